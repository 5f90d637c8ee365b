"""Memory of training, from the config alone: what one rank holds at the worst moment of a step.

A step is walked through as it happens: the forward pass fills memory with what the layers keep, the losses add
their own, the backward pass trades it for gradients layer by layer. The largest moment is the estimate; on one GPU
it is compared with torch's own count in benchmarks/results/planner_points.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.activations import feed_forward_bytes, feed_forward_network_bytes, saved_bytes
from deepseek_v3.planning.calibration import calibration
from deepseek_v3.planning.counts import count_layers, mtp_projection_weights, owned_parameters
from deepseek_v3.planning.execution import Execution, LayerKind
from deepseek_v3.planning.hardware import Device
from deepseek_v3.planning.pipeline_split import max_in_flight, stage_layer_kinds, stages_of_rank

# Tokens in one chunk of the loss at least, as in ops/cross_entropy/chunked.py.
_LEAST_ROWS = 256
# What cuBLAS keeps for itself on Hopper; and the interpreter with torch and its libraries on a host.
_WORKSPACE = 64 * 2**20
_CPU_PROCESS = 0.5 * 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank at the worst moment of a step, and the name of that moment.

    `weights`, `moments`, `gradients`: this rank's shares. `weight_copies`: bfloat16 copies of the weights that
    layers keep for their backward pass. `head`: a chunk of logits, and the gradients that the losses make at once.
    `communication`: whole layers gathered from shares, and rows on their way to experts of other ranks.
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
        """All parts: what torch counts as allocated."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Bytes by part."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "moment"}


def estimate_memory(config: RunConfig, run: Execution) -> MemoryEstimate:
    """The worst moment of the rank that needs most: of a pipeline, the one with the largest stages."""
    parallel = config.parallel
    number = parallel.pipeline * parallel.stages_per_rank
    stages = stage_layer_kinds(config.model, number, config.training.sequence_length)
    kinds = [[stages[stage] for stage in stages_of_rank(parallel, rank)] for rank in range(parallel.pipeline)]
    # Of equal ranks in the middle the first has most micro-batches under way.
    ends = {0, 1, len(kinds) - 1}
    worst = [rank for rank in range(len(kinds)) if rank in ends or kinds[rank] != kinds[rank - 1]]
    return max(
        (moment for rank in worst for moment in _Rank(config, run, stages, rank).moments()),
        key=lambda moment: moment.total,
    )


def needed_bytes(estimate: MemoryEstimate, device: Device) -> float:
    """What the device must have: allocated, held besides by torch's allocator, and kept by driver and libraries."""
    calibrated = calibration()
    context = _CPU_PROCESS if device.is_cpu else calibrated.context_bytes
    return estimate.total * (1 + calibrated.allocator_overhead) + context


@dataclass(frozen=True)
class _Layer:
    """One layer on one rank. `parameters`: how many are this rank's own share, of which it holds `whole` like every
    rank; all others in bytes.

    `saved`: activations kept for the backward pass. `again`: those that are made anew in it instead, where only a
    part of the layer is. `copies`: bfloat16 weights kept with them. `gathered`: the layer's other weights in
    activations' width, where they are sharded. `working`: gradients made, less what is let go, at the worst moment
    of the layer's own backward pass.
    """

    parameters: float
    whole: float
    saved: float
    again: float
    copies: float
    gathered: float
    working: float


def _layer(config: RunConfig, run: Execution, kind: LayerKind) -> _Layer:
    model, parallel = config.model, config.parallel
    tokens = parallel.micro_batch_size * config.training.sequence_length
    dense = kind == "dense"
    counts = count_layers(model, int(dense), int(not dense), model.n_routed_experts)
    joining, more_norms = (mtp_projection_weights(model), 3 * model.hidden_size) if kind == "mtp" else (0, 0)
    routed = counts.routed_experts / parallel.expert
    whole = counts.norms + more_norms + counts.gates
    others = counts.total - counts.routed_experts + joining + more_norms - whole
    is_sharded, recomputes = parallel.data_shard > 1, parallel.recomputation != "none"
    partly = parallel.recomputation == "selective"
    matrices = counts.attention + joining if partly else routed + others
    again = feed_forward_bytes(model, kind, run) * tokens if partly else 0.0
    return _Layer(
        parameters=owned_parameters(parallel, counts.routed_experts, whole, others),
        whole=whole,
        saved=saved_bytes(model, kind, run) * tokens - again,
        again=again,
        copies=0.0 if run.width == 4 or is_sharded else 2 * matrices,
        gathered=run.width * (routed + others) if is_sharded else 0.0,
        working=_working_bytes(model, dense, run, tokens, parallel.expert, lets_go=not (recomputes or is_sharded)),
    )


