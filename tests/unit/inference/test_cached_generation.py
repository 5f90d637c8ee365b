"""Generation on the paged cache: the texts of a model without one, from any format, batch and chunk length."""

import copy
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.inference import generator as module
from deepseek_v3.inference import kv_cache
from deepseek_v3.inference.engine.cpu_forward import CpuForward
from deepseek_v3.inference.engine.device_forward import DeviceForward
from deepseek_v3.inference.engine.device_rows import runs_by_rows
from deepseek_v3.inference.engine.rows import Chunk
from deepseek_v3.inference.generator import Completion, Generator
from deepseek_v3.inference.kv_cache import KvCache
from deepseek_v3.inference.sampling import SamplingConfig
from deepseek_v3.mla.attention import MultiHeadLatentAttention
from deepseek_v3.mla.kv_compression import KvFormat, PagePool
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.ops.mla_decode.formats import PAGE
from deepseek_v3.ops.operation import copyable
from deepseek_v3.utils.errors import ConfigError, GenerationError
from helpers.caches import poisoned
from helpers.models import fill_with_noise, foreseeable_model, small_config, small_model

GREEDY = SamplingConfig(temperature=0, max_new_tokens=12)
LENGTHS = [70, 3, 130, 64, 63]  # of prompts, around the sizes of pages


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat\n", "return the cat\n"] * 3, vocab_size=280)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> DeepSeekV3:
    torch.manual_seed(0)
    return small_model(small_config(vocab_size=tokenizer.vocab_size, max_position_embeddings=256)).eval()


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    torch.manual_seed(1)
    return [torch.randint(10, tokenizer.vocab_size, (length,)).tolist() for length in LENGTHS]


@pytest.fixture(autouse=True)
def pools(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[PagePool]]:
    """The pools that a test has made: poisoned, and without an owner of any page when the test ends."""
    made: list[PagePool] = []

    new_pool_of = KvCache.new_pool

    def new_pool(cache: KvCache, num_pages: int) -> PagePool:
        made.append(poisoned(new_pool_of(cache, num_pages)))
        return made[-1]

    monkeypatch.setattr(KvCache, "new_pool", new_pool)
    yield made
    assert [pool.num_free for pool in made] == [pool.num_pages for pool in made]


def texts(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.tokens for completion in completions]


