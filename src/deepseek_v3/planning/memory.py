"""Peak memory of one rank during a training step, from the config alone.

The estimate follows a step: in the forward pass the layers save activations, the losses add logits and gradients,
and the backward pass frees activations and allocates gradients layer by layer. The largest moment is the estimate.
benchmarks/results/planner_points_*.json compare it with the memory that torch measured on one GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.calibration import calibration
from deepseek_v3.planning.execution import Execution, LayerKind
from deepseek_v3.planning.hardware import Device
from deepseek_v3.planning.layer_memory import layer_memory
from deepseek_v3.planning.pipeline_split import max_in_flight, stage_layer_kinds, stages_of_rank

# Fewest tokens in one chunk of the loss, as in ops/cross_entropy/chunked.py.
_MIN_CHUNK_TOKENS = 256
# The workspace of cuBLAS on Hopper; and a host's Python process with torch and its libraries.
_WORKSPACE = 64 * 2**20
_CPU_PROCESS = 0.5 * 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank at the moment of a step when it holds most, and the name of that moment.

    `weights`, `moments`, `gradients`: the shards of this rank. `weight_copies`: bfloat16 or FP8 copies of weights
    that layers save for their backward pass. `head`: a chunk of logits, and the gradients that the losses compute
    with it. `communication`: layers gathered from their shards, and the buffers of the expert exchange.
    """

    moment: str
    weights: float
    moments: float
    gradients: float
    activations: float
    weight_copies: float
    head: float
    communication: float
    workspace: float = _WORKSPACE

    @property
    def total(self) -> float:
        """The sum of all parts: the bytes that torch's allocator hands out."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Bytes by part."""
        return {name: number for name, number in vars(self).items() if name != "moment"}


def estimate_memory(config: RunConfig, run: Execution) -> MemoryEstimate:
    """The peak of the rank that needs most memory, over all pipeline ranks."""
    parallel = config.parallel
    number = parallel.pipeline * parallel.stages_per_rank
    stages = stage_layer_kinds(config.model, number, config.training.sequence_length)
    kinds = [[stages[stage] for stage in stages_of_rank(parallel, rank)] for rank in range(parallel.pipeline)]
    # Among equal ranks in the middle, the first has the most micro-batches in flight.
    ends = {0, 1, len(kinds) - 1}
    worst = [rank for rank in range(len(kinds)) if rank in ends or kinds[rank] != kinds[rank - 1]]
    return max(
        (moment for rank in worst for moment in _Rank(config, run, stages, rank).moments()),
        key=lambda moment: moment.total,
    )


def needed_bytes(estimate: MemoryEstimate, device: Device) -> float:
    """Memory that the device must have: allocated bytes, the allocator's overhead, and the driver's context."""
    calibrated = calibration(device)
    context = _CPU_PROCESS if device.is_cpu else calibrated.context_bytes
    return estimate.total * (1 + calibrated.allocator_overhead) + context


