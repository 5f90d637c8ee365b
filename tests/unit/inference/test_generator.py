import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers

from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.inference import generator
from deepseek_v3.inference.engine.generation_request import StreamedText
from deepseek_v3.inference.generator import Generator
from deepseek_v3.inference.sampling import SamplingConfig
from deepseek_v3.utils.errors import DataError, GenerationError
from helpers.models import small_config, small_model

CONTEXT = 48
TEXTS = [
    "the cat sat on the mat\n",
    "def cat(path): return path.read_text()\n",
    "ein Fuchs läuft über die Straße\n",
]
# Ragged: one to a dozen tokens, an empty one, and characters of several bytes.
PROMPTS = ["the cat", "", "def cat(path): return pa", "ü", "\n", "ein Fuchs läuft über", "数学🙂"]
GREEDY = SamplingConfig(temperature=0, max_new_tokens=20)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS * 3, vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer):
    """Random weights, wide enough apart that rounding does not decide between tokens."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "vocab_size": tokenizer.vocab_size + 20, "max_position_embeddings": CONTEXT}
    return small_model(small_config(**sizes))


@pytest.fixture(scope="module")
def engine(model, tokenizer):
    return Generator(model, tokenizer)


def _answers_with(monkeypatch, model, answer):
    """Lets a function from positions (N,) to logits (N, V) stand in for the whole model, cached or not."""

    class Scripted:
        def __init__(self, *_):
            pass

        def prefill(self, chunks):
            return answer(torch.tensor([chunk.end - 1 for chunk in chunks]))

        def decode(self, sequences, tokens_B):
            assert len(sequences) == len(tokens_B)
            return answer(torch.tensor([sequence.length - 1 for sequence in sequences]))

        def logits(self, logits_BV):
            return logits_BV

    def final_states(tokens_BS):
        return answer(torch.arange(tokens_BS.shape[1])).expand(len(tokens_BS), -1, -1)

    monkeypatch.setattr(generator, "CpuForward", Scripted)
    monkeypatch.setattr(model, "final_states", final_states, raising=False)
    monkeypatch.setattr(model, "logits", lambda logits: logits, raising=False)


@pytest.fixture
def scripted(model, tokenizer, monkeypatch):
    """Makes an engine whose model answers the prompt "a" with the given ids, cached or not."""
    assert len(tokenizer.encode("a")) == 1

    def make(ids):
        script = torch.tensor([*ids, *[tokenizer.end_of_text] * CONTEXT])
        vocabulary = model.config.vocab_size
        _answers_with(monkeypatch, model, lambda at: torch.nn.functional.one_hot(script[at], vocabulary).float())
        return Generator(model, tokenizer)

    return make


def pieces_of(stream):
    """What a stream yields, and what it returns at the end."""
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


SAMPLINGS = [
    GREEDY,
    SamplingConfig(temperature=0, repetition_penalty=1.3, max_new_tokens=20),
    *[SamplingConfig(temperature=1.0, top_p=1.0, seed=seed, max_new_tokens=20) for seed in range(2)],
    SamplingConfig(temperature=0.7, top_p=0.9, top_k=20, repetition_penalty=1.2, seed=9, max_new_tokens=100),
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_cache_changes_no_token(model, tokenizer, sampling, device):
    engine = Generator(copy.deepcopy(model).to(device), tokenizer)
    cached = engine.generate(PROMPTS, sampling)
    assert cached == engine.generate(PROMPTS, sampling, use_cache=False)
    assert all(completion.tokens for completion in cached)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_batch_changes_no_token(engine, model, tokenizer, sampling):
    """Each prompt alone, in twos, and all of them together, though some end early and others go on."""
    together = engine.generate(PROMPTS, sampling)
    assert [completion.prompt for completion in together] == PROMPTS
    for batch_size in (1, 2):
        assert Generator(model, tokenizer, batch_size).generate(PROMPTS, sampling) == together


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_stream_is_the_completion_in_pieces(engine, sampling):
    for prompt in PROMPTS[1::2]:
        pieces, completion = pieces_of(engine.stream(prompt, sampling))
        assert completion == engine.generate([prompt], sampling)[0]
        assert "".join(pieces) == completion.text
        assert all(pieces)


def test_greedy_tokens_are_those_of_the_plain_model(engine, model, tokenizer):
    ids = tokenizer.encode(PROMPTS[0])
    chosen = []
    with torch.no_grad():
        for _ in range(10):
            logits_V = model(torch.tensor([ids + chosen]))[0, -1]
            chosen.append(int(logits_V[: tokenizer.vocab_size].argmax()))
    [completion] = engine.generate(PROMPTS[:1], SamplingConfig(temperature=0, max_new_tokens=10))
    assert completion.tokens == tuple(chosen)


def test_copies_of_a_prompt_are_sampled_apart(engine):
    sampling = SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=20)
    assert len({completion.tokens for completion in engine.generate(["the cat"] * 5, sampling)}) == 5


def test_seeds_repeat_and_differ(engine):
    first, again, other = (
        engine.generate(["the"], SamplingConfig(temperature=1.0, seed=seed, max_new_tokens=20))
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_an_empty_prompt_starts_at_the_document_boundary(engine, model, tokenizer):
    with torch.no_grad():
        logits_V = model(torch.tensor([[tokenizer.end_of_text]]))[0, -1, : tokenizer.vocab_size]
    [completion] = engine.generate([""], SamplingConfig(temperature=0, max_new_tokens=1))
    assert completion.tokens == (int(logits_V.argmax()),)
    assert completion.prompt == ""


def test_no_prompts_give_no_completions(engine):
    assert engine.generate([], GREEDY) == []


def test_ids_beyond_the_tokenizer_are_never_chosen(engine, model, tokenizer, monkeypatch):
    def answer(positions):
        logits = torch.zeros(len(positions), model.config.vocab_size)
        logits[:, tokenizer.vocab_size :] = 50.0
        return logits

    _answers_with(monkeypatch, model, answer)
    [completion] = engine.generate(["a"], SamplingConfig(temperature=1.0, max_new_tokens=10))
    assert max(completion.tokens) < tokenizer.vocab_size


def test_the_limit_of_new_tokens(engine, tokenizer):
    [completion] = engine.generate(["the"], SamplingConfig(temperature=0, max_new_tokens=7))
    assert completion.finish_reason == "length"
    assert len(completion.tokens) == 7
    assert completion.text == tokenizer.decode(completion.tokens)


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_end_of_the_context(engine, tokenizer, use_cache):
    """Prompts that leave no room, room for one token, and room for several, beside one that ends by length."""
    word = tokenizer.encode("cat")
    prompts = [tokenizer.decode((word * CONTEXT)[:length]) for length in (CONTEXT, CONTEXT - 1, 40, 1)]
    lengths = [len(tokenizer.encode(prompt)) for prompt in prompts]
    assert lengths == [CONTEXT, CONTEXT - 1, 40, 1]
    sampling = SamplingConfig(temperature=0, max_new_tokens=20)
    completions = engine.generate(prompts, sampling, use_cache)
    assert [len(completion.tokens) for completion in completions] == [0, 1, 8, 20]
    assert [c.finish_reason for c in completions] == ["context", "context", "context", "length"]
    assert pieces_of(engine.stream(prompts[0], sampling, use_cache)) == ([], completions[0])


def test_the_last_token_of_both_limits_counts_as_length(engine, tokenizer):
    prompt = tokenizer.decode((tokenizer.encode("cat") * CONTEXT)[:40])
    [completion] = engine.generate([prompt], SamplingConfig(temperature=0, max_new_tokens=8))
    assert completion.finish_reason == "length"


def test_a_prompt_longer_than_the_context_is_refused(engine):
    with pytest.raises(GenerationError, match=rf"prompt 2 is \d+ tokens long, expected at most .* {CONTEXT} "):
        engine.generate(["a", "0 " * CONTEXT], GREEDY)
    with pytest.raises(GenerationError, match="prompt 1 is"):
        engine.stream("0 " * CONTEXT, GREEDY)


def test_a_prompt_that_is_not_unicode_is_refused(engine):
    with pytest.raises(DataError, match="surrogate"):
        engine.generate(["\ud800"], GREEDY)


def test_a_tokenizer_larger_than_the_model_is_refused(model):
    larger = Tokenizer.train([chr(code) * 4 for code in range(0x400, 0x600)], vocab_size=600)
    with pytest.raises(GenerationError, match=f"has {larger.vocab_size} ids, expected at most .* 320; use"):
        Generator(model, larger)


def test_weights_that_are_not_numbers_are_reported(tokenizer, model, monkeypatch):
    _answers_with(monkeypatch, model, lambda at: torch.full((len(at), model.config.vocab_size), float("nan")))
    with pytest.raises(GenerationError, match="NaN"):
        Generator(model, tokenizer).generate(["a"], GREEDY)


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_end_of_text_token_ends_the_text_and_is_left_out(scripted, tokenizer, use_cache):
    ids = tokenizer.encode("the cat")
    [completion] = scripted(ids).generate(["a"], GREEDY, use_cache)
    assert completion.text == "the cat"
    assert completion.tokens == (*ids, tokenizer.end_of_text)
    assert completion.finish_reason == "end_of_text"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (("xyz",), "q"),  # three tokens
        (("yzx", "zx"), "qx"),  # both end at the same place: the longer, so the earlier, counts
        (("yzxw", "zx"), "qxy"),  # the one that is complete first
        (("q",), ""),
        (("w",), "qxyzx"),
    ],
)
def test_the_text_ends_before_a_stop_string_that_spans_tokens(scripted, tokenizer, stop, text):
    ids = [*tokenizer.encode("qxyzxw"), *tokenizer.encode("the")]
    assert len(tokenizer.encode("qxyzxw")) == 6
    engine = scripted(ids)
    pieces, completion = pieces_of(engine.stream("a", SamplingConfig(temperature=0, stop=stop)))
    assert completion.text == "".join(pieces) == text
    assert completion.finish_reason == "stop"
    assert completion.tokens == tuple(ids[: len(completion.tokens)])


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_text_ends_before_a_stop_token(scripted, tokenizer, use_cache):
    ids = tokenizer.encode("the cat sat")
    sampling = SamplingConfig(temperature=0, stop_tokens=(ids[2],), logprobs=1)
    [completion] = scripted(ids).generate(["a"], sampling, use_cache)
    assert completion.text == tokenizer.decode(ids[:2])
    assert completion.tokens == tuple(ids[:3])
    assert completion.finish_reason == "stop"
    assert [each.top[0] for each in completion.logprobs] == [
        (token, each.logprob) for token, each in zip(ids, completion.logprobs, strict=False)
    ]


def test_what_only_looked_like_a_stop_string_is_shown(scripted, tokenizer):
    engine = scripted(tokenizer.encode("xyxyq"))
    pieces, completion = pieces_of(engine.stream("a", SamplingConfig(temperature=0, stop=("xyz", "q!"))))
    assert pieces == ["xy", "xy", "q"]
    assert completion.finish_reason == "end_of_text"


def test_a_stop_string_in_the_prompt_does_not_count(engine):
    [completion] = engine.generate(["the cat"], SamplingConfig(temperature=0, max_new_tokens=1, stop=("the cat",)))
    assert completion.finish_reason == "length"


def test_a_character_is_streamed_whole(scripted, tokenizer):
    text = "a🙂é数\ufffd!"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)
    pieces, completion = pieces_of(scripted(ids).stream("a", GREEDY))
    assert pieces == ["a", "🙂", "é", "数", "\ufffd!"]
    assert completion.text == text


def test_a_character_cut_off_at_the_end_is_marked(scripted, tokenizer):
    ids = tokenizer.encode("a🙂")
    pieces, completion = pieces_of(scripted(ids).stream("a", SamplingConfig(temperature=0, max_new_tokens=3)))
    assert pieces[0] == "a"
    assert "".join(pieces) == completion.text == tokenizer.decode(ids[:3])
    assert set(completion.text[1:]) == {"\ufffd"}


def test_a_stop_string_may_cut_through_what_the_end_releases(scripted, tokenizer):
    ids = tokenizer.encode("ab🙂")[:4]
    [completion] = scripted(ids).generate(["a"], SamplingConfig(temperature=0, stop=("b\ufffd",)))
    assert completion.text == "a"
    assert completion.finish_reason == "stop"


@pytest.mark.parametrize(("stop", "text"), [((), " day day"), ((" day d",), ""), ((" ",), "")])
def test_text_after_a_prompt_begins_with_a_space(model, monkeypatch, stop, text):
    """Tokenizers in the manner of Llama drop the space before the first word of a text, which the prompt has."""
    vocabulary = {"<unk>": 0, "</s>": 1, "\u2581good": 2, "\u2581day": 3}
    theirs = HuggingFaceTokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    theirs.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    theirs.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    theirs.model.ignore_merges = True
    strip = [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    theirs.decoder = decoders.Sequence(strip)
    theirs.add_special_tokens(["</s>"])
    llama = Tokenizer.from_json(theirs.to_str())
    assert llama.encode("good") == [2]

    def answer(positions):
        return torch.nn.functional.one_hot(torch.full_like(positions, 3), model.config.vocab_size).float()

    _answers_with(monkeypatch, model, answer)
    sampling = SamplingConfig(temperature=0, max_new_tokens=2, stop=stop)
    pieces, completion = pieces_of(Generator(model, llama).stream("good", sampling))
    assert "".join(pieces) == completion.text == text


@settings(max_examples=200)
@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_are_found_however_the_text_is_cut(tokenizer, whole, stop, data):
    """Against a search through every prefix; what is shown on the way is never taken back."""
    ends = [end for end in range(len(whole) + 1) if whole[:end].endswith(tuple(stop))] if stop else []
    first = whole[: ends[0]] if ends else None
    expected = min((first.removesuffix(s) for s in stop), key=len) if first else whole
    text, rest, stopped = StreamedText(tokenizer, tuple(stop)), whole, False
    while rest and not stopped:
        length = data.draw(st.integers(1, len(rest)))
        stopped = text._ends_with(rest[:length])
        rest = rest[length:]
        assert expected.startswith(text.shown)
    if not stopped:
        text.end()
    assert stopped == bool(ends)
    assert text.shown == expected
