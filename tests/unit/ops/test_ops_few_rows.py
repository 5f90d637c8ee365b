"""The operations of a step of generation: the kernels against the reference in float64, and bits in any batch."""

import pytest
import torch
from torch import Tensor

from deepseek_v3.ops.expert_choice import Choices
from deepseek_v3.ops.expert_choice import reference as choice
from deepseek_v3.ops.few_rows import FewRows, reference

TYPES = [torch.float32, torch.bfloat16]
ROWS = [1, 5, 16, 19, 40]


@pytest.fixture
def kernels(triton_device: torch.device) -> tuple[FewRows, torch.device]:
    from deepseek_v3.ops.few_rows import triton

    return triton, triton_device


def random(device: torch.device, dtype: torch.dtype, *sizes: int) -> Tensor:
    return torch.randn(sizes, device=device).to(dtype)


def assert_near(found: Tensor, wanted: Tensor) -> None:
    """Compares with a result in float64; one rounding of the result, and sums in float32."""
    assert found.shape == wanted.shape
    close = 2**-8 if found.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), wanted, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("sizes", [(64, 32), (200, 70), (24, 16)])
def test_products(
    kernels: tuple[FewRows, torch.device], dtype: torch.dtype, rows: int, sizes: tuple[int, int]
) -> None:
    ops, device = kernels
    (width, columns) = sizes
    x_MI, w_OI = random(device, dtype, rows, width) / 8, random(device, dtype, columns, width)
    x_MI = torch.cat((x_MI, torch.full_like(x_MI, torch.nan)), 1)[:, :width]  # the rows may lie apart
    assert_near(ops.product(x_MI, w_OI), reference.product(x_MI.double(), w_OI.double()))
    wide = ops.product(x_MI, w_OI, torch.float32)
    assert wide.dtype == torch.float32
    assert_near(wide, reference.product(x_MI.double(), w_OI.double()))
    assert_near(ops.swiglu_product(x_MI, w_OI), reference.swiglu_product(x_MI.double(), w_OI.double()))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_products_by_head_read_and_write_parts(
    kernels: tuple[FewRows, torch.device], dtype: torch.dtype, rows: int
) -> None:
    ops, device = kernels
    heads, nope, rope, rank = 3, 24, 8, 40
    q_MHK, w_HNC = random(device, dtype, rows, heads, nope + rope), random(device, dtype, heads, nope, rank) / 8
    out_MHL = torch.full((rows, heads, rank + rope), 7.0, device=device, dtype=dtype)
    angles_MP = random(device, torch.float32, rows, rope // 2)
    cos_MP, sin_MP = angles_MP.cos(), angles_MP.sin()

    ops.product_by_head(q_MHK[..., :nope], w_HNC.mT, out_MHL[..., :rank])
    assert (out_MHL[..., rank:] == 7).all()
    ops.rotate_heads(q_MHK[..., nope:], cos_MP, sin_MP, out_MHL[..., rank:])

    wanted_MHL = torch.empty(out_MHL.shape, dtype=torch.float64, device=device)
    reference.product_by_head(q_MHK[..., :nope].double(), w_HNC.mT.double(), wanted_MHL[..., :rank])
    reference.rotate_heads(q_MHK[..., nope:].double(), cos_MP.double(), sin_MP.double(), wanted_MHL[..., rank:])
    assert_near(out_MHL, wanted_MHL)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("added", [1, 3])
def test_sums_and_norms(kernels: tuple[FewRows, torch.device], dtype: torch.dtype, added: int) -> None:
    ops, device = kernels
    rows, width = 3, 200
    x_MD, norm_D = random(device, dtype, rows, width), random(device, torch.float32, width)
    added_MKD = random(device, dtype, rows, added, width)
    total_MD, normed_MD = ops.add_norm(x_MD, added_MKD, norm_D, 1e-6)
    wanted_MD, _ = reference.add_norm(x_MD, added_MKD, norm_D, 1e-6)
    assert torch.equal(total_MD, wanted_MD) or dtype == torch.float32
    assert_near(total_MD, wanted_MD.double())
    assert_near(normed_MD, reference.rms_norm(total_MD.double(), norm_D.double(), 1e-6))
    parts_MD = x_MD[:, :120]  # rows that lie apart
    assert_near(
        ops.rms_norm(parts_MD, norm_D[:120], 1e-6), reference.rms_norm(parts_MD.double(), norm_D[:120], 1e-6)
    )


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_the_products_of_experts(kernels: tuple[FewRows, torch.device], dtype: torch.dtype, rows: int) -> None:
    """Expert 0 has no row, expert 1 has all of them, and a row is padding."""
    ops, device = kernels
    experts, width, hidden, per_token = 6, 48, 24, 3
    x_MD, gates_MK = random(device, dtype, rows, width), torch.rand(rows, per_token, device=device)
    gate_up_EGD = random(device, dtype, experts, 2 * hidden, width) / 8
    down_EDF = random(device, dtype, experts, width, hidden) / 8
    others = [2 + torch.randperm(experts - 2)[: per_token - 1] for _ in range(rows)]
    experts_MK = torch.stack([torch.cat((torch.tensor([1]), other)) for other in others]).int().to(device)
    slots_M = torch.arange(rows, device=device)
    if rows > 1:
        slots_M[-2] = -1
        x_MD[-2] = torch.nan

    chosen = choice.rows_by_expert(experts_MK, slots_M, experts)
    hidden_MKF = ops.expert_swiglu_product(x_MD, gate_up_EGD, chosen, gates_MK)
    wide_MKF = reference.expert_swiglu_product(x_MD.double(), gate_up_EGD.double(), chosen, gates_MK.double())
    valid_M = slots_M >= 0
    assert_near(hidden_MKF[valid_M], wide_MKF[valid_M])
    out_MKD = ops.expert_product(hidden_MKF, down_EDF, chosen)
    wide_MKD = reference.expert_product(hidden_MKF.double(), down_EDF.double(), chosen)
    assert_near(out_MKD[valid_M], wide_MKD[valid_M])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
def test_no_bit_of_a_row_depends_on_the_others(dtype: torch.dtype) -> None:
    from deepseek_v3.ops.expert_choice import triton as choice
    from deepseek_v3.ops.few_rows import triton as ops

    device = torch.device("cuda")
    x_MD, w_OD = random(device, dtype, 300, 520), random(device, dtype, 96, 520)
    router_ED = random(device, torch.float32, 16, 520)
    gate_up_EGD = random(device, dtype, 16, 48, 520)
    norm_D = random(device, torch.float32, 520)

    def run(rows: slice) -> list[Tensor]:
        x = x_MD[rows]
        logits = choice.router_logits(x, router_ED)
        gates, experts = choice.choose(logits, logits.new_zeros(16), Choices(3, 4, 2, True, 2.5))
        chosen = choice.rows_by_expert(experts, torch.arange(len(x), device=device), 16)
        hidden = ops.expert_swiglu_product(x, gate_up_EGD, chosen, gates)
        return [ops.product(x, w_OD), ops.swiglu_product(x, w_OD), logits, gates, hidden,
                *ops.add_norm(x, x[:, None], norm_D, 1e-6)]  # fmt: skip

    whole = run(slice(0, 300))
    for rows in (slice(7, 8), slice(3, 20), slice(5, 38), slice(99, 230)):
        for found, wanted in zip(run(rows), whole, strict=True):
            assert torch.equal(found, wanted[rows])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("vocabulary", [1, 300, 4099])
def test_the_lowest_of_the_most_probable_ids_is_chosen(
    kernels: tuple[FewRows, torch.device], dtype: torch.dtype, vocabulary: int
) -> None:
    ops, device = kernels
    logits_BV = torch.randn(9, vocabulary + 5, device=device).to(dtype)[:, :vocabulary]
    logits_BV[1] = -3
    logits_BV[2] = 0
    logits_BV[2, : vocabulary // 2] = -0.0
    logits_BV[3] -= 100
    for row, value in ((4, torch.nan), (5, torch.inf), (6, -torch.inf)):
        logits_BV[row, vocabulary // 3] = value
    tokens_B = ops.greedy_choice(logits_BV)
    assert torch.equal(tokens_B, reference.greedy_choice(logits_BV))
    assert tokens_B[1:3].tolist() == [0, 0]
    assert tokens_B[4:7].tolist() == [-1] * 3
    assert torch.equal(ops.greedy_choice(logits_BV[:0]), tokens_B[:0])
