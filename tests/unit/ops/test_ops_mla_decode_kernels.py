"""Latent attention in Triton: FlashMLA's tolerances against float64, the same bits in any batch, and writing."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from deepseek_v3.ops.mla_decode import PAGE, LatentFormat, MlaDecode, reference
from helpers.experts import fill_new_memory_with_nan
from helpers.latent_pages import (
    BF16,
    E4M3,
    HEADS,
    Cached,
    cached,
    check_tolerances,
    exact,
    queries,
    scale_of,
    write,
)

WIDE, BLOCKS, SMALL = LatentFormat(512, 64, BF16), LatentFormat(512, 64, E4M3), LatentFormat(32, 16, BF16)
BORDERS = [0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 512, 513]


@pytest.fixture
def kernels(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlaDecode]:
    """The Triton back end, on tensors of `triton_device`; what it leaves unwritten is NaN.

    The interpreter is slow: there, a part has 128 tokens of sequences of up to 512, and 256 tokens of longer ones.
    """
    from deepseek_v3.ops.mla_decode import triton

    if triton_device.type == "cpu":
        for name, value in (("_SHORTEST", 128), ("_LIMIT", 512), ("_FIRST_PART", 128), ("_FIRST_LIMIT", 512)):
            monkeypatch.setattr(triton, name, value)
    with fill_new_memory_with_nan():
        yield triton


def decode(kernels: MlaDecode, q_BSHL: Tensor, cache: Cached, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the kernels give, on the CPU."""
    out, sums = kernels.mla_decode(q_BSHL.to(device), *cache.to(device).arguments, scale_of(cache.layout))
    return out.cpu(), sums.cpu()


def check(kernels: MlaDecode, q_BSHL: Tensor, cache: Cached, device: torch.device) -> None:
    found = decode(kernels, q_BSHL, cache, device)
    assert found[0].dtype == q_BSHL.dtype
    check_tolerances(found, exact(q_BSHL, cache, scale_of(cache.layout)))


@pytest.mark.parametrize(
    ("layout", "heads"),
    [
        (WIDE, 16),
        (WIDE, 40),
        (BLOCKS, 16),
        (BLOCKS, 40),
        (LatentFormat(256, 32, E4M3), 20),
        (LatentFormat(384, 64, E4M3), 1),
        (LatentFormat(192, 24, BF16), 3),
        (LatentFormat(24, 4, BF16), 2),
    ],
    ids=str,
)
def test_layouts_and_tiles(
    kernels: MlaDecode, triton_device: torch.device, layout: LatentFormat, heads: int
) -> None:
    check(kernels, queries(3, 1, heads, layout), cached(layout, [70, 0, 3]), triton_device)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.float32, torch.float32),
        (torch.float32, E4M3),
        (torch.float16, torch.float16),
        (torch.float16, E4M3),
        (torch.float32, BF16),
    ],
)
def test_types(kernels: MlaDecode, triton_device: torch.device, dtype: torch.dtype, stored: torch.dtype) -> None:
    layout = LatentFormat(128, 16, stored)
    cache = cached(layout, [40, 66], size=0.01 if stored == E4M3 else 0.1)  # scales that are small for float16
    q_BSHL = queries(2, 2, 3, layout, dtype)
    check(kernels, q_BSHL, cache, triton_device)
    if dtype == torch.float32:
        out, sums = decode(kernels, q_BSHL, cache, triton_device)
        exact_out, exact_sums = exact(q_BSHL, cache, scale_of(layout))
        assert (out - exact_out).abs().max() < 1e-6
        assert (sums - exact_sums).abs().max() < 1e-5


def test_scales_need_not_be_powers_of_two(kernels: MlaDecode, triton_device: torch.device) -> None:
    layout = LatentFormat(128, 16, E4M3)
    cache = cached(layout, [70, 300])
    scales = cache.pages[..., 128:132].view(torch.float32)
    scales *= torch.rand_like(scales) + 0.5
    pages = cache.pages[cache.table_BM.long().clamp(0, len(cache.pages) - 1)].flatten(1, 2)
    rows = [layout.unpack(own[: len(old)], torch.float64) for own, old in zip(pages, cache.rows, strict=True)]
    check(kernels, queries(2, 1, 4, layout), cache._replace(rows=rows), triton_device)


