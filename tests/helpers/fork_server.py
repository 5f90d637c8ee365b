"""Where tests get processes that have imported already what takes seconds: forked from one that did it once.

That one holds no threads and locks of the tests. A process has one such server, and whoever starts it says what it
imports: the tests do, before the commands that they try.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver

CONTEXT = multiprocessing.get_context("forkserver")
_IMPORTED = [
    "deepseek_v3.training.trainer",
    "deepseek_v3.data.pipeline.tasks",
    "deepseek_v3.data.tokens.encoding",
]


def start() -> None:
    """Starts the server, which imports while the first tests run."""
    CONTEXT.set_forkserver_preload(_IMPORTED)
    forkserver.ensure_running()
