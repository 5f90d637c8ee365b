"""Queries, keys and values of every head: the reference against a loop over heads, the kernels against float64."""

import pytest
import torch
from torch import Tensor

from deepseek_v3.ops.rotary import JoinHeads, join_heads, rotate

BATCH, LENGTH = 2, 3
# Heads, and widths without position, of the rotary part and of the value: of the published model, and uneven ones.
SHAPES = [(11, 10, 6, 14), (1, 1, 2, 1), (16, 128, 64, 128)]


@pytest.fixture
def kernels(triton_device: torch.device) -> tuple[JoinHeads, torch.device]:
    from deepseek_v3.ops.rotary import triton

    return triton.join_heads, triton_device


def projected(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, tables: int = 1
) -> tuple[list[Tensor], tuple[Tensor, Tensor], list[Tensor]]:
    """What the projections return, cosine and sine, and upstream gradients in the layout of attention kernels."""
    heads, nope, rope, value = shape

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=device).to(dtype)

    leaves = [
        random(BATCH, LENGTH, heads, nope + rope).requires_grad_(),
        random(BATCH, LENGTH, heads, nope + value).requires_grad_(),
        random(BATCH, LENGTH, rope + 5).requires_grad_(),
    ]
    angles_BSP = 10 * torch.randn(tables, LENGTH, rope // 2, device=device)
    widths = (nope + rope, nope + rope, value)
    upstream = [random(BATCH, heads, LENGTH, width).transpose(1, 2) for width in widths]
    return leaves, (angles_BSP.cos(), angles_BSP.sin()), upstream


def run(
    join: JoinHeads, leaves: list[Tensor], tables: tuple[Tensor, Tensor], upstream: list[Tensor]
) -> list[Tensor]:
    """Results and gradients; the rotary key is a part of a wider projection, as in the model."""
    q_BSHK, kv_BSHX, latent_BSL = leaves
    results = join(q_BSHK, kv_BSHX, latent_BSL[..., -2 * tables[0].shape[-1] :], *tables)
    return [*results, *torch.autograd.grad(results, leaves, upstream)]


def exact(leaves: list[Tensor], tables: tuple[Tensor, Tensor], upstream: list[Tensor]) -> list[Tensor]:
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    cos_BSP, sin_BSP = tables
    return run(join_heads, wide, (cos_BSP.double(), sin_BSP.double()), [grad.double() for grad in upstream])


def test_the_reference_equals_a_loop_over_heads() -> None:
    (q_BSHK, kv_BSHX, latent_BSL), tables, _ = projected(SHAPES[0], torch.float64, torch.device("cpu"))
    heads, nope, rope, _ = SHAPES[0]
    k_rope_BSR = latent_BSL[..., -rope:]
    joined_q, joined_k, joined_v = join_heads(q_BSHK, kv_BSHX, k_rope_BSR, *tables)
    turned_BSR = rotate(k_rope_BSR[:, :, None], *tables)[:, :, 0]
    for head in range(heads):
        assert torch.equal(joined_q[:, :, head, :nope], q_BSHK[:, :, head, :nope])
        assert torch.equal(joined_q[:, :, head, nope:], rotate(q_BSHK[:, :, [head], nope:], *tables)[:, :, 0])
        assert torch.equal(joined_k[:, :, head], torch.cat((kv_BSHX[:, :, head, :nope], turned_BSR), -1))
        assert torch.equal(joined_v[:, :, head], kv_BSHX[:, :, head, nope:])


@pytest.mark.parametrize("tables", [1, BATCH], ids=["one table", "a table for each sequence"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_join_heads_as_the_reference_does(
    kernels: tuple[JoinHeads, torch.device], shape: tuple[int, int, int, int], dtype: torch.dtype, tables: int
) -> None:
    join, device = kernels
    given = projected(shape, dtype, device, tables)
    for found, expected in zip(run(join, *given), exact(*given), strict=True):
        assert found.dtype == dtype
        tolerance = 4e-3 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance / 4)


def test_the_kernels_touch_only_their_tensors(kernels: tuple[JoinHeads, torch.device]) -> None:
    """Inputs that are parts of wider memory, NaN around them."""
    join, device = kernels
    (q_BSHK, kv_BSHX, latent_BSL), tables, upstream = projected(SHAPES[0], torch.float32, device)
    expected = exact([q_BSHK, kv_BSHX, latent_BSL], tables, upstream)
    apart = []
    for tensor in (q_BSHK, kv_BSHX):
        memory = torch.full([size + 3 for size in tensor.shape], torch.nan, device=device)
        part = memory[1:-2, 2:-1, 1:-2, 2:-1]
        part.copy_(tensor.detach())
        apart.append(part.requires_grad_())
    for found, right in zip(run(join, [*apart, latent_BSL], tables, upstream), expected, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-6)


def test_a_compiled_graph_keeps_the_kernels(kernels: tuple[JoinHeads, torch.device]) -> None:
    join, device = kernels
    compiled = torch.compile(
        lambda *inputs: join(*inputs),
        fullgraph=True,
        dynamic=True,
        backend="inductor" if device.type == "cuda" else "aot_eager",
    )
    given = projected(SHAPES[0], torch.float32, device)
    for found, expected in zip(run(compiled, *given), run(join, *given), strict=True):
        assert torch.equal(found, expected)


def test_no_tokens_have_no_heads(kernels: tuple[JoinHeads, torch.device]) -> None:
    join, device = kernels
    leaves, tables, upstream = projected(SHAPES[0], torch.float32, device)
    none = [leaf.detach()[:0].requires_grad_() for leaf in leaves]
    found = run(join, none, tables, [grad[:0] for grad in upstream])
    assert [len(tensor) for tensor in found] == [0] * 6
