"""`dsv3 train --deepspeed` under DeepSpeed's own launcher, with two processes on a CPU."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from deepseek_v3.utils.checkpointing.reader import open_checkpoint
from deepseek_v3.utils.monitoring import read_metrics
from helpers import ROOT
from helpers.jobs import HANGS, free_port
from helpers.runs import dsv3, write_run

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is an extra")
SHIPPED = ROOT / "configs" / "deepspeed_config.json"
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run that DeepSpeed's launcher has started."""
    folder = tmp_path_factory.mktemp("run")
    config = write_run(folder, STEPS)
    (folder / "mlflow.py").write_text("raise ImportError", encoding="utf-8")  # DeepSpeed's tuner imports it
    done = launched(config, SHIPPED)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "output.txt").write_text(done.stdout, encoding="utf-8")
    return folder


def launched(config: Path, settings: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Runs the launcher's command with two processes on the CPU."""
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus=2", f"--master_port={free_port()}"]
    script = [
        ROOT / "src/training/train.py",
        "--config",
        config,
        "--deepspeed",
        settings,
        "--device",
        "cpu",
        *words,
    ]
    variables = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    modules = [str(config.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables["PYTHONPATH"] = os.pathsep.join(modules)
    variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"
    return subprocess.run(
        [*launcher, *map(str, script)], env=variables, capture_output=True, text=True, timeout=HANGS
    )


def test_the_launcher_trains_to_the_end(folder: Path) -> None:
    steps = re.findall(r"\[Trainer\] Step (\d)/4 \| Loss: \d", (folder / "output.txt").read_text())
    assert steps == ["1", "2", "3", "4"]
    losses = [row["loss"] for row in read_metrics(folder / "run" / "metrics.jsonl") if "loss" in row]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    assert open_checkpoint(folder / "checkpoints" / f"checkpoint_step_{STEPS}").plain["step"] == STEPS


def test_one_process_goes_on_from_it(folder: Path, tmp_path: Path) -> None:
    middle = folder / "checkpoints" / "checkpoint_step_2"
    places = ["--set", f"checkpoint.directory={tmp_path}/c", "--set", f"logging.directory={tmp_path}/l"]
    result = dsv3("train", "--config", folder / "run.yaml", "--resume", middle, "--device", "cpu", *places)
    assert result.exit_code == 0, result.output
    first, second = (read_metrics(place / "metrics.jsonl") for place in (folder / "run", tmp_path / "l"))
    assert [row["loss"] for row in second if "loss" in row] == pytest.approx(
        [row["loss"] for row in first if "loss" in row][2:], rel=1e-4
    )
