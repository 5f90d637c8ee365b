"""How a run's layers are executed: bytes per activation, compilation, and the division of experts over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.fp8_choice import layers_in_fp8, shipped_speeds
from deepseek_v3.planning.hardware import Device, find_device, known_devices
from deepseek_v3.utils.errors import ConfigError

LayerKind = Literal["dense", "moe", "mtp"]

# Numbers in one chunk of logits, as in ops/cross_entropy/chunked.py.
_LOGITS_AT_ONCE = {"gpu": 1 << 28, "cpu": 1 << 20}

# Bytes of a number in FP8 with a float32 scale: of activations for each 128 of a row or column, and of weights for
# each block of 128 × 128.
FP8_ACTIVATION = 1 + 4 / 128
FP8_WEIGHT = 1 + 4 / 128**2

# Rows of the busiest rank's experts over the rows of an even load: an assumption, not measured.
_UNEVEN_EXPERTS = 1.2


@dataclass(frozen=True)
class Execution:
    """How the layers of a run are executed.

    `width`: bytes of one activation. `compiled`: the layers are compiled, in bfloat16. `has_kernels`: layers that
    are not compiled run on a GPU, whose kernels save less than the operations of a CPU. `compiled_in_parts`: the
    attention and the feed-forward network are compiled separately; an MTP layer's input projection is not compiled.

    `expert_imbalance`: rows of the busiest rank's experts over the rows of an even load; 1 if one rank holds all
    experts. `logits_per_chunk`: numbers in one chunk of the loss. `mask_bytes`: bytes of the attention mask of
    separate documents that a layer keeps per token; 0 without such a mask.

    `fp8`: the names of the layers that multiply in FP8 (`fp8_choice.py`), and save their inputs for the backward
    pass in FP8. `keeps_fp8_weights`: they also save their weights; otherwise the weights, which are gathered for
    each pass, are quantized again. `received_bytes`: bytes per token and channel of the tokens that the experts of
    a rank receive through their exchange; 0 without an exchange.
    """

    width: Literal[2, 4]
    compiled: bool
    expert_imbalance: float = 1.0
    logits_per_chunk: int = _LOGITS_AT_ONCE["gpu"]
    mask_bytes: int = 0
    compiled_in_parts: bool = False
    has_kernels: bool = False
    fp8: frozenset[str] = frozenset()
    keeps_fp8_weights: bool = True
    received_bytes: float = 0.0


def resolve_execution(device: Device, config: RunConfig) -> Execution:
    """How this device executes a run: what `training/parallel/parallelize.py` makes of its `parallel` section.

    Raises ConfigError for FP8 on a GPU that has no rate for it. On a CPU, FP8 runs by its definition, for tests,
    with float32 between the products.
    """
    parallel, model = config.parallel, config.model
    has_bfloat16 = device.bfloat16_tflops is not None
    precision = parallel.precision
    if precision == "fp8" and not device.is_cpu and device.fp8_tflops is None:
        known = ", ".join(each.name for each in known_devices() if each.fp8_tflops is not None)
        raise ConfigError(
            f"parallel.precision = fp8: FP8 training is not known to run on {device.name}, but on {known}; "
            "use --set parallel.precision=bf16"
        )
    narrow = precision == "bf16" or (precision in ("auto", "fp8") and has_bfloat16)
    fits_kernels = model.hidden_size % 8 == 0 and model.moe_intermediate_size % 8 == 0
    width: Literal[2, 4] = 2 if narrow else 4
    compiled = narrow and has_bfloat16 and fits_kernels and parallel.compile is not False
    exchanging = parallel.expert
    imbalance = _UNEVEN_EXPERTS if exchanging > 1 else 1.0
    received = imbalance * ranks_reached(exchanging, model.num_experts_per_tok) if exchanging > 1 else 0.0
    return Execution(
        width=width,
        compiled=compiled,
        compiled_in_parts=compiled and (parallel.recomputation == "selective" or exchanging > 1),
        has_kernels=not device.is_cpu,
        expert_imbalance=imbalance,
        logits_per_chunk=_LOGITS_AT_ONCE["cpu" if device.is_cpu else "gpu"],
        fp8=_layers_in_fp8(device, config),
        keeps_fp8_weights=parallel.data_ranks == 1 or parallel.zero_stage < 3 or parallel.pipeline > 1,
        received_bytes=(FP8_ACTIVATION if parallel.dispatch_precision == "fp8" else width) * received,
        mask_bytes=width * config.training.sequence_length if config.data.mask_documents else 0,
    )


def _layers_in_fp8(device: Device, config: RunConfig) -> frozenset[str]:
    """The layers in FP8; with `auto` there are none on a device that FP8 does not run on, or on a CPU."""
    if config.parallel.precision == "auto" and device.fp8_tflops is None:
        return frozenset()
    return layers_in_fp8(config, _driver_name(device))


def _driver_name(device: Device) -> str:
    """The name under which the table of measured speeds has this card: the planner's own names are shorter."""
    card = find_device(device.name)
    same_card = (row.device for row in shipped_speeds() if find_device(row.device) == card)
    return device.name if card is None else next(same_card, device.name)


def ranks_reached(places: float, chosen: int) -> float:
    """Mean number of ranks (or nodes) with any of a token's `chosen` experts, if `places` share all experts."""
    return places * (1 - (1 - 1 / places) ** chosen)
