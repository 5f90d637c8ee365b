"""The report of runs: figures, the page, and files that are incomplete or hostile."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepseek_v3.moe.balance import decode_load, encode_load
from deepseek_v3.training.report import command
from deepseek_v3.training.report.run_files import open_runs
from deepseek_v3.training.report.run_page import page
from deepseek_v3.training.report.summary import comparison, summary
from deepseek_v3.utils.errors import DataError
from helpers.pages import Seen
from helpers.runs import dsv3, message_of, run_fields

HOSTILE = "</title></pre><script>alert(1)</script>"


def record(step: int, **changes: Any) -> dict[str, Any]:
    counts = [10.0, 0.0, 20.0, 10.0, 10.0, 10.0, 10.0, 10.0]
    return {
        "step": step,
        "tokens": 128 * step,
        "loss": 5.0 / step,
        "learning_rate": 1e-3,
        "gradient_norm": 1.0,
        "tokens_per_second": 64.0,
        "memory_bytes": 2.0**31,
        "skipped_steps": 0,
        "time": 1.8e9 + 2 * step,
        "experts/entropy": [0.9, 1.0],
        "experts/max_violation": [1.0, 0.0],
        "experts/utilisation": [0.75, 1.0],
        "experts/bias_min": [-0.1, -0.2],
        "experts/bias_max": [0.1, 0.2],
        "experts/load": encode_load(counts, 2),
        **changes,
    }


def write(folder: Path, records: list[dict[str, Any]], events: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    (folder / "config.yaml").write_text(yaml.safe_dump(run_fields(folder, steps=6)))
    if events is not None:
        (folder / "events.jsonl").write_text("".join(json.dumps(each) + "\n" for each in events))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run after 3 of 6 steps that was restarted once, with an anomaly that happened again after the restart."""
    held_out = {"step": 3, "tokens": 384, "holdout_loss": 2.0, "holdout_bits_per_byte": 1.0}
    anomaly = {"event": "anomaly", "step": 2, "kind": "spike", "loss": 9.0}
    events = [
        {"event": "start", "step": 0, "host": "one", "versions": {"torch": "2"}},
        anomaly,
        {"event": "start", "step": 1, "host": "two", "versions": {"torch": "2"}},
        anomaly,
        {"event": "rollback", "step": 2, "to_step": 1},
    ]
    return write(tmp_path / "run", [record(1), record(2), record(3), held_out], events)


def test_the_main_figures(run: Path) -> None:
    found = summary(open_runs([run])[0])
    assert {name: found[name] for name in ("step", "of plan", "loss", "held-out loss", "anomalies")} == {
        "step": "3",
        "of plan": "50.0%",
        "loss": "1.6667",
        "held-out loss": "2.0000",
        "anomalies": "1 spike",
    }
    assert (found["rollbacks"], found["restarts"], found["MFU"]) == ("1", "1", "–")
    assert (found["worst MaxVio"], found["experts used"]) == ("1.00", "75.0%")
    assert found["end"] == "in 0:06, 2027-01-15 08:00 UTC"  # 384 tokens at 64 per second


def test_the_page_shows_every_part(run: Path) -> None:
    seen = Seen(page(open_runs([run])))
    for text in ("Tokens trained on", "Loss", "MaxVio", "Bias drift", "MoE layer 1", "two", "hidden_size: 32"):
        assert text in seen.text
    markers = [each["class"] for each in seen.attributes if "marker" in (each.get("class") or "")]
    assert {*markers} == {"marker alarm", "marker event"}
    assert "1 spike" in seen.text
    assert not any(name in ("script", "link", "iframe") for name in seen.tags)
    sources = [each["src"] for each in seen.attributes if "src" in each]
    assert len(sources) == 3
    assert all((source or "").startswith("data:image/png;base64,") for source in sources)


