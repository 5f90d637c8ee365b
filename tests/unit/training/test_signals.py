"""Requests to stop: of one process, and of several ranks, which stop after the same step."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch

from deepseek_v3.config.parallel_config import ParallelConfig
from deepseek_v3.config.train_config import CheckpointConfig
from deepseek_v3.training.checkpoint import CheckpointManager
from deepseek_v3.training.parallel.mesh import ParallelMesh
from deepseek_v3.training.signals import GracefulStop
from deepseek_v3.training.train import train
from deepseek_v3.utils.checkpointing import writer
from deepseek_v3.utils.checkpointing.directory import load_checkpoint
from deepseek_v3.utils.checkpointing.safetensors_file import WrittenFile
from deepseek_v3.utils.checkpointing.sharded import ShardedWriter
from deepseek_v3.utils.distributed.launch import World, process_group
from helpers.jobs import HANGS, Job
from helpers.runs import write_run

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]


class _ActedAtOnceError(Exception):
    """Raised by the handler that was there before."""


@pytest.fixture
def handled_before() -> Iterator[None]:
    def handle(number: int, frame: object) -> None:
        raise _ActedAtOnceError

    earlier = {number: signal.signal(number, handle) for number in SIGNALS}
    yield
    for number, handler in earlier.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.usefixtures("handled_before")
def test_alone_the_first_signal_asks_and_the_second_acts(number: signal.Signals) -> None:
    with GracefulStop() as stop:
        stop.install()
        assert not stop.requested
        assert not stop.should_stop()
        signal.raise_signal(number)
        assert stop.requested
        assert stop.should_stop()
        with pytest.raises(_ActedAtOnceError):
            signal.raise_signal(number)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.usefixtures("handled_before")
def test_afterwards_signals_act_as_before(number: signal.Signals) -> None:
    with GracefulStop() as stop:
        stop.install()
    with pytest.raises(_ActedAtOnceError):
        signal.raise_signal(number)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.usefixtures("handled_before")
def test_before_it_listens_signals_act_as_before(number: signal.Signals) -> None:
    with GracefulStop(), pytest.raises(_ActedAtOnceError):
        signal.raise_signal(number)


@pytest.mark.usefixtures("handled_before")
def test_of_ignored_signals_only_sighup_stays_ignored() -> None:
    """nohup ignores SIGHUP for a run that outlives its terminal; batch scripts ignore signals that they pass on."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with GracefulStop() as stop:
        stop.install()
        signal.raise_signal(signal.SIGHUP)
        assert not stop.requested
        signal.raise_signal(signal.SIGUSR1)
        assert stop.requested
    assert all(signal.getsignal(number) is signal.SIG_IGN for number in SIGNALS)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.usefixtures("handled_before")
def test_a_second_signal_waits_for_the_end_of_a_save(number: signal.Signals) -> None:
    with GracefulStop() as stop:
        stop.install()
        saved = False
        with pytest.raises(_ActedAtOnceError):  # noqa: PT012, SIM117 -- the save is what it must not interrupt
            with stop.saving(last=False):
                for _ in range(5):
                    signal.raise_signal(number)
                saved = True
        assert saved


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.usefixtures("handled_before")
def test_from_the_last_save_on_only_ctrl_c_acts(number: signal.Signals) -> None:
    with GracefulStop() as stop:
        stop.install()
        with stop.saving(last=True):
            for _ in range(5):
                signal.raise_signal(number)
        signal.raise_signal(number)
        with pytest.raises(_ActedAtOnceError):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("handled_before")
def test_the_error_of_a_save_comes_before_a_signal() -> None:
    with GracefulStop() as stop, pytest.raises(ValueError, match="full"):  # noqa: PT012
        stop.install()
        with stop.saving(last=False):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise ValueError("full")


def _train(world: World, signals: dict[tuple[int, int], signal.Signals], folder: Path) -> None:
    """Steps that signal this rank as `signals`, by rank and step, says; writes down the last one."""
    with process_group(world, torch.device("cpu"), timedelta(seconds=HANGS)), GracefulStop(world.size) as stop:
        stop.install()
        for step in range(1, 9):
            if (world.rank, step) in signals:
                os.kill(os.getpid(), signals[world.rank, step])
                os.kill(os.getpid(), signals[world.rank, step])  # once more, as launchers do
            if stop.should_stop():
                break
        (folder / f"stopped_{world.rank}").write_text(str(step))


@pytest.mark.parametrize(
    ("signals", "last_step", "name"),
    [
        ({(2, 3): signal.SIGUSR1}, 3, "SIGUSR1"),
        ({(0, 5): signal.SIGTERM, (1, 4): signal.SIGINT}, 4, "SIGINT"),
        ({(rank, 1): signal.SIGTERM for rank in range(3)}, 1, "SIGTERM"),
        ({}, 8, None),
    ],
)
def test_all_ranks_stop_after_the_same_step(
    tmp_path: Path, signals: dict[tuple[int, int], signal.Signals], last_step: int, name: str | None
) -> None:
    outcome = Job(tmp_path, 3, partial(_train, signals=signals, folder=tmp_path)).outcome()
    assert outcome.codes == [0, 0, 0]
    assert {path.read_text() for path in tmp_path.glob("stopped_*")} == {str(last_step)}
    assert len(list(tmp_path.glob("stopped_*"))) == 3
    assert outcome.lines == ([f"[Trainer] {name}: all ranks stop after this step and save"] if name else [])


def _train_and_signal_in_the_last_save(world: World, config: Path) -> None:
    """Trains as the command does; rank 1 is signalled when nothing but the background save is left to wait for."""
    write, wait, waiting = writer.write_tensor_file, ShardedWriter.wait, threading.Event()

    def told_wait(writer: ShardedWriter) -> None:
        if writer._pending is not None:
            waiting.set()
        wait(writer)

    def signalled_write(path: Path, tensors: dict[str, torch.Tensor]) -> WrittenFile:
        assert waiting.wait(timeout=HANGS)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        return write(path, tensors)

    if world.rank == 1:
        writer.write_tensor_file, ShardedWriter.wait = signalled_write, told_wait
    variables = {"RANK": world.rank, "WORLD_SIZE": 2, "LOCAL_RANK": world.rank, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.environ |= {"MASTER_ADDR": world.address, "MASTER_PORT": str(world.port)}
    train(config, ["parallel.data_shard=2"], device="cpu")


def test_signals_in_the_last_save_of_several_ranks_lose_nothing(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=1)
    outcome = Job(tmp_path, 2, partial(_train_and_signal_in_the_last_save, config=config)).outcome()
    assert outcome.codes == [0, 0], outcome.lines
    saved = tmp_path / "checkpoints" / "checkpoint_step_1"
    assert load_checkpoint(saved)["step"] == 1
    assert [line for line in outcome.lines if "Saved" in line] == [f"[Trainer] Saved {saved}"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("kind", ["background", "file"])
def test_saved_is_said_when_it_is(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ranks = ParallelMesh(ParallelConfig(data_shard=2 if kind == "background" else 1))
    gate, write = threading.Event(), writer.write_tensor_file

    def gated(path: Path, tensors: dict[str, torch.Tensor]) -> WrittenFile:
        assert gate.wait(timeout=HANGS)
        return write(path, tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "write_tensor_file", gated)
        with CheckpointManager(CheckpointConfig(directory=tmp_path), ranks) as checkpoints:
            path = checkpoints.save(1, {"model": {"weight": torch.ones(2)}})
            assert caplog.messages == ([] if kind == "background" else [f"Saved {path}"])
            gate.set()
    assert caplog.messages == [f"Saved {path}"]
