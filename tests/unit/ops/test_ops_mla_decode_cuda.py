"""The CUDA C++ kernel of latent attention, run by an emulation of a thread block on the CPU.

It shows wrong indices, masks and barriers. `pytest -m gpu` runs the kernel itself.
"""

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deepseek_v3.ops.mla_decode import PAGE, LatentFormat, reference
from helpers.emulated_kernels import emulated_kernel
from helpers.latent_pages import BF16, E4M3, Cached, cached, check_tolerances, exact, queries, scale_of

PART = 256  # shorter parts than on a GPU, so that a few hundred keys have several
WIDE, BLOCKS, NARROW = LatentFormat(512, 64, BF16), LatentFormat(512, 64, E4M3), LatentFormat(256, 32, BF16)


@pytest.fixture(scope="module")
def kernel_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ctypes.CDLL]:
    """Compiles the kernel for a format."""
    folder = tmp_path_factory.mktemp("kernels")

    def compiled(layout: LatentFormat) -> ctypes.CDLL:
        parts = {"PARTS": 8, "LONGEST_PART": PART, "MOST_PARTS": 64, "LONG": 600}
        defines = {"RANK": layout.rank, "FP8": int(layout.is_fp8), **parts}
        return emulated_kernel(folder, "mla_decode", "mla_decode", defines)

    return compiled


def decode(kernel: ctypes.CDLL, q_BSHL: Tensor, cache: Cached, blocks: int = 3) -> tuple[Tensor, Tensor]:
    """Runs the kernel with a number of thread blocks; whatever it writes to is NaN before."""
    batch, new, heads, width = q_BSHL.shape
    parts, rows = max(1, -(-cache.table_BM.shape[1] * PAGE // (PART // 2))), new * heads
    out_BSHC = torch.full((batch, new, heads, cache.layout.rank), torch.nan, dtype=BF16)
    sums_BSH = torch.full((batch, new, heads), torch.nan)
    parts_BIXC = torch.full((batch, parts, rows, cache.layout.rank), torch.nan)
    part_rows_BIX4 = torch.full((batch, parts, rows, 4), torch.nan)
    added_B = torch.full((batch,), -1, dtype=torch.int32)
    kept = torch.full((blocks, 64, cache.layout.rank), torch.nan)
    given = (q_BSHL, cache.pages, cache.table_BM.contiguous(), cache.lengths_B)
    results = (out_BSHC, sums_BSH, parts_BIXC, part_rows_BIX4, added_B, kept)
    pointers = [ctypes.c_void_p(each.data_ptr()) for each in (*given, *results)]
    numbers = [ctypes.c_int(number) for number in (batch, new, heads, parts, PART, cache.table_BM.shape[1])]
    shape = [ctypes.c_long(len(cache.pages) * PAGE), ctypes.c_long(width)]
    scale = ctypes.c_float(scale_of(cache.layout))
    kernel.run(ctypes.c_int(blocks), *pointers[:2], *shape, *pointers[2:], *numbers, scale)
    return out_BSHC, sums_BSH


@pytest.mark.parametrize(
    ("layout", "lengths", "new", "heads"),
    [
        (WIDE, [1, 0], 1, 1),
        (WIDE, [131, 0, 0, 1], 1, 8),
        (WIDE, [63, 65], 1, 16),
        (WIDE, [192], 1, 8),
        (WIDE, [255, 257], 1, 16),
        (WIDE, [3, 1, 513], 4, 20),
        (BLOCKS, [131, 0, 1], 1, 8),
        (BLOCKS, [255, 257], 1, 16),
        (BLOCKS, [3, 513], 4, 20),
    ],
)
def test_lengths_queries_and_heads(
    kernel_of: Callable[..., ctypes.CDLL],
    layout: LatentFormat,
    lengths: list[int],
    new: int,
    heads: int,
) -> None:
    cache, q_BSHL = cached(layout, lengths), queries(len(lengths), new, heads, layout)
    check_tolerances(decode(kernel_of(layout), q_BSHL, cache), exact(q_BSHL, cache, scale_of(layout)))


def test_narrow_latents(kernel_of: Callable[..., ctypes.CDLL]) -> None:
    cache, q_BSHL = cached(NARROW, [130, 300]), queries(2, 1, 20, NARROW)
    check_tolerances(decode(kernel_of(NARROW), q_BSHL, cache), exact(q_BSHL, cache, scale_of(NARROW)))


@pytest.mark.parametrize(
    ("layout", "lengths", "new", "heads"),
    [(WIDE, [1, 0], 1, 128), (WIDE, [700, 5], 4, 20), (BLOCKS, [63, 513], 2, 64)],
    ids=["short", "long", "fp8"],
)
def test_any_number_of_thread_blocks_gives_the_same_bits(
    kernel_of: Callable[..., ctypes.CDLL], layout: LatentFormat, lengths: list[int], new: int, heads: int
) -> None:
    cache, q_BSHL = cached(layout, lengths), queries(len(lengths), new, heads, layout)
    many = decode(kernel_of(layout), q_BSHL, cache, blocks=4)
    check_tolerances(many, exact(q_BSHL, cache, scale_of(layout)))
    few = decode(kernel_of(layout), q_BSHL, cache, blocks=2)
    assert all(one.equal(other) for one, other in zip(many, few, strict=True))


@pytest.mark.parametrize("factor", [1.37, 2.0**-100, 2.0**20])
def test_fp8_rows_may_have_any_scale(kernel_of: Callable[..., ctypes.CDLL], factor: float) -> None:
    """Others write scales that are no powers of two; a very large or small power is none of what a shift can do."""
    cache, q_BSHL = cached(BLOCKS, [70]), queries(1, 1, 16, BLOCKS) / max(1, factor)
    page = cache.pages[cache.table_BM[0, 0].item()]
    page[3, 512:528].view(torch.float32).mul_(factor)
    expected = reference.mla_decode(q_BSHL.double(), *cache.arguments, scale_of(BLOCKS))
    check_tolerances(decode(kernel_of(BLOCKS), q_BSHL, cache), expected)
    page[3, 100] = 0x7F  # NaN
    assert decode(kernel_of(BLOCKS), q_BSHL, cache)[0].isnan().all()


def test_no_bit_depends_on_the_batch(kernel_of: Callable[..., ctypes.CDLL]) -> None:
    cache, q_BSHL = cached(WIDE, [300, 64, 130]), queries(3, 1, 16, WIDE)
    together = decode(kernel_of(WIDE), q_BSHL, cache)
    for b in range(3):
        alone = decode(kernel_of(WIDE), q_BSHL[b : b + 1].contiguous(), cache.of([b], more_pages=b), blocks=1)
        assert all(one[0].equal(many[b]) for one, many in zip(alone, together, strict=True))


def test_the_number_of_parts_is_never_larger_than_the_memory() -> None:
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds only")
    from deepseek_v3.ops.mla_decode.cuda import most_parts, part_tokens

    for rows in (8, 16, 17, 128):
        largest = 0
        for length in range(1, 40_000):
            assert part_tokens(length, rows) % PAGE == 0
            largest = max(largest, -(-length // part_tokens(length, rows)))
            assert largest <= most_parts(length, rows)
