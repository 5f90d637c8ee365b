"""Alarms while a run trains: every failure that is injected is named within one logging interval, and once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_v3.config.loading import load_config
from deepseek_v3.moe.balance import routers_of
from deepseek_v3.training.run_warnings import ADVICE, RunAlarms
from deepseek_v3.training.schedule import TrainingSchedule
from deepseek_v3.training.trainer import Trainer
from helpers.runs import dsv3, write_run

HEALTHY: dict[str, Any] = {
    "loss": 3.0,
    "tokens_per_second": 10.0,
    "experts/entropy": [0.98, 0.99],
    "experts/utilisation": [1.0, 1.0],
    "experts/bias_min": [-0.1, -0.2],
    "experts/bias_max": [0.1, 0.2],
}
HELD_OUT = {"holdout_loss": 3.1, "tokens": 0}
FAILURES: dict[str, tuple[dict[str, Any], str]] = {
    "dead expert": ({"experts/utilisation": [1.0, 0.75]}, "1 of 4 experts of MoE layer 2 received no token"),
    "collapsed entropy": ({"experts/entropy": [0.7, 0.99]}, "the load of MoE layer 1 has 0.700 of the entropy"),
    "runaway routing bias": ({"experts/bias_max": [0.1, 0.9]}, "biases of MoE layer 2 are 1.10 apart"),
    "throughput drop": ({"tokens_per_second": 4.9}, "5 tokens per second, and 10 in the median"),
    "divergence": ({"loss": 4.1}, "the loss is 4.100 nats per token, and has been 3.000"),
    "held-out gap": ({"holdout_loss": 3.5}, "has risen from 3.100 to 3.500 nats per token, and its gap"),
}


class Watched:
    """The alarms of a run that logs records, one for each step, healthy ones first."""

    def __init__(self, folder: Path) -> None:
        config = load_config(write_run(folder, steps=40))
        self.alarms: list[tuple[int, str, str, str]] = []
        self._judge, self._step = RunAlarms(config, TrainingSchedule(config), self._note), 0
        for _ in range(12):
            self.log()
        self.log(**HELD_OUT)

    def log(self, **changes: Any) -> None:
        """Logs a healthy step with other figures, or a validation."""
        if "holdout_loss" in changes:
            self._judge.add(self._step, changes)
            return
        self._step += 1
        self._judge.add(self._step, {**HEALTHY, "tokens": 128 * self._step, **changes})

    def _note(self, event: str, step: int, kind: str, meaning: str, advice: str) -> None:
        assert event == "alarm"
        self.alarms.append((step, kind, meaning, advice))


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_a_healthy_run_raises_no_alarm(watched: Watched) -> None:
    assert watched.alarms == []


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_is_named_once(watched: Watched, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    figures, meaning = FAILURES[kind]
    watched.log(**figures)
    step = 12 if kind == "held-out gap" else 13
    ((found_step, found_kind, found_meaning, advice),) = watched.alarms
    assert (found_step, found_kind, advice) == (step, kind, ADVICE[kind])
    assert meaning in found_meaning
    assert caplog.messages[-1] == f"step {step}: {kind}: {found_meaning}; {advice}"
    watched.log(**figures)
    assert len(watched.alarms) == 1


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_that_comes_back_is_named_again(watched: Watched, kind: str) -> None:
    figures, _ = FAILURES[kind]
    watched.log(**figures)
    watched.log(**(HELD_OUT if kind == "held-out gap" else {}))
    watched.log(**figures)
    assert [found for _, found, _, _ in watched.alarms] == [kind, kind]


@pytest.mark.parametrize(
    "figures",
    [
        {"tokens_per_second": 5.1},
        {"tokens_per_second": 4.0, "tokens": 12 * 128 + 7},  # an interval of less than two seconds
        {"loss": 3.9},
        {"loss": float("nan")},
        {"experts/entropy": [0.76, 0.99]},
        {"holdout_loss": 3.14},
    ],
)
def test_small_changes_raise_no_alarm(watched: Watched, figures: dict[str, Any]) -> None:
    watched.log(**figures)
    assert watched.alarms == []


def test_routers_may_be_uneven_during_the_warm_up(tmp_path: Path) -> None:
    config, alarms = load_config(write_run(tmp_path)), []
    judge = RunAlarms(config, TrainingSchedule(config), lambda *_, **fields: alarms.append(fields["kind"]))
    uneven = {**HEALTHY, "tokens": 128, "experts/utilisation": [0.5, 0.5], "experts/entropy": [0.5, 0.5]}
    judge.add(2, uneven)
    assert alarms == []
    judge.add(3, uneven)
    assert alarms == ["dead expert", "collapsed entropy"]


def test_alarms_of_a_run_are_in_its_events_and_reports(tmp_path: Path) -> None:
    """A real run in which two experts of four take all tokens."""
    trainer = Trainer(load_config(write_run(tmp_path)), torch.device("cpu"))
    for router in routers_of(trainer.engine.models[0]):
        router.e_score_correction_bias[:2] += 100
    trainer.run()
    run = tmp_path / "run"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    alarms = [(each["step"], each["kind"]) for each in events if each["event"] == "alarm"]
    assert alarms == [(1, "runaway routing bias"), (3, "dead expert"), (3, "collapsed entropy")]
    counted = "1 collapsed entropy, 1 dead expert, 1 runaway routing bias"
    assert counted in dsv3("report", run, "--html").output
    page = (run / "report.html").read_text()
    assert counted in page
    assert "meaning 2 of 4 experts of MoE layer 1 received no token" in page
    assert "alarms" in dsv3("watch", run, "--once").output


def test_a_gap_alone_is_no_alarm_while_both_losses_fall(watched: Watched) -> None:
    for _ in range(6):
        watched.log(loss=2.0)
    watched.log(holdout_loss=2.9)
    assert watched.alarms == []
