"""Generated tokens on a GPU, row by row: the states of a row, whatever runs beside it, and the weights' places."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.inference.engine.device_forward import DeviceForward
from deepseek_v3.inference.engine.device_rows import Row, RowsForward, runs_by_rows
from deepseek_v3.inference.generator import Generator
from deepseek_v3.inference.sampling import SamplingConfig
from deepseek_v3.mla.cached_sequences import CachedSequence
from deepseek_v3.mla.kv_compression import PagePool, latent_format
from deepseek_v3.model.backends import select_backends
from deepseek_v3.model.pretrained import prepare_for_inference
from deepseek_v3.model.transformer import DeepSeekV3
from helpers.models import fill_with_noise, small_config, small_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LENGTHS = [1, 5, 64, 70, 200, 650, 1000]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def loaded_model(device: torch.device, **sizes: int) -> DeepSeekV3:
    """A model as it is loaded for inference; on a GPU in bfloat16, with the widths that have all kernels."""
    torch.manual_seed(0)
    wide = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
    if device.type == "cpu":
        return small_model(small_config(**sizes)).eval().requires_grad_(False)
    model = small_model(small_config(hidden_size=256, max_position_embeddings=2048, **wide, **sizes))
    fill_with_noise(model, std=0.05)
    prepare_for_inference(model, torch.bfloat16)
    model.to(device)
    select_backends(model, device)
    return model.eval().requires_grad_(False)


def filled_cache(model: DeepSeekV3, device: torch.device) -> tuple[PagePool, list[CachedSequence]]:
    """Sequences of random latents."""
    dtype = model.compute_dtype or torch.float32
    pool = PagePool(model.config, latent_format(model.config, dtype), 64, device)
    for pages in pool.pages:
        pages.copy_(torch.randn(pages.shape, device=device))
    sequences = [CachedSequence(pool) for _ in LENGTHS]
    for sequence, length in zip(sequences, LENGTHS, strict=True):
        sequence.grow(length)
    return pool, sequences


@pytest.fixture
def rows_forward(device: torch.device) -> Iterator[tuple[RowsForward, list[Row], Tensor]]:
    model = loaded_model(device)
    pool, sequences = filled_cache(model, device)
    forward = DeviceForward(model, pool)._rows
    assert forward is not None
    rows = [Row(each, each.length - 1) for each in sequences]
    with torch.inference_mode():
        yield forward, rows, torch.arange(3, 3 + len(rows), device=device)


@pytest.mark.gpu
def test_no_bit_of_a_state_depends_on_the_other_rows() -> None:
    device = torch.device("cuda")
    model = loaded_model(device)
    pool, sequences = filled_cache(model, device)
    forward = DeviceForward(model, pool)._rows
    assert forward is not None
    rows = [Row(each, each.length - 1) for each in sequences] * 40
    tokens = [3 + number % 7 for number in range(len(rows))]
    with torch.inference_mode():
        many = forward.states(rows, tokens)
        assert many.isfinite().all()
        for number in range(len(LENGTHS)):
            for _ in range(3):  # also the same bits each time
                one = forward.states(rows[number : number + 1], tokens[number : number + 1])
                assert torch.equal(one[0], many[number])
        some = forward.states(rows[2:30], tokens[2:30])
        assert torch.equal(some, many[2:30])
        assert torch.equal(forward.logits(some), forward.logits(many)[2:30])


def test_tokens_may_be_on_the_device(rows_forward: tuple[RowsForward, list[Row], Tensor]) -> None:
    forward, rows, tokens_B = rows_forward
    assert torch.equal(forward.states(rows, tokens_B), forward.states(rows, tokens_B.tolist()))


def test_two_engines_share_the_weights_of_a_model(device: torch.device) -> None:
    """Weights that were moved side by side stay there, with the values that they had."""
    model = loaded_model(device, n_shared_experts=2)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    places = []
    for _ in range(2):
        pool, _ = filled_cache(model, device)
        DeviceForward(model, pool)
        places.append([weight.data_ptr() for weight in model.parameters()])
    assert places[0] == places[1]
    after = model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_a_model_that_is_trained_does_not_run_by_rows() -> None:
    model = loaded_model(torch.device("cpu"))
    assert runs_by_rows(model)
    trained = copy.deepcopy(model).requires_grad_(True)
    assert not runs_by_rows(trained)
    narrow = copy.deepcopy(model)
    narrow.compute_dtype = torch.bfloat16
    assert not runs_by_rows(narrow)


@pytest.mark.gpu
def test_a_warm_engine_has_no_requests_and_all_its_pages() -> None:
    device = torch.device("cuda")
    generator = Generator(
        loaded_model(device, vocab_size=260), Tokenizer.train(["text"], vocab_size=260), batch_size=40
    )
    pool = generator.kv_cache.new_pool(80)
    engine = generator.new_engine(pool)
    generator.warm_up(engine)
    assert not engine.has_work
    assert pool.num_free == pool.num_pages


@pytest.mark.gpu
def test_a_text_is_the_same_beside_any_others() -> None:
    """Prompts that the modules would compute together, and others; greedy and sampled."""
    device = torch.device("cuda")
    model, tokenizer = loaded_model(device, vocab_size=260), Tokenizer.train(["text"], vocab_size=260)
    prompts = [
        [1 + (7 * place * number) % 90 for place in range(length)] for number, length in enumerate(LENGTHS, 1)
    ]
    for sampling in (SamplingConfig(0, max_new_tokens=40), SamplingConfig(1.0, max_new_tokens=40)):
        together = Generator(model, tokenizer, batch_invariant=True).continue_tokens(prompts, sampling)
        few = Generator(model, tokenizer, 2, batch_invariant=True).continue_tokens(prompts[:1], sampling)
        assert few[0].tokens == together[0].tokens
        if sampling.temperature == 0:  # a seed belongs to the number of a prompt
            generator = Generator(model, tokenizer, 1, batch_invariant=True)
            assert [each.tokens for each in generator.continue_tokens(prompts, sampling)] == [
                each.tokens for each in together
            ]
