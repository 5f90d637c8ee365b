"""Measures layers in bf16 and FP8, for the choice of `precision: auto`: `python benchmarks/fp8_layers.py`.

Takes each layer of `fp8_layers.yaml`, or of --config, out of a model that was built for training, compiles it by
itself, compares its output and gradients in both precisions, and times a forward and a backward pass of each. After
every layer it writes `results/fp8_layers_DEVICE.json`. Once all layers of the list are measured on a GPU, it
replaces the device's rows of `src/deepseek_v3/planning/fp8_speed.json` by those that follow from the
measurements. With --fit-only it only does that, for every device.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import typer
import yaml
from environment import RESULTS, ROOT, cpu_name, environment
from torch import Tensor, nn

from deepseek_v3.benchmark.ops_cases.case import relative_error
from deepseek_v3.benchmark.timing import median_seconds
from deepseek_v3.config.loading import load_config
from deepseek_v3.model.backends import compute_dtype, select_backends
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.moe.dispatch import LocalDispatcher
from deepseek_v3.moe.experts import RoutedExperts
from deepseek_v3.planning.fp8_choice import SPEED_FILE, LayerSize, MeasuredSpeed, measured_speeds
from deepseek_v3.planning.hardware import find_device
from deepseek_v3.training.parallel.fp8_layers import Fp8Layer, compute_in_fp8, fp8_layers
from deepseek_v3.utils.command_line import run_command
from deepseek_v3.utils.distributed.launch import select_device
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.files import atomic_write
from deepseek_v3.utils.logging import configure_logging, get_logger

LAYERS = Path(__file__).with_suffix(".yaml")
Kind = Literal["projection", "feed_forward", "experts"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FASTER = 1.03  # times as fast as bf16 counts as faster: less may be chance

# The largest relative errors of FP8 beside bf16, in an output or a gradient. A rounding to e4m3 has an error of
# 2.6%; a projection's products have two rounded factors each, and the other layers join several products.
BOUNDS = {"projection": 0.05, "feed_forward": 0.12, "experts": 0.12}

_CACHE_BYTES = 2**28  # more than the cache of any GPU
_log = get_logger("Bench")


@dataclass(frozen=True)
class Measurement:
    """A layer in both precisions.

    `kind`, `rows` and `widths` as in `LayerSize`. `errors` are the relative errors of FP8, by output and gradient.
    The milliseconds are those of a forward and a backward pass; None if the layer `failed`, with the reason.
    """

    name: str
    kind: Kind
    rows: int
    widths: tuple[int, ...]
    errors: dict[str, float]
    ms_bf16: float | None = None
    ms_fp8: float | None = None
    failed: str | None = None

    @property
    def ratio(self) -> float | None:
        """How many times as fast FP8 is; None without times."""
        return None if self.ms_bf16 is None or self.ms_fp8 is None else self.ms_bf16 / self.ms_fp8

    @property
    def is_faster(self) -> bool:
        """Whether FP8 is right, and faster by the least share that counts."""
        return self.ratio is not None and self.ratio >= FASTER

    def is_covered(self, row: MeasuredSpeed) -> bool:
        """Whether a row of the table holds for the layer."""
        return row.covers(LayerSize(self.kind, self.rows, self.widths), row.device)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Measurement:
        fields = {name: value for name, value in stored.items() if name != "ratio"}
        return cls(**{**fields, "widths": tuple(stored["widths"])})

    def __str__(self) -> str:
        size = f"{self.name}: {self.kind}, {self.rows} rows, {'×'.join(map(str, self.widths))}"
        if self.failed is not None:
            return f"{size}: {self.failed}"
        worst = max(self.errors.values())
        return (
            f"{size}: {self.ms_bf16:.3f} ms in bf16, {self.ms_fp8:.3f} in FP8, {self.ratio:.2f}; error {worst:.3f}"
        )


def derive_speeds(device: str, measurements: Sequence[Measurement]) -> list[MeasuredSpeed]:
    """The rows of a device's table: they cover measured layers that were faster in FP8, and no other measured one.

    Each row begins at the size of a measured layer. They are as few as cover every faster layer that a row can
    cover without covering one that was not faster.
    """
    speeds: list[MeasuredSpeed] = []
    for kind in KINDS:
        layers = [each for each in measurements if each.kind == kind]
        sizes = {(each.rows, min(each.widths)) for each in layers if each.is_faster}
        rows = [MeasuredSpeed(device, kind, *size) for size in sorted(sizes)]
        right = [row for row in rows if all(each.is_faster for each in layers if each.is_covered(row))]
        speeds += [row for row in right if not any(other != row and _contains(other, row) for other in right)]
    return speeds


def _contains(larger: MeasuredSpeed, row: MeasuredSpeed) -> bool:
    """Whether one row covers all that another one of the same kind covers."""
    return larger.rows <= row.rows and larger.width <= row.width


@dataclass(frozen=True)
class ListedLayer:
    """A layer to measure: of a config, with a micro-batch size, by its name in `fp8_layers`."""

    config: Path
    micro_batch_size: int
    layer: str

    @property
    def name(self) -> str:
        return f"{self.config.stem}/micro_batch_{self.micro_batch_size}/{self.layer}"


def listed_layers() -> list[ListedLayer]:
    """The layers of `fp8_layers.yaml`, in order."""
    return [
        ListedLayer(ROOT / entry["config"], entry["micro_batch_size"], layer)
        for entry in yaml.safe_load(LAYERS.read_text(encoding="utf-8"))
        for layer in entry["layers"]
    ]


def layers_of(config: Path) -> list[ListedLayer]:
    """Every layer of a config that can compute in FP8, with its own micro-batch size."""
    size = load_config(config).parallel.micro_batch_size
    built = build_layers(config, size, "bf16", torch.device("cpu"))
    return [
        ListedLayer(config, size, name) for name, layer in built.layers.items() if layer.size.obstacle() is None
    ]


@dataclass(frozen=True)
class BuiltLayers:
    """Layers of a model in one precision, by name, without memory for their weights; `dtype` is their inputs'."""

    dtype: torch.dtype
    experts_per_token: int
    layers: dict[str, Fp8Layer]