@pytest.mark.parametrize("stored", [BF16, E4M3], ids=["bf16", "fp8"])
@pytest.mark.parametrize("shared_kib", [164, 100])
def test_tiles_of_other_gpus(
    kernels: MlaDecode,
    triton_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    stored: torch.dtype,
    shared_kib: int,
) -> None:
    monkeypatch.setattr("deepseek_v3.ops.mla_decode.triton._describe", lambda _: (False, shared_kib))
    layout = LatentFormat(128, 16, stored)
    for heads in (17, 40):
        check(kernels, queries(1, 1, heads, layout), cached(layout, [70]), triton_device)


@pytest.mark.parametrize("heads", HEADS)
def test_every_number_of_heads(kernels: MlaDecode, triton_device: torch.device, heads: int) -> None:
    check(kernels, queries(1, 1, heads, SMALL), cached(SMALL, [70]), triton_device)


@pytest.mark.parametrize("new", [1, 4])
def test_lengths_at_the_borders_of_blocks_and_parts(
    kernels: MlaDecode, triton_device: torch.device, new: int
) -> None:
    check(kernels, queries(len(BORDERS), new, 2, SMALL), cached(SMALL, BORDERS), triton_device)


@pytest.mark.parametrize("new", [2, 3])
def test_queries_of_several_tokens(kernels: MlaDecode, triton_device: torch.device, new: int) -> None:
    """Some of which see no row, and tiles that hold heads of several tokens."""
    check(kernels, queries(3, new, 17, SMALL), cached(SMALL, [1, 2, 66]), triton_device)


@pytest.mark.parametrize("layout", [SMALL, LatentFormat(128, 16, E4M3)], ids=["bf16", "fp8"])
def test_no_bit_depends_on_the_batch(kernels: MlaDecode, triton_device: torch.device, layout: LatentFormat) -> None:
    """Each sequence alone, in two orders, among other lengths, and with a table for many more parts."""
    cache = cached(layout, [200, 0, 70, 520])
    q_BSHL = queries(4, 2, 3, layout)
    out, sums = decode(kernels, q_BSHL, cache, triton_device)
    for sequences, more_pages in [([0], 0), ([3], 300), ([2, 3, 0, 1], 7)]:
        found = decode(kernels, q_BSHL[sequences], cache.of(sequences, more_pages), triton_device)
        assert torch.equal(found[0], out[sequences])
        assert torch.equal(found[1], sums[sequences])


def test_without_sequences_or_pages(kernels: MlaDecode, triton_device: torch.device) -> None:
    cache = cached(SMALL, [0, 0])
    out, sums = decode(kernels, queries(2, 1, 3, SMALL), cache, triton_device)
    assert not out.any()
    assert sums.isneginf().all()
    without_table = cache._replace(table_BM=cache.table_BM[:, :0])
    assert not decode(kernels, queries(2, 1, 3, SMALL), without_table, triton_device)[0].any()
    assert decode(kernels, queries(0, 1, 3, SMALL), cache.of([]), triton_device)[0].shape == (0, 1, 3, 32)


def test_tensors_may_lie_apart(kernels: MlaDecode, triton_device: torch.device) -> None:
    """Pages of one layer among others, queries whose heads come first, a slice of a table; int64 lengths."""
    cache = cached(SMALL, [70, 64])
    q_BSHL = queries(2, 2, 3, SMALL).transpose(1, 2).contiguous().transpose(1, 2)
    layers = torch.stack([torch.full_like(cache.pages, torch.nan), cache.pages], 1)
    apart = cache._replace(table_BM=cache.table_BM.repeat(1, 2)[:, : cache.table_BM.shape[1]]).to(triton_device)
    apart = apart._replace(pages=layers.to(triton_device)[:, 1], lengths_B=apart.lengths_B.long())
    expected = decode(kernels, q_BSHL, cache, triton_device)
    found = kernels.mla_decode(q_BSHL.to(triton_device), *apart.arguments, scale_of(SMALL))
    assert torch.equal(found[0].cpu(), expected[0])


