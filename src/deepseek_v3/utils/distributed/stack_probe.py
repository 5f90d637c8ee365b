"""Where another thread of this process is, and for how long it has waited there for other ranks."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from types import CodeType, FrameType

import torch
import torch.distributed as dist

_PROJECT = str(Path(__file__).parents[1])
_LIBRARIES = (str(Path(torch.__file__).parent), sysconfig.get_path("stdlib"))
_COLLECTIVES = str(Path(dist.__file__).parent)
_OPERATORS = str(Path(torch.__file__).parent / "_ops.py")  # through which functional collectives are called


class StackProbe:
    """Looks at a thread now and then; keeps none of its frames, which would keep their tensors."""

    def __init__(self, thread: int) -> None:
        self._thread = thread
        self._stack: list[tuple[CodeType, int]] = []
        self._since = 0.0

    def look(self, now: float) -> tuple[str, float]:
        """`file:line` of the innermost code that is not torch's or Python's own, and the seconds of waiting.

        It waits while every look finds it at the same point of the same calls, inside torch.distributed.
        """
        frames = _frames(sys._current_frames().get(self._thread))
        stack = [(frame.f_code, frame.f_lasti) for frame in frames]
        if stack != self._stack:
            self._stack, self._since = stack, now
        waits = now - self._since if _in_collective(frames) else 0.0
        return next((_place(frame) for frame in frames if not _in_library(frame)), "nowhere"), waits


def _frames(innermost: FrameType | None) -> list[FrameType]:
    frames = []
    while innermost is not None:
        frames.append(innermost)
        innermost = innermost.f_back
    return frames


def _in_collective(frames: list[FrameType]) -> bool:
    files = (frame.f_code.co_filename for frame in frames)
    return next((name for name in files if name != _OPERATORS), "").startswith(_COLLECTIVES)


def _in_library(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    return name.startswith(_LIBRARIES) and not name.startswith(_PROJECT)


def _place(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
