"""The router's weight and bias stay float32, whatever the type of the model around them."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deepseek_v3.interop.huggingface import load_released, released_state
from deepseek_v3.model.init import initialize
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.moe.balance import routers_of
from deepseek_v3.moe.routing import Router
from helpers.models import random_tokens, small_config, small_model

NARROW = [torch.bfloat16, torch.float16]
CONFIG = small_config(num_nextn_predict_layers=1)
CONVERSIONS: dict[str, Callable[[DeepSeekV3], DeepSeekV3]] = {
    "to(bfloat16)": lambda model: model.to(torch.bfloat16),
    "to(float16)": lambda model: model.to(torch.float16),
    "to(device, bfloat16)": lambda model: model.to("cpu", torch.bfloat16),
    "to(a bfloat16 tensor)": lambda model: model.to(torch.ones(1, dtype=torch.bfloat16)),
    "to(float8)": lambda model: model.to(torch.float8_e4m3fn),
    "bfloat16()": lambda model: model.bfloat16(),
    "half()": lambda model: model.half(),
    "type()": lambda model: model.type(torch.bfloat16),
    "there and back": lambda model: model.bfloat16().float(),
}


def close_biases(model: DeepSeekV3) -> DeepSeekV3:
    """Biases as in released weights: near 5, a few thousandths apart, where bfloat16 has steps of 1/32."""
    for router in routers_of(model):
        router.e_score_correction_bias.copy_(5 + 0.003 * torch.arange(len(router.weight)))
    return model


def router_state(model: DeepSeekV3) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".mlp.gate." in name}


def assert_same_routers(model: DeepSeekV3, expected: dict[str, Tensor]) -> None:
    found = router_state(model)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(tensor, expected[name]), name


def initialized() -> DeepSeekV3:
    model = DeepSeekV3(CONFIG)
    initialize(model, std=0.02, seed=1)
    return model


def choices(router: Router, x_TD: Tensor) -> Tensor:
    return router(x_TD).experts_TK


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
@torch.no_grad()
def test_converting_the_model_leaves_its_routers_alone(convert: Callable[[DeepSeekV3], DeepSeekV3]) -> None:
    model = close_biases(small_model(CONFIG))
    expected = copy.deepcopy(router_state(model))
    x_TD = torch.randn(64, CONFIG.hidden_size)
    chosen = [choices(router, x_TD) for router in routers_of(model)]

    model = convert(model)

    assert_same_routers(model, expected)
    for router, before_TK in zip(routers_of(model), chosen, strict=True):
        assert torch.equal(choices(router, x_TD), before_TK)


def test_float64_and_back_to_float32_reach_the_routers() -> None:
    model = small_model(CONFIG).double()
    assert {tensor.dtype for tensor in router_state(model).values()} == {torch.float64}
    assert {tensor.dtype for tensor in router_state(model.bfloat16()).values()} == {torch.float32}


def test_gradients_of_routers_stay_float32() -> None:
    model = small_model(CONFIG)
    model(random_tokens(CONFIG, 1, 8)).sum().backward()
    gradient = model.model.layers[1].mlp.gate.weight.grad
    expected = gradient.clone()
    converted = model.bfloat16().model.layers[1].mlp.gate.weight.grad
    assert converted.dtype == torch.float32
    assert torch.equal(converted, expected)


@pytest.mark.parametrize("dtype", NARROW)
def test_a_narrow_default_type_does_not_reach_the_routers(dtype: torch.dtype) -> None:
    expected = router_state(initialized())
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = initialized()
    finally:
        torch.set_default_dtype(before)
    assert model.lm_head.weight.dtype == dtype
    assert_same_routers(model, expected)


@pytest.mark.parametrize("dtype", NARROW)
def test_converting_without_memory_and_filling_later(dtype: torch.dtype) -> None:
    with torch.device("meta"):
        model = DeepSeekV3(CONFIG)
    model = model.to(dtype).to_empty(device="cpu")
    state = close_biases(small_model(CONFIG)).state_dict()
    model.load_state_dict(state)
    assert model.lm_head.weight.dtype == dtype
    assert_same_routers(model, {name: tensor for name, tensor in state.items() if ".mlp.gate." in name})


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", NARROW)
def test_a_narrow_state_is_widened_when_it_is_loaded(dtype: torch.dtype, assign: bool) -> None:
    state = {name: tensor.to(dtype) for name, tensor in small_model(CONFIG).state_dict().items()}
    model = small_model(CONFIG)
    model.load_state_dict(state, assign=assign)
    expected = {name: tensor.float() for name, tensor in state.items() if ".mlp.gate." in name}
    assert_same_routers(model, expected)
    assert {tensor.dtype for name, tensor in state.items() if ".mlp.gate." in name} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@torch.no_grad()
def test_released_weights_reach_a_bfloat16_model_unrounded(dtype: torch.dtype) -> None:
    source = close_biases(small_model(CONFIG))
    weights = {name: t if "correction_bias" in name else t.to(dtype) for name, t in released_state(source).items()}
    model = small_model(CONFIG).bfloat16()
    load_released(model, weights)
    expected = {
        name: tensor if "correction_bias" in name else tensor.to(dtype).float()
        for name, tensor in router_state(source).items()
    }
    assert_same_routers(model, expected)
    assert len(model.model.layers[1].mlp.gate.e_score_correction_bias.unique()) == CONFIG.n_routed_experts


@torch.no_grad()
def test_a_bfloat16_model_computes_with_float32_routers() -> None:
    model = small_model(CONFIG).bfloat16()
    logits_BSV = model(random_tokens(CONFIG, 2, 9))
    assert logits_BSV.dtype == torch.bfloat16
    assert logits_BSV.isfinite().all()
