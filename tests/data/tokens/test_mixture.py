"""A mixture reads every source as it would be read alone, and its sources share one meaning of the ids."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.config.data_config import DataConfig, SourceConfig
from deepseek_v3.data.tokens.index import CorpusOptions
from deepseek_v3.data.tokens.loader import TokenLoader
from deepseek_v3.data.tokens.mixture import MixtureLoader, TokenMixture
from deepseek_v3.data.tokens.open_source import open_source, open_tokens_of
from deepseek_v3.data.tokens.shards import ShardWriter, TokenShards
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.utils.errors import DataError
from helpers.megatron import their_write

LENGTH = 4
OPTIONS = CorpusOptions(source="corpus", text_field="text", holdout=0.1, fim_rate=0.0, seed=0)
TOKENIZER = Tokenizer.train([], 260)
# The tokens of each source, which no other source has.
WEB, CODE, BOOKS = range(10, 90), range(90, 170), range(170, 250)


def write_shards(folder: Path, ids: range, windows: int, tokenizer: Tokenizer = TOKENIZER) -> Path:
    folder.mkdir()
    with ShardWriter(folder, tokenizer) as writer:
        writer.add("train", [ids[i % len(ids)] for i in range(windows * LENGTH)], 9)
        writer.add("holdout", [*ids[:10]], 10)
        writer.finish(OPTIONS)
    return folder


def files(folder: Path) -> dict[str, SourceConfig]:
    """Three sources: two folders of token shards, and a Megatron-LM dataset between them."""
    documents = [[[CODE[i] for i in range(7 * LENGTH)], [0]]]
    code = their_write(folder / "code", documents, "int64")
    valid = their_write(folder / "valid", [[[*CODE[:10], 0]]])
    TOKENIZER.save(folder / "tokenizer.json")
    return {
        "web": SourceConfig(name="web", path=write_shards(folder / "web", WEB, 50), weight=0.6),
        "code": SourceConfig(name="code", path=code, weight=0.3, holdout_path=valid),
        "books": SourceConfig(name="books", path=write_shards(folder / "books", BOOKS, 20), weight=0.1),
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, SourceConfig]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        return files(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def mixture(sources) -> TokenMixture:
    tokens = open_tokens_of(DataConfig(sources=tuple(sources.values())))
    assert isinstance(tokens, TokenMixture)
    return tokens


def source_of(sample: np.ndarray) -> str:
    (name,) = {name for name, ids in (("web", WEB), ("code", CODE), ("books", BOOKS)) if sample[0] in ids}
    return name


def test_every_source_is_read_as_alone_and_by_its_share(mixture):
    samples = MixtureLoader(mixture, sequence_length=LENGTH, seed=3).batch(0, 200)
    names = [source_of(sample) for sample in samples]
    for number, (name, share) in enumerate((("web", 0.6), ("code", 0.3), ("books", 0.1))):
        mine = np.array([found == name for found in names])
        assert np.abs(mine.cumsum() - share * np.arange(1, 201)).max() < 1.5
        seed = (3, number) if number else 3
        alone = TokenLoader(mixture.parts[number].source, sequence_length=LENGTH, seed=seed)
        assert np.array_equal(samples[mine], alone.batch(0, mine.sum()))


@given(st.integers(0, 10**12), st.integers(1, 12), st.integers(0, 3))
def test_a_batch_is_its_samples(mixture, first, count, seed):
    loader = MixtureLoader(mixture, sequence_length=LENGTH, seed=seed)
    batch = loader.batch(first, count)
    assert batch.shape == (count, LENGTH + 1)
    again = MixtureLoader(mixture, sequence_length=LENGTH, seed=seed)
    assert batch.tolist() == [again.sample(i).tolist() for i in range(first, first + count)]


def test_a_mixture_of_one_source_is_the_source(sources):
    source = open_source(sources["web"])
    alone = TokenLoader(source, sequence_length=LENGTH, seed=5).batch(0, 120)
    for tokens in (source, open_tokens_of(DataConfig(sources=(sources["web"],)))):
        assert np.array_equal(MixtureLoader(tokens, sequence_length=LENGTH, seed=5).batch(0, 120), alone)


def test_sources_share_the_limit_of_open_files(sources, monkeypatch):
    monkeypatch.setattr("deepseek_v3.data.tokens.shards._MAX_OPEN_FILES", 5)
    tokens = open_tokens_of(DataConfig(sources=tuple(sources.values())))
    shards = [part.source for part in tokens.parts if isinstance(part.source, TokenShards)]
    assert [each._file.cache_info().maxsize for each in shards] == [1, 1]
    MixtureLoader(tokens, sequence_length=LENGTH).batch(0, 40)


def test_sources_are_shuffled_differently(sources):
    twice = (sources["web"], sources["web"].model_copy(update={"name": "again"}))
    loader = MixtureLoader(open_tokens_of(DataConfig(sources=twice)), sequence_length=LENGTH)
    samples = loader.batch(0, 100)
    assert not np.array_equal(samples[::2], samples[1::2])


def test_a_mixture_has_the_tokenizer_of_its_sources(mixture):
    assert (mixture.vocab_size, mixture.end_of_text) == (260, 0)
    assert mixture.load_tokenizer().to_json() == TOKENIZER.to_json()
    assert [part.share for part in mixture.parts] == [Fraction(tenths, 10) for tenths in (6, 3, 1)]
    assert mixture.name.startswith("web (")
    assert len(mixture.identity) == 4
    assert mixture.identity[0] == mixture.parts[0].source.identity[0]


def with_tokenizer(sources, folder: Path, json_text: str) -> list[SourceConfig]:
    (folder / "tokenizer.json").write_text(json_text)
    return [sources["web"], sources["code"].model_copy(update={"tokenizer": folder})]


def test_the_same_ids_may_be_written_differently(sources, tmp_path):
    fields = {**json.loads(TOKENIZER.to_json()), "truncation": None}
    open_tokens_of(DataConfig(sources=tuple(with_tokenizer(sources, tmp_path, json.dumps(fields, indent=1)))))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda vocab: vocab.update({"A": vocab["B"], "B": vocab["A"]}), "'B' in the one and 'A' in the other"),
        (lambda vocab: vocab.update({"more": 260}), "'more' in the one and no token in the other"),
    ],
)
def test_other_ids_are_refused(sources, tmp_path, change, expected):
    fields = json.loads(TOKENIZER.to_json())
    change(fields["model"]["vocab"])
    with pytest.raises(DataError) as caught:
        open_tokens_of(DataConfig(sources=tuple(with_tokenizer(sources, tmp_path, json.dumps(fields)))))
    assert str(caught.value).startswith("data.sources: code (")
    first = min(TOKENIZER.encode("AB")) if "A" in expected else 260
    assert f"have different tokenizers: id {first} is " in str(caught.value)
    assert expected in str(caught.value)


def test_another_end_of_text_is_refused(sources, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|fim_end|>"}')
    with pytest.raises(DataError, match="id 3 ends a text in the one and id 0 in the other"):
        open_tokens_of(DataConfig(sources=tuple(with_tokenizer(sources, tmp_path, TOKENIZER.to_json()))))


def test_a_source_that_is_not_there_is_named(sources, tmp_path):
    lost = sources["books"].model_copy(update={"path": tmp_path / "nowhere"})
    with pytest.raises(DataError, match=r"nowhere: no token shards here.* name others with data\.sources\.1\.path"):
        open_tokens_of(DataConfig(sources=(sources["web"], lost)))
