"""Whole models train in FP8, on a CPU by the reference: near float32, the same in every layout, across resumes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepseek_v3.config.loading import load_config
from deepseek_v3.training.trainer import Trainer
from helpers import parallel_runs
from helpers.rank_pool import RankPool
from helpers.runs import dsv3, write_run

CPU = torch.device("cpu")
# A dense layer, one of mixtures and one of prediction. All widths but 24 can compute in FP8.
MODEL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "num_attention_heads": 2,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
SIZES = [word for name, value in MODEL.items() for word in ("--set", f"model.{name}={value}")]
STEPS = 2
LAYOUTS: dict[str, dict[str, Any]] = {
    "EP 2, dispatched in FP8, partly recomputed": {
        "data_replicate": 2,
        "expert": 2,
        "dispatch_precision": "fp8",
        "recomputation": "selective",
    },
    "FSDP 2": {"data_shard": 2},
    "PP 2, zero bubble": {"pipeline": 2, "pipeline_schedule": "zero_bubble"},
    "PP 2 × EP 2": {"pipeline": 2, "data_shard": 2, "expert": 2},
}


def train(pool: RankPool, ranks: int, model: dict[str, Any] = MODEL, **parallel: Any) -> dict[str, Any]:
    """The results of the last rank, which has the losses also of a pipeline."""
    return pool.run(ranks, parallel_runs.train, STEPS, parallel, None, "cpu", False, model)[-1]


@pytest.fixture(scope="module")
def alone(pool: RankPool) -> Callable[[int], dict[str, Any]]:
    """A run in one process, by the layers of its model."""
    return cache(lambda layers: train(pool, 1, MODEL | {"num_hidden_layers": layers}, precision="fp8"))


def test_losses_and_gradients_stay_near_float32(pool: RankPool) -> None:
    """Every token chooses every expert: rounding would send a few tokens to other experts."""
    model = MODEL | {"n_routed_experts": 4, "num_experts_per_tok": 4}
    model |= {"n_group": 1, "topk_group": 1}
    rounded, exact = (train(pool, 1, model, precision=precision) for precision in ("fp8", "fp32"))
    for (found, *_), (expected, *_) in zip(rounded["rows"], exact["rows"], strict=True):
        np.testing.assert_allclose(found[:4], expected[:4], rtol=1e-3)  # losses
        np.testing.assert_allclose(found[4], expected[4], rtol=1e-2)  # the norm of gradients of 3 bits
    for name, (*_, gradient) in rounded["gradients"].items():
        expected = exact["gradients"][name][-1]
        cosine = (gradient * expected).sum() / np.linalg.norm(gradient) / np.linalg.norm(expected)
        assert cosine > 0.97, name


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_train_as_one_process_does(
    pool: RankPool, alone: Callable[[int], dict[str, Any]], name: str
) -> None:
    """Before the first update losses agree but for the order of sums; after it, sums that round to other numbers
    of 8 bits lead apart slowly."""
    layout = LAYOUTS[name]
    ranks = layout.get("pipeline", 1) * layout.get("data_shard", 1) * layout.get("data_replicate", 1)
    layers = 4 if "pipeline_schedule" in layout else 2  # a zero bubble has two stages on each of two ranks
    found = train(pool, ranks, MODEL | {"num_hidden_layers": layers}, precision="fp8", **layout)["rows"]
    expected = alone(layers)["rows"]
    for step, rtol in enumerate((1e-5, 2e-3)):
        np.testing.assert_allclose(found[step][0][:4], expected[step][0][:4], rtol=rtol)
    np.testing.assert_allclose(found[0][0][4], expected[0][0][4], rtol=1e-3)


@pytest.mark.parametrize("recomputation", ["selective", "full"])
def test_recomputed_layers_have_the_same_bits(
    pool: RankPool, alone: Callable[[int], dict[str, Any]], recomputation: str
) -> None:
    found, expected = train(pool, 1, precision="fp8", recomputation=recomputation), alone(2)
    for (one, *_), (other, *_) in zip(found["rows"], expected["rows"], strict=True):
        np.testing.assert_array_equal(one, other)
    for name, (*_, weight) in found["weights"].items():
        np.testing.assert_array_equal(weight, expected["weights"][name][-1])


def test_a_run_resumes_in_another_precision(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The checkpoint has the same tensors; the log names the change, and the layers with and without FP8."""
    config = write_run(tmp_path, steps=4)
    assert dsv3("train", "--device", "cpu", "--config", config, *SIZES).exit_code == 0
    caplog.clear()
    last = tmp_path / "checkpoints" / "checkpoint_step_4.pt"
    longer = ["--set", "training.total_tokens=768", "--set", "parallel.precision=fp8"]
    words = [*SIZES, *longer, "--resume", last]
    result = dsv3("train", "--device", "cpu", "--config", config, *words)
    assert result.exit_code == 0, result.output
    text = "\n".join(caplog.messages)
    assert "parallel.precision: auto -> fp8" in text
    assert "takes the slow reference" in text
    assert "layers in FP8: self_attn.kv_a_proj_with_mqa 64×48, self_attn.kv_b_proj 32×64" in text
    assert "mlp.experts 64×128" in text
    assert (
        "not in FP8, widths that are no multiples of 16: self_attn.q_a_proj 64×24, self_attn.q_b_proj 24×64" in text
    )
    before, after = (
        torch.load(path, weights_only=True)["model"] for path in (last, last.with_name("checkpoint_step_6.pt"))
    )
    assert {name: (each.shape, each.dtype) for name, each in before.items()} == {
        name: (each.shape, each.dtype) for name, each in after.items()
    }


def test_a_number_that_is_not_finite_skips_the_step(tmp_path: Path) -> None:
    fields = [word for word in SIZES if word != "--set"]
    trainer = Trainer(load_config(write_run(tmp_path), [*fields, "parallel.precision=fp8"]), CPU)
    (model,) = trainer.engine.models
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj[0, 0, 0] = torch.inf
    before = [weight.clone() for weight in model.parameters()]
    trainer._train_step(trainer.plan.step(1), next(trainer.batches()))
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
