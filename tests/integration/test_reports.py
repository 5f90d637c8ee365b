"""The report of a step is written when its values have arrived, once and in order, and keeps no GPU waiting."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Callable, Container
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepseek_v3.config.loading import load_config
from deepseek_v3.training import metrics, throughput
from deepseek_v3.training.trainer import Trainer
from deepseek_v3.utils import host_copy
from deepseek_v3.utils.errors import DataError, TrainingError
from deepseek_v3.utils.monitoring import MetricsWriter, read_metrics
from helpers.runs import TOKENS_PER_STEP, write_run

CPU = torch.device("cpu")
# Nothing but the reports is due before the last step.
SETTINGS = ["training.evaluation.interval_steps=0", "checkpoint.interval_steps=0"]


class SimulatedGPU:
    """The clocks of a host and of a GPU that works on its steps after the host has launched them.

    A launch takes `launching` seconds of the host, a step then takes `working` seconds of the GPU. `trace` holds
    what the host does; it holds a wait only if the GPU has not done the work that the host waits for.
    """

    def __init__(self, launching: float = 1, working: float = 10) -> None:
        self._launching, self._working = launching, working
        self.seconds = self._done = 0.0  # the time of the host; when the GPU will have done all its work
        self.launched = 0
        self.trace: list[str] = []
        self.failure: Exception | None = None  # what the host is told when it waits

    def launch(self, number: int) -> None:
        self.trace.append(f"launch {number}")
        self.seconds += self._launching
        self._done = max(self._done, self.seconds) + self._working
        self.launched = number

    def moment(self, _device: torch.device) -> SimulatedMoment:
        return SimulatedMoment(self, max(self._done, self.seconds))

    def wait(self, number: int, until: float) -> None:
        if self.failure is not None:
            raise self.failure
        if until > self.seconds:
            self.trace.append(f"wait {number}")
            self.seconds = until


class SimulatedMoment:
    """Takes the place of `Moment`."""

    def __init__(self, gpu: SimulatedGPU, seconds: float) -> None:
        self._gpu, self._seconds, self._number = gpu, seconds, gpu.launched

    def wait(self) -> None:
        self._gpu.wait(self._number, self._seconds)

    def seconds_since(self, earlier: SimulatedMoment) -> float:
        assert self._gpu.seconds >= self._seconds
        return self._seconds - earlier._seconds


def trainer_on(
    gpu: SimulatedGPU,
    monkeypatch: pytest.MonkeyPatch,
    run: Path,
    *overrides: str,
    resume: str | None = None,
    step_begins: Callable[[int], None] | None = None,
    fails_at: tuple[int, BaseException] | None = None,
    not_finite: Container[int] = (),
) -> Trainer:
    """A trainer whose steps run on the simulated GPU. Validation takes it 100 seconds, saving 50."""
    trainer = Trainer(load_config(run, [*SETTINGS, *overrides]), CPU, resume, step_begins=step_begins)
    trainer._runs_ahead = True
    train, measure, save = trainer._train_step, trainer.validator.measure, trainer.checkpoints.save
    write = MetricsWriter.write

    def train_step(step: Any, batches: Any) -> Any:
        gpu.launch(step.number)
        if fails_at is not None and step.number == fails_at[0]:
            raise fails_at[1]
        result = train(step, batches)
        if step.number not in not_finite:
            return result
        return result._replace(norm=result.norm * math.inf, accepted=torch.tensor(False))

    def measured(*arguments: Any) -> Any:
        gpu.trace.append("validate")
        gpu.seconds += 100
        return measure(*arguments)

    def saved(number: int, state: Any) -> Path:
        gpu.trace.append(f"save {number}")
        gpu.seconds += 50
        return save(number, state)

    def written(writer: MetricsWriter, step: int, values: Any, more: Any) -> None:
        gpu.trace.append(f"{'report' if 'loss' in values else 'validation'} {step}")
        write(writer, step, values, more)

    monkeypatch.setattr(trainer, "_train_step", train_step)
    monkeypatch.setattr(trainer.validator, "measure", measured)
    monkeypatch.setattr(trainer.checkpoints, "save", saved)
    monkeypatch.setattr(MetricsWriter, "write", written)
    monkeypatch.setattr(host_copy, "Moment", gpu.moment)
    monkeypatch.setattr(metrics, "Moment", gpu.moment)
    monkeypatch.setattr(metrics, "device_memory_bytes", lambda _: gpu.launched)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: gpu.seconds))
    return trainer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path, steps=8)


def records_of(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run.parent / "run" / "metrics.jsonl") if "loss" in record]


def reported(gpu: SimulatedGPU) -> list[str]:
    return [entry for entry in gpu.trace if entry.startswith("report")]


def test_a_report_is_written_after_the_launch_of_the_next_step(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first step and until the last one, the host waits for no step before it has launched the next."""
    gpu = SimulatedGPU()
    assert trainer_on(gpu, monkeypatch, run, "logging.interval_steps=3").run().finished
    assert " | ".join(gpu.trace) == (
        "launch 1 | wait 1 | report 1 | launch 2 | launch 3 | wait 2 | launch 4 | wait 3 | report 3 | launch 5 | "
        "wait 4 | launch 6 | wait 5 | launch 7 | wait 6 | report 6 | launch 8 | wait 7 | wait 8 | report 8 | "
        "validate | validation 8 | save 8"
    )
    assert [(record["step"], record["memory_bytes"]) for record in records_of(run)] == [
        (number, number) for number in (1, 3, 6, 8)
    ]


