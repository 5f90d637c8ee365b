"""How a run's layers are executed: the width of activations, compilation, and their division over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.hardware import Device

LayerKind = Literal["dense", "mixture", "prediction"]

# As in ops/cross_entropy/chunked.py.
_LOGITS_AT_ONCE = {"gpu": 1 << 28, "cpu": 1 << 20}

# Rows that the busiest rank gets over those that even loads would give it; an assumption, not measured.
_UNEVEN_EXPERTS = 1.2


@dataclass(frozen=True)
class Execution:
    """`width`: bytes of an activation. `compiled`: layers are compiled, in bfloat16; `in_parts`: attention and
    feed-forward network each by itself, so that what joins a prediction layer's inputs is not compiled.

    `row_factor`: rows that the experts of the busiest rank see over those of even loads; 1 where one rank holds
    all experts. `logits_at_once`: numbers in one chunk of the loss. `mask_bytes`: what a layer keeps per token of
    the mask that parts documents, 0 without one.
    """

    width: Literal[2, 4]
    compiled: bool
    row_factor: float = 1.0
    logits_at_once: int = _LOGITS_AT_ONCE["gpu"]
    mask_bytes: int = 0
    in_parts: bool = False


def execution_on(device: Device, config: RunConfig) -> Execution:
    """What `training/parallel/plan.py` makes of `parallel.precision` and `parallel.compile` on this device."""
    parallel, model = config.parallel, config.model
    has_bfloat16 = device.bfloat16_tflops is not None
    narrow = parallel.precision == "bfloat16" or (parallel.precision == "auto" and has_bfloat16)
    fits_kernels = model.hidden_size % 8 == 0 and model.moe_intermediate_size % 8 == 0
    width: Literal[2, 4] = 2 if narrow else 4
    compiled = narrow and has_bfloat16 and fits_kernels and parallel.compile is not False
    return Execution(
        width=width,
        compiled=compiled,
        in_parts=compiled and (parallel.recomputation == "selective" or parallel.expert > 1),
        row_factor=_UNEVEN_EXPERTS if parallel.expert > 1 else 1.0,
        logits_at_once=_LOGITS_AT_ONCE["cpu" if device.is_cpu else "gpu"],
        mask_bytes=width * config.training.sequence_length if config.data.mask_documents else 0,
    )
