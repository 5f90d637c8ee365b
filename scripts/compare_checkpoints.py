"""Says whether two checkpoints hold the same training state bit for bit: `compare_checkpoints.py A.pt B.pt`.

Compares parameters, optimizer, expert biases, progress and random state, everything but the run's own config.
Exits with 1 and names each difference where there is one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from deepseek_v3.utils.checkpointing import load_checkpoint
from deepseek_v3.utils.commands import run_command


def compare(first: Annotated[Path, typer.Argument()], second: Annotated[Path, typer.Argument()]) -> None:
    """Compare two checkpoints bit for bit."""
    left, right = (_flat(load_checkpoint(path)) for path in (first, second))
    differences = sorted(left.keys() ^ right.keys())
    differences += [name for name in left.keys() & right.keys() if not _equal(left[name], right[name])]
    for name in differences:
        typer.echo(f"differs: {name}")
    if differences:
        raise typer.Exit(1)
    tensors = [value for value in left.values() if isinstance(value, torch.Tensor)]
    typer.echo(f"equal bit for bit: {len(tensors)} tensors, {sum(t.numel() for t in tensors):,} numbers")


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Every leaf of nested dicts and lists under its path."""
    if isinstance(value, dict):
        items = [(f"{name}.{key}" if name else str(key), entry) for key, entry in value.items()]
    elif isinstance(value, list):
        items = [(f"{name}[{index}]", entry) for index, entry in enumerate(value)]
    else:
        return {name: value}
    return {leaf: found for path, entry in items if path != "config" for leaf, found in _flat(entry, path).items()}


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return bool(left == right)


if __name__ == "__main__":
    run_command(compare)
