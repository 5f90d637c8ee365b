"""A run that is killed at any point resumes and ends with the same bytes."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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
    write_damaged_corpus(folder, 250, seed=5)
    return folder


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("output") / "clean"
    run_pipeline(pipeline_config(str(corpus), output, PIPELINE, **{**SIZES, "workers": 1}))
    return digests(output)


class Killer:
    """Kills a run in this process, once before each file and folder that it renames into place.

    A killed run leaves its unfinished files behind, as after `kill -9`.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.targets: list[Path] = []
        self.killed = False
        for method in ("rename", "replace"):
            monkeypatch.setattr(Path, method, self._dying(getattr(Path, method)))
        monkeypatch.setattr(Path, "unlink", self._idle_once_killed(Path.unlink))
        monkeypatch.setattr(shutil, "rmtree", self._idle_once_killed(shutil.rmtree))

    def _dying(self, publish: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def die_or_publish(path: Path, target: Path) -> Path:
            known = Path(re.sub("[0-9a-f]{32}", "", str(target)))  # without the random part of a folder's name
            if known not in self.targets:
                self.targets.append(known)
                self.killed = True
                raise Killed
            return publish(path, target)

        return die_or_publish

    def _idle_once_killed(self, remove: Callable[..., None]) -> Callable[..., None]:
        return lambda *arguments, **options: None if self.killed else remove(*arguments, **options)


class Killed(BaseException):
    """No part of a run catches this, like a signal that cannot be caught."""


def test_killed_before_each_file_that_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_damaged_corpus(tmp_path / "in", 60, seed=5)
    sizes = {**SIZES, "workers": 1, "keep_keys": True}
    run_pipeline(pipeline_config(str(tmp_path / "in"), tmp_path / "expected", PIPELINE, **sizes))
    config = pipeline_config(str(tmp_path / "in"), tmp_path / "out", PIPELINE, **sizes)
    killer = Killer(monkeypatch)
    manifest = None
    while manifest is None:
        killer.killed = False
        with contextlib.suppress(Killed):
            manifest = run_pipeline(config)
    names = {target.name for target in killer.targets}
    assert {
        "run.json",
        "000000-00000",
        "complete.json",
        "decisions",
        "00000",
        "stats.json",
        "manifest.json",
    } <= names
    assert len(killer.targets) > 20
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")


def test_a_killed_run_takes_its_workers_along_and_resumes(
    corpus: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    fields = {"input_path": str(corpus), "output_dir": str(tmp_path / "out"), "pipeline": PIPELINE, **SIZES}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields))
    command = [sys.executable, str(SCRIPT), "--config", str(tmp_path / "run.yaml")]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as run:
        while _finished(tmp_path / "out") < 2 and run.poll() is None:
            time.sleep(0.01)
        run.kill()
    assert run.returncode == -signal.SIGKILL
    deadline = time.monotonic() + HANGS
    while _group(run.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _group(run.pid)
    run_pipeline(pipeline_config(str(corpus), tmp_path / "out", PIPELINE, **{**SIZES, "workers": 1}))
    assert digests(tmp_path / "out") == expected


def test_a_damaged_part_is_done_again(
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
    write_damaged_corpus(tmp_path / "in", 6000)  # more than one work unit
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
    """The number of finished parts and decisions."""
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