@cache
def build_layers(config: Path, micro_batch_size: int, precision: str, device: torch.device) -> BuiltLayers:
    """The first layer of each name, as the trainer builds it: with its back ends, its precision and its shard."""
    run = load_config(config)
    parallel = {"micro_batch_size": micro_batch_size, "precision": precision, "compile": "auto"}
    model = {"num_hidden_layers": run.model.first_k_dense_replace + 1, "num_nextn_predict_layers": 0}
    run = run.model_copy(
        update={
            "parallel": run.parallel.model_copy(update=parallel),
            "model": run.model.model_copy(update=model),
        }
    )
    with torch.device("meta"):
        built = DeepSeekV3(run.model)
    dtype = built.compute_dtype = compute_dtype(run.parallel.precision, device)
    select_backends(built, device)
    compute_in_fp8(built, run, device, reshards_weights=False)
    layers: dict[str, Fp8Layer] = {}
    for layer in fp8_layers(built, run):
        layers.setdefault(layer.name, layer)
    for layer in layers.values():
        if isinstance(layer.module, RoutedExperts):
            layer.module.keep_shard(0, run.parallel.expert)
    return BuiltLayers(dtype, run.model.num_experts_per_tok, layers)


class Passes:
    """A forward and a backward pass of a layer, compiled on a GPU as in training.

    `inputs` are the arguments of the layer, `leaves` those of them that have gradients, by name.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[Any], leaves: dict[str, Tensor], grad: Tensor) -> None:
        self.module, self.inputs, self.grad = module, inputs, grad
        self.leaves = {**leaves, **dict(module.named_parameters())}
        if grad.device.type == "cuda":
            from deepseek_v3.training.parallel.weight_gradients_last import WEIGHT_GRADIENTS_LAST  # slow to import

            options: dict[str, Any] = {"post_grad_custom_post_pass": WEIGHT_GRADIENTS_LAST}
            module.compile(fullgraph=True, dynamic=False, options=options)

    def __call__(self, _: int = 0) -> dict[str, Tensor]:
        """The output and all gradients."""
        output = self.module(*self.inputs)
        gradients = torch.autograd.grad(output, list(self.leaves.values()), self.grad)
        return {"output": output.detach(), **dict(zip(self.leaves, gradients, strict=True))}


def make_passes(layer: Fp8Layer, dtype: torch.dtype, experts_per_token: int, device: torch.device) -> Passes:
    """The passes of a layer over random rows, the same ones for each precision.

    The tokens of experts choose among those of the rank at random, as many as give each expert `rows` on average.
    """
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device).bfloat16().to(dtype)

    rows, width = layer.size.rows, layer.size.widths[0]
    if not isinstance(layer.module, RoutedExperts):
        out = layer.size.widths[1] if layer.size.kind == "projection" else width
        x_TD = normal(rows, width).requires_grad_()
        return Passes(layer.module, [x_TD], {"x": x_TD}, normal(rows, out))
    experts = len(layer.module.down_proj)
    chosen = min(experts_per_token, experts)
    tokens = rows * experts // chosen
    x_TD, scores_TE = normal(tokens, width), torch.rand(tokens, experts, generator=random, device=device)
    gates_TK, experts_TK = scores_TE.topk(chosen)
    sent = LocalDispatcher(experts).dispatch(x_TD, gates_TK / gates_TK.sum(-1, keepdim=True), experts_TK)
    leaves = {"x": x_TD.requires_grad_(), "gates": sent.gates_X.requires_grad_()}
    return Passes(layer.module, [x_TD, sent.gates_X, sent.copies, sent.ends_E], leaves, normal(tokens, width))


def measure(listed: ListedLayer, device: torch.device) -> Measurement:
    """Compares a layer in FP8 with bf16, and times both if FP8 is right."""
    in_bf16, in_fp8 = (
        build_layers(listed.config, listed.micro_batch_size, precision, device) for precision in ("bf16", "fp8")
    )
    layers = in_bf16.layers[listed.layer], in_fp8.layers[listed.layer]
    size = layers[0].size
    found = Measurement(listed.name, size.kind, size.rows, size.widths, {})
    _set_weights(*layers, device)
    try:
        bf16 = make_passes(layers[0], in_bf16.dtype, in_bf16.experts_per_token, device)
        fp8 = make_passes(layers[1], in_fp8.dtype, in_fp8.experts_per_token, device)
        found = replace(found, errors=_errors(bf16(), fp8()))
        bound = BOUNDS[found.kind]
        if wrong := {name: error for name, error in found.errors.items() if not error <= bound}:
            return replace(found, failed=f"wrong in FP8: errors {wrong}, expected at most {bound}")
        return replace(found, ms_bf16=_milliseconds(bf16, device), ms_fp8=_milliseconds(fp8, device))
    except Exception as problem:  # noqa: BLE001 -- the other layers can still be measured
        return replace(found, failed=" ".join(f"{type(problem).__name__}: {problem}".split()))
    finally:
        for layer in layers:
            layer.module.to_empty(device="meta")
        torch._dynamo.reset()  # frees the compiled code of the layer, which no other one uses
        gc.collect()


@torch.no_grad()
def _set_weights(bf16: Fp8Layer, fp8: Fp8Layer, device: torch.device) -> None:
    """Gives both the same random weights, in one memory."""
    torch.manual_seed(0)
    bf16.module.to_empty(device=device)
    for parameter in bf16.module.parameters():
        parameter.normal_(std=0.02)
    fp8.module.load_state_dict(bf16.module.state_dict(), assign=True)


def _errors(expected: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, float]:
    return {name: relative_error([found[name]], [expected[name]]) for name in expected}


def _milliseconds(passes: Passes, device: torch.device) -> float:
    """The time of passes whose inputs and weights are in no cache, as in training."""
    if device.type != "cuda":
        return 1e3 * median_seconds(passes, device)
    scratch = torch.empty(_CACHE_BYTES, dtype=torch.uint8, device=device)
    return 1e3 * median_seconds(passes, device, before=scratch.zero_)


def main(
    kind: Annotated[
        list[str] | None, typer.Option(metavar="KIND", help=f"Measure only {', '.join(KINDS)}; repeatable.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Measure only this layer, such as '1b/*'; repeatable.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Measure all layers of this config instead.")] = None,
    fit_only: Annotated[bool, typer.Option("--fit-only", help="Make the table from stored results.")] = False,
    output: Annotated[Path, typer.Option(help="Where the results are written.")] = RESULTS,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    commit: Annotated[str | None, typer.Option(help="Where the code has no history beside it.")] = None,
) -> None:
    """Measure layers in both precisions, and make the table from which `precision: auto` chooses."""
    configure_logging()
    if fit_only:
        for file in sorted(output.glob("fp8_layers_*.json")):
            write_table(file)
        return
    listed = listed_layers() if config is None else layers_of(config)
    chosen = [layer for layer in listed if not only or any(fnmatchcase(layer.name, pattern) for pattern in only)]
    if not chosen:
        raise ConfigError(
            f"--only {', '.join(only or ())}: expected one of {', '.join(each.name for each in listed)}"
        )
    if unknown := set(kind or ()) - set(KINDS):
        raise ConfigError(f"--kind {', '.join(sorted(unknown))}: expected {', '.join(KINDS)}")
    place = select_device(device)
    failed = []
    file = output / f"fp8_layers_{_short_name(place)}.json"
    for measured in measure_layers(chosen, kind or KINDS, file, place, commit):
        typer.echo(measured)
        failed += [measured.name] if measured.failed else []
    if file.is_file():  # there is none if no layer is of these kinds
        write_table(file)
    if failed:
        raise SystemExit(f"failed, and so covered by no row of the table: {', '.join(failed)}")


def measure_layers(
    listed: Sequence[ListedLayer], kinds: Sequence[str], file: Path, device: torch.device, commit: str | None
) -> Iterator[Measurement]:
    """Measures the layers of these kinds, and stores each at once, in place of its earlier measurement."""
    stored = _read(file)["layers"] if file.is_file() else []
    measured = {layer["name"]: layer for layer in stored}
    made_with = environment("torch", "triton", commit=commit)
    made_with["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    for each in listed:
        built = build_layers(each.config, each.micro_batch_size, "bf16", device)
        if built.layers[each.layer].size.kind in kinds:
            found = measure(each, device)
            measured[each.name] = found.as_json()
            _write(file, {**made_with, "device_type": device.type, "layers": list(measured.values())})
            yield found


def write_table(file: Path) -> None:
    """Replaces a device's rows of `fp8_speed.json` by those that follow from its results, if these are complete.

    Results of a CPU, and those without some layer of `fp8_layers.yaml`, leave the table as it is.
    """
    record = _read(file)
    if record["device_type"] != "cuda":
        _log.info(f"{file.name}: {SPEED_FILE.name} is for GPUs, and stays as it is")
        return
    measurements = [Measurement.from_json(layer) for layer in record["layers"]]
    names = {each.name for each in measurements}
    if missing := [each.name for each in listed_layers() if each.name not in names]:
        _log.info(f"{SPEED_FILE.name} stays as it is until these are measured, too: {', '.join(missing)}")
        return
    rows = derive_speeds(record["device"], measurements)
    others = [row for row in measured_speeds(SPEED_FILE) if row.device != record["device"]]
    _write(SPEED_FILE, [asdict(row) for row in (*others, *rows)])
    covered = [each.name for each in measurements if any(each.is_covered(row) for row in rows)]
    _log.info(f"{record['device']}: {len(rows)} rows cover {len(covered)} of {len(names)} measured layers")


def _short_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    name = torch.cuda.get_device_name(device)
    known = find_device(name)
    return (known.name if known else name).lower().replace(" ", "_")


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _write(file: Path, content: object) -> None:
    with atomic_write(file) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
