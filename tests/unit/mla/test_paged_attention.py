"""Attention over pages: chunks of any length, absorbed or expanded, shared pages, FP8 rows."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.mla import attention
from deepseek_v3.mla.attention import expanding_is_cheaper
from deepseek_v3.mla.cached_sequences import CachedSequence, extend
from deepseek_v3.mla.kv_compression import KvFormat
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.ops.mla_decode.formats import PAGE
from helpers.caches import poisoned_pool
from helpers.models import YARN, fill_with_noise, largest_difference, random_tokens, small_config, small_model

WAYS = {"absorbed": False, "expanded": True}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no query rank, YaRN": {"q_lora_rank": None, "rope_scaling": YARN},
}
LONG = {"max_position_embeddings": 256}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes all chunks but the first attend in one way."""
    monkeypatch.setattr(attention, "expanding_is_cheaper", lambda *_: WAYS[request.param])
    name: str = request.param
    return name


def run_chunk(model: DeepSeekV3, sequences: list[CachedSequence], chunks: list[Tensor]) -> list[Tensor]:
    """The logits of new tokens of each sequence, which are padded with a token of their own."""
    cache = extend(sequences, [len(chunk) for chunk in chunks])
    tokens_BS = torch.nn.utils.rnn.pad_sequence(chunks, batch_first=True, padding_value=96)
    logits_BSV = model(tokens_BS, cache)
    assert logits_BSV.isfinite().all()
    return [logits_SV[: len(chunk)] for logits_SV, chunk in zip(logits_BSV, chunks, strict=True)]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_chunks_of_any_length_equal_the_whole_text(shape: str) -> None:
    config = small_config(**SHAPES[shape], **LONG)
    model = small_model(config, torch.float64)
    pool = poisoned_pool(config)
    texts = [random_tokens(config, 1, length)[0] for length in (PAGE + 9, 2 * PAGE + 3, 12)]
    sizes = [[PAGE - 1, 2, 8], [3, PAGE, PAGE], [1, 0, 11]]
    sequences = [CachedSequence(pool) for _ in texts]
    parts = [text.split(lengths) for text, lengths in zip(texts, sizes, strict=True)]

    found = [run_chunk(model, sequences, [part[step] for part in parts]) for step in range(3)]

    for row, text in enumerate(texts):
        logits_SV = torch.cat([step[row] for step in found])
        assert largest_difference(logits_SV, model(text[None])[0]) < 1e-10


@pytest.mark.usefixtures("way")
@torch.no_grad()
def test_forks_and_cut_sequences_continue_on_their_own() -> None:
    config = small_config(**LONG)
    model = small_model(config, torch.float64)
    pool = poisoned_pool(config)
    start_S = random_tokens(config, 1, PAGE + 5)[0]
    sequence = CachedSequence(pool)
    run_chunk(model, [sequence], [start_S])
    fork, cut = sequence.fork(), sequence.fork()
    cut.truncate(7)
    ends = [random_tokens(config, 1, length)[0] for length in (4, 2, 6)]

    found = run_chunk(model, [sequence, fork, cut], ends)

    starts = [start_S, start_S, start_S[:-7]]
    for logits_SV, start, end_S in zip(found, starts, ends, strict=True):
        expected_SV = model(torch.cat([start, end_S])[None])[0, -len(end_S) :]
        assert largest_difference(logits_SV, expected_SV) < 1e-10
    assert len({each.pages[0] for each in (sequence, fork)}) == 1
    assert len({each.pages[1] for each in (sequence, fork)}) == 2


def operations(config: ModelConfig, queries: int, keys: int) -> tuple[int, int]:
    """Multiply-adds of one head: absorbed, and expanded from the cache."""
    rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
    nope, value = config.qk_nope_head_dim, config.v_head_dim
    absorb = queries * (nope * rank + rank * value)
    expand = keys * (rank * nope + rank * value)
    pairs = queries * keys
    return absorb + pairs * (rank + rope + rank), expand + pairs * (nope + rope + value)


def test_the_way_with_fewer_operations_is_taken() -> None:
    shapes = [
        small_config(),
        small_config(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128),
        small_config(kv_lora_rank=8),  # narrower than a head: always absorbed
    ]
    for config in shapes:
        for queries in (1, 2, 16, 64, 170, 171, 1000):
            for keys in (queries, queries + 1, 2 * queries, 10_000, 10**9):
                absorbed, expanded = operations(config, queries, keys)
                assert expanding_is_cheaper(config, queries, keys) == (expanded < absorbed)
    assert [expanding_is_cheaper(shapes[1], queries, 10**9) for queries in (1, 170, 171)] == [False, False, True]
    assert [expanding_is_cheaper(shapes[1], queries, 2 * queries) for queries in (85, 86)] == [False, True]


@torch.no_grad()
def test_a_new_pool_follows_changed_weights() -> None:
    config = small_config()
    model = small_model(config)
    tokens_BS = random_tokens(config, 1, 6)

    def decoded() -> Tensor:
        sequence = CachedSequence(poisoned_pool(config, dtype=torch.float32))
        return torch.cat([run_chunk(model, [sequence], [part])[0] for part in tokens_BS[0].split([4, 1, 1])])

    before = decoded()
    for parameter in model.parameters():
        parameter.data.mul_(1.1)  # as a fused optimizer, without a new version of the tensor
    assert largest_difference(before, decoded()) > 0.01
    assert largest_difference(decoded(), model(tokens_BS)[0]) < 1e-4


@torch.no_grad()
def test_absorbed_weights_are_cast_once_for_a_pool() -> None:
    config = small_config()
    model = small_model(config)
    model.compute_dtype = torch.bfloat16
    pool = poisoned_pool(config, dtype=torch.bfloat16)
    sequence = CachedSequence(pool)
    kept = []
    for part in random_tokens(config, 1, 7)[0].split([5, 1, 1]):
        run_chunk(model, [sequence], [part])
        kept.append({layer: [weight.data_ptr() for weight in pair] for layer, pair in pool.absorbed.items()})
    assert kept[0] == {}
    assert kept[1] == kept[2]
    assert sorted(kept[1]) == [0, 1, 2]


@pytest.mark.usefixtures("way")
@torch.no_grad()
def test_fp8_rows_move_probabilities_little() -> None:
    """e4m3 rounds a number by up to 1/16; measured: log-probabilities move by up to 0.05, in the mean by 0.003.

    Layers are dense, so that no token changes its experts.
    """
    config = small_config(kv_lora_rank=128, first_k_dense_replace=3, **LONG)
    model = small_model(config)
    fill_with_noise(model, std=0.1)
    texts = [random_tokens(config, 1, length)[0] for length in (PAGE + 20, 30)]
    for kv in (None, KvFormat.FP8):
        sequences = [CachedSequence(pool) for pool in [poisoned_pool(config, dtype=torch.float32, kv=kv)] * 2]
        parts = [text.split([len(text) - 20, 18, 1, 1]) for text in texts]
        steps = [run_chunk(model, sequences, [part[step] for part in parts]) for step in range(4)]
        for row, text in enumerate(texts):
            found_SV = torch.cat([step[row] for step in steps]).log_softmax(-1)
            difference_SV = (found_SV - model(text[None])[0].log_softmax(-1)).abs()
            assert difference_SV.max() < (1e-4 if kv is None else 0.1)
            assert difference_SV.mean() < (1e-5 if kv is None else 0.01)
            assert kv is None or difference_SV.mean() > 1e-4
