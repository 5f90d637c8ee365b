"""The data pipeline as a whole: reads, judges, compares and writes, going on wherever it was interrupted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_v3.config.preprocess_config import PreprocessConfig
from deepseek_v3.data.formats.batches import ReadOptions
from deepseek_v3.data.formats.inputs import Inputs, find_inputs
from deepseek_v3.data.pipeline import resources, resume
from deepseek_v3.data.pipeline.executors import Executor, InProcessExecutor, ProcessExecutor, RayExecutor
from deepseek_v3.data.pipeline.global_stages import StageDecisions, run_global_stages
from deepseek_v3.data.pipeline.outputs import write_outputs
from deepseek_v3.data.pipeline.passes import Pass, build_passes
from deepseek_v3.data.pipeline.previous_runs import STAGES_WITH_KEYS, keep_keys, key_options, previous_parts
from deepseek_v3.data.pipeline.progress import Progress
from deepseek_v3.data.pipeline.registry import preload
from deepseek_v3.data.pipeline.run_folder import RECORDS_FILE, SHARD_PREFIX, Part, RunFolder, read_part
from deepseek_v3.data.pipeline.tasks import WorkUnit, apply_stages, finished_parts, read_work_unit, write_shard
from deepseek_v3.data.stages import GlobalStage
from deepseek_v3.data.tokens.tokenizer import TokenCounter
from deepseek_v3.utils.errors import ConfigError, DataError
from deepseek_v3.utils.logging import get_logger

_log = get_logger("Preprocess")


def run_pipeline(
    config: PreprocessConfig, *, shard: tuple[int, int] | None = None, merge: bool = False
) -> dict[str, Any]:
    """Runs the pipeline and returns the manifest, the content of `manifest.json`.

    Goes on where an earlier, interrupted run with the same configuration and input stopped; a run that is complete
    is left as it is. `shard=(i, n)` only reads the i-th of n shares of the input (i from 0), for machines with one
    file system, and returns {}; `merge` then does the rest, and refuses to where shares are missing.

    Raises ConfigError or DataError for what cannot be meant or done. Records that cannot be read are set aside in
    `quarantine/` and raise nothing.
    """
    if shard is not None and (merge or not 0 <= shard[0] < shard[1]):
        raise ConfigError(f"shard = {shard[0]}/{shard[1]}: expected i/n with i from 0 to n - 1, and not with merge")
    inputs = find_inputs(config.input_path)
    run_folder = RunFolder(config.output_dir)
    described = resume.describe_run(config, inputs.files)
    if run_folder.manifest.exists():
        return _existing(run_folder, described)
    passes = build_passes(config)
    workers = resources.count_workers(config)
    with resume.run_lock(run_folder, shared=shard is not None):
        resumed = resume.start_or_resume(run_folder, described)
        _announce(config, inputs, workers, resumed)
        if resumed and shard is None:
            _discard_damaged(run_folder, len(passes))
        with _build_executor(config, workers) as executor, Progress() as progress:
            run = _Run(config, run_folder, passes, executor, progress, resources.memory_limit(config) // workers)
            units = resources.split_into_work_units(inputs.files, config.work_unit_size)
            if shard is not None:
                run.read(units[shard[0] :: shard[1]])
                return {}
            if not merge:
                run.read(units)
            return run.finish(units, inputs)


@dataclass(frozen=True)
class _Run:
    """A run under way. `memory` is what one task may take, in bytes."""

    config: PreprocessConfig
    run_folder: RunFolder
    passes: tuple[Pass, ...]
    executor: Executor
    progress: Progress
    memory: int

    def read(self, units: Sequence[WorkUnit]) -> None:
        """The first pass, for some units or all."""
        folder = self.run_folder.parts(0)
        folder.mkdir(parents=True, exist_ok=True)
        if resume.completed_parts(folder) is not None:
            return
        options = ReadOptions(self.config.text_field, self.config.id_field, self.config.max_record_size)
        arguments = [
            (unit, options, self.passes[0], self._following(0), folder, self.config.work_unit_size)
            for unit in units
        ]
        title = ", ".join(["reading", *(stage.name for stage in self.passes[0].stages)])
        sizes = {unit.number: unit.size for unit in units}
        with self.progress.step(title, sum(sizes.values()), "bytes") as step:
            self.executor.run(read_work_unit, arguments, lambda number: step.advance(sizes[number]))

    def finish(self, units: Sequence[WorkUnit], inputs: Inputs) -> dict[str, Any]:
        """Everything after the first pass."""
        finished = self._read_parts(units)
        last = len(self.passes) - 1
        for number in range(1, last + 1):
            target = self.run_folder.shards if number == last else self.run_folder.parts(number)
            complete = resume.completed_parts(target)
            if complete is None:
                complete = self._carry_out(number, finished, target)
                resume.mark_complete(target, complete)
            self._release(number - 1, finished)
            finished = complete
        return write_outputs(self.config, self.run_folder, self.passes, finished, inputs)

    def _read_parts(self, units: Sequence[WorkUnit]) -> list[Part]:
        """All parts of the first pass. Raises DataError where a unit was not read to its end."""
        folder = self.run_folder.parts(0)
        parts = resume.completed_parts(folder)
        if parts is None:
            by_unit = [finished_parts(unit.number, folder) for unit in units]
            missing = sum(not parts or parts[-1].resume is not None for parts in by_unit)
            if missing:
                raise DataError(
                    f"{self.run_folder.output}: {missing} of {len(units)} pieces of the input are not read yet; "
                    "run the missing --shard i/n first, or run without --merge to read them here"
                )
            parts = [part for parts in by_unit for part in parts]
            resume.mark_complete(folder, parts)
        return parts

    def _carry_out(self, number: int, finished: Sequence[Part], target: Path) -> list[Part]:
        """Decides what pass `number` has to decide about the parts before it, and carries it out."""
        this = self.passes[number]
        decisions = self._decide(number, finished)
        names = [*(stage.name for stage in this.global_stages[1:]), *(stage.name for stage in this.stages)]
        if target == self.run_folder.shards:
            tokens = TokenCounter(self.config.tokenizer, self.config.bytes_per_token)
            shards = [
                (target / f"{index:05d}", numbers, decisions, this, self._shard_name(index), tokens)
                for index, numbers in enumerate(_shards(finished, self.config.shard_size))
            ]
            return self._run_missing([*names, "writing"], "files", write_shard, shards)
        pieces = [
            (target / part.name, index, decisions, this, self._following(number))
            for index, part in enumerate(finished)
        ]
        return self._run_missing(names, "pieces", apply_stages, pieces)

    def _decide(self, number: int, finished: Sequence[Part]) -> tuple[StageDecisions, ...]:
        stages = self.passes[number].global_stages
        earlier = [
            previous_parts(stage.name, key_options(self.config, stage.name), self.config.previous_runs)
            for stage in stages
        ]
        folders = [self.run_folder.decisions(number, stage.name) for stage in stages]
        return run_global_stages(stages, finished, earlier, folders, self.executor, self.memory, self.progress)

    def _following(self, number: int) -> tuple[GlobalStage, ...]:
        """The stages whose keys pass `number` writes."""
        return self.passes[number + 1].global_stages if number + 1 < len(self.passes) else ()

    def _shard_name(self, index: int) -> str:
        return f"{SHARD_PREFIX}{index:05d}.{self.config.output_format}"

    def _run_missing(
        self, names: Sequence[str], unit: str, function: Callable[..., None], arguments: Sequence[tuple[Any, ...]]
    ) -> list[Part]:
        """Runs the tasks whose target, their first argument, is not finished; returns what all of them wrote."""
        missing = [each for each in arguments if read_part(each[0]) is None]
        with self.progress.step(", ".join(names), len(missing), unit) as step:
            self.executor.run(function, missing, lambda _: step.advance(1))
        return [part for each in arguments if (part := read_part(each[0]))]

    def _release(self, number: int, finished: Sequence[Part]) -> None:
        """Frees the disk of what only the next pass needed; keeps the keys where a later run shall see them."""
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
    preload(config)
    return ProcessExecutor(workers)


def _shards(finished: Sequence[Part], shard_bytes: int) -> list[list[int]]:
    """The numbers of neighbouring parts that go into one output file, by the bytes of text in them."""
    groups: list[list[int]] = []
    filled = 0
    for number, part in enumerate(finished):
        if not groups or filled + part.text_bytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(number)
        filled += part.text_bytes
    return groups


def _existing(run_folder: RunFolder, described: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a run that is complete."""
    manifest = resume.read_run_json(run_folder.manifest)
    resume.check_same_run(manifest, described, run_folder.manifest, f"remove {run_folder.output} to start anew")
    shutil.rmtree(run_folder.work, ignore_errors=True)  # left where a run was killed after its last file
    _log.info("%s: is complete already; nothing to do", run_folder.output)
    return manifest