def test_the_number_of_parts_is_never_larger_than_the_memory() -> None:
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds only")
    from deepseek_v3.ops.mla_decode.triton import most_parts, part_length

    largest = 0
    for capacity in range(1, 300_000, 61):
        largest = max(largest, -(-capacity // part_length(capacity)))
        assert largest <= most_parts(capacity) <= 2 * largest
    assert [most_parts(length) for length in (0, 1, 512, 513, 4096, 8192, 8193, 131_072)] == [
        0, 1, 1, 2, 4, 8, 9, 64,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_whole_numbers_convert_like_instructions(
    kernels: MlaDecode, triton_device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs before compute capability 8.9 have no instructions for e4m3: every code, and codes of small numbers."""
    layout = LatentFormat(256, 16, E4M3)
    kv_NL = torch.randn(20, 272) * torch.logspace(-6, 0, 272).flip(0)
    cache, q_BSHL = cached(layout, [64]), queries(1, 1, 4, layout, dtype)
    codes = torch.arange(256).where(torch.arange(256) % 128 != 127, 0).byte()
    cache.pages[cache.table_BM[0, 0], 3, :256] = codes
    found = []
    for native in (True, False):
        monkeypatch.setattr("deepseek_v3.ops.mla_decode.triton._converts_e4m3", lambda _, native=native: native)
        pages = layout.empty_pages(1, triton_device)
        write(kernels, pages, torch.arange(20), kv_NL, layout, triton_device)
        found.append((*decode(kernels, q_BSHL, cache, triton_device), pages[0, :20].cpu()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# Writing


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize(
    "layout",
    [BLOCKS, LatentFormat(384, 24, E4M3), LatentFormat(40, 12, BF16), LatentFormat(64, 8, torch.float32)],
    ids=str,
)
def test_writing_equals_the_reference(
    kernels: MlaDecode, triton_device: torch.device, layout: LatentFormat, dtype: torch.dtype
) -> None:
    """Within one step of the stored type; most numbers equal. Padding and other rows are not touched."""
    slots_N = torch.tensor([130, -1, 5, 64, -7, 191])
    kv_NL, norm_C = torch.randn(6, layout.width + 3).to(dtype)[:, : layout.width], torch.rand(layout.rank)
    pages = layout.empty_pages(3, triton_device)
    pages.view(torch.uint8).fill_(0xFF)
    expected = pages.clone()
    write(kernels, pages, slots_N, kv_NL, layout, triton_device, norm_C)
    write(reference, expected, slots_N, kv_NL, layout, triton_device, norm_C)
    written = slots_N[slots_N >= 0].to(triton_device)
    rows, right = (x.flatten(0, 1)[written] for x in (pages, expected))
    numbers, right_numbers = layout.unpack(rows, torch.float64), layout.unpack(right, torch.float64)
    error, size = (numbers - right_numbers).abs(), right_numbers.abs()
    step = {E4M3: 1 / 8, BF16: 1 / 128, torch.float32: 1e-6 if dtype == torch.float32 else 1 / 128}[layout.dtype]
    assert (error <= step * size + 1e-5).all()
    assert (error <= 1e-6 * size).double().mean() > 0.95
    pages.flatten(0, 1)[written] = 0
    expected.flatten(0, 1)[written] = 0
    assert torch.equal(pages.view(torch.uint8), expected.view(torch.uint8))


def test_codes_and_scales_are_those_of_the_reference(kernels: MlaDecode, triton_device: torch.device) -> None:
    """Sums of the squares of small whole numbers are exact in any order; one block is zero, and one is NaN."""
    kv_NL = torch.randint(-8, 9, (40, 576)).float()
    kv_NL[7, :128], kv_NL[9, 130] = 0, torch.nan
    norm_C = torch.randn(512).exp()
    rows = []
    for back_end in (kernels, reference):
        pages = BLOCKS.empty_pages(1, triton_device)
        write(back_end, pages, torch.arange(40), kv_NL, BLOCKS, triton_device, norm_C)
        rows.append(pages[0, :40, :528].cpu())
    finite = torch.arange(40) != 9
    assert torch.equal(rows[0][finite], rows[1][finite])
    assert BLOCKS.unpack(pages[0, 9:10].cpu(), torch.float32)[0, :512].isnan().all()


def test_what_is_written_is_read(kernels: MlaDecode, triton_device: torch.device) -> None:
    layout = LatentFormat(128, 16, E4M3)
    pages = layout.empty_pages(3, triton_device)
    pages.fill_(0xFF)
    slots_N = torch.cat((torch.arange(PAGE) + 2 * PAGE, torch.arange(6)))
    write(kernels, pages, slots_N, torch.randn(70, 144).bfloat16(), layout, triton_device)
    rows = layout.unpack(pages.flatten(0, 1)[slots_N.to(triton_device)].cpu(), torch.float64)
    table_BM, lengths_B = torch.tensor([[2, 0]], dtype=torch.int32), torch.tensor([70], dtype=torch.int32)
    check(kernels, queries(1, 1, 4, layout), Cached(layout, pages, table_BM, lengths_B, [rows]), triton_device)
