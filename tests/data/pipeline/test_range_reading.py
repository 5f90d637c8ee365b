"""Small files and batches share a batch, and reading continues from the place of any batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek_v3.data.formats.batches import FileRange, ReadBatch, ReadOptions
from deepseek_v3.data.formats.inputs import find_inputs
from deepseek_v3.data.pipeline import range_reading
from deepseek_v3.data.pipeline.range_reading import Place, read_ranges
from deepseek_v3.data.pipeline.run import run_pipeline
from helpers.pipeline import pipeline_config, rows_of, write_lines

START = (0, 0)


@pytest.fixture
def ranges(tmp_path: Path) -> list[FileRange]:
    """40 text files, of which one is empty, with two JSONL files among them."""
    for number in range(40):
        (tmp_path / f"{number:02d}.py").write_text(f"value = {number}\n" * (number != 7))
    write_lines(tmp_path / "10.jsonl", [{"text": f"line {number}"} for number in range(30)] + [{"id": 1}])
    write_lines(tmp_path / "30.jsonl", [{"text": "é" * 400}] * 3)
    return [FileRange(file) for file in find_inputs(tmp_path).files]


def read(ranges: list[FileRange], resume: Place = START) -> list[tuple[ReadBatch, Place]]:
    return list(read_ranges(ranges, ReadOptions(), resume))


def ids(batches: list[tuple[ReadBatch, Place]]) -> list[str]:
    return [id_ for batch, _ in batches for id_ in batch.records["id"].to_pylist()]


def test_small_files_share_one_batch_in_the_order_of_the_files(ranges: list[FileRange]) -> None:
    [(batch, _)] = read(ranges)
    sources = batch.records["source"].to_pylist()
    assert batch.records.num_rows == 39 + 30 + 3
    assert sources == sorted(sources)
    assert batch.quarantined.select(["source", "reason"]).to_pylist() == [
        {"source": "07.py", "reason": "empty"},
        {"source": "10.jsonl", "reason": "text_missing"},
    ]


@pytest.mark.parametrize("size", [20, 60, 200, 900])
def test_reading_continues_from_the_place_of_any_batch(
    ranges: list[FileRange], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    whole = ids(read(ranges))
    monkeypatch.setattr(range_reading, "BATCH_BYTES", size)
    batches = read(ranges)
    assert len(batches) > 3
    assert ids(batches) == whole
    for number, (_, place) in enumerate(batches):
        following = read(ranges, place)
        assert [batch.records for batch, _ in following] == [batch.records for batch, _ in batches[number + 1 :]]


def test_a_batch_has_at_most_the_size_of_a_batch_of_one_file(
    ranges: list[FileRange], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_reading, "BATCH_BYTES", 60)
    texts = [batch.records["text"].to_pylist() for batch, _ in read(ranges)]
    small = [batch for batch in texts if all(text.startswith("value") for text in batch)]
    assert len(small) > 5
    assert all(sum(map(len, batch)) <= 60 for batch in small)


def test_a_batch_holds_a_bounded_number_of_records(
    ranges: list[FileRange], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_reading, "BATCH_RECORDS", 5)
    sizes = [batch.records.num_rows for batch, _ in read(ranges)]
    assert sum(sizes) == 72
    assert sorted(sizes)[-2] == 5  # the largest is the batch of 10.jsonl


def test_a_folder_gives_the_documents_of_one_file(tmp_path: Path, ranges: list[FileRange]) -> None:
    rows = [
        {"id": record["id"], "text": record["text"]}
        for batch, _ in read(ranges)
        for record in batch.records.to_pylist()
    ]
    source = write_lines(tmp_path / "one" / "all.jsonl", rows)
    folder = Path(ranges[0].file.path).parent
    pipeline = ["preliminary_cleaning", "exact_deduplication"]
    for name, given in (("of_folder", [str(r.file.path) for r in ranges]), ("of_file", str(source))):
        run_pipeline(pipeline_config(given, folder / name, pipeline))
    texts = [[row["text"] for row in rows_of(folder / name, "data")] for name in ("of_folder", "of_file")]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 39 + 30 + 1