def test_runs_are_compared_on_one_page(run: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", [record(1), record(2, mfu=0.4)])
    runs = open_runs([run, other / "metrics.jsonl"])
    header, rows = comparison(runs)
    assert header == ["", "run", "other"]
    assert ["MFU", "–", "40.0%"] in rows
    text = Seen(page(runs)).text
    assert "Training: 2 runs" in text
    assert "differs from run: " in text
    assert page(runs) == page(runs)


def test_runs_of_the_same_name_are_called_by_their_path(run: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "b" / "run", [record(1)])
    assert [each.name for each in open_runs([run, other])] == [str(run), str(other)]


def test_metrics_never_become_markup(tmp_path: Path) -> None:
    event = {"event": HOSTILE, "step": 1, "time": HOSTILE, "error": HOSTILE, "host": HOSTILE}
    start = {"event": "start", "step": 1, "versions": {HOSTILE: HOSTILE}, "host": HOSTILE}
    metrics = record(1, **{f"loss_terms/{HOSTILE}": 1.0})
    held_out = {"step": 1, "tokens": 128, "holdout_loss": 2.0, f"holdout_loss/{HOSTILE}": 2.0}
    folder = write(tmp_path / "<script>x", [metrics, held_out], [event, start])
    assert "script" not in Seen(page(open_runs([folder]))).tags


def test_damaged_values_are_left_out(tmp_path: Path) -> None:
    odd: dict[str, Any] = {"gradient_norm": None, "learning_rate": "x", "experts/load": "%", "time": None}
    folder = write(tmp_path / "run", [record(1, loss=None, tokens=None), record(2, **odd)])
    (folder / "config.yaml").write_text("model: 1")
    (folder / "events.jsonl").write_text('nonsense\n{"event": "end"}\n[1]\n{"event": "anomaly", "step": 9}\n')
    runs = open_runs([folder])
    assert summary(runs[0])["of plan"] == "–"
    assert "config.yaml cannot be read." in Seen(page(runs)).text


def test_a_run_without_experts_has_a_page(tmp_path: Path) -> None:
    dense = {name: value for name, value in record(1).items() if not name.startswith("experts/")}
    assert "No run has experts." in Seen(page(open_runs([write(tmp_path / "run", [dense])]))).text


def test_a_folder_without_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics.jsonl: cannot be read: No such file"):
        open_runs([tmp_path])
    with pytest.raises(DataError, match="holds no training step yet"):
        open_runs([write(tmp_path / "run", [{"step": 0, "holdout_loss": 1.0}])])


def test_the_command_prints_a_table_and_writes_a_page(run: Path, tmp_path: Path) -> None:
    result = dsv3("report", run)
    assert result.exit_code == 0
    assert "2.0000" in result.output
    assert f"dsv3 report {run} --html" in result.output
    assert f"dsv3 watch {run}" in dsv3("report", run, "--html").output
    assert (run / "report.html").read_text("utf-8").startswith("<!DOCTYPE html>")
    assert dsv3("report", run, "--html", "--output", tmp_path / "page.html").exit_code == 0
    assert (tmp_path / "page.html").exists()
    assert "expected with --html" in message_of(dsv3("report", run, "--output", tmp_path / "page.html"))
    assert "is no regular file" in message_of(dsv3("report", run, "--html", "--output", tmp_path))


def test_the_load_of_experts_survives_its_encoding() -> None:
    load = decode_load(encode_load([1.0, 3.0, 0.0, 4.0, 0.0, 1e9, 1.0, 0.0], 2), 2)
    assert load == [[0.5, 1.5, 0, 2], [0, 4, 1 / 32, 0]]
    for damaged in ("%", "", "AAAA"):
        with pytest.raises(ValueError, match=r"\w"):
            decode_load(damaged, 2)


def test_watch_shows_a_run_once_or_until_it_has_ended(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = dsv3("watch", run, "--once")
    assert once.exit_code == 0
    for text in ("held-out loss", "█", "rollback at step 2", "Next:"):
        assert text in once.output

    def finish(_seconds: float) -> None:
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record(6)) + "\n")

    monkeypatch.setattr(command.time, "sleep", finish)
    assert "finished" in dsv3("watch", run).output
    assert "expected more than 0 seconds" in message_of(dsv3("watch", run, "--interval", "0"))


@pytest.mark.parametrize(
    ("values", "shown"),
    [([3.0, 2.0, 1.0], "█▅▁"), ([1.0], "▁"), ([math.nan], "–"), ([0.0] * 40 + [1.0] * 40, "▁" * 20 + "█" * 20)],
)
def test_a_curve_is_a_line_of_bars(values: list[float], shown: str) -> None:
    assert command.curve(values) == shown
