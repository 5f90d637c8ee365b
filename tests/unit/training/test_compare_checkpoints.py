"""Whether two checkpoints are the same bit for bit, and what is said of each difference."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from deepseek_v3.utils.checkpointing.directory import save_checkpoint
from deepseek_v3.utils.checkpointing.sharded import save_sharded
from deepseek_v3.utils.checkpointing.state_dict import flatten
from helpers import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

NANS = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
STATE: dict[str, Any] = {
    "step": 3,
    "config": {"a": 1},
    "rate": 0.0,
    "list": [1, "x", None],
    "model": {"weight": torch.zeros(2, 3), "nans": NANS, "scale": torch.tensor(1.0), "none": torch.zeros(0, 2)},
}


def run(*paths: Path) -> tuple[int, list[str]]:
    """The exit code and the lines of the script."""
    script = ROOT / "scripts" / "compare_checkpoints.py"
    app = Typer()
    app.command()(runpy.run_path(str(script))["compare"])
    result = CliRunner().invoke(app, [str(path) for path in paths])
    return result.exit_code, result.output.splitlines()


def compared(folder: Path, one: dict[str, Any], other: dict[str, Any]) -> tuple[int, list[str]]:
    """The same for two states, saved as A.pt and B.pt."""
    save_checkpoint(folder / "A.pt", one)
    save_checkpoint(folder / "B.pt", other)
    code, lines = run(folder / "A.pt", folder / "B.pt")
    return code, [line.replace(f"{folder}/", "") for line in lines]


def changed(**model: Any) -> dict[str, Any]:
    return {**STATE, "model": {**STATE["model"], **model}}


def test_equal_checkpoints_are_counted(tmp_path: Path) -> None:
    other = {**changed(weight=torch.zeros(3, 2).t()), "config": {"a": 2}}
    assert compared(tmp_path, STATE, other) == (0, ["equal bit for bit: 4 tensors, 9 numbers"])


ZEROS = torch.zeros(2, 3)
ZEROS[0, 2] = ZEROS[1, 0] = -0.0


@pytest.mark.parametrize(
    ("other", "line"),
    [
        (
            changed(weight=ZEROS),
            "model.weight: 2 of 6 numbers, first at [0, 2]: 0.0 (bytes 00000000) and -0.0 (bytes 00000080)",
        ),
        (
            changed(nans=NANS.flip(0)),
            "model.nans: 2 of 2 numbers, first at [0]: nan (bytes 0000c07f) and nan (bytes 0100c07f)",
        ),
        (
            changed(scale=torch.tensor(2.0)),
            "model.scale: 1 of 1 numbers, first at []: 1.0 (bytes 0000803f) and 2.0 (bytes 00000040)",
        ),
        (changed(weight=torch.zeros(3, 2)), "model.weight: torch.float32 [2, 3] and torch.float32 [3, 2]"),
        (changed(none=torch.zeros(0, 3)), "model.none: torch.float32 [0, 2] and torch.float32 [0, 3]"),
        (changed(nans=NANS.view(torch.int32)), "model.nans: torch.float32 [2] and torch.int32 [2]"),
        (changed(scale=1.0), "model.scale: is Tensor and float"),
        ({**STATE, "rate": -0.0}, "rate: 0.0 and -0.0"),
        ({**STATE, "step": True}, "step: is int and bool"),
        ({**STATE, "list": [1, "y", None]}, "list[1]: 'x' and 'y'"),
    ],
)
def test_a_difference_is_told_with_its_place(other: dict[str, Any], line: str, tmp_path: Path) -> None:
    code, lines = compared(tmp_path, STATE, other)
    assert code == 1
    assert lines[0] == f"differs: {line}"
    assert lines[1:] == [f"1 of {len_of(STATE)} entries differ"]


def len_of(state: dict[str, Any]) -> int:
    """Leaves and containers but the config: step, rate, the list and its three items, the model and its four."""
    return 2 + 1 + len(state["list"]) + 1 + len(state["model"])


def test_entries_of_one_side_and_other_containers_are_told(tmp_path: Path) -> None:
    one = {"a": {}, "b": (1,), "c": {1: 2}, "d": None}
    other = {"b": [1], "c": {"1": 2}, "d": None}
    assert compared(tmp_path, one, other) == (
        1,
        [
            "differs: a{}: is only in A.pt",
            "differs: b(): is only in A.pt",
            "differs: b[]: is only in B.pt",
            "differs: c.1: is only in B.pt",
            "differs: c[1]: is only in A.pt",
            "5 of 8 entries differ",
        ],
    )


def test_a_folder_equals_the_file_of_the_same_state(tmp_path: Path) -> None:
    tensors, plain = flatten(STATE)
    folder = save_sharded(tmp_path / "checkpoint_step_3", tensors, plain, None).wait()
    save_checkpoint(tmp_path / "A.pt", STATE)
    assert run(tmp_path / "A.pt", folder) == (0, ["equal bit for bit: 4 tensors, 9 numbers"])
