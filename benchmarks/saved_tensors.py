"""Records what compiled layers save for their backward pass, on a GPU, for the tests of the planner's estimates:

    python benchmarks/saved_tensors.py --output tests/unit/planning/compiled_saved_tensors.json

Layers run as in training: compiled, with the back ends of the device. The record has the saved tensors of every
kind of layer in autograd's order, each storage once, and by how much allocated memory grew in the forward pass.
"""

from __future__ import annotations

import gc
import json
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from environment import environment, select_gpu
from torch import Tensor, nn

from deepseek_v3.benchmark.shape_files import shape_file
from deepseek_v3.config.loading import load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.mla.attention import AttentionMetadata
from deepseek_v3.mla.rotary import rotary_tables
from deepseek_v3.model.block import DecoderLayer
from deepseek_v3.model.mtp import MTPLayer
from deepseek_v3.training.parallel.mesh import build_mesh
from deepseek_v3.training.parallel.parallelize import build_model
from deepseek_v3.utils.command_line import run_command
from deepseek_v3.utils.distributed.launch import World
from deepseek_v3.utils.logging import configure_logging

_ONE_DEPTH = "model.num_nextn_predict_layers=1"
# Shape, precision, sequences and overrides of every point.
POINTS: tuple[tuple[str, str, int, list[str]], ...] = (
    ("1b", "bf16", 8, [_ONE_DEPTH]),
    ("v3slice", "bf16", 2, []),
    ("v3slice", "fp8", 2, []),
    ("1b", "fp8", 8, [_ONE_DEPTH]),
    ("1b", "fp32", 2, [_ONE_DEPTH]),
)


def main(output: Annotated[Path, typer.Option(help="Where the record is written.")]) -> None:
    """Record the tensors of each kind of layer of every point."""
    configure_logging(logging.WARNING)
    device = select_gpu(World.from_environment())
    points = [_point(device, *point) for point in POINTS]
    record = {**environment("torch"), "points": points}
    output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for point in points:
        typer.echo(f"{point['name']} {point['precision']}: {[layer['allocated_mib'] for layer in point['layers']]}")


def _point(
    device: torch.device, shape: str, precision: str, sequences: int, overrides: list[str]
) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        places = [f"checkpoint.directory={folder}/checkpoints", f"logging.directory={folder}/run"]
        size = [f"parallel.micro_batch_size={sequences}", f"training.global_batch_size={sequences}"]
        config = load_config(shape_file(shape), [*places, *size, f"parallel.precision={precision}", *overrides])
    model = build_model(config, device, build_mesh(config.parallel, "cuda", 1), wrap=lambda model: model)
    layers: dict[str, nn.Module] = {}
    for number, layer in enumerate(model.model.layers):
        layers.setdefault(_kind(layer, number, config), layer)
    point = {
        "name": shape,
        "precision": precision,
        "sequences": config.parallel.micro_batch_size,
        "sequence_length": config.training.sequence_length,
        "model": config.model.model_dump(exclude_defaults=True),
        "layers": [_layer(layer, kind, config, device) for kind, layer in layers.items()],
    }
    del model, layers
    gc.collect()
    torch.cuda.empty_cache()
    return point


def _kind(layer: nn.Module, number: int, config: RunConfig) -> str:
    if isinstance(layer, MTPLayer):
        return "mtp"
    return "dense" if number < config.model.first_k_dense_replace else "moe"


def _layer(layer: nn.Module, kind: str, config: RunConfig, device: torch.device) -> dict[str, Any]:
    """One layer's record, of its second step: the first one compiles it and fills the workspaces."""
    assert isinstance(layer, DecoderLayer)
    length = config.training.sequence_length - (kind == "mtp")
    positions_BS = torch.arange(length, device=device)[None]
    metadata = AttentionMetadata(positions_BS, *rotary_tables(positions_BS, config.model))
    dtype = torch.float32 if config.parallel.precision == "fp32" else torch.bfloat16
    shape = (config.parallel.micro_batch_size, length, config.model.hidden_size)
    inputs = [
        torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2 if kind == "mtp" else 1)
    ]
    output, _ = layer(*inputs, metadata)
    output.sum().backward()
    layer.zero_grad()
    for tensor in inputs:
        tensor.grad = None
    del output
    names = {parameter.data_ptr(): "parameter" for parameter in layer.parameters()}
    saved: list[str] = []
    storages: set[int] = set()

    def describe(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place in storages:
            return tensor
        storages.add(place)
        size = "x".join(map(str, tensor.shape)) or "scalar"
        words = [size, str(tensor.dtype).removeprefix("torch."), names.get(tensor.data_ptr(), "")]
        saved.append(" ".join(words).strip())
        return tensor

    gc.collect()
    before = torch.cuda.memory_allocated()
    output, _ = layer(*inputs, metadata)
    grown = torch.cuda.memory_allocated() - before
    del output
    with torch.autograd.graph.saved_tensors_hooks(describe, lambda tensor: tensor):
        output, _ = layer(*inputs, metadata)
    del output
    return {"kind": kind, "allocated_mib": round(grown / 2**20, 2), "saved": saved}


if __name__ == "__main__":
    run_command(main)