def _announce(config: PreprocessConfig, inputs: Inputs, workers: int, resumed: bool) -> None:
    """Says what is to come, and refuses what the disk cannot hold."""
    for name, reason in inputs.ignored:
        _log.warning("%s: not read: %s", name, reason)
    need = resources.estimate_disk(inputs.files, config)
    size = sum(file.size for file in inputs.files)
    _log.info(
        "%s: %s files, %.1f MB, about %.1f MB of text; %s with up to %.1f GB of memory and %.2f GB of disk%s",
        *(config.output_dir, f"{len(inputs.files):,}", size / 1e6, need.text / 1e6),
        *(f"{workers} workers" if workers > 1 else "1 worker", workers * resources.worker_memory(config) / 1e9),
        *(need.disk / 1e9, "; going on with unfinished work" if resumed else ""),
    )
    if not resumed:
        resources.check_disk(need, config.output_dir)


def _discard_damaged(run_folder: RunFolder, passes: int) -> None:
    """Removes what an interruption left half-written, and finished work that is not as it was written."""
    for folder in [*(run_folder.parts(number) for number in range(passes - 1)), run_folder.shards]:
        if resume.completed_parts(folder) is None:
            damaged = resume.discard_damaged(folder)
            if damaged:
                _log.warning("%s: %d finished pieces were damaged and are done again", folder, damaged)
