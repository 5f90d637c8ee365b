"""Worker processes that never outlive whoever started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker


def start_fork_server(modules: Sequence[str] = ()) -> None:
    """Starts the process that workers are forked from, which imports `modules`; nothing where it runs already.

    It and all that it forks never hear Ctrl-C, not even while they import: that is for the process that started
    them. A Ctrl-C that comes meanwhile reaches this process afterwards.
    """
    if modules:
        multiprocessing.get_context("forkserver").set_forkserver_preload(list(modules))
    resource_tracker.ensure_running()  # or the server starts it, and with it unblocks the signal
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which is inherited
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def exit_with_parent() -> None:
    """Lets this worker end with the process that started it, however that ends, and leaves Ctrl-C to that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