def _working_bytes(
    model: ModelConfig, dense: bool, run: Execution, tokens: int, expert_ranks: int, lets_go: bool
) -> float:
    """The feed-forward network's backward pass: rows' gradients first, the widest weight's gradient later.

    A compiled backward pass makes a weight's gradient in bfloat16 beside its float32 copy, an eager one makes
    the experts' one by one and then stacks them. `lets_go`: saved tensors and copies of weights are freed as
    soon as they have been used.
    """
    hidden = model.intermediate_size if dense else model.moe_intermediate_size
    rows = tokens if dense else tokens * model.num_experts_per_tok * run.expert_imbalance
    weight = model.hidden_size * hidden * (1.0 if dense else model.n_routed_experts / expert_ranks)
    if run.compiled:
        # The inner gradient replaces the saved product. A dense network's output gradient is that of the states.
        early = run.width * (rows * (hidden if dense else model.hidden_size) + weight)
    else:
        early = 4 * rows * (model.hidden_size + hidden)
        if not (dense or lets_go):  # what the shared experts keep, and a gradient inside, wait for that of the rows
            shared = model.n_shared_experts * hidden
            early += tokens * (feed_forward_network_bytes(shared, run) + 4 * shared)
    if not run.compiled:
        late = 20 * weight + run.width * rows * (model.hidden_size - 2 * hidden)
    elif lets_go:
        late = 10 * weight - 3 * run.width * rows * hidden
    else:
        late = 16 * weight - run.width * rows * hidden
    return max(early, late)


