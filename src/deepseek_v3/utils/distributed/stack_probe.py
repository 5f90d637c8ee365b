"""Samples the stack of another thread: where it is, and how long it has waited in a collective operation."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from types import CodeType, FrameType

import torch
import torch.distributed as dist

_PROJECT = str(Path(__file__).parents[2])
_LIBRARIES = (str(Path(torch.__file__).parent), sysconfig.get_path("stdlib"))
_COLLECTIVES = str(Path(dist.__file__).parent)
_OPERATORS = str(Path(torch.__file__).parent / "_ops.py")  # calls functional collectives


class StackProbe:
    """Samples the stack of one thread. Keeps none of its frames, because they would keep their tensors alive."""

    def __init__(self, thread: int) -> None:
        self._thread = thread
        self._stack: list[tuple[CodeType, int]] = []
        self._since = 0.0

    def sample(self, now: float) -> tuple[str, float]:
        """`file:line` of the innermost frame outside torch and the standard library, and the seconds of waiting.

        The thread counts as waiting while every sample finds it at the same instruction of the same calls, inside
        torch.distributed. `now` is in seconds.
        """
        frames = _frames(sys._current_frames().get(self._thread))
        stack = [(frame.f_code, frame.f_lasti) for frame in frames]
        if stack != self._stack:
            self._stack, self._since = stack, now
        waiting = now - self._since if _in_collective(frames) else 0.0
        return next((_location(frame) for frame in frames if not _in_library(frame)), "nowhere"), waiting


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


def _location(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
