"""A server that imports torch and the trainer once and forks processes for the tests from itself.

The server shares no threads and locks with the tests. A process has only one such server, and its first user sets
what it imports; the tests set it before any command of the package does.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver

CONTEXT = multiprocessing.get_context("forkserver")
_IMPORTED = [
    "deepseek_v3.training.trainer",
    "deepseek_v3.training.loss_curve",
    "deepseek_v3.training.parallel.pipeline_parallel",
    "deepseek_v3.data.pipeline.tasks",
    "deepseek_v3.data.tokens.encoding",
    "deepseek_v3.data.deduplication.kernels.numba_kernels",
    "pandas",  # pyarrow imports it
    "torch._inductor.compile_fx",  # DeepSpeed imports it
]


def start() -> None:
    """Starts the server, which imports while the first tests run."""
    CONTEXT.set_forkserver_preload(_IMPORTED)
    forkserver.ensure_running()
