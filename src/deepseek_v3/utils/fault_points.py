"""Named places at which `dsv3 torture` lets a run go wrong; in every other process they do nothing.

A place is one call, `reach("rename")`, where the program could die. A process that is tortured sets a hook. It is
called with the name of every place, in the thread that reaches it, and may end the process, stop it, or raise the
OSError of a full disk. So a fault strikes at an exact instruction, and not after some time:

    with hooked(striker):
        ...
        reach("rename")  # calls striker("rename")
        partial.replace(path)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

Place = Literal["data", "step", "metrics", "save", "rename", "renamed", "remove"]

PLACES: dict[Place, str] = {
    "data": "the tokens of a step are about to be read, in the loader's thread",
    "step": "the weights have changed, and nothing has been reported",
    "metrics": "a record is about to be appended to metrics.jsonl",
    "save": "the tensors of a checkpoint are written, and its checksum or index is not",
    "rename": "a complete file or checkpoint folder is about to get its name",
    "renamed": "it has its name, and the folder that holds it is not fsynced",
    "remove": "an outdated checkpoint is about to be deleted, or half deleted",
}

_hook: Callable[[Place], None] | None = None


def reach(place: Place) -> None:
    """Calls the hook, if there is one: the program has come to `place`."""
    if _hook is not None:
        _hook(place)


@contextmanager
def hooked(hook: Callable[[Place], None]) -> Iterator[None]:
    """Calls `hook` at every place that this process reaches during the `with` block.

    All threads share the hook, because a checkpoint may be written in the background.
    """
    global _hook
    _hook = hook
    try:
        yield
    finally:
        _hook = None
