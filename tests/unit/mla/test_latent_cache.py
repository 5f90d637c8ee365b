"""The pages of the latent cache: what they cost, who holds them, and which row of which page a token has."""

from itertools import count

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.mla.cached_sequences import CachedSequence, CacheView, extend
from deepseek_v3.mla.kv_compression import (
    KvFormat,
    PagePool,
    bytes_per_token,
    describe_cache,
    expanded_width,
    latent_format,
    latent_width,
    pages_that_fit,
)
from deepseek_v3.ops.mla_decode.formats import PAGE
from deepseek_v3.utils.errors import CacheFullError, ConfigError
from helpers.caches import poisoned_pool
from helpers.models import small_config

CPU = torch.device("cpu")
CONFIG = small_config()
BF16 = latent_format(CONFIG, torch.bfloat16)


def write(cache: CacheView, numbers: list[list[float]]) -> None:
    """Fills the rows of the new tokens of each sequence with a number of their own, in every layer another one."""
    for layer, pages in enumerate(cache.pool.pages):
        for slots_S, numbers_S in zip(cache.slots_BS, numbers, strict=True):
            assert (slots_S[len(numbers_S) :] == -1).all()
            rows_S1 = torch.tensor(numbers_S, dtype=pages.dtype)[:, None] + layer / 4
            pages.flatten(0, 1)[slots_S[: len(numbers_S)]] = rows_S1


def numbers_of(sequence: CachedSequence) -> list[float]:
    """The number of every cached token, after the check that each layer has its own."""
    if not sequence.length:
        return []
    table_M = torch.tensor(sequence.pages)
    layers = [pages[table_M].flatten(0, 1)[: sequence.length] for pages in sequence.pool.pages]
    for layer, rows_TL in enumerate(layers):
        assert torch.equal(rows_TL, (layers[0][:, :1] + layer / 4).expand_as(rows_TL))
    return layers[0][:, 0].tolist()


lengths = st.one_of(st.integers(0, 3), st.integers(PAGE - 2, PAGE + 2), st.integers(0, 3 * PAGE))
actions = st.tuples(st.sampled_from(["start", "extend", "extend", "fork", "truncate", "free"]), st.data())


