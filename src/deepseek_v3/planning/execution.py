"""How a run's layers are executed: bytes per activation, compilation, and the division of experts over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.hardware import Device

LayerKind = Literal["dense", "moe", "mtp"]

# Numbers in one chunk of logits, as in ops/cross_entropy/chunked.py.
_LOGITS_AT_ONCE = {"gpu": 1 << 28, "cpu": 1 << 20}

# Rows of the busiest rank's experts over the rows of an even load: an assumption, not measured.
_UNEVEN_EXPERTS = 1.2


@dataclass(frozen=True)
class Execution:
    """How the layers of a run are executed.

    `width`: bytes of one activation. `compiled`: the layers are compiled, in bfloat16. `compiled_in_parts`: the
    attention and the feed-forward network are compiled separately; an MTP layer's input projection is not compiled.

    `expert_imbalance`: rows of the busiest rank's experts over the rows of an even load; 1 if one rank holds all
    experts. `logits_per_chunk`: numbers in one chunk of the loss. `mask_bytes`: bytes of the attention mask of
    separate documents that a layer keeps per token; 0 without such a mask.
    """

    width: Literal[2, 4]
    compiled: bool
    expert_imbalance: float = 1.0
    logits_per_chunk: int = _LOGITS_AT_ONCE["gpu"]
    mask_bytes: int = 0
    compiled_in_parts: bool = False


def resolve_execution(device: Device, config: RunConfig) -> Execution:
    """How this device executes a run: what `training/parallel/parallelize.py` makes of its `parallel` section."""
    parallel, model = config.parallel, config.model
    has_bfloat16 = device.bfloat16_tflops is not None
    narrow = parallel.precision == "bf16" or (parallel.precision == "auto" and has_bfloat16)
    fits_kernels = model.hidden_size % 8 == 0 and model.moe_intermediate_size % 8 == 0
    width: Literal[2, 4] = 2 if narrow else 4
    compiled = narrow and has_bfloat16 and fits_kernels and parallel.compile is not False
    return Execution(
        width=width,
        compiled=compiled,
        compiled_in_parts=compiled and (parallel.recomputation == "selective" or parallel.expert > 1),
        expert_imbalance=_UNEVEN_EXPERTS if parallel.expert > 1 else 1.0,
        logits_per_chunk=_LOGITS_AT_ONCE["cpu" if device.is_cpu else "gpu"],
        mask_bytes=width * config.training.sequence_length if config.data.mask_documents else 0,
    )