def test_a_step_has_arrived_before_other_work_begins(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimulatedGPU()
    overrides = [
        "training.evaluation.interval_steps=3",
        "checkpoint.interval_steps=4",
        "logging.interval_steps=2",
        "logging.samples={prompts: [def], interval_steps: 5, max_new_tokens: 1}",
    ]
    trainer_on(gpu, monkeypatch, run, *overrides).run()
    assert " | ".join(gpu.trace) == (
        "launch 1 | wait 1 | report 1 | launch 2 | launch 3 | wait 2 | report 2 | wait 3 | validate | "
        "validation 3 | launch 4 | wait 4 | report 4 | save 4 | launch 5 | wait 5 | launch 6 | wait 6 | report 6 | "
        "validate | validation 6 | launch 7 | launch 8 | wait 7 | wait 8 | report 8 | validate | validation 8 | "
        "save 8"
    )


def test_samples_follow_the_report_of_their_step(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    samples = "logging.samples={prompts: [def], interval_steps: 3, max_new_tokens: 1}"
    with caplog.at_level(logging.INFO, "deepseek_v3"):
        trainer_on(SimulatedGPU(), monkeypatch, run, samples).run()
    starts = ("Step 3/", "After step 3", "Step 4/", "Step 5/", "Step 6/", "After step 6", "Step 7/")
    found = [start for message in caplog.messages for start in starts if message.startswith(start)]
    assert found == list(starts)


@pytest.mark.parametrize(("launching", "working"), [(1, 10), (10, 1)])
@pytest.mark.parametrize("interval", [1, 2])
def test_rates_are_those_of_the_steps_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch, launching: float, working: float, interval: int
) -> None:
    """Whether the GPU or the host is slower: a step takes 10 seconds, or 11 if the GPU had no work before it."""
    overrides = [
        "training.evaluation.interval_steps=3",
        "checkpoint.interval_steps=4",
        f"logging.interval_steps={interval}",
    ]
    trainer_on(SimulatedGPU(launching, working), monkeypatch, run, *overrides).run()
    seconds = [TOKENS_PER_STEP / record["tokens_per_second"] for record in records_of(run)]
    assert all(10 <= each <= 11.001 for each in seconds), seconds


def test_a_signal_stops_with_both_reports(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimulatedGPU()

    def stop(number: int) -> None:
        if number == 4:
            signal.raise_signal(signal.SIGTERM)

    trainer = trainer_on(gpu, monkeypatch, run, "logging.interval_steps=3", step_begins=stop)
    assert trainer.run().step == 4
    assert gpu.trace[-6:] == ["launch 4", "wait 3", "report 3", "wait 4", "report 4", "save 4"]
    assert reported(gpu) == ["report 1", "report 3", "report 4"]


@pytest.mark.parametrize("error", [OSError("lost"), KeyboardInterrupt()])
@pytest.mark.parametrize("inside", [True, False])
def test_an_error_loses_no_report(
    run: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, inside: bool
) -> None:
    """The error of a step, or the end of a benchmark before it."""
    gpu = SimulatedGPU()

    def begins(number: int) -> None:
        if number == 4 and not inside:
            raise error

    fails_at = (4, error) if inside else None
    trainer = trainer_on(gpu, monkeypatch, run, "logging.interval_steps=3", step_begins=begins, fails_at=fails_at)
    with pytest.raises(type(error)) as caught:
        trainer.run()
    assert caught.value is error
    assert reported(gpu) == ["report 1", "report 3"]
    assert [record["step"] for record in records_of(run)] == [1, 3]


def test_an_error_of_the_gpu_stays_the_first_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimulatedGPU()

    def fail(number: int) -> None:
        if number == 4:
            gpu.failure = RuntimeError("the GPU no longer answers")
            raise OSError("first")

    with pytest.raises(OSError, match="first"):
        trainer_on(gpu, monkeypatch, run, step_begins=fail).run()
    assert reported(gpu) == ["report 1", "report 2"]


@pytest.mark.parametrize("runs_ahead", [True, False])
def test_steps_that_are_not_finite_are_reported_in_order(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, runs_ahead: bool
) -> None:
    gpu = SimulatedGPU()
    trainer = trainer_on(gpu, monkeypatch, run, "training.max_skipped_steps=1", not_finite=(3, 4, 5))
    trainer._runs_ahead = runs_ahead
    with caplog.at_level(logging.INFO, "deepseek_v3"), pytest.raises(TrainingError, match="step 4: total loss"):
        trainer.run()
    assert reported(gpu) == ["report 1", "report 2", "report 3", "report 4"]
    assert [record["skipped_steps"] for record in records_of(run)] == [0, 0, 1, 2]
    assert [record["gradient_norm"] is None for record in records_of(run)] == [False, False, True, True]
    starts = ("Step 2/", "step 3: total loss", "Step 3/", "Step 4/")
    assert [start for message in caplog.messages for start in starts if message.startswith(start)] == list(starts)


def test_another_error_comes_before_too_many_skipped_steps(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimulatedGPU()
    fails_at = (5, OSError("lost"))
    allowed = "training.max_skipped_steps=1"
    trainer = trainer_on(gpu, monkeypatch, run, allowed, not_finite=(3, 4), fails_at=fails_at)
    with pytest.raises(OSError, match="lost"):
        trainer.run()
    assert [(record["step"], record["skipped_steps"]) for record in records_of(run)] == [
        (1, 0),
        (2, 0),
        (3, 1),
        (4, 2),
    ]


def test_a_resumed_run_reports_each_step_once(run: Path) -> None:
    for attempt in ("fails", "ends"):
        gpu = SimulatedGPU()
        fails_at = (6, OSError("lost")) if attempt == "fails" else None
        with pytest.MonkeyPatch.context() as patch:
            overrides = ["checkpoint.interval_steps=4"]
            trainer = trainer_on(gpu, patch, run, *overrides, resume="auto", fails_at=fails_at)
            with pytest.raises(OSError, match="lost") if fails_at else nullcontext():
                trainer.run()
    assert gpu.trace[:3] == ["launch 5", "launch 6", "wait 5"]
    assert [record["step"] for record in records_of(run)] == list(range(1, 9))


def test_a_held_out_split_that_is_lost_leaves_a_report(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimulatedGPU()
    overrides = ["training.evaluation.interval_steps=4", "logging.interval_steps=3"]
    trainer = trainer_on(gpu, monkeypatch, run, *overrides)

    def lose(*_: object) -> Any:
        raise DataError("holdout: lost")

    monkeypatch.setattr(trainer.validator, "measure", lose)
    with pytest.raises(DataError, match="holdout: lost"):
        trainer.run()
    assert gpu.trace[-6:] == ["launch 4", "wait 3", "report 3", "wait 4", "report 4", "save 4"]
