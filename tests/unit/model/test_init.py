"""The first weights: one table says how each starts, and a seed says what each becomes."""

import pytest
import torch
from torch import Tensor, nn

from deepseek_v3.model.init import initialize
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.moe.balance import routers_of
from helpers.models import small_config

# Wide enough for a standard deviation to be estimated within a few percent.
WIDE = {
    "hidden_size": 128,
    "vocab_size": 1000,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_nextn_predict_layers": 1,
}


def weights_of(seed: int, std: float = 0.02, **changes: int) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = DeepSeekV3(small_config(**{**WIDE, **changes}))
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    initialize(model, std, seed)
    return model.state_dict()


@pytest.mark.parametrize("std", [0.006, 0.02])
def test_matrices_are_normal_norms_are_one_and_biases_are_zero(std: float) -> None:
    for name, weight in weights_of(seed=1, std=std).items():
        if name.endswith("norm.weight"):
            assert torch.equal(weight, torch.ones_like(weight)), name
        elif name.endswith("e_score_correction_bias"):
            assert torch.equal(weight, torch.zeros_like(weight)), name
        else:
            # Five times the standard error of a mean and of a standard deviation.
            assert abs(weight.mean().item()) < 5 * std / weight.numel() ** 0.5, name
            assert weight.std().item() == pytest.approx(std, rel=5 / (2 * weight.numel()) ** 0.5), name


def test_the_tails_are_not_cut() -> None:
    embedding = weights_of(seed=1, std=0.006)["model.embed_tokens.weight"] / 0.006
    assert (embedding.abs() > 2).double().mean().item() == pytest.approx(0.0455, rel=0.1)
    assert embedding.abs().max() > 3.5


def test_a_seed_says_what_every_weight_becomes() -> None:
    first, again, other = weights_of(seed=1), weights_of(seed=1), weights_of(seed=2)
    for name, weight in first.items():
        assert torch.equal(weight, again[name]), name
        drawn = not name.endswith(("norm.weight", "e_score_correction_bias"))
        assert torch.equal(weight, other[name]) != drawn, name


def test_no_two_weights_start_alike() -> None:
    starts = [tuple(w.flatten()[:8].tolist()) for w in weights_of(seed=1).values() if w.dim() > 1]
    assert len(set(starts)) == len(starts)


def test_a_weight_does_not_depend_on_the_number_of_others() -> None:
    short, long = weights_of(seed=1), weights_of(seed=1, num_hidden_layers=4, num_nextn_predict_layers=0)
    shared = [name for name in short if not name.startswith("model.layers.3.")]
    assert "model.layers.2.mlp.experts.gate_up_proj" in shared
    assert all(torch.equal(short[name], long[name]) for name in shared)


def test_a_weight_does_not_depend_on_the_order_of_the_others() -> None:
    def modules(*names: str) -> nn.Module:
        module = nn.Module()
        for name in names:
            module.add_module(name, nn.Linear(4, 4, bias=False))
        initialize(module, 0.02, seed=1)
        return module

    one, other = modules("lm_head", "eh_proj"), modules("eh_proj", "lm_head")
    assert torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert torch.equal(one.eh_proj.weight, other.eh_proj.weight)


def test_a_parameter_that_the_table_does_not_name_raises() -> None:
    model = DeepSeekV3(small_config())
    model.model.layers[1].self_attn.extra_proj = nn.Linear(2, 2, bias=False)
    with pytest.raises(KeyError, match=r"model\.layers\.1\.self_attn\.extra_proj\.weight has no row"):
        initialize(model, 0.02, seed=1)


def test_a_name_that_only_ends_like_a_known_one_raises() -> None:
    module = nn.Module()
    module.add_module("my_lm_head", nn.Linear(2, 2, bias=False))
    with pytest.raises(KeyError, match=r"my_lm_head\.weight"):
        initialize(module, 0.02, seed=1)


def test_an_unknown_buffer_raises() -> None:
    module = nn.Module()
    module.register_buffer("running_mean", torch.zeros(2))
    with pytest.raises(KeyError, match="running_mean has no initial value"):
        initialize(module, 0.02, seed=1)


def test_initial_weights_depend_on_the_seed_and_the_config() -> None:
    torch.manual_seed(5)
    first = DeepSeekV3(small_config(initializer_range=0.5))
    torch.manual_seed(5)
    again = DeepSeekV3(small_config(initializer_range=0.5))
    other = DeepSeekV3(small_config(initializer_range=0.5))
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.lm_head.weight.std().item() == pytest.approx(0.5, rel=0.05)
    assert all(router.e_score_correction_bias.eq(0).all() for router in routers_of(first))


def test_a_model_on_meta_stays_there() -> None:
    with torch.device("meta"):
        model = DeepSeekV3(small_config(num_nextn_predict_layers=1))
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
