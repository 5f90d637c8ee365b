"""An input in which the text is elsewhere, or nowhere: it is found, or the run stops before it does anything."""

from __future__ import annotations

import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepseek_v3.data.pipeline.run import run_pipeline
from deepseek_v3.utils.errors import DataError
from helpers.pipeline import pipeline_config, rows_of, write_lines

PIPELINE = ["preliminary_cleaning"]


def test_the_text_is_found_by_its_usual_names_in_each_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [f"Text number {number}." for number in range(30)]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"body": [text.encode() for text in texts]}), tmp_path / "in" / "a.parquet")
    write_lines(tmp_path / "in" / "b.jsonl", [{"content": text, "code": 1} for text in texts])
    write_lines(tmp_path / "in" / "c.jsonl", [{"content": "not this", "text": text} for text in texts])
    (tmp_path / "in" / "d.txt").write_text("A file that is a text.")
    with caplog.at_level(logging.INFO):
        manifest = run_pipeline(
            pipeline_config(str(tmp_path / "in"), tmp_path / "out", PIPELINE, work_unit_size="1KB", workers=2)
        )
    assert (manifest["counts"]["kept"], manifest["alarms"]) == (91, [])
    assert sorted(row["text"] for row in rows_of(tmp_path / "out", "data")) == sorted(
        [*texts * 3, "A file that is a text."]
    )
    for name, field in (("a.parquet", "body"), ("b.jsonl", "content"), ("c.jsonl", "text")):
        assert f"the text of {name} is in the field '{field}'" in caplog.text


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ({"id": 1, "words": "x"}, {}, r"has no field 'text', only \['id', 'words'\]; say which one"),
        ({"id": 1, "text": "x"}, {"text_field": "words"}, r"has no field 'words', only \['id', 'text'\]"),
        ({"text": ["x"]}, {}, "field 'text' holds a list, expected a string"),
        ({"text": None}, {}, "field 'text' holds null, expected a string"),
        ([1], {}, "holds a list, expected an object"),
    ],
)
def test_a_run_without_text_stops_and_leaves_nothing(
    tmp_path: Path, row: dict[str, object], fields: dict[str, str], message: str
) -> None:
    source = write_lines(tmp_path / "in" / "a.jsonl", [row] * 40)
    with pytest.raises(DataError, match=f"a.jsonl: place 0: {message}.*of the first 40 records.* set text_field"):
        run_pipeline(pipeline_config(str(source), tmp_path / "out", PIPELINE, **fields))
    assert not (tmp_path / "out").exists()


def test_hardly_any_text_in_the_first_files_stops_the_run(tmp_path: Path) -> None:
    for number in range(20):
        rows = [{"wrong": "field"}] * 50 + [{"text": "A text."}] * (number == 0)
        write_lines(tmp_path / "in" / f"{number:02d}.jsonl", rows)
    with pytest.raises(DataError, match="of the first 401 records of the input 1 can be read"):
        run_pipeline(pipeline_config(str(tmp_path / "in"), tmp_path / "out", PIPELINE))


def test_a_share_of_unreadable_records_is_an_alarm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": f"Text {n}."} if n % 10 else {"body": "x"} for n in range(50)]
    source = write_lines(tmp_path / "a.jsonl", rows)
    manifest = run_pipeline(pipeline_config(str(source), tmp_path / "out", PIPELINE))
    assert manifest["alarms"] == [{"stage": "quarantine", "removed": 0.1, "limit": 0.01}]
    assert "10.0% of the records are in quarantine, above max_quarantine_warning of 1.0% (text_missing: 5)" in (
        caplog.text
    )
    assert "holds 10.0% of the records, above the max_quarantine_warning of 1.0%" in (
        (tmp_path / "out" / "report.html").read_text()
    )
    quiet = pipeline_config(str(source), tmp_path / "quiet", PIPELINE, max_quarantine_warning=0.1)
    assert run_pipeline(quiet)["alarms"] == []
