"""The signals that stop a program, and Ctrl-C while a program imports its modules. Imports nothing slow itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_INTERRUPTED = 130  # the exit code that shells report for Ctrl-C: 128 + SIGINT
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


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
