"""The trackers with their libraries: what the real ones store, and what ours ask of W&B with and without a key."""

from __future__ import annotations

import json
import logging
import math
import sqlite3
import struct
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepseek_v3.utils.trackers.background import BackgroundTracker
from deepseek_v3.utils.trackers.mlflow_tracker import MlflowTracker
from deepseek_v3.utils.trackers.tracker import RemoteRun, Status, TrackedRun, Tracker
from deepseek_v3.utils.trackers.trackio_tracker import TrackioTracker
from deepseek_v3.utils.trackers.wandb_tracker import WandbTracker

PREFIXES = ("WANDB_", "MLFLOW_", "TRACKIO_")
STEPS: dict[int, dict[str, float | list[float] | None]] = {
    1: {"loss": 2.5, "experts/load": [0.25, math.nan], "loss_terms/z=1": -1e-30, "mfu": None},
    2: {"loss": math.nan, "experts/load": [0.5, 1.5]},
    10: {"loss": math.inf, "tokens": 123_456_789_012, "skipped": 0},
}
STORED = {
    (1, "loss"): 2.5,
    (1, "experts/load/layer_00"): 0.25,
    (1, "experts/load/layer_01"): math.nan,
    (1, "loss_terms/z=1"): -1e-30,
    (2, "loss"): math.nan,
    (2, "experts/load/layer_00"): 0.5,
    (2, "experts/load/layer_01"): 1.5,
    (10, "loss"): math.inf,
    (10, "tokens"): 123_456_789_012,
    (10, "skipped"): 0,
}
RESUMED = {(11, "loss"): 1.25}


