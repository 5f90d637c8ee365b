"""Runs batches through the stages of a pass and gathers what comes out, what is dropped, and the counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from deepseek_v3.data.formats.quarantine import QUARANTINED
from deepseek_v3.data.pipeline.parts import DROPPED_FILE, QUARANTINED_FILE, TALLY_FILE, write_table
from deepseek_v3.data.pipeline.tally import Tally
from deepseek_v3.data.stages import DROPPED, Outcome, Stage


class Collector:
    """What the documents of one part became."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = stages
        self._dropped: list[pa.RecordBatch] = []
        self._quarantined: list[pa.RecordBatch] = []
        self.tally = Tally()
        self.copies = 0  # of documents that go on more than once

    def judge(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The batch after all stages of the pass."""
        for stage in self._stages:
            result = stage.apply(batch)
            self.account(stage.name, batch, result)
            batch = result.kept
        return batch

    def account(self, stage: str, before: pa.RecordBatch, result: Outcome) -> None:
        """Counts what a stage did to a batch, and keeps what it dropped."""
        missing = before.num_rows - int(result.kept_rows.sum()) - result.dropped.num_rows
        if missing:
            raise AssertionError(f"stage {stage} lost {missing} documents of a batch without a reason")
        self.copies += result.kept.num_rows - int(result.kept_rows.sum())
        self.tally.stage(stage, before, result)
        if result.dropped.num_rows:
            self._dropped.append(result.dropped)

    def quarantine(self, quarantined: pa.RecordBatch) -> None:
        """Keeps records that were set aside; they are counted by whoever found them."""
        if quarantined.num_rows:
            self._quarantined.append(quarantined)

    def write(self, folder: Path) -> None:
        """Writes what was dropped and set aside, and the counts."""
        write_table(pa.Table.from_batches(self._dropped, DROPPED), folder / DROPPED_FILE)
        write_table(pa.Table.from_batches(self._quarantined, QUARANTINED), folder / QUARANTINED_FILE)
        (folder / TALLY_FILE).write_bytes(self.tally.to_json())
