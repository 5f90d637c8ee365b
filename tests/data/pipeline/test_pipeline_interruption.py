"""A run that is killed anywhere, any number of times, goes on and ends with the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from deepseek_v3.data.pipeline.run import run_pipeline
from deepseek_v3.data.sample_corpora import write_damaged_corpus
from deepseek_v3.utils.errors import DataError
from helpers import ROOT
from helpers.jobs import HANGS
from helpers.pipeline import digests, pipeline_config

PIPELINE = ["preliminary_cleaning", "exact_deduplication", "deduplication", "heuristic_filters"]
SCRIPT = ROOT / "scripts" / "preprocess_data.py"
SIZES = {"work_unit_size": 20_000, "shard_size": 60_000, "max_record_size": 1_000_000, "workers": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("input") / "corpus"
    write_damaged_corpus(folder, 500, seed=5)
    return folder


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("output") / "clean"
    run_pipeline(pipeline_config(str(corpus), output, PIPELINE, **{**SIZES, "workers": 1}))
    return digests(output)


def test_killed_in_a_loop(corpus: Path, expected: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    fields = {"input_path": str(corpus), "output_dir": str(output), "pipeline": PIPELINE, **SIZES}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields))
    command = [sys.executable, str(SCRIPT), "--config", str(tmp_path / "run.yaml")]
    chooser = random.Random(0)
    killed = 0
    while not (output / "manifest.json").exists():
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
            enough = _finished(output) + chooser.randrange(1, 8)
            while run.poll() is None and _finished(output) < enough:
                time.sleep(0.01)
            time.sleep(chooser.random() / 50)
            if run.poll() is None and killed < 4:
                run.send_signal(signal.SIGKILL)
                killed += 1
            error = run.communicate()[1]
        assert run.returncode in (0, -signal.SIGKILL), error.decode()
    assert killed >= 3
    assert digests(output) == expected


def test_workers_end_with_the_run_that_started_them(corpus: Path, tmp_path: Path) -> None:
    fields = {"input_path": str(corpus), "output_dir": str(tmp_path / "out"), "pipeline": PIPELINE, **SIZES}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields))
    command = [sys.executable, str(SCRIPT), "--config", str(tmp_path / "run.yaml")]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as run:
        while _finished(tmp_path / "out") < 1 and run.poll() is None:
            time.sleep(0.01)
        run.kill()
    deadline = time.monotonic() + HANGS
    while _group(run.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _group(run.pid)


def test_a_damaged_piece_is_done_again(
    corpus: Path, expected: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = pipeline_config(str(corpus), tmp_path / "out", PIPELINE, **{**SIZES, "workers": 1})
    run_pipeline(config, shard=(0, 1))
    files = sorted((tmp_path / "out" / ".work" / "pass-0").glob("*/records.arrow"))
    damaged = bytearray(files[1].read_bytes())
    damaged[len(damaged) // 2] ^= 255
    files[1].write_bytes(damaged)
    files[2].unlink()
    run_pipeline(config)
    assert "2 finished parts are damaged and are done again" in caplog.text
    assert digests(tmp_path / "out") == expected


def test_two_runs_in_one_folder_are_refused(corpus: Path, tmp_path: Path) -> None:
    import fcntl

    config = pipeline_config(str(corpus), tmp_path / "out", PIPELINE)
    (tmp_path / "out" / ".work").mkdir(parents=True)
    with (tmp_path / "out" / ".work" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process works on this run"):
            run_pipeline(config)


def test_memory_stays_below_what_is_allowed(tmp_path: Path) -> None:
    write_damaged_corpus(tmp_path / "in", 12_000)
    code = f"""
import resource, sys
from pathlib import Path
from deepseek_v3.data.pipeline.run import run_pipeline
sys.path.insert(0, {str(ROOT / "tests")!r})
from helpers.pipeline import pipeline_config
resource.setrlimit(resource.RLIMIT_DATA, (600_000_000, 600_000_000))
run_pipeline(pipeline_config({str(tmp_path / "in")!r}, Path({str(tmp_path / "out")!r}), {PIPELINE!r},
             memory="600MB", work_unit_size="4MB", max_record_size="4MB"))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "manifest.json").exists()


def _finished(output: Path) -> int:
    """Pieces, tasks and files that are finished."""
    marks = {"part.json", "figures.json"}
    return sum(len(marks.intersection(files)) for _, _, files in os.walk(output / ".work"))


def _group(leader: int) -> list[str]:
    """The living processes of a session."""
    living = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[3] == str(leader) and fields[0] != "Z":
            living.append(status.parent.name)
    return living
