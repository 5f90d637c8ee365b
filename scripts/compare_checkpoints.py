"""Compares the training state of two checkpoints bit for bit: `compare_checkpoints.py A.pt B.pt`.

Each may be a file or a folder. Compares parameters, optimizer, expert biases, progress and random state, not the
config of the run. Lists every difference (of a tensor: how many elements differ, and the first of them) and exits
with 1 if there is any.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Annotated, Any

from deepseek_v3.utils.interrupts import exit_on_interrupt

with exit_on_interrupt():
    import torch
    import typer
    from torch import Tensor

    from deepseek_v3.utils.checkpointing.directory import load_checkpoint
    from deepseek_v3.utils.command_line import run_command


def compare(first: Annotated[Path, typer.Argument()], second: Annotated[Path, typer.Argument()]) -> None:
    """Compare two checkpoints bit for bit."""
    left, right = (_flat(load_checkpoint(path)) for path in (first, second))
    names = sorted(left.keys() | right.keys())
    differences = [(name, found) for name in names if (found := _difference(name, left, right, first, second))]
    for name, found in differences:
        typer.echo(f"differs: {name}: {found}")
    if differences:
        typer.echo(f"{len(differences)} of {len(names)} entries differ")
        raise typer.Exit(1)
    tensors = [value for value in left.values() if isinstance(value, Tensor)]
    typer.echo(f"equal bit for bit: {len(tensors)} tensors, {sum(t.numel() for t in tensors):,} numbers")


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Every leaf of nested dicts, lists and tuples by its path; each container also by its kind, as `name{}`."""
    if isinstance(value, dict):
        items = [(_below(name, key), entry) for key, entry in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(f"{name}[{index}]", entry) for index, entry in enumerate(value)]
    else:
        return {name: value}
    kind = "[]" if isinstance(value, list) else "()" if isinstance(value, tuple) else "{}"
    inner = {leaf: found for path, entry in items if path != "config" for leaf, found in _flat(entry, path).items()}
    return {f"{name}{kind}": len(value), **inner} if name else inner


def _below(name: str, key: Any) -> str:
    if not isinstance(key, str):
        return f"{name}[{key!r}]"
    return f"{name}.{key}" if name else key


def _difference(name: str, left: dict[str, Any], right: dict[str, Any], first: Path, second: Path) -> str | None:
    """Describes how an entry differs; None where it is bit-identical."""
    if name not in left or name not in right:
        return f"is only in {first if name in left else second}"
    one, other = left[name], right[name]
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _difference_of_tensors(one, other)
    if type(one) is not type(other):
        return f"is {type(one).__name__} and {type(other).__name__}"
    equal = struct.pack("<d", one) == struct.pack("<d", other) if isinstance(one, float) else one == other
    return None if equal else f"{_shown(one)} and {_shown(other)}"


def _difference_of_tensors(one: Tensor, other: Tensor) -> str | None:
    if one.dtype != other.dtype or one.shape != other.shape:
        return f"{one.dtype} {list(one.shape)} and {other.dtype} {list(other.shape)}"
    differs = (_bytes(one) != _bytes(other)).any(dim=1)
    count = int(differs.sum())
    if not count:
        return None
    place = int(differs.to(torch.uint8).argmax())
    index = [int(number) for number in torch.unravel_index(torch.tensor(place), one.shape)] if one.ndim else []
    values = (f"{t.reshape(-1)[place].item()} (bytes {_hex(_bytes(t)[place])})" for t in (one, other))
    return f"{count:,} of {one.numel():,} numbers, first at {index}: {' and '.join(values)}"


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: uint8 [elements, bytes per element]."""
    return tensor.detach().contiguous().reshape(-1, 1).view(torch.uint8)


def _hex(numbers: Tensor) -> str:
    return bytes(numbers.tolist()).hex()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


if __name__ == "__main__":
    run_command(compare)