@pytest.fixture(autouse=True)
def _no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No key and no setting of this machine; a library's own changes are undone."""
    import os

    for name in [name for name in os.environ if name.startswith(PREFIXES)]:
        monkeypatch.delenv(name)
    for name in ("WANDB_ERROR_REPORTING", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, {"WANDB_ERROR_REPORTING": "false"}.get(name, "true"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield
    for name in [name for name in os.environ if name.startswith(PREFIXES) and name != "WANDB_SERVICE"]:
        monkeypatch.delenv(name)


def run_in(folder: Path, previous: RemoteRun | None = None) -> TrackedRun:
    config = {"training.seed": 0, "training.schedule.kind": "cosine", "model.q_lora_rank": None}
    return TrackedRun(folder, None, None, "run-1", config, previous)


def track(
    make: Callable[[], Tracker], run: TrackedRun, steps: Mapping[int, Any], status: Status = Status.FINISHED
) -> RemoteRun:
    """Runs a tracker as training does; fails the test unless everything has arrived."""
    started: list[RemoteRun] = []
    background = BackgroundTracker("real", make(), run, started.append)
    for step, values in steps.items():
        background.log_scalars(step, values)
    background.log_text(max(steps), "samples/00", "def <f>(x):\n  return x")
    background.close(status)
    background.wait(time.monotonic() + 120)
    return started[0]


@pytest.fixture
def no_warning(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("deepseek_v3")]
    assert [message for message in ours if "failed" in message or "missing" in message] == []


def equal(found: Mapping[Any, Any], expected: Mapping[Any, float]) -> bool:
    return {key: float(value) for key, value in found.items()} == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


@pytest.mark.usefixtures("no_warning")
def test_trackio_stores_every_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    folder = trackio.utils.TRACKIO_DIR  # read on its first import
    project = f"test-{tmp_path.name}"
    monkeypatch.setenv("TRACKIO_PROJECT", project)
    first = track(TrackioTracker, run_in(tmp_path), STEPS)
    second = track(TrackioTracker, run_in(tmp_path, first), {11: {"loss": 1.25}})
    assert (second.id, second.name, second.continued) == (first.id, "run-1", True)
    other = track(TrackioTracker, run_in(tmp_path), {12: {"loss": 9.0}})  # takes the name
    third = track(TrackioTracker, run_in(tmp_path, first), {13: {"loss": 9.0}})
    assert len({first.id, other.id, third.id}) == 3
    with closing(sqlite3.connect(folder / f"{project}.db")) as database:
        rows = database.execute("SELECT step, metrics FROM metrics WHERE run_id = ?", (first.id,)).fetchall()
        ((config,),) = database.execute("SELECT config FROM configs WHERE run_id = ?", (first.id,)).fetchall()
    stored = {(step, name): value for step, values in rows for name, value in json.loads(values).items()}
    assert "def <f>(x):\n  return x" in stored.pop((10, "samples/00"))["_value"]
    stored.pop((11, "samples/00"))
    assert equal(stored, STORED | RESUMED)
    assert json.loads(config)["training.schedule.kind"] == "cosine"
    assert first.place == f"open it with: trackio show --project {project}"


@pytest.mark.usefixtures("no_warning")
def test_mlflow_stores_every_value(tmp_path: Path) -> None:
    pytest.importorskip("alembic")
    pytest.importorskip("mlflow")
    folder = tmp_path / "a run % # é"
    folder.mkdir()
    handlers = list(logging.getLogger().handlers)
    first = track(MlflowTracker, run_in(folder), STEPS, Status.STOPPED)
    assert run_status(folder) == {first.id: "KILLED"}
    changed = replace(run_in(folder, first), config={"training.seed": 1, "new": "field"})
    second = track(MlflowTracker, changed, {11: {"loss": 1.25}}, Status.FAILED)
    assert (second.id, second.name, second.continued) == (first.id, "run-1", True)
    assert run_status(folder) == {first.id: "FAILED"}
    with closing(sqlite3.connect(folder / "mlflow" / "mlflow.db")) as database:
        rows = database.execute("SELECT step, key, value, is_nan FROM metrics").fetchall()
        parameters = dict(database.execute("SELECT key, value FROM params").fetchall())
    stored = {(step, name): math.nan if is_nan else value for step, name, value, is_nan in rows}
    expected = {(step, name.replace("=", "_")): value for (step, name), value in (STORED | RESUMED).items()}
    assert equal(stored, expected | {(10, "loss"): math.nan})
    assert parameters == {
        "training.seed": "0",  # MLflow refuses to change it
        "training.schedule.kind": "cosine",
        "model.q_lora_rank": "None",
        "new": "field",
    }
    (text,) = folder.rglob("step_000000010.txt")
    assert text.read_text() == "def <f>(x):\n  return x"
    assert [path.name for path in folder.iterdir()] == ["mlflow"]
    assert logging.getLogger().handlers == handlers
    other = track(MlflowTracker, run_in(folder, RemoteRun("0" * 32, "deepseek_v3", "x", "")), {1: {}})
    assert not other.continued


def run_status(folder: Path) -> dict[str, str]:
    with closing(sqlite3.connect(folder / "mlflow" / "mlflow.db")) as database:
        return dict(database.execute("SELECT run_uuid, status FROM runs").fetchall())


def finished_records(file: Path) -> list[Any]:
    """The records of a .wandb file, once W&B's process, which writes a moment later, has written the last one."""
    while not any(record.WhichOneof("record_type") == "exit" for record in wandb_records(file)):
        time.sleep(0.01)
    return list(wandb_records(file))


def wandb_records(file: Path) -> Iterator[Any]:
    """The complete records of a .wandb file: LevelDB's log format (blocks of 32 KiB) after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, record = file.read_bytes(), 7, b""
    while position < len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        if position + 7 > len(data):
            return
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if position > len(data):
            return
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


@pytest.mark.usefixtures("no_warning")
def test_wandb_stores_every_value_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    hooks = sys.excepthook, sys.exit
    first = track(WandbTracker, run_in(tmp_path), STEPS, Status.STOPPED)
    second = track(WandbTracker, run_in(tmp_path, first), {11: {"loss": 1.25}})
    assert (sys.excepthook, sys.exit) == hooks
    assert (second.id, second.name, second.continued) == (first.id, "run-1", True)
    folders = [Path(run.place.rpartition(" ")[2]) for run in (first, second)]
    assert all(folder.parent == tmp_path / "wandb" for folder in folders)
    stored, codes, config = {}, [], {}
    for folder in folders:
        for record in finished_records(folder / f"run-{first.id}.wandb"):
            items = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
            }
            stored |= {(items["_step"], name): value for name, value in items.items() if name[0] != "_"}
            codes += [record.exit.exit_code] if record.WhichOneof("record_type") == "exit" else []
            config |= {entry.key: entry.value_json for entry in record.run.config.update}
    assert codes == [255, 0]
    assert config["training.schedule.kind"] == '"cosine"'
    assert {step for step, name in stored if name.startswith("samples")} == {10, 11}
    assert equal({key: value for key, value in stored.items() if "samples" not in key[1]}, STORED | RESUMED)


# W&B without a server


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A stand-in for the library, which records the arguments of `init`, and all calls of the run."""
    fake = types.SimpleNamespace(init_arguments=[], logged=[], codes=[], step=0)

    def init(**arguments: Any) -> types.SimpleNamespace:
        fake.init_arguments.append(arguments)
        sys.excepthook = print
        return types.SimpleNamespace(
            id=arguments["id"] or "new1",
            name=arguments["name"],
            offline=arguments["mode"] == "offline",
            disabled=arguments["mode"] == "disabled",
            url="https://me:secret99@host/run",
            dir="/runs/wandb/offline-run-1/files",
            step=fake.step,
            log=lambda values, step: fake.logged.append((step, values)),
            finish=lambda exit_code: fake.codes.append(exit_code),
        )

    module = types.ModuleType("wandb")
    module.init, module.Settings = init, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return fake


def test_wandb_is_offline_without_a_key(wandb: types.SimpleNamespace, tmp_path: Path) -> None:
    assert (
        WandbTracker().start(run_in(tmp_path)).place
        == "offline; upload it with: wandb sync /runs/wandb/offline-run-1"
    )
    (arguments,) = wandb.init_arguments
    assert (arguments["mode"], arguments["dir"], arguments["project"]) == ("offline", tmp_path, "deepseek_v3")
    assert sys.excepthook is not print


@pytest.mark.parametrize("source", ["variable", "netrc", "named netrc"])
def test_wandb_is_online_with_a_key(
    source: str, wandb: types.SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source == "variable":
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    else:
        file = tmp_path / "home" / ".netrc" if source == "netrc" else tmp_path / "netrc"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"machine wandb.example\n  login user\n  password {'a' * 40}\n")
        file.chmod(0o600)
        monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
        if source == "named netrc":
            monkeypatch.setenv("NETRC", str(file))
    assert WandbTracker().start(run_in(tmp_path)).place == "https://***@host/run"
    assert wandb.init_arguments[0]["mode"] is None  # the library's own default


def test_wandb_asks_for_no_key(
    wandb: types.SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ValueError, match="WANDB_MODE is online, and there is no key; run `wandb login`"):
        WandbTracker().start(run_in(tmp_path))
    assert wandb.init_arguments == []
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert WandbTracker().start(run_in(tmp_path)).place == "WANDB_MODE is disabled, so nothing is kept"


def test_wandb_variables_are_respected(
    wandb: types.SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PROJECT", "NAME", "RUN_ID", "DIR"):
        monkeypatch.setenv(f"WANDB_{name}", name.lower())
    WandbTracker().start(run_in(tmp_path))
    arguments = wandb.init_arguments[0]
    assert [arguments[name] for name in ("project", "name", "id", "dir")] == ["project", "name", "run_id", "dir"]


def test_wandb_continues_after_its_last_step(wandb: types.SimpleNamespace, tmp_path: Path) -> None:
    wandb.step = 9  # the previous process had trained on after its last checkpoint
    tracker = WandbTracker()
    assert tracker.start(run_in(tmp_path, RemoteRun("old1", "deepseek_v3", "run-1", ""))).continued
    assert (wandb.init_arguments[0]["id"], wandb.init_arguments[0]["resume"]) == ("old1", "allow")
    for step in (8, 9, 10):
        tracker.log_scalars(step, {"loss": 1.0})
    tracker.finish(Status.FAILED)
    assert [step for step, _ in wandb.logged] == [9, 10]
    assert wandb.codes == [1]
