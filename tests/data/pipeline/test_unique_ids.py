"""Ids that several records have: each is qualified, and no record is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepseek_v3.data.pipeline.run import run_pipeline
from helpers.pipeline import pipeline_config, rows_of, write_lines

PIPELINE = ["exact_deduplication"]


def test_ids_unique_per_file_are_qualified_by_their_source(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for shard in range(4):
        texts = [f"Text {shard}-{number}." for number in range(50)] + ["The same in all shards."]
        (tmp_path / "in").mkdir(exist_ok=True)
        pq.write_table(pa.table({"id": range(51), "text": texts}), tmp_path / "in" / f"{shard}.parquet")
    write_lines(tmp_path / "in" / "other.jsonl", [{"id": "own", "text": "An id of its own."}])
    manifest = run_pipeline(pipeline_config(str(tmp_path / "in"), tmp_path / "out", PIPELINE))
    assert manifest["counts"] == {"input": 205, "kept": 202, "dropped": 3, "quarantined": 0, "copies": 0}
    kept = {row["id"] for row in rows_of(tmp_path / "out", "data")}
    assert kept == {*(f"{shard}.parquet:{n}" for shard in range(4) for n in range(50)), "0.parquet:50", "own"}
    dropped = rows_of(tmp_path / "out", "dropped")
    assert {row["id"] for row in dropped} == {f"{shard}.parquet:50" for shard in (1, 2, 3)}
    assert {json.loads(row["figures"])["duplicate_of"] for row in dropped} == {"0.parquet:50"}
    assert manifest["repaired"] == {"id_qualified": 204}
    assert "204 records were repaired (id_qualified)" in caplog.text
    report = (tmp_path / "out" / "report.html").read_text()
    assert "Repaired records, by kind of repair" in report
    assert "0.parquet:50" in report


def test_an_id_that_one_file_repeats_names_the_place(tmp_path: Path) -> None:
    rows = [{"id": "x", "text": "One."}, {"id": "x", "text": "Two."}, {"id": "a.jsonl:y", "text": "Three."}]
    write_lines(tmp_path / "in" / "a.jsonl", [*rows, {"id": "y", "text": "Four."}])
    write_lines(tmp_path / "in" / "b.jsonl", [{"id": "x", "text": "Five."}, {"id": "y", "text": "Six."}])
    config = pipeline_config(str(tmp_path / "in"), tmp_path / "out", PIPELINE)
    assert run_pipeline(config)["counts"]["kept"] == 6
    found = {row["text"]: row["id"] for row in rows_of(tmp_path / "out", "data")}
    assert found == {
        "One.": "a.jsonl:0:x",
        "Two.": "a.jsonl:28:x",
        "Three.": "a.jsonl:y",
        "Four.": "a.jsonl:94:y",  # another record is called a.jsonl:y
        "Five.": "b.jsonl:x",
        "Six.": "b.jsonl:y",
    }


def test_a_name_that_is_taken_even_with_the_place_is_a_duplicate(tmp_path: Path) -> None:
    rows = [{"id": "x", "text": "One."}, {"id": "x", "text": "Two."}, {"id": "a.jsonl:28:x", "text": "Three."}]
    write_lines(tmp_path / "a.jsonl", rows)
    run_pipeline(pipeline_config(str(tmp_path / "a.jsonl"), tmp_path / "out", PIPELINE))
    (quarantined,) = rows_of(tmp_path / "out", "quarantine")
    assert (quarantined["place"], quarantined["reason"]) == (28, "duplicate_id")
    assert "another record has the id 'x', even with source and place" in quarantined["error"]
    assert {row["id"] for row in rows_of(tmp_path / "out", "data")} == {"a.jsonl:0:x", "a.jsonl:28:x"}


def test_qualified_ids_do_not_depend_on_the_work_units(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        rows = [{"id": n // 2, "text": f"{name} {n} and a text that is a little longer."} for n in range(300)]
        write_lines(tmp_path / "in" / f"{name}.jsonl", rows)
    found = []
    for output, fields in (("one", {}), ("many", {"work_unit_size": "4KB", "shard_size": "1GB", "workers": 2})):
        run_pipeline(pipeline_config(str(tmp_path / "in"), tmp_path / output, PIPELINE, **fields))
        found.append([rows_of(tmp_path / output, folder) for folder in ("data", "dropped", "quarantine")])
    assert found[0] == found[1]
    ids = [row["id"] for row in rows_of(tmp_path / "one", "data")]
    assert len(ids) == len({*ids}) == 900
