"""Whether a system trains what it should, before anyone looks at its speed.

A narrow model of the shape's structure is compared with float32: loss and gradients of one step. The measured run
itself must begin at the loss that random weights have and at that of plain bfloat16 on the same tokens, stay finite
and learn.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from deepseek_v3.benchmark.own_training import TrainingFigures
from deepseek_v3.benchmark.shape_files import Precision
from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.training.loss import Objective
from deepseek_v3.training.parallel.mesh import ParallelMesh
from deepseek_v3.training.parallel.parallelize import build_model
from deepseek_v3.utils.distributed.launch import select_device
from deepseek_v3.utils.logging import configure_logging

# The most of each field in the narrow model. All are multiples of 128, the block of FP8, as published widths are.
_NARROW = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_attention_heads": 4,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "n_routed_experts": 64,
    "first_k_dense_replace": 1,
}
_MOE_LAYERS, _SEQUENCES, _LENGTH = 2, 4, 256

# Parameters whose gradients are compared together, by what their names contain; the first that matches.
_ROUTERS = "routers"
_PARTS = {
    "routed experts": "mlp.experts.",
    "shared experts": "shared_experts",
    _ROUTERS: "mlp.gate.",
    "dense network": "mlp.",
    "attention": "self_attn",
    "rest": "",
}

# How far a precision may be from float32 in the narrow model: relative difference of the loss, and cosine and
# relative difference of the norms of the gradients of a part. Rounding also sends some tokens to other experts,
# whose scores are as good. In shape 1b's narrow model, with 6 of 64 experts, this leaves cosines of 0.97 (bf16) and
# 0.73 (fp8) to the routers, and 0.98 and 0.84 to the experts.
_LOSS_BOUND: dict[Precision, float] = {"bf16": 2e-3, "fp8": 5e-3}
_COSINE_BOUND: dict[Precision, float] = {"bf16": 0.95, "fp8": 0.75}
_ROUTER_COSINE_BOUND: dict[Precision, float] = {"bf16": 0.9, "fp8": 0.55}
_NORM_BOUND: dict[Precision, float] = {"bf16": 0.02, "fp8": 0.05}

_TINY = 1e-30  # in place of the norm of a gradient of zeros

_RANDOM_LOSS_BOUND = 0.1  # nats between the first loss and that of random logits
_SAME_LOSS_BOUND = 0.02  # nats between the first losses of two precisions on the same tokens
_PEER_LOSS_BOUND = 1.5  # nats above ln(vocabulary): other systems draw other initial weights


@dataclass(frozen=True)
class Check:
    """One comparison: what was compared, the figure, what it may be, and whether it is."""

    name: str
    value: float | None
    expected: str
    passed: bool

    def __str__(self) -> str:
        value = "not finite" if self.value is None or not math.isfinite(self.value) else f"{self.value:.5g}"
        return f"{self.name}: {value}, expected {self.expected}"


def check_narrow_model(config: RunConfig, precision: Precision, device: str) -> list[Check]:
    """Compares one step of the narrow model in this precision, compiled as in training, with eager float32."""
    configure_logging(logging.ERROR)
    place = select_device(device)
    found = _loss_and_gradients(_narrow(config, config.parallel.precision, config.parallel.compile), place)
    expected = _loss_and_gradients(_narrow(config, "fp32", compiled=False), place)
    return compare_steps(found, expected, precision)


def compare_steps(
    found: tuple[float, Mapping[str, Tensor]], expected: tuple[float, Mapping[str, Tensor]], precision: Precision
) -> list[Check]:
    """The checks of a step's loss and gradients by name, against the same step in float32."""
    (loss, gradients), (true_loss, true_gradients) = found, expected
    bad = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
    where, cosines, differences = "narrow model beside float32", {}, {}
    for part, names in _parts(true_gradients).items():
        mine, true = (_vector(each, names) for each in (gradients, true_gradients))
        cosines[part] = float(mine @ true / (mine.norm() * true.norm()).clamp(min=_TINY))
        differences[part] = abs(float(mine.norm() / true.norm().clamp(min=_TINY)) - 1)
    furthest = max(differences, key=differences.__getitem__)
    routers = {part: cosines.pop(part) for part in [_ROUTERS] if part in cosines}
    worst = min(cosines, key=cosines.__getitem__)
    return [
        _at_most(f"{where}, gradients that are not finite", float(len(bad)), 0),
        _at_most(f"{where}, relative difference of the loss", abs(loss / true_loss - 1), _LOSS_BOUND[precision]),
        _at_least(f"{where}, cosine of the gradients ({worst})", cosines[worst], _COSINE_BOUND[precision]),
        *(
            _at_least(f"{where}, cosine of the gradients ({part})", cosine, _ROUTER_COSINE_BOUND[precision])
            for part, cosine in routers.items()
        ),
        _at_most(
            f"{where}, relative difference of the norms ({furthest})", differences[furthest], _NORM_BOUND[precision]
        ),
    ]