@given(st.lists(actions, max_size=30))
def test_sequences_hold_what_was_written_to_them(steps: list[tuple[str, st.DataObject]]) -> None:
    pool = poisoned_pool(CONFIG, num_pages=8)
    expected: dict[CachedSequence, list[float]] = {}
    numbers = count()
    for action, data in steps:
        if action == "start":
            expected[CachedSequence(pool)] = []
            continue
        if not expected:
            continue
        if action == "extend":
            batch = data.draw(st.lists(st.sampled_from(list(expected)), min_size=1, unique=True))
            new = [[float(next(numbers)) for _ in range(data.draw(lengths))] for _ in batch]
            needed = [-(-(each.length + len(new_S)) // PAGE) for each, new_S in zip(batch, new, strict=True)]
            added = sum(needed) - sum(len(each.pages) for each in batch)
            free = pool.num_free
            try:
                cache = extend(batch, [len(new_S) for new_S in new])
            except CacheFullError:
                assert added + len(batch) > free
            else:
                assert added <= free
                write(cache, new)
                for sequence, new_S in zip(batch, new, strict=True):
                    expected[sequence] = expected[sequence] + new_S
        else:
            sequence = data.draw(st.sampled_from(list(expected)))
            if action == "fork":
                expected[sequence.fork()] = expected[sequence]
            elif action == "truncate":
                dropped = data.draw(st.integers(0, sequence.length))
                sequence.truncate(dropped)
                expected[sequence] = expected[sequence][: sequence.length]
            else:
                sequence.free()
                expected[sequence] = []
        assert {each: numbers_of(each) for each in expected} == expected
        held = [page for each in expected for page in each.pages]
        assert [pool.owners(page) for page in range(8)] == [held.count(page) for page in range(8)]
        assert pool.num_free == 8 - len(set(held))
    for sequence in expected:
        sequence.free()
    assert pool.num_free == pool.num_pages == 8


def test_a_view_places_the_new_tokens_of_each_sequence() -> None:
    pool = poisoned_pool(CONFIG, num_pages=6)
    long, short, empty = (CachedSequence(pool) for _ in range(3))
    first = extend([long, short], [PAGE + 1, 2])
    assert (first.is_new, first.longest) == (True, PAGE + 1)

    cache = extend([long, empty, short], [2, 0, 3])

    assert (cache.is_new, cache.longest) == (False, PAGE + 3)
    assert cache.table_BM.dtype == cache.lengths_B.dtype == torch.int32
    assert cache.lengths_B.tolist() == [PAGE + 3, 0, 5]
    assert cache.table_BM.tolist() == [list(long.pages), [0, 0], [*short.pages, 0]]
    assert cache.positions_BS.tolist() == [[PAGE + 1, PAGE + 2, PAGE + 3], [0, 1, 2], [2, 3, 4]]
    at_long, at_short = long.pages[1] * PAGE, short.pages[0] * PAGE
    assert cache.slots_BS.tolist() == [[at_long + 1, at_long + 2, -1], [-1] * 3, [at_short + n for n in (2, 3, 4)]]
    assert cache.right_aligned_BS is not None
    assert cache.right_aligned_BS.tolist() == [[2, 0, 1], [0, 1, 2], [0, 1, 2]]
    assert extend([long, short], [1, 1]).right_aligned_BS is None


@pytest.mark.parametrize("kv", [None, KvFormat.FP8])
def test_reading_gives_zeros_behind_the_end(kv: KvFormat | None) -> None:
    config = small_config(kv_lora_rank=128)
    pool = poisoned_pool(config, num_pages=4, kv=kv)
    sequences = [CachedSequence(pool), CachedSequence(pool)]
    cache = extend(sequences, [PAGE + 1, 2])
    rows = pool.layout.pack(torch.ones(PAGE + 3, 128), torch.full((PAGE + 3, 8), 2.0))
    slots_N = cache.slots_BS.flatten()
    pool.pages[1].flatten(0, 1)[slots_N[slots_N >= 0]] = rows

    rows_BTL: Tensor = cache.read(1, torch.float32)

    assert rows_BTL.shape == (2, PAGE + 1, 136)
    assert torch.equal(rows_BTL[0], rows_BTL[0, :1].expand_as(rows_BTL[0]))
    assert rows_BTL[1, 1, :128].unique().tolist() == [1.0]
    assert rows_BTL[1, 1, 128:].unique().tolist() == [2.0]
    assert not rows_BTL[1, 2:].any()


def test_mtp_layers_have_rows_in_the_same_pages() -> None:
    pool = PagePool(CONFIG, BF16, 3, CPU, mtp_layers=1)
    assert len(pool.pages) == CONFIG.num_hidden_layers + 1
    assert pool.bytes_per_token == len(pool.pages) * BF16.row_bytes
    assert pages_that_fit(CONFIG, BF16, 3 * PAGE * pool.bytes_per_token, mtp_layers=1) == 3


def test_a_full_cache_says_what_was_wanted_and_changes_nothing() -> None:
    pool = PagePool(CONFIG, BF16, 3, CPU)
    first, second = CachedSequence(pool), CachedSequence(pool)
    extend([first], [PAGE])
    with pytest.raises(CacheFullError) as error:
        extend([first, second], [1, PAGE + 1])
    assert str(error.value) == (
        "the latent cache is full: 66 more tokens need 3 pages of 64 tokens, found 2 of 3 free, for 128 tokens; "
        "run fewer or shorter sequences, or give the cache more memory"
    )
    assert (first.length, second.length, len(first.pages), pool.num_free) == (PAGE, 0, 1, 2)


def test_a_full_cache_advises_fp8_where_it_helps() -> None:
    config = small_config(kv_lora_rank=128)
    for kv in KvFormat:
        with pytest.raises(CacheFullError) as error:
            PagePool(config, latent_format(config, torch.float32, kv), 0, CPU).allocate(1)
        assert str(error.value).endswith(" or an FP8 format") == (kv is KvFormat.BF16)


def test_the_last_owner_of_a_shared_page_keeps_it() -> None:
    pool = PagePool(CONFIG, BF16, 2, CPU)
    first = CachedSequence(pool)
    extend([first], [PAGE - 2])
    other = first.fork()
    assert first.pages == other.pages
    extend([first, other], [1, 1])
    assert (sorted([*first.pages, *other.pages]), pool.num_free) == ([0, 1], 0)


def test_pages_that_nobody_holds_cannot_be_freed() -> None:
    pool = PagePool(CONFIG, BF16, 3, CPU)
    (page,) = pool.allocate(1)
    for wrong, message in {
        (page, page): "has 1 owners, expected at least 2",
        (3,): "page 3 is not of this pool, whose pages are 0 to 2",
        (-1,): "page -1 is not of this pool",
        (1 - page, page): "has 0 owners, expected at least 1",
    }.items():
        with pytest.raises(ValueError, match=message):
            pool.free(wrong)
        assert pool.num_free == 2
    pool.share([page])
    pool.free([page, page])
    with pytest.raises(ValueError, match="has 0 owners"):
        pool.share([page])
    with pytest.raises(ValueError, match="found 1 tokens to drop, expected 0 to the length of 0"):
        CachedSequence(pool).truncate(1)


DEEPSEEK_V3: dict[str, int] = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
}


@pytest.mark.parametrize(
    ("use_fp8_kv", "row_bytes", "log"),
    [
        (False, 1152, "in bfloat16: 70,272 bytes per token; multi-head attention would take 4,997,120, 71.1 times"),
        (True, 656, "in FP8: 40,016 bytes per token; multi-head attention would take 4,997,120, 125 times"),
    ],
)
def test_bytes_at_the_shape_of_deepseek_v3(use_fp8_kv: bool, row_bytes: int, log: str) -> None:
    config = small_config(**DEEPSEEK_V3, use_fp8_kv=use_fp8_kv)
    layout = latent_format(config, torch.bfloat16)
    assert layout.row_bytes == row_bytes
    assert 2 * expanded_width(config) == 81_920
    assert round(81_920 / row_bytes) == (125 if use_fp8_kv else 71)
    assert bytes_per_token(config, layout) == 61 * row_bytes
    assert log in describe_cache(config, layout)
    pages = pages_that_fit(config, layout, 80 * 10**9)
    assert pages * PAGE * 61 * row_bytes <= 80 * 10**9 < (pages + 1) * PAGE * 61 * row_bytes
    assert pages_that_fit(config, layout, -1) == 0


@pytest.mark.parametrize("kv", [None, KvFormat.BF16, KvFormat.FP8])
def test_a_pool_takes_the_bytes_that_it_says(kv: KvFormat | None) -> None:
    config = small_config(kv_lora_rank=256)
    pool = PagePool(config, latent_format(config, torch.float32, kv), 2, CPU)
    taken = sum(pages.numel() * pages.element_size() for pages in pool.pages)
    assert taken == 2 * PAGE * pool.bytes_per_token
    wide = {None: 4, KvFormat.BF16: 2}
    row = wide[kv] * latent_width(config) if kv in wide else 256 + 2 * 4 + 2 * 8
    assert pool.bytes_per_token == config.num_hidden_layers * row


def test_the_config_and_the_option_choose_the_format() -> None:
    def found(config: ModelConfig, kv: KvFormat | None = None) -> torch.dtype:
        return latent_format(config, torch.float32, kv).dtype

    wide, narrow = (small_config(kv_lora_rank=128, use_fp8_kv=use) for use in (False, True))
    fp8 = torch.float8_e4m3fn
    assert (found(wide), found(narrow)) == (torch.float32, fp8)
    for config in (wide, narrow):
        assert (found(config, KvFormat.BF16), found(config, KvFormat.FP8)) == (torch.bfloat16, fp8)
    with pytest.raises(ConfigError, match="kv_lora_rank = 16, expected a multiple of 128; keep the cache in bf16"):
        found(CONFIG, KvFormat.FP8)
