"""The signals that stop a program, and Ctrl-C while a program imports its modules. Imports nothing slow itself."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

EXIT_INTERRUPTED = 130  # the exit code that shells report for Ctrl-C: 128 + SIGINT
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

_SECONDS_TO_EXIT = 3.0
exit_may_hang = threading.Event()  # set by parts whose libraries register exit handlers that may not return


def limit_time_to_exit(code: int) -> None:
    """Ends the process with this exit code if, once the main thread has ended, its exit takes longer than 3 s.

    Does nothing unless `exit_may_hang` is set: libraries that upload in the background register exit handlers that
    wait for a server, even for one that does not answer. Ends child processes as well, because they may keep the
    standard output open, for which a pipeline waits.
    """
    if not exit_may_hang.is_set():
        return

    def end() -> None:
        threading.main_thread().join()
        time.sleep(_SECONDS_TO_EXIT)
        for child in _children():
            with suppress(OSError):
                os.kill(child, signal.SIGKILL)
        os._exit(code)

    threading.Thread(target=end, name="limit of the exit", daemon=True).start()


def _children() -> list[int]:
    """The process ids of the child processes; empty where the system does not list them in /proc."""
    lists = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return [int(number) for children in lists for number in children.read_text().split()]


@contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """While entered, Ctrl-C ends this process at once, with exit code 130 and without a traceback.

    Wrap a program's imports in it: they leave nothing to clean up. It changes nothing if Ctrl-C is ignored or
    has another handler than Python's.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