def test_the_cache_changes_no_text(
    model: DeepSeekV3, tokenizer: Tokenizer, prompts: list[list[int]], pools: list[PagePool]
) -> None:
    generator = Generator(model, tokenizer)
    found = generator.continue_tokens(prompts, GREEDY)
    assert texts(found) == texts(generator.continue_tokens(prompts, GREEDY, use_cache=False))
    assert {len(completion.tokens) for completion in found} == {GREEDY.max_new_tokens}
    assert [pool.num_pages for pool in pools] == [2 + 1 + 3 + 2 + 2]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets generators on the CPU run the modules of the model, and read tokens one step late."""
    engine = module.Engine
    monkeypatch.setattr(module, "CpuForward", lambda model, pool, *_: DeviceForward(model, pool))
    monkeypatch.setattr(module, "Engine", lambda *parts, **_: engine(*parts, reads_late=True))


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_forward_pass_of_a_gpu_gives_the_same_text(
    model: DeepSeekV3,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    request: pytest.FixtureRequest,
    temperature: float,
    is_loaded: bool,
) -> None:
    """Modules run a model that is trained; one that was loaded for inference runs row by row."""
    model = copy.deepcopy(model).requires_grad_(not is_loaded)
    assert runs_by_rows(model) == is_loaded
    sampling = SamplingConfig(temperature=temperature, max_new_tokens=12, repetition_penalty=1.2)
    wanted = texts(Generator(model, tokenizer).continue_tokens(prompts, sampling))
    request.getfixturevalue("as_on_a_gpu")
    for batch_size in (2, 32):
        assert texts(Generator(model, tokenizer, batch_size).continue_tokens(prompts, sampling)) == wanted


@pytest.fixture(scope="module")
def drafting(tokenizer: Tokenizer) -> DeepSeekV3:
    torch.manual_seed(0)
    sizes = {"max_position_embeddings": 256, "num_nextn_predict_layers": 1}
    return foreseeable_model(small_config(vocab_size=tokenizer.vocab_size, **sizes)).eval()


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize("speculate", [1, 2])
@pytest.mark.parametrize("chunk", [64, 8192])
def test_the_forward_pass_of_a_gpu_accepts_the_same_drafts(
    drafting: DeepSeekV3,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    speculate: int,
    chunk: int,
    is_loaded: bool,
) -> None:
    drafting = copy.deepcopy(drafting).requires_grad_(not is_loaded)
    plain = Generator(drafting, tokenizer)
    wanted = texts(plain.continue_tokens(prompts, GREEDY))
    monkeypatch.setattr(module, "PREFILL_TOKENS", chunk)
    on_cpu = Generator(drafting, tokenizer, speculate=speculate)
    assert texts(on_cpu.continue_tokens(prompts, GREEDY)) == wanted
    monkeypatch.setattr(module, "CpuForward", lambda model, pool, *_: DeviceForward(model, pool))
    on_device = Generator(drafting, tokenizer, speculate=speculate)
    assert texts(on_device.continue_tokens(prompts, GREEDY)) == wanted
    assert on_device.acceptance == on_cpu.acceptance
    assert on_cpu.acceptance.tokens_per_step > 1.1
    assert plain.acceptance.steps == 0


def test_a_step_that_can_add_one_token_has_no_drafts(
    drafting: DeepSeekV3, tokenizer: Tokenizer, prompts: list[list[int]], pools: list[PagePool]
) -> None:
    """A prompt of 63 tokens and one new token fill a page; a step that can add but one token has no drafts."""
    for number in (1, 2):
        generator = Generator(drafting, tokenizer, speculate=2)
        sampling = SamplingConfig(temperature=0, max_new_tokens=number)
        [found] = generator.continue_tokens([prompts[4]], sampling)
        assert len(found.tokens) == number
        assert not sum(generator.acceptance.offered)
    assert [pool.num_pages for pool in pools] == [1, 2]
    assert len(pools[0].pages) == drafting.config.num_hidden_layers + 1


def test_drafts_need_a_model_that_can_make_them(model: DeepSeekV3, tokenizer: Tokenizer) -> None:
    with pytest.raises(GenerationError) as error:
        Generator(model, tokenizer, speculate=1)
    assert str(error.value) == (
        "speculate = 1: the model has no MTP layer to draft tokens with; take weights that hold one "
        "(num_nextn_predict_layers = 1 or more), loaded with mtp_layers = 1, or set speculate = 0"
    )
    with pytest.raises(GenerationError, match="speculate = 3: expected 0 to 2 drafts per step"):
        Generator(model, tokenizer, speculate=3)


def test_the_kernels_give_the_text_of_the_reference(
    model: DeepSeekV3,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    triton_device: torch.device,
    as_on_a_gpu: None,
) -> None:
    from deepseek_v3.ops.mla_decode import triton

    few, sampling = prompts[:2], SamplingConfig(temperature=0, max_new_tokens=4)
    wanted = texts(Generator(model, tokenizer).continue_tokens(few, sampling))
    moved = copy.deepcopy(model).to(triton_device)
    for layer in moved.modules():
        if isinstance(layer, MultiHeadLatentAttention):
            layer.cached = copyable(triton)
    assert texts(Generator(moved, tokenizer).continue_tokens(few, sampling)) == wanted


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_chunks_of_a_prompt_give_the_same_text(
    model: DeepSeekV3, tokenizer: Tokenizer, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    generator = Generator(model, tokenizer)
    whole = texts(generator.continue_tokens(prompts, GREEDY))
    lengths: list[int] = []
    run = CpuForward.prefill

    def prefill(forward: CpuForward, chunks: Sequence[Chunk]) -> Tensor:
        lengths.append(sum(len(chunk.ids) for chunk in chunks))
        return run(forward, chunks)

    monkeypatch.setattr(CpuForward, "prefill", prefill)
    monkeypatch.setattr(module, "PREFILL_TOKENS", chunk)

    assert texts(generator.continue_tokens(prompts, GREEDY)) == whole
    assert max(lengths) <= max(chunk, PAGE)


@pytest.mark.parametrize("kv", [None, KvFormat.FP8])
def test_batch_mates_and_their_order_change_no_text(
    tokenizer: Tokenizer, prompts: list[list[int]], kv: KvFormat | None
) -> None:
    torch.manual_seed(0)
    config = small_config(vocab_size=tokenizer.vocab_size, max_position_embeddings=256, kv_lora_rank=128)
    generator = Generator(small_model(config).eval(), tokenizer, kv=kv)
    alone = [texts(generator.continue_tokens([prompt], GREEDY))[0] for prompt in prompts]
    assert texts(generator.continue_tokens(prompts, GREEDY)) == alone
    assert texts(generator.continue_tokens(prompts[::-1], GREEDY)) == alone[::-1]
    assert texts(Generator(generator._model, tokenizer, 2, kv=kv).continue_tokens(prompts, GREEDY)) == alone


def test_the_config_selects_the_fp8_cache(
    tokenizer: Tokenizer, prompts: list[list[int]], pools: list[PagePool], caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(vocab_size=tokenizer.vocab_size, kv_lora_rank=128, use_fp8_kv=True)
    model = small_model(config).eval()
    fill_with_noise(model, std=0.1)
    generator = Generator(model, tokenizer)
    with caplog.at_level("INFO"):
        for _ in range(2):
            generator.continue_tokens([prompts[1]], GREEDY)
    assert [pool.layout.row_bytes for pool in pools] == [128 + 4 + 16] * 2
    [line] = [line for line in caplog.messages if "latent cache" in line]
    assert line.startswith(
        "latent cache in FP8: 444 bytes per token; multi-head attention would take 768, 1.73 times"
    )
    Generator(model, tokenizer, kv=KvFormat.BF16).continue_tokens([prompts[1]], GREEDY)
    assert not pools[-1].layout.is_fp8


def test_fp8_needs_a_rank_of_whole_blocks(model: DeepSeekV3, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"FP8: found kv_lora_rank = 16, expected a multiple of 128; keep"):
        Generator(model, tokenizer, kv=KvFormat.FP8)


def free_pages(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Leaves room for this many pages of the float32 cache of `small_config`."""
    monkeypatch.setattr(kv_cache, "free_bytes", lambda _: int((number + 0.5) * PAGE * 3 * 24 * 4 / 0.9))


