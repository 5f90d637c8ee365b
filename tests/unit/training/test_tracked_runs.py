"""What a tracker sees of a training run: its config, every record of metrics.jsonl, and how the run ended."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_v3.config.loading import config_from_dict, config_to_yaml, load_config
from deepseek_v3.config.train_config import LoggingConfig, RunConfig
from deepseek_v3.training.metrics import MetricsLogger
from deepseek_v3.training.schedule import TrainingSchedule
from deepseek_v3.training.signals import GracefulStop
from deepseek_v3.training.train import train_run
from deepseek_v3.training.trainer import Trainer
from deepseek_v3.utils.errors import ConfigError, DataError
from deepseek_v3.utils.trackers import select_trackers
from deepseek_v3.utils.trackers.select_trackers import register_tracker
from deepseek_v3.utils.trackers.tracker import RemoteRun, Status, TrackedRun, Tracker, scalars
from helpers.runs import dsv3, message_of, write_run

CPU = torch.device("cpu")


class Recorder(Tracker):
    """Keeps what it is told; `runs` holds all of them."""

    runs: list[Recorder]

    def start(self, run: TrackedRun) -> RemoteRun:
        self.run, self.steps, self.texts, self.status = run, [], [], None  # type: ignore[var-annotated]
        self.runs.append(self)
        return RemoteRun("7", run.project_or("X"), run.name_or("X"), "here", run.previous is not None)

    def log_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self.steps.append((step, dict(scalars)))

    def log_text(self, step: int, name: str, text: str) -> None:
        self.texts.append((step, name, text))

    def finish(self, status: Status) -> None:
        self.status = status


@pytest.fixture(autouse=True)
def _recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_trackers, "_registered", {})
    monkeypatch.setattr(Recorder, "runs", [], raising=False)
    register_tracker("recorder", Recorder)


def config_in(folder: Path, *overrides: str, steps: int = 3) -> RunConfig:
    return load_config(write_run(folder, steps), ["logging.trackers=[recorder]", *overrides])


def records_of(config: RunConfig) -> list[tuple[int, dict[str, float]]]:
    lines = (config.logging.directory / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    alone = ("step", "time", "experts/load")  # not for trackers
    return [(each["step"], scalars({k: v for k, v in each.items() if k not in alone})) for each in records]


def test_a_tracker_gets_every_record_of_a_run(tmp_path: Path) -> None:
    samples = "logging.samples={prompts: [def], interval_steps: 2, max_new_tokens: 2}"
    config = config_in(tmp_path, samples, "logging.project=small", "training.optimizer.eps=1e-7")
    with GracefulStop() as stop:
        stop.request_after_failure()
        train_run(config, CPU, stop=stop)
    (stopped,) = Recorder.runs
    assert stopped.status is Status.STOPPED
    train_run(config, CPU, "latest")
    finished = Recorder.runs[1]
    assert finished.status is Status.FINISHED
    assert stopped.steps + finished.steps == records_of(config)
    assert {step for step, _ in finished.steps} == {2, 3}
    assert finished.run.previous == RemoteRun("7", "small", stopped.run.default_name, "here")
    assert finished.run.default_name == stopped.run.default_name
    assert stopped.run.folder == config.logging.directory.resolve()
    assert [(step, name) for step, name, _ in finished.texts] == [(2, "samples/00")]
    assert finished.texts[0][2].startswith("def")
    told = stopped.run.config
    assert (told["training.optimizer.eps"], told["model.q_lora_rank"], told["training.batch_ramp.initial"]) == (
        1e-7,
        16,
        None,
    )


def test_errors_and_ctrl_c_have_their_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_in(tmp_path, "logging.interval_steps=1")
    trainer = Trainer(config, CPU)
    for error, status in ((OSError("lost"), Status.FAILED), (KeyboardInterrupt(), Status.STOPPED)):

        def fail(*_: object, error: BaseException = error) -> Any:
            raise RuntimeError("archive writer") from error

        monkeypatch.setattr(trainer, "_train_step", fail)
        with pytest.raises(RuntimeError, match="archive writer"):
            trainer.run()
        assert Recorder.runs[-1].status is status


def test_lost_tokens_and_the_watchdog_end_as_failed(tmp_path: Path) -> None:
    trainer = Trainer(config_in(tmp_path), CPU)
    trainer._failure = DataError("shard lost")
    with pytest.raises(DataError, match="shard lost"):
        trainer.run()
    assert Recorder.runs[-1].status is Status.FAILED
    with logger_of(trainer.config) as trainer._reporter:
        trainer.abort()
        assert Recorder.runs[-1].status is Status.FAILED


def logger_of(config: RunConfig, *, writes: bool = True) -> MetricsLogger:
    return MetricsLogger(config, TrainingSchedule(config), CPU, torch.float32, 1, writes)


def test_only_the_writing_rank_has_trackers(tmp_path: Path) -> None:
    with logger_of(config_in(tmp_path), writes=False) as logger:
        logger.log_samples(1, ["text"])
    assert Recorder.runs == []
    assert not (tmp_path / "run").exists()


def test_secrets_in_the_config_stay_here(tmp_path: Path) -> None:
    config = config_in(tmp_path, "data.corpus.source=s3://user:hunter22@bucket/text", "logging.run_name=mine")
    with logger_of(config):
        pass
    (recorder,) = Recorder.runs
    assert recorder.run.config["data.corpus.source"] == "s3://***@bucket/text"
    assert recorder.run.name == "mine"


def test_a_missing_library_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    result = dsv3("train", "--config", write_run(tmp_path), "--set", "logging.trackers=[wandb]", "--device", "cpu")
    assert result.exit_code == 1
    assert message_of(result).startswith(
        "logging.trackers: wandb needs wandb; run `pip install 'deepseek_v3[wandb]'`"
    )
    assert not (tmp_path / "tokens").exists()


def test_a_tracker_that_raises_changes_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left")

    monkeypatch.setattr(Recorder, "log_scalars", fail)
    with caplog.at_level(logging.INFO), logger_of(config_in(tmp_path)) as logger:
        logger._write(1, {"loss": math.nan, "load": [1.0, 2.0]})
        logger._write(2, {"loss": 2.0})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": None, "load": [1.0, 2.0]},
        {"step": 2, "loss": 2.0},
    ]
    assert "recorder: 2 of 2 records are missing there; metrics.jsonl has them all" in caplog.messages


# The config


def test_configs_of_former_checkpoints_have_no_trackers(tmp_path: Path) -> None:
    fields = load_config(write_run(tmp_path), ["logging.tensorboard=true"]).model_dump(mode="json")
    for name in ("trackers", "project", "run_name"):
        fields["logging"].pop(name)
    former = config_from_dict(fields, "checkpoint").logging
    assert (former.tensorboard, former.trackers, former.project, former.run_name) == (True, (), None, None)


def test_trackers_survive_yaml_and_hash(tmp_path: Path) -> None:
    config = config_in(tmp_path, "logging.trackers=[wandb, mlflow]")
    path = tmp_path / "again.yaml"
    path.write_text(config_to_yaml(config), encoding="utf-8")
    assert load_config(path) == config
    assert hash(load_config(path)) == hash(config)
    assert config.logging.trackers == ("wandb", "mlflow")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[wandb, wandb]", "trackers names wandb more than once; name each tracker once"),
        ("wandb", "logging.trackers"),
        ("['']", "logging.trackers"),
    ],
)
def test_invalid_lists_of_trackers_are_refused(value: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        config_in(tmp_path, f"logging.trackers={value}")
    assert message in str(error.value)
    assert LoggingConfig(directory=tmp_path).trackers == ()