def _vector(gradients: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([gradients[name].flatten().double() for name in names])


def _parts(gradients: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The names of the parameters of each part that the model has."""
    parts: dict[str, list[str]] = {}
    for name in gradients:
        parts.setdefault(next(part for part, text in _PARTS.items() if text in name), []).append(name)
    return parts


def check_run(config: RunConfig, figures: TrainingFigures, plain_loss: float | None) -> list[Check]:
    """The checks of a measured run of ours; `plain_loss` is the first loss of eager bfloat16 on the same tokens."""
    first = figures.losses.get(1)
    random = random_loss(config.model)
    return [
        *_finite_and_learning(figures),
        _at_most("first loss, distance from that of random weights", _distance(first, random), _RANDOM_LOSS_BOUND),
        _at_most("first loss, distance from eager bfloat16", _distance(first, plain_loss), _SAME_LOSS_BOUND),
    ]


def check_peer(config: RunConfig, figures: TrainingFigures) -> list[Check]:
    """The checks of another system's run."""
    above = _distance(figures.losses.get(1), math.log(config.model.vocab_size))
    name = "first loss, distance from ln(vocabulary)"
    return [*_finite_and_learning(figures), _at_most(name, above, _PEER_LOSS_BOUND)]


def random_loss(model: ModelConfig) -> float:
    """The expected loss of initial weights: logits are normal with the variance initializer_range² · width."""
    return math.log(model.vocab_size) + model.initializer_range**2 * model.hidden_size / 2


def _finite_and_learning(figures: TrainingFigures) -> list[Check]:
    values = [*figures.losses.values(), *figures.norms.values()]
    bad = sum(value is None or not math.isfinite(value) for value in values)
    losses = list(figures.losses.values())
    gain = _distance(losses[0], losses[-1], signed=True)
    return [
        _at_most("losses and gradient norms that are not finite", float(bad), 0),
        _at_least("fall of the loss from the first to the last step", gain, 0),
    ]


def _distance(one: float | None, other: float | None, *, signed: bool = False) -> float | None:
    if one is None or other is None:
        return None
    return one - other if signed else abs(one - other)


def _at_most(name: str, value: float | None, bound: float) -> Check:
    return Check(name, value, f"at most {bound:g}", value is not None and value <= bound)


def _at_least(name: str, value: float | None, bound: float) -> Check:
    return Check(name, value, f"at least {bound:g}", value is not None and value >= bound)


def _narrow(config: RunConfig, precision: str, compiled: bool | str) -> RunConfig:
    """The same structure with fewer and narrower layers, on short sequences.

    Its weights are drawn so that every layer keeps the size of what it reads: with the report's range the layers of
    a narrow model would add next to nothing.
    """
    fields = config.model.model_dump()
    narrow = {name: min(fields[name], most) for name, most in _NARROW.items() if fields[name] is not None}
    layers = min(config.model.num_hidden_layers, narrow["first_k_dense_replace"] + _MOE_LAYERS)
    length, std = min(config.training.sequence_length, _LENGTH), narrow["hidden_size"] ** -0.5
    parallel = {"precision": precision, "compile": compiled, "micro_batch_size": _SEQUENCES}
    return config.model_copy(
        update={
            "model": ModelConfig(**{**fields, **narrow, "num_hidden_layers": layers, "initializer_range": std}),
            "training": config.training.model_copy(
                update={"sequence_length": length, "global_batch_size": _SEQUENCES}
            ),
            "parallel": config.parallel.model_copy(update=parallel),
        }
    )


def _loss_and_gradients(config: RunConfig, device: torch.device) -> tuple[float, dict[str, Tensor]]:
    """Loss, and gradients by name on the CPU, of one step on random tokens from the run's initial weights."""
    objective = build_model(config, device, ParallelMesh(config.parallel), partial(Objective, loss_terms=()))
    generator = torch.Generator().manual_seed(config.training.seed)
    shape = (_SEQUENCES, config.training.sequence_length + 1)
    tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
    training = config.training
    weights = training.prediction.weight, training.balance.sequence_loss_weight
    total: Tensor = objective(tokens.to(device), *weights).total
    total.backward()
    gradients = {
        name: torch.zeros(weight.shape) if weight.grad is None else weight.grad.float().cpu()
        for name, weight in objective.named_parameters()
    }
    return total.item(), gradients


def failures(checks: Sequence[Check]) -> list[str]:
    """The checks that failed, in words."""
    return [str(check) for check in checks if not check.passed]
