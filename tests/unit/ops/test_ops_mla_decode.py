"""Latent attention over pages against one query at a time in float64, and the bytes of a cached row."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek_v3.ops.mla_decode import MLA_DECODE, PAGE, LatentFormat
from deepseek_v3.ops.mla_decode.reference import mla_decode, write_latents
from deepseek_v3.ops.operation import Target
from deepseek_v3.ops.rms_norm import rms_norm
from deepseek_v3.ops.rotary import rotate
from deepseek_v3.utils.errors import ConfigError
from helpers.latent_pages import cached, check_tolerances, exact, scale_of

E4M3 = torch.float8_e4m3fn
EXACT = 1e-12
BORDERS = [0, 1, 2, 63, 64, 65, 127, 128, 129]
HEADS = [1, 2, 8, 16, 20, 64, 128]


def largest_difference(found: Tensor, expected: Tensor) -> float:
    return (found - expected).abs().max().item()


def queries(batch: int, new: int, heads: int, layout: LatentFormat, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, new, heads, layout.width).to(dtype)


@pytest.mark.parametrize("new", [1, 2, 3, 4])
def test_decoding_is_one_softmax_per_query(new: int) -> None:
    layout = LatentFormat(16, 8, torch.float64)
    cache = cached(layout, BORDERS)
    q_BSHL = queries(len(BORDERS), new, 3, layout, torch.float64)
    out, sums = mla_decode(q_BSHL, *cache.arguments, 0.3)
    exact_out, exact_sums = exact(q_BSHL, cache, 0.3)
    assert largest_difference(out, exact_out) < EXACT
    seen = ~exact_sums.isneginf()
    assert torch.equal(sums.isneginf(), ~seen)
    assert sums.dtype == torch.float32
    assert largest_difference(sums[seen], exact_sums[seen].float()) < 1e-6


@given(st.lists(st.integers(0, 200), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 5))
def test_any_lengths_queries_and_heads(lengths: list[int], new: int, heads: int) -> None:
    layout = LatentFormat(8, 4, torch.float64)
    cache = cached(layout, lengths)
    q_BSHL = queries(len(lengths), new, heads, layout, torch.float64)
    found = mla_decode(q_BSHL, *cache.arguments, 0.3)
    expected = exact(q_BSHL, cache, 0.3)
    assert largest_difference(found[0], expected[0]) < EXACT
    check_tolerances(found, expected)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    "layout", [LatentFormat(128, 64, torch.bfloat16), LatentFormat(128, 64, E4M3)], ids=["bf16", "fp8"]
)
def test_bfloat16_keeps_to_the_published_tolerances(layout: LatentFormat, heads: int) -> None:
    cache = cached(layout, [0, 70])
    q_BSHL = queries(2, 1, heads, layout, torch.bfloat16)
    found = mla_decode(q_BSHL, *cache.arguments, scale_of(layout))
    assert found[0].dtype == torch.bfloat16
    check_tolerances(found, exact(q_BSHL, cache, scale_of(layout)))


def test_the_widths_of_released_models() -> None:
    layout = LatentFormat(512, 64, E4M3)
    cache = cached(layout, [65, 300])
    q_BSHL = queries(2, 2, 16, layout, torch.bfloat16)
    check_tolerances(mla_decode(q_BSHL, *cache.arguments, scale_of(layout)), exact(q_BSHL, cache, scale_of(layout)))


def test_a_page_of_two_sequences_counts_for_both() -> None:
    layout = LatentFormat(8, 4, torch.float64)
    cache = cached(layout, [64, 100])
    q_BSHL = queries(2, 1, 2, layout, torch.float64)
    shared = cache._replace(table_BM=cache.table_BM[[1, 1]], lengths_B=cache.lengths_B[[0, 1]])
    shared = shared._replace(rows=[cache.rows[1][:64], cache.rows[1]])
    found = mla_decode(q_BSHL, *shared.arguments, 0.3)
    assert largest_difference(found[0], exact(q_BSHL, shared, 0.3)[0]) < EXACT


# The bytes of a row


@pytest.mark.parametrize(("rank", "rope", "size"), [(512, 64, 656), (256, 32, 328), (128, 64, 260)])
def test_a_row_of_8_bit_blocks_byte_by_byte(rank: int, rope: int, size: int) -> None:
    layout = LatentFormat(rank, rope, E4M3)
    latent_NC, rope_NR = 3 * torch.randn(5, rank), torch.randn(5, rope)
    latent_NC[1, 128:] = 0
    rows = layout.pack(latent_NC, rope_NR)
    assert (layout.row_bytes, rows.shape, rows.dtype) == (size, (5, size), torch.uint8)
    for row, latent_C, rope_R in zip(rows, latent_NC, rope_NR, strict=True):
        scales = row[rank : rank + rank // 32].clone().view(torch.float32)
        assert torch.equal(row[rank + rank // 32 :].clone().view(torch.bfloat16), rope_R.bfloat16())
        for block, scale in enumerate(scales):
            numbers = latent_C[128 * block : 128 * (block + 1)]
            least = max(float(numbers.abs().max()) / 448, torch.finfo(torch.float32).tiny)
            assert scale == 2 ** math.ceil(math.log2(least))
            codes = row[128 * block : 128 * (block + 1)]
            assert torch.equal(codes, (numbers * scale.reciprocal()).to(E4M3).view(torch.uint8))


def test_the_round_trip_of_8_bit_blocks() -> None:
    """A number loses 1/16 of itself at most, or 2^-10 of its scale; a rotated key loses half a bit of bfloat16."""
    layout = LatentFormat(256, 32, E4M3)
    latent_NC, rope_NR = torch.randn(50, 256) * torch.logspace(-20, 20, 50)[:, None], torch.randn(50, 32)
    numbers_NL = layout.unpack(layout.pack(latent_NC, rope_NR), torch.float64)
    scales_NC = (latent_NC.unflatten(1, (2, 128)).abs().amax(-1) / 448).repeat_interleave(128, 1)
    error_NC = (numbers_NL[:, :256] - latent_NC).abs()
    assert (error_NC <= torch.maximum(latent_NC.abs() / 16, scales_NC * 2**-10) * (1 + 1e-6)).all()
    assert ((numbers_NL[:, 256:] - rope_NR).abs() <= rope_NR.abs() / 256).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_wide_rows_hold_the_numbers_themselves(dtype: torch.dtype) -> None:
    layout = LatentFormat(24, 8, dtype)
    latent_NC, rope_NR = torch.randn(3, 24), torch.randn(3, 8)
    rows = layout.pack(latent_NC, rope_NR)
    assert layout.row_bytes == 32 * dtype.itemsize
    assert torch.equal(layout.unpack(rows, torch.float32), torch.cat((latent_NC, rope_NR), -1).to(dtype).float())
    assert layout.empty_pages(4, rows.device).shape == (4, PAGE, 32)


def test_8_bit_blocks_need_whole_blocks() -> None:
    with pytest.raises(ConfigError, match=r"kv_lora_rank = 96, expected a multiple of 128"):
        LatentFormat(96, 32, E4M3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, E4M3], ids=str)
def test_writing_is_norm_rotation_and_packing(dtype: torch.dtype) -> None:
    layout, wide = LatentFormat(128, 8, dtype), torch.float64 if dtype == torch.float64 else torch.bfloat16
    pages = layout.empty_pages(3, torch.device("cpu"))
    pages.view(torch.uint8).fill_(7)
    before, kv_NL, norm_C = pages.clone(), torch.randn(4, 136).to(wide), torch.rand(128)
    angles_NZ, slots_N = torch.randn(4, 4), torch.tensor([130, -1, 5, 64])
    write_latents(pages, slots_N, kv_NL, norm_C, 1e-6, angles_NZ.cos(), angles_NZ.sin(), layout)

    for number, slot in enumerate(slots_N.tolist()):
        turned = rotate(
            kv_NL[None, number, None, None, 128:],
            *(f(angles_NZ)[None, number, None] for f in (torch.cos, torch.sin)),
        )
        row = layout.pack(rms_norm(kv_NL[None, number, :128], norm_C, 1e-6), turned.view(1, 8))
        if slot >= 0:
            assert torch.equal(pages[slot // PAGE, slot % PAGE], row[0])
            before[slot // PAGE, slot % PAGE] = row[0]
    assert torch.equal(pages, before)


# The operation


@pytest.mark.parametrize(
    ("capability", "dtype", "widths", "expected"),
    [
        ((9, 0), torch.bfloat16, (512, 64), None),
        ((8, 0), torch.float32, (64, 8), None),
        ((7, 5), torch.float16, (512, 64), "needs a GPU of compute capability 8.0 or newer"),
        ((9, 0), torch.float64, (512, 64), "needs float32, bfloat16 or float16"),
        ((9, 0), torch.bfloat16, (576, 64), "needs a latent of at most 512 numbers and a rotary key of at most 64"),
        (
            (9, 0),
            torch.bfloat16,
            (512, 128),
            "needs a latent of at most 512 numbers and a rotary key of at most 64",
        ),
    ],
)
def test_obstacles_of_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    widths: tuple[int, ...],
    expected: str | None,
) -> None:
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds only")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert MLA_DECODE.backends["triton"].obstacle(Target(torch.device("cuda"), dtype, widths)) == expected


@pytest.mark.parametrize(
    ("capability", "dtype", "widths", "expected"),
    [
        ((9, 0), torch.float16, (512, 64), "needs bfloat16"),
        (
            (9, 0),
            torch.bfloat16,
            (384, 64),
            "needs a latent of 512 numbers and a rotary key of 64, or of 256 and 32",
        ),
        ((10, 0), torch.bfloat16, (256, 32), "needs a GPU of compute capability 9.0"),
    ],
)
def test_obstacles_of_the_kernel_for_hopper(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    widths: tuple[int, ...],
    expected: str,
) -> None:
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds only")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert MLA_DECODE.backends["cuda"].obstacle(Target(torch.device("cuda"), dtype, widths)) == expected


def test_a_cpu_runs_the_reference() -> None:
    selection = MLA_DECODE.select(Target(torch.device("cpu"), torch.bfloat16, (512, 64)))
    assert str(selection) == "mla_decode reference (cuda needs a CUDA device; triton needs a CUDA device)"
    assert selection.run.mla_decode is mla_decode
    assert selection.run.write_latents is write_latents
