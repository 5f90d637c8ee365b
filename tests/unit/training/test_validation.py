"""The held-out loss: which windows are measured, and for how many bytes of text they stand."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from deepseek_v3.config.loading import load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.tokens.index import CorpusOptions
from deepseek_v3.data.tokens.shards import ShardWriter, TokenShards
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.training.validation import EvaluatedBatches, ValidationLoss, ValidationWindows, Validator
from deepseek_v3.utils.errors import DataError
from helpers.runs import write_run

BYTES_ALONE = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
CPU = torch.device("cpu")
OPTIONS = CorpusOptions(source="corpus", text_field="text", holdout=0.1, fim_rate=0.0, seed=0)
# Two sources, one after the other in the split: few bytes for each token, then many.
SOURCES = (["x1y2z3" * 10] * 30, ["the quick brown fox " * 20] * 30)


def shards_of(folder: Path, texts: list[str], tokenizer: Tokenizer | None = None) -> TokenShards:
    tokenizer = tokenizer or Tokenizer.train(texts[len(texts) // 2 :], 300)
    with ShardWriter(folder, tokenizer, 10**6) as writer:
        for text in texts:
            writer.add("holdout", tokenizer.encode(text), len(text.encode()))
        writer.add("train", [5] * 9, 9)
        writer.finish(OPTIONS)
    return TokenShards.open(folder)


@pytest.fixture
def shards(tmp_path: Path) -> TokenShards:
    return shards_of(tmp_path / "tokens", [text for source in SOURCES for text in source])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return load_config(write_run(tmp_path_factory.mktemp("run")))


def measured(
    shards: TokenShards, config: RunConfig, tokens: int, micro_batch: int, ranks: int = 1
) -> ValidationLoss:
    """Measures a made-up loss and drafts that differ from window to window, over ranks one after another."""
    parallel = config.parallel.model_copy(update={"micro_batch_size": micro_batch})
    config = config.model_copy(update={"parallel": parallel})
    shapes = set()
    sums: dict[torch.dtype, Tensor] = {}

    def evaluate(batches: list[Tensor]) -> EvaluatedBatches:
        batches = list(batches)
        shapes.update(batch.shape for batch in batches)
        return EvaluatedBatches.of((batch[:, 1:].double().square().mean(), drafts_of(batch)) for batch in batches)

    def summed(values: Tensor) -> Tensor:
        sums[values.dtype] = sums.get(values.dtype, 0) + values
        return sums[values.dtype]

    for rank in range(ranks):
        found = Validator(shards, config, tokens, rank, ranks).measure(evaluate, CPU, summed)
    assert shapes == {(micro_batch, config.training.sequence_length + 1)}
    return found


def drafts_of(windows_BX: Tensor) -> Tensor:
    """Made-up counts of three depths, (B, 3, 2), that differ between windows; the last depth has no drafts."""
    drafted_BK = windows_BX[:, :3] * torch.tensor([2, 1, 0])
    return torch.stack([drafted_BK, drafted_BK // 3], -1)


def test_windows_are_drawn_from_every_source(shards: TokenShards) -> None:
    windows = ValidationWindows(shards, 32, 10 * 32)
    tokens = np.concatenate([shards.load_tokenizer().encode(text) for text in SOURCES[0]]).size
    share = tokens / shards.num_tokens("holdout")
    first = (windows.numbers < share * windows.numbers.max()).sum()
    assert 10 * share - 1 <= first <= 10 * share + 1
    assert windows.num_targets == 320


@pytest.mark.parametrize("tokens", [1, 7 * 32, 10**9])
def test_bytes_are_those_of_the_measured_targets(shards: TokenShards, config: RunConfig, tokens: int) -> None:
    found = measured(shards, config, tokens, micro_batch=4)
    tokenizer = shards.load_tokenizer()
    targets = np.concatenate(
        [window[1:] for block in ValidationWindows(shards, 32, tokens).blocks() for window in block]
    )
    text = tokenizer.decode([token for token in targets.tolist() if token != tokenizer.end_of_text])
    assert found.tokens == len(targets)
    assert found.num_bytes == len(text.encode())
    assert found.loss == pytest.approx((targets.astype(float) ** 2).mean())
    assert found.bits_per_byte == pytest.approx(
        (targets.astype(float) ** 2).sum() / math.log(2) / len(text.encode())
    )


@pytest.mark.parametrize(("micro_batch", "ranks"), [(1, 1), (3, 1), (8, 1), (4, 3), (6, 2), (64, 2)])
def test_layouts_measure_the_same_windows(
    shards: TokenShards, config: RunConfig, micro_batch: int, ranks: int
) -> None:
    expected = measured(shards, config, 23 * 32, micro_batch=1)
    found = measured(shards, config, 23 * 32, micro_batch, ranks)
    assert (found.tokens, found.num_bytes) == (expected.tokens, expected.num_bytes)
    assert found.loss == pytest.approx(expected.loss)
    windows = ValidationWindows(shards, 32, 23 * 32)
    totals = drafts_of(torch.from_numpy(windows.read(windows.numbers))).sum(0).tolist()
    shares = [accepted / drafted for drafted, accepted in totals[:2]]
    assert found.mtp_acceptance == pytest.approx([*shares, math.nan], abs=0, nan_ok=True)


@pytest.mark.parametrize(("micro_batch", "ranks"), [(1, 1), (3, 1), (4, 3)])
def test_masked_documents_begin_with_no_target(
    tmp_path: Path, config: RunConfig, micro_batch: int, ranks: int
) -> None:
    """The loss is a mean over the targets that are left, however they spread over batches and ranks."""
    shards = shards_of(tmp_path, ["ab" * size for size in (1, 40, 2, 3, 90, 1, 1, 1, 60)], Tokenizer.train([], 260))
    end = shards.index.end_of_text
    parallel = config.parallel.model_copy(update={"micro_batch_size": micro_batch})
    data = config.data.model_copy(update={"mask_documents": True})
    config = config.model_copy(update={"parallel": parallel, "data": data})
    sums = []

    def evaluate(batches: list[Tensor]) -> EvaluatedBatches:
        counted = [(batch[:, 1:].double().square() * (batch[:, :-1] != end)).mean() for batch in batches]
        return EvaluatedBatches(
            torch.stack(counted), torch.zeros(len(counted), micro_batch, 0, 2, dtype=torch.int64)
        )

    def summed(values: Tensor) -> Tensor:
        sums.append(values)
        return torch.stack(sums).sum(0)

    for rank in range(ranks):
        found = Validator(shards, config, 10**6, rank, ranks).measure(evaluate, CPU, summed)

    windows = np.concatenate(list(ValidationWindows(shards, 32, 10**6).blocks()))
    targets = windows[:, 1:][windows[:, :-1] != end]
    assert targets.size < windows[:, 1:].size
    assert found.tokens == targets.size
    assert found.windows == len(windows)
    assert found.loss == pytest.approx((targets.astype(float) ** 2).mean())
    assert found.num_bytes == (targets != end).sum()


def test_masked_documents_of_one_token_leave_nothing_to_measure(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, [""] * 40 + ["ab"], Tokenizer.train([], 260))
    with pytest.raises(DataError, match=r"first token of a document, .* set data\.mask_documents=false"):
        ValidationWindows(shards, 8, 100, masked=True)


def test_a_character_of_several_tokens_has_its_bytes(tmp_path: Path) -> None:
    text = "\u6f22\u5b57\U0001f600 <|endoftext|> \u00fc\n" * 4
    shards = shards_of(tmp_path, [text], Tokenizer.train([], 260))
    tokenizer = shards.load_tokenizer()
    assert tokenizer.is_byte_exact
    # All but the first token, a byte, are targets; the last target is the end of the text.
    assert ValidationWindows(shards, shards.num_tokens("holdout") - 1, 10**6).num_bytes() == len(text.encode()) - 1
    assert tokenizer.byte_lengths[tokenizer.end_of_text] == 0


def test_white_space_among_the_added_tokens_counts(tmp_path: Path) -> None:
    theirs = HuggingFaceTokenizer.from_str(Tokenizer.train([], 260).to_json())
    theirs.add_tokens(["        "])
    tokenizer = Tokenizer.from_json(theirs.to_str())
    assert tokenizer.byte_lengths[tokenizer.encode("        ")].tolist() == [8]


@pytest.mark.parametrize(
    "change",
    [
        lambda theirs: setattr(theirs, "normalizer", normalizers.NFC()),
        lambda theirs: setattr(theirs, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda theirs: setattr(
            theirs, "pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), BYTES_ALONE])
        ),
        lambda theirs: setattr(theirs, "decoder", decoders.Fuse()),
    ],
)
def test_tokenizers_that_change_text_do_not_count_as_exact(change: Callable[[HuggingFaceTokenizer], None]) -> None:
    theirs = HuggingFaceTokenizer.from_str(Tokenizer.train([], 260).to_json())
    assert Tokenizer.from_json(theirs.to_str()).is_byte_exact
    change(theirs)
    assert not Tokenizer.from_json(theirs.to_str()).is_byte_exact


def test_a_tokenizer_that_is_not_of_bytes_is_calibrated(tmp_path: Path) -> None:
    """One that folds case and drops spaces: what its ids spell is less than the text, alike everywhere."""
    vocabulary = {"<unk>": 0, "<|endoftext|>": 1, "a": 2, "b": 3}
    theirs = HuggingFaceTokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    theirs.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "")])
    theirs.decoder = decoders.Fuse()
    theirs.add_special_tokens(["<|endoftext|>", "<unk>"])
    tokenizer = Tokenizer.from_json(theirs.to_str())
    shards = shards_of(tmp_path, ["A b a B " * 100], tokenizer)
    assert not tokenizer.is_byte_exact
    windows = ValidationWindows(shards, 10, 50)
    assert windows.num_bytes() == pytest.approx(2 * windows.num_targets, rel=0.01)