class _Rank:
    """One rank of a pipeline, with one or two of its `stages`."""

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
        self.layers = {kind: _layer(config, run, kind) for kind in sorted(set(self.kinds))}
        # A stage of a pipeline, like ZeRO's first, keeps weights and gradients whole until the step's end.
        self.holds_whole = parallel.zero_stage == 1 or parallel.pipeline > 1
        self.ends = self._vocabulary_copies(model)
        self.last_norm = model.hidden_size if self.is_last else 0
        own = self.ends * self.vocabulary / parallel.data_shard + self.last_norm
        each = [self.layers[kind] for kind in self.kinds]
        self.parameters = own + sum(layer.parameters for layer in each)
        self.saved_before = [*accumulate((layer.saved for layer in each), initial=0.0)]
        self.copies_before = [*accumulate((layer.copies for layer in each), initial=0.0)]

    def _vocabulary_copies(self, model: ModelConfig) -> int:
        """Matrices of the vocabulary's size: the embedding of the first stage, the head of the last one.

        The last one also has the embedding where it is the head, or where it predicts further tokens.
        """
        if self.config.parallel.pipeline == 1:
            return 1 if model.tie_word_embeddings else 2
        again = model.num_nextn_predict_layers > 0 and not model.tie_word_embeddings
        return int(self.is_first) + (1 + int(again) if self.is_last else 0)

    def moments(self) -> Iterator[MemoryEstimate]:
        """Every moment that can be the worst; across equal layers memory changes evenly, so their ends suffice."""
        if self.is_last:
            yield self._losses()
            yield self._last_norm()
        last = len(self.kinds) - 1
        for index, kind in enumerate(self.kinds):
            if index in (0, last) or not self.kinds[index - 1] == kind == self.kinds[index + 1]:
                yield self._backward(index)
        yield self._end()

    def _losses(self) -> MemoryEstimate:
        """In the last depth's loss: everything is kept, and a chunk of logits is out."""
        model, narrow = self.config.model, self.run.width == 2
        chunks = math.ceil(self.tokens * model.vocab_size / self.run.logits_per_chunk)
        rows = max(math.ceil(self.tokens / chunks), min(self.tokens, _LEAST_ROWS))
        chunk = self.run.width * rows * model.vocab_size
        per_loss = 4 * self.vocabulary + self.states  # gradients of the head and of the states, made at once
        return self._moment(
            "loss",
            made=0.0,
            activations=self._kept(len(self.kinds)) + self.states + self._saved_by_last_norm,
            copies=self._copies(len(self.kinds)),
            head=(1 + model.num_nextn_predict_layers) * per_loss + chunk + (2 * self.vocabulary if narrow else 0),
        )

    def _last_norm(self) -> MemoryEstimate:
        """In the backward pass of the norm before the head: all layers are kept, the head's gradient is made.

        The norm is not compiled. As torch runs it, its gradients and the products they come from are five float32
        tensors of the states' shape (counted on an H200, torch 2.11).
        """
        working = 5 * 4 * self.tokens * self.config.model.hidden_size
        return self._moment(
            "backward pass of the last norm",
            made=self.vocabulary / self.config.parallel.data_shard,
            activations=self._kept(len(self.kinds)) + self._saved_by_last_norm + working,
            copies=self._copies(len(self.kinds)),
        )

    @property
    def _saved_by_last_norm(self) -> float:
        """The norm's input and product in float32, the former in place of the last states."""
        return (8 if self.run.width == 2 else 4) * self.tokens * self.config.model.hidden_size

    def _backward(self, index: int) -> MemoryEstimate:
        """In layer `index` of the stage, going backward, those after it done."""
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
        """All gradients are made, the embedding's last, whole and from float32 states."""
        return self._moment(
            "end of the backward pass",
            made=self.parameters,
            activations=self.states + 4 * self.tokens * self.config.model.hidden_size,
            head=4 * self.vocabulary if self.is_first and self.accumulates else 0.0,
        )

    def _moment(
        self, name: str, made: float, activations: float, copies: float = 0.0, head: float = 0.0
    ) -> MemoryEstimate:
        """`made`: parameters whose gradients are there, if none are left from an earlier micro-batch."""
        waiting = self.in_flight - 1
        return MemoryEstimate(
            moment=name,
            weights=4 * self.parameters,
            moments=2 * self.config.training.optimizer.moment_bytes * self.parameters,
            gradients=4 * (self._summed() if self.accumulates else made),
            activations=activations + waiting * self._kept(len(self.kinds)),
            weight_copies=copies + waiting * self._copies(len(self.kinds)),
            head=head,
            communication=self._communication,
        )

    def _kept(self, layers: int) -> float:
        """Activations that the first `layers` layers keep, and the states that enter each stage."""
        if self.recomputes:
            return (self.num_stages + layers) * self.states
        return self.num_stages * self.states + self.saved_before[layers]

    def _copies(self, layers: int) -> float:
        return 0.0 if self.recomputes else self.copies_before[layers]

    def _made(self, first: int) -> float:
        return sum(self.layers[kind].parameters for kind in self.kinds[first:])

    def _summed(self) -> float:
        """Numbers in the gradients of several micro-batches: of own parameters, or of all until the last."""
        if self.config.parallel.data_shard == 1 or not self.holds_whole:
            return self.parameters
        each = [self.layers[kind] for kind in self.kinds]
        in_layers = sum(layer.gathered / self.run.width + layer.whole for layer in each)
        return in_layers + self.ends * self.vocabulary + self.last_norm

    @cached_property
    def _communication(self) -> float:
        """Layers gathered: all of them, or one computing and one to come; rows to and from experts elsewhere."""
        every = [self.layers[kind].gathered for kind in self.kinds]
        keeps = self.holds_whole or self.config.parallel.zero_stage < 3
        gathered = sum(every) if keeps else 2 * max(every, default=0.0)
        if self.config.parallel.expert == 1:
            return gathered
        return gathered + 2 * self.states * self.config.model.num_experts_per_tok * self.run.expert_imbalance
