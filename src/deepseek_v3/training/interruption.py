"""Stopping in good order: a signal asks, the loop answers after the step in hand."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from deepseek_v3.utils.logging import get_logger

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, turns the first Ctrl-C or SIGTERM into `requested`; a second one acts at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopRequest:
        self._earlier = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        name = signal.Signals(number).name
        get_logger("Trainer").info(f"{name}: finishing this step and saving; once more to stop at once")

    def _restore(self) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
