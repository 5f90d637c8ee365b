"""The later passes: carry out what was decided about a part's documents, apply stages, and write what is left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepseek_v3.data.formats.batches import BATCH_BYTES
from deepseek_v3.data.formats.writing import RecordWriter
from deepseek_v3.data.pipeline.barrier import Decision
from deepseek_v3.data.pipeline.collector import Collector
from deepseek_v3.data.pipeline.parts import (
    appearing_folder,
    finish_part,
    read_table,
    single_batch,
)
from deepseek_v3.data.pipeline.program import Pass
from deepseek_v3.data.pipeline.reading import text_bytes, write_records
from deepseek_v3.data.pipeline.unique_ids import UniqueIds, set_aside
from deepseek_v3.data.stages import CorpusStage
from deepseek_v3.data.token_counts import TokenCounter


def judge_part(
    target: Path, number: int, decisions: Sequence[Decision], this: Pass, following: Sequence[CorpusStage]
) -> None:
    """Carries out the decisions for the part of that number and applies the stages of a pass, not the last one.

    What is left, its keys for the `following` stages, and what was dropped appear in the folder `target`.
    """
    collector = Collector(this.stages)
    kept = pa.Table.from_batches(_judged(number, decisions, this, collector))
    write_records(kept, collector, following, target)


def write_shard(
    target: Path,
    numbers: Sequence[int],
    decisions: Sequence[Decision],
    this: Pass,
    file_name: str,
    tokens: TokenCounter,
) -> None:
    """As `judge_part`, in the last pass, for several parts whose documents become one output file."""
    collector = Collector(this.stages)
    rows = num_bytes = 0
    with appearing_folder(target) as partial:
        with RecordWriter(partial / file_name) as writer:
            for number in numbers:
                for batch in _judged(number, decisions, this, collector):
                    collector.tally.kept(batch, tokens.total(batch.column("text")))
                    writer.write(batch)
                    rows += batch.num_rows
                    num_bytes += text_bytes(batch)
        collector.tally.copies(collector.copies)
        collector.write(partial)
        finish_part(target, partial, rows, num_bytes, None)


def _judged(
    number: int, decisions: Sequence[Decision], this: Pass, collector: Collector
) -> Iterator[pa.RecordBatch]:
    """The documents of a part that are left after the decisions and the stages of a pass; one batch or several."""
    records = decisions[0].own(number).records
    assert records is not None
    batch = single_batch(read_table(records))
    rows = np.arange(batch.num_rows)
    for stage, decision in zip(this.corpus, decisions, strict=True):
        documents = decision.own(number).first + rows
        result = stage.apply(batch, documents, decision.folder, decision.ids_of)
        if isinstance(stage, UniqueIds):
            repeated = set_aside(batch, result)
            collector.tally.quarantine(repeated)
            collector.quarantine(repeated)
        else:
            collector.account(stage.name, batch, result)
        batch, rows = result.kept, rows[result.kept_rows]
    for piece in _pieces(batch):
        yield collector.judge(piece)


def _pieces(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """A batch in slices as small as those that reading gives; an empty batch as it is."""
    ends = np.cumsum(pc.binary_length(batch.column("text")).to_numpy(zero_copy_only=False)) // BATCH_BYTES
    cuts = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist(), batch.num_rows]
    for start, stop in pairwise(cuts):
        yield batch.slice(start, stop - start)
