"""Saves and loads sharded checkpoints on all ranks of a job; saving runs in the background.

    with ShardedWriter(checkpoints, checkpoint_group()) as writer:
        ...
        writer.save(step, state)  # blocks for a copy to CPU memory; a thread does the rest

    load_sharded(path, tensors, group)  # a folder or a file, into tensors of any sharding

`torch.distributed.checkpoint` plans which rank writes or reads which part, so that nothing is written twice, runs
the thread, and raises the error of any rank on all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from deepseek_v3.utils.checkpointing.checks import (
    SAME_CONFIG_ADVICE,
    mismatches,
    raise_problems,
    tensor_infos,
    unexpected_tensors,
)
from deepseek_v3.utils.checkpointing.directory import CheckpointDirectory
from deepseek_v3.utils.checkpointing.reader import CheckpointReader, DcpReader, open_checkpoint
from deepseek_v3.utils.checkpointing.safetensors_file import DTYPE_NAMES
from deepseek_v3.utils.checkpointing.state_dict import flatten
from deepseek_v3.utils.checkpointing.writer import CpuStager, DcpWriter, StagedSavePlanner
from deepseek_v3.utils.distributed.collectives import (
    any_rank,
    gather_objects,
    raise_first_rank_error,
    rank_and_size,
    run_on_all_ranks,
)
from deepseek_v3.utils.errors import CheckpointError
from deepseek_v3.utils.logging import get_logger

_log = get_logger("Checkpoint")


class PendingSave:
    """A checkpoint that is being written to `path`. The interpreter waits for it before it exits."""

    def __init__(self, path: Path, future: Future[Any]) -> None:
        self.path, self._future = path, future

    def finished(self) -> bool:
        """Whether this rank has nothing left to do: the save is complete or has failed."""
        return self._future.done()

    def finish(self) -> None:
        """Waits until the save is complete or has failed; raises nothing."""
        wait([self._future])

    def wait(self) -> Path:
        """Waits until the checkpoint is complete. Raises the CheckpointError of any rank on all ranks."""
        with raise_first_rank_error():
            self._future.result()
        return self.path


def save_sharded(
    folder: Path,
    tensors: dict[str, Tensor],
    plain: dict[str, Any],
    group: ProcessGroup | None,
    *,
    completed: Callable[[], None] = lambda: None,
    stager: CpuStager | None = None,
) -> PendingSave:
    """Starts to write `folder`, which appears complete or not at all and replaces a previous one.

    `tensors` are given by name. The ranks that hold a DTensor's shards write those; one of the ranks that have a
    plain tensor writes it, once. All are copied before this returns and may change afterwards. `plain` holds JSON
    values; those of rank 0 are written. Rank 0 calls `completed` once the folder is complete. All ranks of `group`,
    a gloo group or None for a single process, call this. A save must end before the next one starts, which may
    reuse its `stager`. Raises TypeError for a dtype that cannot be saved.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise TypeError(
                f"{name} is of {tensor.dtype}; a sharded checkpoint holds {', '.join(map(str, DTYPE_NAMES))}"
            )
    stager = stager or CpuStager()
    future = async_save(
        {name: tensor.detach() for name, tensor in tensors.items()},
        storage_writer=DcpWriter(folder, plain, completed),
        planner=StagedSavePlanner(stager),
        async_stager=stager,
        process_group=group,
        no_dist=group is None,
    )
    assert isinstance(future, Future)
    return PendingSave(folder, future)


