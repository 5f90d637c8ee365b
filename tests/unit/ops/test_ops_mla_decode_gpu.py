"""Latent attention by the kernels on a GPU: FlashMLA's tolerances, and the same bits in any batch."""

import random

import pytest
import torch

from deepseek_v3.ops.mla_decode import MLA_DECODE, PAGE, LatentFormat, MlaDecode, reference
from deepseek_v3.ops.operation import Target
from helpers.latent_pages import BF16, E4M3, HEADS, cached, check_tolerances, queries, scale_of, write

WIDE, BLOCKS = LatentFormat(512, 64, BF16), LatentFormat(512, 64, E4M3)
LONG_BORDERS = [511, 512, 513, 1024, 1025, 2047, 2049, 4095, 4097, 8191, 8192, 8193, 32768, 32769]

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["triton", "cuda"])
def kernels(request: pytest.FixtureRequest) -> MlaDecode:
    target = Target(torch.device("cuda", torch.cuda.current_device()), BF16, (512, 64))
    backend = MLA_DECODE.backends[request.param]
    if obstacle := backend.obstacle(target):
        pytest.skip(f"{request.param} {obstacle}")
    return backend.load()


@pytest.mark.parametrize("layout", [WIDE, BLOCKS, LatentFormat(256, 32, BF16)], ids=["bf16", "fp8", "narrow"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("new", [1, 2, 3, 4])
def test_heads_queries_and_short_lengths(kernels: MlaDecode, layout: LatentFormat, heads: int, new: int) -> None:
    lengths = [0, 1, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257]
    cache = cached(layout, lengths).to(torch.device("cuda"))
    q_BSHL = queries(len(lengths), new, heads, layout).to("cuda")
    found = kernels.mla_decode(q_BSHL, *cache.arguments, scale_of(layout))
    check_tolerances(found, reference.mla_decode(q_BSHL.double(), *cache.arguments, scale_of(layout)))


@pytest.mark.parametrize("layout", [WIDE, BLOCKS], ids=["bf16", "fp8"])
def test_the_borders_of_longer_parts(kernels: MlaDecode, layout: LatentFormat) -> None:
    """A sequence may have fewer parts than a shorter one. Alone, each gives the same bits."""
    device, scale = torch.device("cuda"), scale_of(layout)
    cache, q_BSHL = cached(layout, LONG_BORDERS).to(device), queries(len(LONG_BORDERS), 2, 64, layout).to(device)
    found = kernels.mla_decode(q_BSHL, *cache.arguments, scale)
    for sequence in range(len(LONG_BORDERS)):
        own, alone = q_BSHL[[sequence]], cache.of([sequence])
        check_tolerances(
            tuple(x[[sequence]] for x in found), reference.mla_decode(own.double(), *alone.arguments, scale)
        )
        assert torch.equal(kernels.mla_decode(own, *alone.arguments, scale)[0], found[0][[sequence]])


def test_ten_thousand_random_sequences(kernels: MlaDecode) -> None:
    device, choose = torch.device("cuda"), random.Random(0)
    for _ in range(100):
        layout = choose.choice([WIDE, BLOCKS, LatentFormat(256, 32, BF16)])
        lengths = [choose.choice([0, 1, choose.randrange(1, 130), choose.randrange(1, 1100)]) for _ in range(100)]
        cache = cached(layout, lengths).to(device)
        q_BSHL = queries(100, choose.randint(1, 4), choose.choice(HEADS), layout).to(device)
        found = kernels.mla_decode(q_BSHL, *cache.arguments, scale_of(layout))
        wide = reference.mla_decode(q_BSHL.double(), *cache.arguments, scale_of(layout))
        check_tolerances(found, wide)


@pytest.mark.parametrize("layout", [WIDE, BLOCKS], ids=["bf16", "fp8"])
def test_pages_beyond_two_to_the_31(kernels: MlaDecode, layout: LatentFormat) -> None:
    device = torch.device("cuda")
    cache = cached(layout, [700]).to(device)
    number = 2**31 // cache.pages[0].numel() + 1
    pages = torch.empty(number + len(cache.pages), *cache.pages.shape[1:], dtype=cache.pages.dtype, device=device)
    pages[number:] = cache.pages
    far = cache._replace(pages=pages, table_BM=cache.table_BM + number)
    q_BSHL = queries(1, 1, 128, layout).to(device)
    found = kernels.mla_decode(q_BSHL, *far.arguments, scale_of(layout))
    assert torch.equal(found[0], kernels.mla_decode(q_BSHL, *cache.arguments, scale_of(layout))[0])
    slots_N = torch.tensor([PAGE * len(pages) - 1])
    write(kernels, pages, slots_N, torch.randn(1, 576).bfloat16(), layout, device)
    near = layout.empty_pages(1, device)
    torch.manual_seed(0)
    write(kernels, near, torch.tensor([3]), torch.ones(1, 576).bfloat16(), layout, device)
    write(kernels, pages, slots_N, torch.ones(1, 576).bfloat16(), layout, device)
    assert torch.equal(pages[-1, -1], near[0, 3])


def test_a_cuda_graph_decodes_other_lengths(kernels: MlaDecode) -> None:
    device = torch.device("cuda")
    cache = cached(WIDE, [900, 1500]).to(device)
    q_BSHL = queries(2, 1, 16, WIDE).to(device)
    kernels.mla_decode(q_BSHL, *cache.arguments, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernels.mla_decode(q_BSHL, *cache.arguments, 0.1)
    for lengths in ([900, 1500], [0, 1], [513, 1500]):
        cache.lengths_B.copy_(torch.tensor(lengths))
        graph.replay()
        assert all(map(torch.equal, found, kernels.mla_decode(q_BSHL, *cache.arguments, 0.1)))
