"""What is no document by the rules of its format is counted in log, manifest, statistics and report."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from deepseek_v3.data.formats.reading import read_documents
from deepseek_v3.data.pipeline.run import run_pipeline
from helpers.pipeline import pipeline_config, rows_of

RECORD = "WARC/1.0\r\nWARC-Type: response\r\nContent-Type: application/http\r\nContent-Length: {}\r\n\r\n{}\r\n\r\n"
PAGE = "HTTP/1.1 {} X\r\nContent-Type: text/plain\r\n\r\nstatus {}"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    pages = [PAGE.format(status, status) for status in (200, 404, 301)]
    path = tmp_path / "input" / "a.warc"
    path.parent.mkdir()
    path.write_bytes("".join(RECORD.format(len(page), page) for page in pages).encode())
    return path


def test_a_run_says_what_it_skipped(tmp_path: Path, archive: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = tmp_path / "out"
    with caplog.at_level(logging.WARNING):
        manifest = run_pipeline(pipeline_config(str(archive), output, ["preliminary_cleaning"]))
    assert manifest["counts"] == {"input": 1, "kept": 1, "dropped": 0, "quarantined": 0, "copies": 0}
    assert manifest["skipped"] == {"http_status": 2}
    assert json.loads((output / "stats.json").read_text())["skipped"] == {"http_status": 2}
    assert "2 are no documents (http_status): a WARC response with a status other than 200" in caplog.text
    assert "No documents by the rules of their format" in (output / "report.html").read_text()
    assert [row["text"] for row in rows_of(output, "data")] == ["status 200"]


def test_documents_read_one_by_one_come_with_the_same_warning(
    archive: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert [document.text for document in read_documents(archive)] == ["status 200"]
    assert "2 are no documents (http_status)" in caplog.text
