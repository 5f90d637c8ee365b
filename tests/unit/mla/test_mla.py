"""Latent attention: the paper's equations, Transformers' angles, and decoding that equals training."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from deepseek_v3.config.model_config import ModelConfig, RopeScaling
from deepseek_v3.mla.attention import AttentionMetadata, MultiHeadLatentAttention
from deepseek_v3.mla.cached_sequences import CachedSequence, extend
from deepseek_v3.mla.rotary import inverse_frequencies, rotary_tables, softmax_scale
from helpers.caches import poisoned_pool
from helpers.models import YARN, fill_with_noise, largest_difference, random_tokens, small_config, small_model
from helpers.transformers_reference import transformers_config

CPU = torch.device("cpu")
SHAPES: dict[str, dict[str, Any]] = {
    "query rank": {},
    "no query rank": {"q_lora_rank": None},
    "query rank, YaRN": {"rope_scaling": YARN},
    "no query rank, YaRN": {"q_lora_rank": None, "rope_scaling": YARN},
}
PRECISIONS = [(torch.float32, 1e-5), (torch.float64, 1e-10)]


def attention_layer(config: ModelConfig, dtype: torch.dtype = torch.float64) -> MultiHeadLatentAttention:
    layer = MultiHeadLatentAttention(config, layer=0)
    fill_with_noise(layer)
    return layer.to(dtype)


def metadata_at(config: ModelConfig, positions_BS: Tensor, allowed_BSS: Tensor | None = None) -> AttentionMetadata:
    return AttentionMetadata(positions_BS, *rotary_tables(positions_BS, config), allowed_BSS)


def from_the_start(config: ModelConfig, length: int) -> AttentionMetadata:
    return metadata_at(config, torch.arange(length)[None])


def decode(
    layer: MultiHeadLatentAttention, sequences: list[CachedSequence], x_BSD: Tensor, lengths: list[int]
) -> Tensor:
    """One step: the new tokens of every sequence, of which the first `lengths` are real."""
    cache = extend(sequences, lengths)
    return layer(x_BSD, metadata_at(layer.config, cache.positions_BS), cache)


# The paper's equations, one token and one head at a time.


def normalised(latent: Tensor, weight: Tensor) -> Tensor:
    return weight * latent / (latent.square().mean() + 1e-6).sqrt()


def rotated(vector_R: Tensor, position: int, frequencies_P: Tensor) -> Tensor:
    turn_P = torch.polar(torch.ones_like(frequencies_P), position * frequencies_P)
    return torch.view_as_real(torch.view_as_complex(vector_R.view(-1, 2)) * turn_P).flatten()


def equations_1_to_11(layer: MultiHeadLatentAttention, h_SD: Tensor) -> Tensor:
    """u_t of every token of one sequence, without YaRN."""
    config = layer.config
    heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    rank, width = config.kv_lora_rank, config.v_head_dim
    frequencies_P = config.rope_theta ** (-torch.arange(0, rope, 2, dtype=torch.float64) / rope)
    w_dkv, w_kr = layer.kv_a_proj_with_mqa.weight.split((rank, rope))
    w_ukv_H = layer.kv_b_proj.weight.view(heads, nope + width, rank)
    w_o = layer.o_proj.weight

    def query_of(h_D: Tensor) -> Tensor:
        if config.q_lora_rank is None:
            return layer.q_proj.weight @ h_D
        latent = normalised(layer.q_a_proj.weight @ h_D, layer.q_a_layernorm.weight)  # eq. 6
        return layer.q_b_proj.weight @ latent  # eq. 7 and, before rotation, 8

    outputs = []
    for t, h_D in enumerate(h_SD):
        latents = [normalised(w_dkv @ h, layer.kv_a_layernorm.weight) for h in h_SD[: t + 1]]  # eq. 1
        shared_keys = [rotated(w_kr @ h, j, frequencies_P) for j, h in enumerate(h_SD[: t + 1])]  # eq. 3
        heads_out = []
        for i, query in enumerate(query_of(h_D).view(heads, nope + rope)):
            q_ti = torch.cat((query[:nope], rotated(query[nope:], t, frequencies_P)))  # eq. 9
            w_uk, w_uv = w_ukv_H[i].split((nope, width))
            keys = [torch.cat((w_uk @ c, k)) for c, k in zip(latents, shared_keys, strict=True)]  # eq. 2 and 4
            values = [w_uv @ c for c in latents]  # eq. 5
            weights = torch.softmax(torch.stack([q_ti @ k for k in keys]) / (nope + rope) ** 0.5, dim=0)
            heads_out.append(sum(w * v for w, v in zip(weights, values, strict=True)))  # eq. 10
        outputs.append(w_o @ torch.cat(heads_out))  # eq. 11
    return torch.stack(outputs)


@pytest.mark.parametrize("q_lora_rank", [24, None])
@torch.no_grad()
def test_training_is_the_papers_equations(q_lora_rank: int | None) -> None:
    config = small_config(q_lora_rank=q_lora_rank)
    layer = attention_layer(config)
    x_BSD = torch.randn(2, 6, config.hidden_size, dtype=torch.float64)

    found_BSD = layer(x_BSD, from_the_start(config, 6))

    expected_BSD = torch.stack([equations_1_to_11(layer, x_SD) for x_SD in x_BSD])
    # The layer's angles are float32, as everywhere in the field.
    assert largest_difference(found_BSD, expected_BSD) < 1e-5 * expected_BSD.abs().max()


def test_parameters_carry_the_released_names() -> None:
    shared = {
        "kv_a_proj_with_mqa.weight": (16 + 8, 40),
        "kv_a_layernorm.weight": (16,),
        "kv_b_proj.weight": (4 * (10 + 14), 16),
        "o_proj.weight": (40, 4 * 14),
    }
    ranked = {"q_a_proj.weight": (24, 40), "q_a_layernorm.weight": (24,), "q_b_proj.weight": (4 * 18, 24)}
    direct = {"q_proj.weight": (4 * 18, 40)}
    for q_lora_rank, own in ((24, ranked), (None, direct)):
        state = attention_layer(small_config(q_lora_rank=q_lora_rank)).state_dict()
        assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shared | own


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["float32", "float64"])
@pytest.mark.parametrize("sizes", [[1] * 9, [4, 1, 1, 1, 1, 1], [3, 1, 5], [9], [2, 7]], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_decoding_equals_training(shape: str, sizes: list[int], dtype: torch.dtype, tolerance: float) -> None:
    config = small_config(**SHAPES[shape])
    layer = attention_layer(config, dtype)
    x_BSD = torch.randn(3, 9, config.hidden_size, dtype=dtype)
    expected_BSD = layer(x_BSD, from_the_start(config, 9))

    sequences = [CachedSequence(pool) for pool in [poisoned_pool(config, dtype=dtype)] * 3]
    steps = [decode(layer, sequences, x, [x.shape[1]] * 3) for x in x_BSD.split(sizes, dim=1)]

    assert largest_difference(torch.cat(steps, dim=1), expected_BSD) < tolerance
    assert [sequence.length for sequence in sequences] == [9, 9, 9]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_sequences_of_one_batch_may_differ_in_length(shape: str, dtype: torch.dtype, tolerance: float) -> None:
    config = small_config(**SHAPES[shape])
    layer = attention_layer(config, dtype)
    prompts, new = [2, 5, 7], 3
    sequences = [torch.randn(1, length + new, config.hidden_size, dtype=dtype) for length in prompts]
    expected = [layer(x_1SD, from_the_start(config, x_1SD.shape[1])) for x_1SD in sequences]
    padded_BSD = torch.randn(3, max(prompts), config.hidden_size, dtype=dtype)
    for row, x_1SD, length in zip(padded_BSD, sequences, prompts, strict=True):
        row[:length] = x_1SD[0, :length]

    cached = [CachedSequence(pool) for pool in [poisoned_pool(config, dtype=dtype)] * 3]
    decode(layer, cached, padded_BSD, prompts)
    for step in range(new):
        tokens = [
            x_1SD[:, length + step : length + step + 1] for x_1SD, length in zip(sequences, prompts, strict=True)
        ]
        found_B1D = decode(layer, cached, torch.cat(tokens), [1, 1, 1])
        for row, (wanted, length) in enumerate(zip(expected, prompts, strict=True)):
            assert largest_difference(found_B1D[row, 0], wanted[0, length + step]) < tolerance


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_whole_model_decodes_what_it_would_compute_at_once(shape: str) -> None:
    config = small_config(**SHAPES[shape])
    model = small_model(config, torch.float64)
    tokens_BS = random_tokens(config, batch_size=2, length=11)
    sequences = [CachedSequence(pool) for pool in [poisoned_pool(config)] * 2]
    chunks = tokens_BS.split([4, 1, 3, 1, 1, 1], dim=1)
    steps = [model(chunk_BS, extend(sequences, [chunk_BS.shape[1]] * 2)) for chunk_BS in chunks]
    assert largest_difference(torch.cat(steps, dim=1), model(tokens_BS)) < 1e-10


@torch.no_grad()
def test_a_document_mask_equals_separate_documents() -> None:
    config = small_config(num_nextn_predict_layers=1)
    model = small_model(config, torch.float64)
    lengths = [3, 1, 6, 2]
    tokens_BS = random_tokens(config, batch_size=1, length=sum(lengths))
    documents_BS = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]

    together_BSD = model.hidden_states(tokens_BS, documents_BS, with_mtp=False).main_BSD

    parts = [model.hidden_states(part_BS, with_mtp=False).main_BSD for part_BS in tokens_BS.split(lengths, dim=1)]
    # Angles are float32 and differ by where a document starts; attention sees only their differences.
    assert largest_difference(together_BSD, torch.cat(parts, dim=1)) < 1e-5


def test_attention_never_looks_ahead() -> None:
    config = small_config()
    layer = attention_layer(config)
    x_BSD = torch.randn(1, 6, config.hidden_size, dtype=torch.float64, requires_grad=True)
    out_BSD = layer(x_BSD, from_the_start(config, 6))
    for t in range(6):
        (gradient_BSD,) = torch.autograd.grad(out_BSD[0, t].sum(), x_BSD, retain_graph=True)
        seen_S = gradient_BSD[0].abs().sum(-1) > 0
        assert seen_S.tolist() == [s <= t for s in range(6)]


ROPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "another base": {"rope_theta": 500.0},
    "released": {
        "qk_rope_head_dim": 64,
        "max_position_embeddings": 163840,
        "rope_scaling": RopeScaling(
            factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0
        ),
    },
    "small": {"rope_scaling": YARN},
    "unequal magnitudes": {"rope_scaling": YARN.model_copy(update={"mscale": 0.7, "mscale_all_dim": 0.9})},
    "magnitude in the angles alone": {"rope_scaling": YARN.model_copy(update={"mscale_all_dim": 0.0})},
    "factor one": {"rope_scaling": YARN.model_copy(update={"factor": 1.0})},
    "other turns": {
        "qk_rope_head_dim": 32,
        "rope_scaling": YARN.model_copy(update={"beta_fast": 4.0, "beta_slow": 0.5}),
    },
    "one turn for both": {"rope_scaling": YARN.model_copy(update={"beta_fast": 1.0, "beta_slow": 1.0})},
}


@pytest.mark.parametrize("rope", ROPES)
def test_angles_and_scale_are_those_of_transformers(rope: str) -> None:
    config = small_config(**ROPES[rope])
    theirs = DeepseekV3RotaryEmbedding(transformers_config(config))
    positions_BS = torch.tensor([[0, 1, 5, 40, 1000]])

    cos_BSP, sin_BSP = rotary_tables(positions_BS, config)

    pairs = config.qk_rope_head_dim // 2
    their_cos, their_sin = theirs(torch.zeros(1), positions_BS)
    torch.testing.assert_close(inverse_frequencies(config, CPU), theirs.inv_freq, rtol=1e-6, atol=0)
    torch.testing.assert_close(cos_BSP, their_cos[..., :pairs], rtol=0, atol=2e-4)
    torch.testing.assert_close(sin_BSP, their_sin[..., :pairs], rtol=0, atol=2e-4)
    assert cos_BSP.dtype == sin_BSP.dtype == torch.float32
    their_scale = DeepseekV3Attention(transformers_config(config), layer_idx=0).scaling
    assert softmax_scale(config) == pytest.approx(their_scale, rel=1e-12)


def test_yarn_slows_the_slow_pairs_alone() -> None:
    """At the released numbers: fast pairs keep their frequency, slow ones are divided by the factor."""
    plain = small_config(qk_rope_head_dim=64)
    stretched = small_config(**ROPES["released"])
    ratio_P = inverse_frequencies(plain, CPU) / inverse_frequencies(stretched, CPU)
    turns_P = 4096 * inverse_frequencies(plain, CPU) / (2 * torch.pi)
    assert ratio_P[turns_P > 45].allclose(torch.tensor(1.0))
    assert ratio_P[turns_P < 0.7].allclose(torch.tensor(40.0))
    assert (ratio_P.diff() >= -1e-4).all()
