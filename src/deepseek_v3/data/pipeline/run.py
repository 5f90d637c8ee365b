"""Runs the data pipeline: reads the input, applies the stages in passes and writes the clean corpus.

The first pass reads the input in work units. Each later pass starts with global stages, which decide about all
documents that the pass before it left; the last pass writes the output files. An interrupted run continues from the
parts that it finished.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_v3.config.preprocess_config import PreprocessConfig
from deepseek_v3.data.formats.batches import ReadOptions
from deepseek_v3.data.formats.inputs import Inputs, find_inputs
from deepseek_v3.data.formats.side_files import evaluation_splits
from deepseek_v3.data.pipeline import resources, resume
from deepseek_v3.data.pipeline.executors import (
    RESUME_ADVICE,
    Executor,
    InProcessExecutor,
    ProcessExecutor,
    RayExecutor,
    preload_workers,
)
from deepseek_v3.data.pipeline.global_stages import StageDecisions, run_global_stages
from deepseek_v3.data.pipeline.outputs import RESULT_FILES, write_outputs
from deepseek_v3.data.pipeline.passes import Pass, build_passes
from deepseek_v3.data.pipeline.preview import preview_input
from deepseek_v3.data.pipeline.previous_runs import STAGES_WITH_KEYS, keep_keys, key_options, previous_parts
from deepseek_v3.data.pipeline.run_folder import RECORDS_FILE, SHARD_PREFIX, Part, RunFolder, read_part
from deepseek_v3.data.pipeline.tasks import WorkUnit, apply_stages, finished_parts, read_work_unit, write_shard
from deepseek_v3.data.stages import GlobalStage
from deepseek_v3.data.tokens.token_counter import TokenCounter
from deepseek_v3.utils.errors import ConfigError, DataError, translate_resource_errors
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.progress import ProgressDisplay

_log = get_logger("Preprocess")


def run_pipeline(
    config: PreprocessConfig, *, shard: tuple[int, int] | None = None, merge: bool = False
) -> dict[str, Any]:
    """Runs the pipeline and returns the manifest, which is the content of `manifest.json`.

    Resumes an interrupted run that has the same configuration and input, and leaves a complete run as it is.

    `shard=(i, n)` reads only the i-th of n shares of the input (i from 0) and returns {}. Jobs on machines that
    share a file system may read the shares at the same time; `merge` then does the rest of the work.

    Records that cannot be read go to `quarantine/` and raise no error. Raises ConfigError for options that
    contradict each other or the machine, and DataError for input or output that cannot be used, an output folder
    that holds another run, or shares that are missing when `merge` is set.
    """
    if shard is not None and (merge or not 0 <= shard[0] < shard[1]):
        raise ConfigError(f"shard = {shard[0]}/{shard[1]}: expected i/n with i from 0 to n - 1, and not with merge")
    inputs = find_inputs(config.input_path, config.output_dir)
    run_folder = RunFolder(config.output_dir)
    described = resume.describe_run(config, inputs.files)
    if run_folder.manifest.exists():
        return _read_complete_run(run_folder, described)
    passes = build_passes(config)
    for stage in config.pipeline:
        previous_parts(stage, key_options(config, stage), config.previous_runs)
    workers = resources.count_workers(config)
    with (
        translate_resource_errors(config.output_dir, RESUME_ADVICE),
        resume.run_lock(run_folder, shared=shard is not None),
    ):
        resumed = resume.is_resumed(run_folder, described)
        _announce(config, inputs, workers, resumed)
        options = ReadOptions(config.text_field, config.id_field, config.max_record_size)
        if not merge:
            preview_input(inputs.files, options)
        units = resources.split_into_work_units(inputs.files, config.work_unit_size)
        if resumed and shard is None:
            _discard_damaged(run_folder, len(passes))
        with _build_executor(config, workers) as executor, ProgressDisplay() as progress:
            memory = resources.memory_limit(config) // workers
            run = _Run(config, run_folder, passes, options, executor, progress, memory)
            if not resumed:
                resume.start(run_folder, described)
            if shard is not None:
                run.read(units[shard[0] :: shard[1]])
                return {}
            if not merge:
                run.read(units)
            return run.finish(units, inputs)


@dataclass(frozen=True)
class _Run:
    """A run in progress. One task may use `memory` bytes."""

    config: PreprocessConfig
    run_folder: RunFolder
    passes: tuple[Pass, ...]
    options: ReadOptions
    executor: Executor
    progress: ProgressDisplay
    memory: int

    def read(self, units: Sequence[WorkUnit]) -> None:
        """Runs the first pass on the given work units, which may be a share of all."""
        folder = self.run_folder.parts(0)
        folder.mkdir(parents=True, exist_ok=True)
        if resume.completed_parts(folder) is not None:
            return
        arguments = [
            (unit, self.options, self.passes[0], self._following(0), folder, self.config.work_unit_size)
            for unit in units
        ]
        title = ", ".join(["reading", *(stage.name for stage in self.passes[0].stages)])
        sizes = {unit.number: unit.size for unit in units}
        with self.progress.task(title, sum(sizes.values()), "bytes", _log) as task:
            self.executor.run(read_work_unit, arguments, lambda number: task.advance(sizes[number]))

    def finish(self, units: Sequence[WorkUnit], inputs: Inputs) -> dict[str, Any]:
        """Runs all passes but the first, and writes the outputs."""
        finished = self._read_parts(units)
        last = len(self.passes) - 1
        for number in range(1, last + 1):
            target = self.run_folder.shards if number == last else self.run_folder.parts(number)
            complete = resume.completed_parts(target)
            if complete is None:
                complete = self._run_pass(number, finished, target)
                resume.mark_complete(target, complete)
            self._release(number - 1, finished)
            finished = complete
        return write_outputs(self.config, self.run_folder, self.passes, finished, inputs)

    def _read_parts(self, units: Sequence[WorkUnit]) -> list[Part]:
        """All parts of the first pass. Raises DataError if a work unit is not completely read."""
        folder = self.run_folder.parts(0)
        parts = resume.completed_parts(folder)
        if parts is None:
            by_unit = [finished_parts(unit.number, folder) for unit in units]
            missing = sum(not parts or parts[-1].resume is not None for parts in by_unit)
            if missing:
                raise DataError(
                    f"{self.run_folder.output}: {missing} of {len(units)} work units are not read yet; "
                    "run the missing --shard i/n first, or run without --merge to read them here"
                )
            parts = [part for parts in by_unit for part in parts]
            resume.mark_complete(folder, parts)
        return parts

    def _run_pass(self, number: int, finished: Sequence[Part], target: Path) -> list[Part]:
        """Runs pass `number` on the `finished` parts of the pass before it, and returns the parts that it wrote."""
        this = self.passes[number]
        decisions = self._run_global_stages(number, finished)
        names = [*(stage.name for stage in this.global_stages[1:]), *(stage.name for stage in this.stages)]
        if target == self.run_folder.shards:
            tokens = TokenCounter(self.config.tokenizer, self.config.bytes_per_token)
            shards = [
                (target / f"{index:05d}", numbers, decisions, this, self._shard_name(index), tokens)
                for index, numbers in enumerate(_group_into_shards(finished, self.config.shard_size))
            ]
            return self._run_missing([*names, "writing"], "files", write_shard, shards)
        parts = [
            (target / part.name, index, decisions, this, self._following(number))
            for index, part in enumerate(finished)
        ]
        return self._run_missing(names, "parts", apply_stages, parts)

    def _run_global_stages(self, number: int, finished: Sequence[Part]) -> tuple[StageDecisions, ...]:
        stages = self.passes[number].global_stages
        previous = [
            previous_parts(stage.name, key_options(self.config, stage.name), self.config.previous_runs)
            for stage in stages
        ]
        folders = [self.run_folder.decisions(number, stage.name) for stage in stages]
        return run_global_stages(stages, finished, previous, folders, self.executor, self.memory, self.progress)

    def _following(self, number: int) -> tuple[GlobalStage, ...]:
        """The global stages of the next pass, whose keys pass `number` writes."""
        return self.passes[number + 1].global_stages if number + 1 < len(self.passes) else ()

    def _shard_name(self, index: int) -> str:
        return f"{SHARD_PREFIX}{index:05d}.{self.config.output_format}"

    def _run_missing(
        self, names: Sequence[str], unit: str, function: Callable[..., None], arguments: Sequence[tuple[Any, ...]]
    ) -> list[Part]:
        """Runs the tasks whose target folder, their first argument, is not finished; returns the parts of all."""
        missing = [each for each in arguments if read_part(each[0]) is None]
        with self.progress.task(", ".join(names), len(missing), unit, _log) as task:
            self.executor.run(function, missing, lambda _: task.advance(1))
        return [part for each in arguments if (part := read_part(each[0]))]

    def _release(self, number: int, finished: Sequence[Part]) -> None:
        """Deletes the keys and documents that only the next pass needed; first moves the keys to be kept."""
        for stage in self._following(number):
            if self.config.keep_keys and stage.name in STAGES_WITH_KEYS:
                keep_keys(stage.name, key_options(self.config, stage.name), finished, self.run_folder.output)
        for part in finished:
            shutil.rmtree(part.folder / "keys", ignore_errors=True)
            (part.folder / RECORDS_FILE).unlink(missing_ok=True)


def _build_executor(config: PreprocessConfig, workers: int) -> Executor:
    if config.engine == "ray":
        return RayExecutor(workers, config.ray_address)
    if workers == 1:
        return InProcessExecutor()
    preload_workers(config)
    return ProcessExecutor(workers)


def _group_into_shards(finished: Sequence[Part], shard_bytes: int) -> list[list[int]]:
    """Groups neighbouring parts into output files of at most `shard_bytes` of text, or one part if it is larger."""
    groups: list[list[int]] = []
    filled = 0
    for number, part in enumerate(finished):
        if not groups or filled + part.text_bytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(number)
        filled += part.text_bytes
    return groups


def _read_complete_run(run_folder: RunFolder, described: dict[str, Any]) -> dict[str, Any]:
    """Returns the manifest of a complete run, after checking that its configuration and input are the same."""
    manifest = resume.read_run_json(run_folder.manifest)
    resume.check_same_run(manifest, described, run_folder.manifest, f"remove {run_folder.output} to start again")
    for entry in [*manifest["outputs"], *manifest["other_outputs"]]:
        path = run_folder.output / entry["file"]
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise DataError(
                f"{path}: was changed or removed since the run was complete; restore it, or remove "
                f"{run_folder.output} to start again"
            )
    shutil.rmtree(run_folder.work, ignore_errors=True)  # a run that was killed after its last file left it
    _log.info("%s: the run is already complete", run_folder.output)
    return manifest


def _announce(config: PreprocessConfig, inputs: Inputs, workers: int, resumed: bool) -> None:
    """Logs the size of the run and what it will use. Raises DataError if the disk is too small for it."""
    for name, reason in inputs.ignored:
        _log.warning("%s: not read: %s", name, reason)
    if splits := evaluation_splits([file.name for file in inputs.files]):
        _log.warning(
            "%s: are splits for evaluation, and are read like all others; to train on one split alone, name it in "
            "input_path, such as folder/train or folder/data/train-*",
            ", ".join(splits),
        )
    need = resources.estimate_disk(inputs.files, config)
    size = sum(file.size for file in inputs.files)
    _log.info(
        "%s: %s files, %.1f MB, about %.1f MB of text; %s with up to %.1f GB of memory and %.2f GB of disk%s",
        *(config.output_dir, f"{len(inputs.files):,}", size / 1e6, need.text / 1e6),
        *(f"{workers} workers" if workers > 1 else "1 worker", workers * resources.worker_memory(config) / 1e9),
        *(need.disk / 1e9, "; resuming unfinished work" if resumed else ""),
    )
    if not resumed:
        resources.check_disk(need, config.output_dir)


def _discard_damaged(run_folder: RunFolder, passes: int) -> None:
    """Removes half-written files and folders, and parts whose files changed since they were written."""
    resume.remove_partial_outputs(run_folder, RESULT_FILES)
    folders = [*(run_folder.parts(number) for number in range(passes - 1)), run_folder.shards]
    complete = [(folder / "complete.json").exists() for folder in folders]
    for number, folder in enumerate(folders):
        if not complete[number]:
            damaged = resume.discard_damaged(folder)
        elif folder == run_folder.shards:
            continue  # verified when they are moved to their place
        else:
            damaged = resume.reopen_damaged(folder, is_first=number == 0, is_released=complete[number + 1])
        if damaged:
            _log.warning("%s: %d finished parts are damaged and are done again", folder, damaged)
