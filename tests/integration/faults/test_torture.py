"""A dozen faults of `dsv3 torture`, each at a fixed place of a real process: the run goes on and loses nothing."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from deepseek_v3.training.torture import command, trial
from deepseek_v3.training.torture.faults import KINDS, Damage, Fault, draw_fault
from deepseek_v3.training.torture.strikes import Striker
from deepseek_v3.training.torture.tiny_run import Undisturbed, run_undisturbed
from deepseek_v3.training.torture.train_processes import Outcome
from deepseek_v3.training.torture.trial import Trial, damage_file, run_trial
from deepseek_v3.utils.fault_points import PLACES
from helpers.runs import dsv3, message_of

NEWEST = "checkpoints/{newest}.pt"

FAULTS = [
    Fault("kill-step", 1, 1, "kill", "step", 3),
    Fault("kill-save", 2, 1, "kill", "save", 2),
    Fault("kill-rename", 3, 1, "kill", "rename", 3),
    Fault("kill-removal", 4, 1, "kill", "remove", 1),
    Fault("sigterm-twice", 5, 1, "terminate", "save", 2),
    Fault("sigstop", 6, 1, "pause", "rename", 2),
    Fault("disk-full", 7, 1, "fill", "step", 3),
    Fault("read-only", 8, 1, "forbid", "step", 3),
    Fault("data-vanishes", 9, 1, "lose and kill", "step", 3),
    Fault("bit-flip", 10, 1, damage="flip", file=NEWEST, position=0.5),
    Fault("bit-flip", 11, 1, damage="flip", file="run/metrics.jsonl", position=0.0),
    Fault("damage-then-kill", 12, 1, "kill", "renamed", 1, damage="truncate", file=NEWEST, position=0.9),
    Fault("rank-dies", 13, 2, "kill", "step", 3, rank=1),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Undisturbed]:
    """The runs without faults, each made once."""
    return cache(lambda ranks: run_undisturbed(tmp_path_factory.mktemp("undisturbed"), ranks))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.kind)
def test_a_run_survives(fault: Fault, undisturbed: Callable[[int], Undisturbed], tmp_path: Path) -> None:
    assert run_trial(fault, undisturbed(fault.ranks), tmp_path / "run").problem is None


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Trials of the command that take no time: those with odd seeds are not survived."""

    def tried(fault: Fault, _: Undisturbed, folder: Path) -> Trial:
        return Trial(fault, 0.5, "step 4 was lost" if fault.seed % 2 else None)

    def known(folder: Path, ranks: int) -> Undisturbed:
        counts = {rank: Counter(dict.fromkeys(PLACES, 3)) for rank in range(ranks)}
        return Undisturbed(ranks, folder, ({}, {}), {}, counts)

    monkeypatch.setattr(command, "run_trial", tried)
    monkeypatch.setattr(command, "run_undisturbed", known)
    monkeypatch.setattr(command.tempfile, "mkdtemp", lambda **_: str(tmp_path / "work"))
    (tmp_path / "work").mkdir()


def test_a_fault_that_is_not_survived_can_be_repeated(
    quick: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "trials.json"
    result = dsv3("torture", "--faults", 4, "--seed", 6, "--kinds", "kill-save,missing", "--output", file)
    assert result.exit_code == 1
    rows = [line.split() for line in result.output.splitlines()]
    assert [row[-3:-1] for row in rows if row[:1] in (["kill-save"], ["missing"])] == [["2", "2"], ["2", "0"]]
    assert "2 of 4 faults were not survived; their runs are in" in result.output
    assert "dsv3 torture --faults 1 --kinds missing --seed 7\n" in result.output
    assert "step 4 was lost | " in caplog.text
    assert " faults/min, 0:00 left" in caplog.text
    assert [each["problem"] for each in json.loads(file.read_text())] == [None, "step 4 was lost"] * 2


def test_a_survived_torture_suggests_more(quick: None, tmp_path: Path) -> None:
    result = dsv3("torture", "--faults", 1)
    assert result.exit_code == 0, result.output
    assert "dsv3 torture --faults 200 --seed 1" in result.output
    assert not (tmp_path / "work").exists()


def test_unknown_kinds_are_named() -> None:
    assert "--kinds: found fire; expected some of kill-step, " in message_of(dsv3("torture", "--kinds", "fire"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_follows_from_its_kind_and_seed(kind: str) -> None:
    counts = {ranks: {rank: Counter(dict.fromkeys(PLACES, 5)) for rank in range(ranks)} for ranks in (1, 2)}
    drawn = [draw_fault(kind, seed, counts) for seed in range(20)]
    assert drawn == [draw_fault(kind, seed, counts) for seed in range(20)]
    assert len({str(fault) for fault in drawn}) > 2


@pytest.mark.parametrize(
    ("fault", "outcome", "problem"),
    [
        (FAULTS[0], Outcome((0,), "Saved x/checkpoint_step_2.pt"), "rank 0 ended with 0, expected -9"),
        (FAULTS[6], Outcome((1,), "error: no"), "the error does not say what cannot be written: error: no"),
        (FAULTS[-1], Outcome((0, -9), ""), "the other rank ended with 0, expected 1"),
    ],
)
def test_an_end_that_a_fault_must_not_have(fault: Fault, outcome: Outcome, problem: str) -> None:
    with pytest.raises(trial.BrokenPromiseError, match=re.escape(problem)):
        trial.check_end(fault, outcome)


def test_a_full_disk_is_injected_where_none_may_be_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    striker = Striker(FAULTS[6], 0)
    for place in ("step", "save", "step", "step", "rename"):
        striker(place)
    with pytest.raises(OSError, match="No space left on device"):
        striker("save")


@pytest.mark.parametrize(("damage", "left"), [("truncate", b"ab"), ("flip", b"abgd"), ("remove", None)])
def test_a_file_is_damaged_at_its_position(tmp_path: Path, damage: Damage, left: bytes | None) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abcd")
    damage_file(path, damage, 0.5)
    assert (path.read_bytes() if path.exists() else None) == left


def test_a_lost_checkpoint_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(trial.BrokenPromiseError, match=r"step 4 was saved, and the good checkpoints are \[\]"):
        trial.check_kept({2, 4}, tmp_path)


def test_a_run_that_resumes_too_early_is_noticed() -> None:
    with pytest.raises(trial.BrokenPromiseError, match="went on after step 2, and the good ones were"):
        trial.check_resumed(Outcome((0,), "[Trainer] Resuming x/checkpoint_step_2.pt after step 2"), {2, 4})