class ShardedWriter:
    """Saves the checkpoints of a run one after another. Leaving its `with` block waits for the last one.

    Rank 0 calls `saved`, in the thread that writes, with the path of each complete checkpoint. Leave the block
    before torch.distributed is shut down.
    """

    def __init__(
        self,
        checkpoints: CheckpointDirectory,
        group: ProcessGroup | None,
        saved: Callable[[Path], None] = lambda _: None,
    ) -> None:
        self._checkpoints, self._group, self._saved = checkpoints, group, saved
        self._stager = CpuStager()
        self._pending: PendingSave | None = None

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except CheckpointError as failure:
            if error is None:
                raise
            _log.warning("%s", failure)  # the error that ended the block is the one to raise

    def save(self, step: int, state: dict[str, Any]) -> PendingSave:
        """Starts to save nested dicts with tensors and DTensors; called on all ranks.

        First waits for the previous save, and raises its CheckpointError. Outdated checkpoints are removed when
        this one is complete. Raises TypeError, naming the entry, for what a sharded checkpoint cannot hold.
        """
        self.wait()
        tensors, plain = flatten(state)
        folder = self._checkpoints.folder_of(step)
        completed = partial(self._completed, folder)
        self._pending = save_sharded(folder, tensors, plain, self._group, completed=completed, stager=self._stager)
        return self._pending

    def finish(self) -> None:
        """Waits until the current save is complete or has failed; may be called from any thread."""
        pending = self._pending
        if pending is not None:
            pending.finish()

    def wait(self) -> None:
        """Waits until the last save is complete. Raises its CheckpointError on all ranks."""
        try:
            if self._pending is not None:
                self._pending.wait()
        finally:
            self._pending = None

    def _completed(self, folder: Path) -> None:
        self._saved(folder)
        self._checkpoints.remove_outdated(folder)


def load_sharded(
    path: Path, tensors: dict[str, Tensor], group: ProcessGroup | None, *, verify: bool = True, ignored: str = ""
) -> None:
    """Fills `tensors`, plain ones and DTensors, in place from the tensors of the same dotted names in a checkpoint.

    All ranks of `group`, a gloo group or None, call this, each with the tensors that it holds shards of. The
    ranks divide the files among them to verify the checksums; `verify=False` skips that. Raises one
    CheckpointError, on all ranks and before any tensor is changed, for damage, for names that only one side has,
    and for other shapes or dtypes; names of the checkpoint that begin with `ignored` may be unwanted. Raises
    TypeError for a tensor on the meta device.
    """
    checkpoint = run_on_all_ranks(group, lambda: open_checkpoint(path))
    if verify:
        _verify(checkpoint, group)
    _check_tensors(checkpoint, tensors, group, ignored)
    with raise_first_rank_error():
        load(
            dict(tensors),
            storage_reader=DcpReader(checkpoint),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
            no_dist=group is None,
        )


def newest_checkpoint(checkpoints: CheckpointDirectory, group: ProcessGroup | None) -> Path:
    """The newest undamaged checkpoint, the same on all ranks, which divide the files to verify among them.

    Rank 0 logs each damaged checkpoint that it skips. Raises CheckpointError if there is none.
    """
    paths = gather_objects(group, run_on_all_ranks(group, checkpoints.newest_first))[0]
    is_rank_0 = rank_and_size(group)[0] == 0
    return checkpoints.first_usable(paths, partial(verify_checkpoint, group=group), log=is_rank_0)[0]


def verify_checkpoint(path: Path, group: ProcessGroup | None) -> None:
    """Raises CheckpointError, on all ranks, if a checkpoint is missing or damaged; the ranks divide the work."""
    _verify(run_on_all_ranks(group, lambda: open_checkpoint(path)), group)


def _verify(checkpoint: CheckpointReader, group: ProcessGroup | None) -> None:
    run_on_all_ranks(group, lambda: checkpoint.verify(*rank_and_size(group)))


def _check_tensors(
    checkpoint: CheckpointReader, tensors: dict[str, Tensor], group: ProcessGroup | None, ignored: str
) -> None:
    """Raises one CheckpointError with the problems of all ranks, on all of them."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise TypeError(f"{name} is on the meta device and has no memory to load into")
    wanted = any_rank(group, [name in tensors for name in checkpoint.tensors])
    left = [name for name, is_wanted in zip(checkpoint.tensors, wanted, strict=True) if not is_wanted]
    unwanted = [name for name in left if not (ignored and name.startswith(ignored))]
    of_ranks = gather_objects(group, mismatches(checkpoint.tensors, tensor_infos(tensors)))
    problems = [problem for of_rank in of_ranks for problem in of_rank]
    raise_problems(checkpoint.path, [*problems, *unexpected_tensors(unwanted)], SAME_CONFIG_ADVICE)
