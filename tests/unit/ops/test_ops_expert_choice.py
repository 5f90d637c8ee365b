"""Choosing the experts of a few rows: the reference against the router of training, and the kernels against it."""

import pytest
import torch

from deepseek_v3.moe.routing import Router
from deepseek_v3.ops.expert_choice import Choices, ExpertChoice, reference
from helpers.models import small_config

EXPERTS = [(8, 1, 1, 3), (12, 1, 1, 1), (16, 4, 2, 3), (24, 3, 1, 8)]  # experts, groups, kept groups, per token


@pytest.fixture
def kernels(triton_device: torch.device) -> tuple[ExpertChoice, torch.device]:
    from deepseek_v3.ops.expert_choice import triton

    return triton, triton_device


def choices_of(sizes: tuple[int, int, int, int], normalised: bool = True) -> Choices:
    _, groups, kept, per_token = sizes
    return Choices(per_token, groups, kept, normalised, 2.5, shared=per_token % 3)


def test_the_reference_chooses_as_the_router_of_training() -> None:
    experts = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
    for normalised in (False, True):
        config = small_config(norm_topk_prob=normalised, **experts)
        router = Router(config)
        torch.nn.init.normal_(router.weight)
        router.e_score_correction_bias.uniform_(-0.2, 0.2)
        x_TD = torch.randn(50, config.hidden_size)
        x_TD[:10] *= 100  # logits that are all very low occur
        wanted = router(x_TD)
        logits_ME = reference.router_logits(x_TD, router.weight)
        choices = Choices(3, 4, 2, normalised, config.routed_scaling_factor)
        gates_MK, experts_MK = reference.choose(logits_ME, router.e_score_correction_bias, choices)
        assert torch.equal(experts_MK.long(), wanted.experts_TK)
        torch.testing.assert_close(gates_MK, wanted.gates_TK)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("sizes", EXPERTS)
def test_choices(
    kernels: tuple[ExpertChoice, torch.device], sizes: tuple[int, int, int, int], normalised: bool
) -> None:
    ops, device = kernels
    logits_ME = torch.randn(9, sizes[0], device=device)
    logits_ME[1] -= 100
    logits_ME[2] = 0  # equal scores: the lowest expert comes first
    bias_E = 0.1 * torch.randn(sizes[0], device=device).round()
    gates_MK, experts_MK = ops.choose(logits_ME, bias_E, choices_of(sizes, normalised))
    wanted_MK, wanted_experts_MK = reference.choose(logits_ME, bias_E, choices_of(sizes, normalised))
    assert torch.equal(experts_MK, wanted_experts_MK)
    torch.testing.assert_close(gates_MK, wanted_MK)
    logits_ME[3] = torch.nan  # whatever is chosen is an expert
    _, experts_MK = ops.choose(logits_ME, bias_E, choices_of(sizes, normalised))
    assert (experts_MK >= 0).all()
    assert (experts_MK < sizes[0] + sizes[3] % 3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 19])
def test_the_logits_of_the_router(
    kernels: tuple[ExpertChoice, torch.device], dtype: torch.dtype, rows: int
) -> None:
    ops, device = kernels
    x_MD, w_ED = torch.randn(rows, 300, device=device).to(dtype), torch.randn(10, 300, device=device)
    found_ME = ops.router_logits(x_MD, w_ED)
    assert found_ME.dtype == torch.float32
    wanted_ME = reference.router_logits(x_MD.double(), w_ED.double())
    torch.testing.assert_close(found_ME.double(), wanted_ME, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 400])
def test_the_rows_of_each_expert(kernels: tuple[ExpertChoice, torch.device], rows: int) -> None:
    """Expert 1 has all rows, experts 0 and 5 none, and a row is padding."""
    ops, device = kernels
    others_M1 = torch.randint(2, 5, (rows, 1), device=device)
    experts_MK = torch.cat((torch.ones_like(others_M1), others_M1), 1).int()
    slots_M = torch.arange(rows, device=device)
    slots_M[-1] = -1
    found, wanted = ops.rows_by_expert(experts_MK, slots_M, 6), reference.rows_by_expert(experts_MK, slots_M, 6)
    assert wanted.counts_E.tolist()[:2] == [0, rows - 1]
    assert torch.equal(found.counts_E, wanted.counts_E)
    for found_M, wanted_M, count in zip(found.choices_EM, wanted.choices_EM, wanted.counts_E, strict=True):
        assert torch.equal(found_M[:count], wanted_M[:count])
