"""The least time and memory of a training step: its operations and bytes at the rates that the device reaches.

The products of layers run at the rate of the precision; attention scores, routers and the head, which FP8 training
keeps in bfloat16, at that of bfloat16. Memory-bound work is added, as if it never overlapped with products: logits,
kept activations (each of them once) and weights move at the rate of a copy. Overlap may be faster.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_v3.benchmark.ceilings import Ceilings
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.counts import count_parameters
from deepseek_v3.planning.execution import Execution
from deepseek_v3.planning.flops import forward_flops, mtp_forward_flops
from deepseek_v3.planning.step_time import step_work

_PASSES = 3  # forward, and a backward pass of twice its operations
_CAST_BYTES = 6  # a float32 weight is read, and its bfloat16 copy written


@dataclass(frozen=True)
class StepFloor:
    """Seconds of a step's parts at the ceilings, and the bytes that it cannot do without."""

    products: float
    attention_and_head: float
    bytes_moved: float
    memory_bytes: float

    @property
    def seconds(self) -> float:
        """Seconds of the whole step."""
        return self.products + self.attention_and_head + self.bytes_moved


def step_floor(config: RunConfig, ceilings: Ceilings, in_fp8: bool, weight_bytes: int = 4) -> StepFloor:
    """The floor of a step of one device; `weight_bytes` of each number of a weight and of its gradient, 2 or 4.

    The bytes in memory are weights, gradients and moments. A step moves a gradient three times (written, read for
    the norm, read for the update), and reads and writes weights and moments. Recomputed operations do not count.
    """
    model, length = config.model, config.training.sequence_length
    parts = (forward_flops(model, length), mtp_forward_flops(model, length))
    others = sum(part.attention_scores + part.gates + part.head for part in parts)
    layers = sum(part.total for part in parts) - others
    tokens = config.tokens_per_step
    work = step_work(config, Execution(width=2, compiled=True))
    weights, moments = count_parameters(model).with_prediction, 2 * config.training.optimizer.moment_bytes
    casts = _CAST_BYTES if weight_bytes == 4 else 0
    moved = work.logit_bytes + work.activation_bytes + weights * (5 * weight_bytes + 2 * moments + casts)
    return StepFloor(
        products=ceilings.product_seconds(_PASSES * tokens * layers, in_fp8),
        attention_and_head=ceilings.product_seconds(_PASSES * tokens * others, in_fp8=False),
        bytes_moved=ceilings.copy_seconds(moved),
        memory_bytes=weights * (2 * weight_bytes + moments),
    )