def test_fewer_prompts_run_at_a_time_if_memory_is_short(
    model: DeepSeekV3,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    pools: list[PagePool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = texts(Generator(model, tokenizer).continue_tokens(prompts, GREEDY))
    free_pages(monkeypatch, 4)
    assert texts(Generator(model, tokenizer).continue_tokens(prompts, GREEDY)) == whole
    assert [pool.num_pages for pool in pools[1:]] == [4]


def test_a_pool_has_room_for_the_prompts_that_run_at_a_time(
    model: DeepSeekV3, tokenizer: Tokenizer, prompts: list[list[int]], pools: list[PagePool]
) -> None:
    Generator(model, tokenizer, batch_size=2).continue_tokens(prompts, GREEDY)
    assert [pool.num_pages for pool in pools] == [3 + 2]


def test_a_text_that_does_not_fit_is_refused_at_once(
    model: DeepSeekV3,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    pools: list[PagePool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free_pages(monkeypatch, 2)
    generator = Generator(model, tokenizer)
    with pytest.raises(GenerationError) as error:
        generator.continue_tokens(prompts, GREEDY)
    assert str(error.value) == (
        "prompt 3 is 130 tokens long, and the cache needs room for 142 with its new tokens, found room for 128; "
        "shorten it, lower max_new_tokens, or take a device with more memory"
    )
    with pytest.raises(GenerationError, match="needs room for 256 with its new tokens, found room for 128"):
        generator.stream("the cat", SamplingConfig(max_new_tokens=10**6))
    assert pools == []
    generator.continue_tokens(prompts[:3], GREEDY, use_cache=False)


@pytest.mark.parametrize("kv", [None, KvFormat.FP8])
def test_fp8_is_advised_where_it_helps(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, kv: KvFormat | None
) -> None:
    model = small_model(small_config(vocab_size=tokenizer.vocab_size, kv_lora_rank=128))
    monkeypatch.setattr(kv_cache, "free_bytes", lambda _: 0)
    with pytest.raises(GenerationError) as error:
        Generator(model, tokenizer, kv=kv).stream("the cat", GREEDY)
    assert ("keep the cache in FP8, or" in str(error.value)) == (kv is None)