class _Rank:
    """One rank of a pipeline, with one or two stages."""

    def __init__(self, config: RunConfig, run: Execution, stages: list[list[LayerKind]], rank: int) -> None:
        parallel, model = config.parallel, config.model
        numbers = stages_of_rank(parallel, rank)
        self.config, self.run, self.num_stages = config, run, len(numbers)
        self.kinds = [kind for number in numbers for kind in stages[number]]
        self.is_first, self.is_last = 0 in numbers, len(stages) - 1 in numbers
        self.recomputes = parallel.recomputation == "full"
        self.tokens = parallel.micro_batch_size * config.training.sequence_length
        self.accumulates = config.gradient_accumulation_steps > 1
        self.in_flight = max_in_flight(parallel, rank, config.gradient_accumulation_steps)
        self.states = float(run.width * self.tokens * model.hidden_size)
        self.vocabulary = model.vocab_size * model.hidden_size
        self.layers = {kind: layer_memory(config, run, kind) for kind in sorted(set(self.kinds))}
        # With ZeRO stage 1, and in a pipeline, weights and gradients stay unsharded until the end of the step.
        self.holds_whole = parallel.zero_stage == 1 or parallel.pipeline > 1
        self.ends = self._vocabulary_copies(model)
        self.last_norm = model.hidden_size if self.is_last else 0
        own = self.ends * self.vocabulary / parallel.data_shard + self.last_norm
        each = [self.layers[kind] for kind in self.kinds]
        self.parameters = own + sum(layer.parameters for layer in each)
        self.saved_before = [*accumulate((layer.saved for layer in each), initial=0.0)]
        self.copies_before = [*accumulate((layer.copies for layer in each), initial=0.0)]

    def _vocabulary_copies(self, model: ModelConfig) -> int:
        """Number of embedding and head matrices: the embedding on the first stage, the head on the last one.

        The last stage also holds the embedding if the head is tied to it, or if there are MTP layers.
        """
        if self.config.parallel.pipeline == 1:
            return 1 if model.tie_word_embeddings else 2
        again = model.num_nextn_predict_layers > 0 and not model.tie_word_embeddings
        return int(self.is_first) + (1 + int(again) if self.is_last else 0)

    def moments(self) -> Iterator[MemoryEstimate]:
        """Every moment that can be the peak; memory changes evenly across equal layers, so their ends suffice."""
        if self.is_last:
            yield self._losses()
            yield self._last_norm()
        last = len(self.kinds) - 1
        for index, kind in enumerate(self.kinds):
            if index in (0, last) or not self.kinds[index - 1] == kind == self.kinds[index + 1]:
                yield self._backward(index)
        yield self._end()

    def _losses(self) -> MemoryEstimate:
        """Memory in the loss of the last depth: all activations are saved, and a chunk of logits is allocated."""
        model, narrow = self.config.model, self.run.width == 2
        chunks = math.ceil(self.tokens * model.vocab_size / self.run.logits_per_chunk)
        rows = max(math.ceil(self.tokens / chunks), min(self.tokens, _MIN_CHUNK_TOKENS))
        chunk = self.run.width * rows * model.vocab_size
        # Each loss computes the gradients of the head and of the states together with its value.
        per_loss = 4 * self.vocabulary + self.states
        return self._moment(
            "loss",
            made=0.0,
            activations=self._kept(len(self.kinds)) + self.states + self._saved_by_last_norm,
            copies=self._copies(len(self.kinds)),
            head=(1 + model.num_nextn_predict_layers) * per_loss + chunk + (2 * self.vocabulary if narrow else 0),
        )

    def _last_norm(self) -> MemoryEstimate:
        """Memory in the backward pass of the loss and of the norm before it: activations are saved, the head has a
        gradient.

        A compiled norm needs less than the loss before it, which scales the gradient of the states in float32. The
        gradients and intermediate products of another norm are five float32 tensors of the states' shape.
        """
        working = (4 + 4 + 2 if self.run.compiled else 5 * 4) * self.tokens * self.config.model.hidden_size
        return self._moment(
            "backward pass of the last norm",
            made=self.vocabulary / self.config.parallel.data_shard,
            activations=self._kept(len(self.kinds)) + self._saved_by_last_norm + working,
            copies=self._copies(len(self.kinds)),
        )

    @property
    def _saved_by_last_norm(self) -> float:
        """The norm's statistics; if it is not compiled, its input, which replaces the last states, and product."""
        each = 8 if self.run.width == 2 else 4
        return 4 * self.tokens if self.run.compiled else each * self.tokens * self.config.model.hidden_size

    def _backward(self, index: int) -> MemoryEstimate:
        """Memory in the backward pass of layer `index` of the rank, after those of all later layers."""
        layer = self.layers[self.kinds[index]]
        kept, copies = self._kept(index + 1), self._copies(index + 1)
        if self.recomputes:
            kept, copies = self._kept(index) + layer.saved, layer.copies
        return self._moment(
            f"backward pass of layer {index}",
            made=self._made(index + 1) + (self.vocabulary / self.config.parallel.data_shard if self.is_last else 0),
            activations=kept + self.states + layer.again + layer.working,
            copies=copies,
        )

    def _end(self) -> MemoryEstimate:
        """Memory at the end: all gradients exist; the embedding's is unsharded and computed from float32 states."""
        return self._moment(
            "end of the backward pass",
            made=self.parameters,
            activations=self.states + 4 * self.tokens * self.config.model.hidden_size,
            head=4 * self.vocabulary if self.is_first and self.accumulates else 0.0,
        )

    def _moment(
        self, name: str, made: float, activations: float, copies: float = 0.0, head: float = 0.0
    ) -> MemoryEstimate:
        """Builds an estimate; `made` is the number of parameters with gradients, if these are not accumulated."""
        waiting = self.in_flight - 1
        return MemoryEstimate(
            moment=name,
            weights=4 * self.parameters,
            moments=self.config.training.optimizer.state_bytes * self.parameters,
            gradients=4 * (self._summed() if self.accumulates else made),
            activations=activations + waiting * self._kept(len(self.kinds)),
            weight_copies=copies + waiting * self._copies(len(self.kinds)),
            head=head,
            communication=self._communication,
        )

    def _kept(self, layers: int) -> float:
        """Activations saved by the first `layers` layers, and the input states of each stage."""
        if self.recomputes:
            return (self.num_stages + layers) * self.states
        return self.num_stages * self.states + self.saved_before[layers]

    def _copies(self, layers: int) -> float:
        return 0.0 if self.recomputes else self.copies_before[layers]

    def _made(self, first: int) -> float:
        return sum(self.layers[kind].parameters for kind in self.kinds[first:])

    def _summed(self) -> float:
        """Number of accumulated gradients: of the owned parameters, or of all if gradients stay unsharded."""
        if self.config.parallel.data_shard == 1 or not self.holds_whole:
            return self.parameters
        each = [self.layers[kind] for kind in self.kinds]
        in_layers = sum(layer.gathered / self.run.width + layer.whole for layer in each)
        return in_layers + self.ends * self.vocabulary + self.last_norm

    @cached_property
    def _communication(self) -> float:
        """Gathered layers (all, or the current one and the next) and the buffers of the expert exchange."""
        every = [self.layers[kind].gathered for kind in self.kinds]
        keeps = self.holds_whole or self.config.parallel.zero_stage < 3
        gathered = sum(every) if keeps else 2 * max(every, default=0.0)
        if self.config.parallel.expert == 1:
            return gathered
        return gathered + 2 * self.states * self.config.model.num_experts_per_tok * self.run.expert_imbalance
