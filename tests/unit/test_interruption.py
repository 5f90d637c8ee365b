"""Requests to stop: of one process, and of several ranks, which stop after the same step."""

import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch

from deepseek_v3.training.interruption import StopRequest
from deepseek_v3.utils.distributed import World, process_group
from job_helpers import Job

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


class _ActedAtOnceError(Exception):
    """Raised by the handler that was there before."""


@pytest.fixture
def handled_before() -> Iterator[None]:
    def handle(number: int, frame: object) -> None:
        raise _ActedAtOnceError

    earlier = {number: signal.signal(number, handle) for number in SIGNALS}
    yield
    for number, handler in earlier.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.usefixtures("handled_before")
def test_alone_the_first_signal_asks_and_the_second_acts(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert not stop.requested
        assert not stop.agreed()
        signal.raise_signal(number)
        assert stop.requested
        assert stop.agreed()
        with pytest.raises(_ActedAtOnceError):
            signal.raise_signal(number)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.usefixtures("handled_before")
def test_afterwards_signals_act_as_before(number: signal.Signals) -> None:
    with StopRequest():
        pass
    with pytest.raises(_ActedAtOnceError):
        signal.raise_signal(number)


def _train(world: World, signals: dict[tuple[int, int], signal.Signals], folder: Path) -> None:
    """Steps that signal this rank as `signals`, by rank and step, says; writes down the last one."""
    with process_group(world, torch.device("cpu"), timedelta(seconds=30)), StopRequest(world.size) as stop:
        for step in range(1, 9):
            if (world.rank, step) in signals:
                os.kill(os.getpid(), signals[world.rank, step])
                os.kill(os.getpid(), signals[world.rank, step])  # once more, as launchers do
            if stop.agreed():
                break
        (folder / f"stopped_{world.rank}").write_text(str(step))


@pytest.mark.parametrize(
    ("signals", "last_step", "name"),
    [
        ({(2, 3): signal.SIGUSR1}, 3, "SIGUSR1"),
        ({(0, 5): signal.SIGTERM, (1, 4): signal.SIGINT}, 4, "SIGINT"),
        ({(rank, 1): signal.SIGTERM for rank in range(3)}, 1, "SIGTERM"),
        ({}, 8, None),
    ],
)
def test_all_ranks_stop_after_the_same_step(
    tmp_path: Path, signals: dict[tuple[int, int], signal.Signals], last_step: int, name: str | None
) -> None:
    outcome = Job(tmp_path, 3, partial(_train, signals=signals, folder=tmp_path)).outcome(30)
    assert outcome.codes == [0, 0, 0]
    assert {path.read_text() for path in tmp_path.glob("stopped_*")} == {str(last_step)}
    assert len(list(tmp_path.glob("stopped_*"))) == 3
    assert outcome.lines == ([f"[Trainer] {name}: all ranks stop after this step and save"] if name else [])
