"""Attention for training against one query at a time in float64."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from deepseek_v3.ops.attention import (
    Attention,
    cudnn_attention,
    reference_attention,
    sdpa_attention,
)
from helpers.models import largest_difference

EXACT = 1e-12
SCALE = 0.3


def attend(query_K: Tensor, keys_TK: Tensor, values_TV: Tensor) -> Tensor:
    """One query over the keys it may see, all of them."""
    weights_T = torch.exp(SCALE * (keys_TK @ query_K))
    return (weights_T / weights_T.sum()) @ values_TV


def queries_keys_values(
    dtype: torch.dtype, device: torch.device, value_width: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys of width 16, an odd length, two sequences."""
    shapes = [(2, 7, 3, 16), (2, 7, 3, 16), (2, 7, 3, value_width)]
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes)
    return q, k, v


def documents_mask(device: torch.device) -> Tensor:
    documents_BS = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1]], device=device)
    same_BSS = documents_BS[:, :, None] == documents_BS[:, None, :]
    return same_BSS.tril()


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
def test_attention_is_one_softmax_per_query(masked: bool) -> None:
    q, k, v = queries_keys_values(torch.float64, torch.device("cpu"))
    allowed = documents_mask(q.device) if masked else torch.ones(2, 7, 7, dtype=torch.bool).tril()

    found = reference_attention(q, k, v, SCALE, allowed if masked else None)

    for b in range(2):
        for s in range(7):
            seen = allowed[b, s]
            for h in range(3):
                expected = attend(q[b, s, h], k[b, seen, h], v[b, seen, h])
                assert largest_difference(found[b, s, h], expected) < EXACT


def test_attention_gradients() -> None:
    q, k, v = (torch.randn(1, 3, 2, width, dtype=torch.float64, requires_grad=True) for width in (4, 4, 2))
    assert gradcheck(lambda q, k, v: reference_attention(q, k, v, SCALE), (q, k, v))


def test_attention_in_half_precision_sums_in_float32() -> None:
    q, k, v = (x.detach().bfloat16() for x in queries_keys_values(torch.float32, torch.device("cpu")))
    found = reference_attention(q, k, v, SCALE)
    exact = reference_attention(q.double(), k.double(), v.double(), SCALE)
    assert found.dtype == torch.bfloat16
    assert (found == exact.bfloat16()).double().mean() > 0.99


def outputs_and_gradients(attention: Attention, inputs: tuple[Tensor, ...], allowed: Tensor | None) -> list[Tensor]:
    out = attention(*inputs, SCALE, allowed)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    return [out, *torch.autograd.grad(out, inputs, upstream)]


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, 1e-5)])
@pytest.mark.parametrize("value_width", [8, 16, 24])
def test_torch_kernels_equal_the_reference(
    masked: bool, dtype: torch.dtype, tolerance: float, value_width: int, device: torch.device
) -> None:
    inputs = queries_keys_values(dtype, device, value_width)
    allowed = documents_mask(device) if masked else None
    expected = outputs_and_gradients(reference_attention, inputs, allowed)
    for found, wanted in zip(outputs_and_gradients(sdpa_attention, inputs, allowed), expected, strict=True):
        assert largest_difference(found, wanted) < tolerance


def test_a_documents_mask_takes_cudnn_back_to_torch_kernels(device: torch.device) -> None:
    inputs = queries_keys_values(torch.float32, device)
    allowed = documents_mask(device)
    expected = outputs_and_gradients(reference_attention, inputs, allowed)
    for found, wanted in zip(outputs_and_gradients(cudnn_attention, inputs, allowed), expected, strict=True):
        assert largest_difference(found, wanted) < 1e-5


@pytest.mark.gpu
def test_cudnn_equals_the_reference_at_the_released_head_widths() -> None:
    shapes = [(2, 257, 4, 192), (2, 257, 4, 192), (2, 257, 4, 128)]
    narrow = tuple(torch.randn(s, dtype=torch.bfloat16, device="cuda", requires_grad=True) for s in shapes)
    wide = tuple(x.detach().float().requires_grad_() for x in narrow)
    expected = outputs_and_gradients(reference_attention, wide, None)
    for found, wanted in zip(outputs_and_gradients(cudnn_attention, narrow, None), expected, strict=True):
        assert largest_difference(found.float(), wanted) < 0.02 * wanted.abs().max()


def test_cudnn_without_its_device_raises() -> None:
    with pytest.raises(RuntimeError):
        cudnn_attention(*queries_keys_values(torch.float32, torch.device("cpu")), SCALE)
