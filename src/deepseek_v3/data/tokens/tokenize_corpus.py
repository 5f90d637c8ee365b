"""Turning a source of text into token ids on disk, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from deepseek_v3.data.documents import text_batches
from deepseek_v3.data.formats.reading import read_documents
from deepseek_v3.data.sample_corpora import stdlib_documents
from deepseek_v3.data.tokens.encoding import CorpusEncoder, encode_batches
from deepseek_v3.data.tokens.fim import FillInMiddle
from deepseek_v3.data.tokens.holdout import DEFAULT_SHARE, HoldoutPlanner, HoldoutRule, TokenBounds
from deepseek_v3.data.tokens.index import SPLITS, CorpusOptions, Split, SplitTotals
from deepseek_v3.data.tokens.megatron_writer import MegatronCorpusWriter
from deepseek_v3.data.tokens.shards import ShardWriter
from deepseek_v3.data.tokens.tokenizer import Tokenizer, check_vocab_size, min_tokens
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.files import atomic_folder, remove_partials
from deepseek_v3.utils.locks import hold_lock
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.machine import usable_cores
from deepseek_v3.utils.progress import ProgressDisplay, ProgressTask

PYTHON_STDLIB = "python-stdlib"
SEQUENCE_LENGTH = 256  # default tokens in a window


class TokenFormat(str, Enum):
    """How tokens are written: as token shards, or as Megatron-LM datasets."""

    SHARDS = "shards"
    MEGATRON = "megatron"


_BATCH_CHARACTERS = 2**20  # encoded at a time: enough to outweigh the transfer to another process and back

_log = get_logger("Tokens")


@dataclass(frozen=True)
class CorpusSummary:
    """The output directory, and the totals of its splits."""

    output: Path
    vocab_size: int
    train: SplitTotals
    holdout: SplitTotals


def tokenize_corpus(
    source: str,
    output: Path,
    *,
    vocab_size: int | None,
    tokenizer: Path | None,
    holdout: float | None,
    fim_rate: float,
    seed: int,
    sequence_length: int = SEQUENCE_LENGTH,
    text_field: str = "text",
    shard_tokens: int = 2**27,
    workers: int | None = None,
    token_format: TokenFormat = TokenFormat.SHARDS,
    end_of_text: str | None = None,
) -> CorpusSummary:
    """Tokenizes `source`, a file or folder of text or `python-stdlib`, to the new directory `output`.

    `token_format` is token shards, or the Megatron-LM datasets `output`/train and `output`/holdout with their
    tokenizer.json beside them; `shard_tokens` is for token shards alone.

    Reads the tokenizer from a file or folder, in which `end_of_text` may name the token that ends a document, or
    trains one of `vocab_size` on the training split. `HoldoutPlanner.choose`
    defines the text to hold out for a `holdout` share and windows of `sequence_length` tokens; copies of a text are
    never on both sides. The share `fim_rate` of the training documents is reordered for fill-in-the-middle.
    `workers` is the number of processes that encode (None: one per core); it does not change the result. Memory
    holds a few megabytes of text per worker, or the longest documents.

    `output` appears when it is complete, or not at all. Raises DataError if it exists, if the source cannot be
    used, or if a split would be shorter than one window.
    """
    if end_of_text is not None and tokenizer is None:
        raise DataError(f"end_of_text = {end_of_text}: expected a tokenizer that has it, and none is given")
    _check_options(vocab_size, tokenizer, holdout, fim_rate, workers)
    share = DEFAULT_SHARE if holdout is None else holdout
    options = CorpusOptions(source=source, text_field=text_field, holdout=share, fim_rate=fim_rate, seed=seed)
    with _new_folder(output) as partial:
        chosen = None if tokenizer is None else Tokenizer.load(tokenizer, [end_of_text] if end_of_text else ())
        if chosen is not None:
            FillInMiddle(fim_rate, seed, chosen.fim)  # raises for a tokenizer without FIM markers, before reading
        rule = _choose_holdout(options, holdout, chosen, sequence_length)
        if chosen is None:
            chosen = _train(options, rule, vocab_size)
        encoder = CorpusEncoder(chosen, options, rule)
        opened = _writer(token_format, partial, chosen, shard_tokens)
        with opened as writer, _progress("Tokenizing", "tokens") as task:
            batches = text_batches(_texts(options, warn=True), _BATCH_CHARACTERS)
            with closing(encode_batches(encoder, batches, workers or usable_cores())) as encoded:
                for batch in encoded:
                    for split, ids, num_bytes in batch.documents():
                        writer.add(split, ids, num_bytes)
                    task.advance(len(batch.ids) + len(batch.lengths), documents=len(batch.lengths))
            totals = writer.finish(options)
        _check_windows(totals, options, sequence_length)
    return CorpusSummary(output, chosen.vocab_size, totals["train"], totals["holdout"])


def _writer(
    token_format: TokenFormat, directory: Path, tokenizer: Tokenizer, shard_tokens: int
) -> ShardWriter | MegatronCorpusWriter:
    if token_format is TokenFormat.MEGATRON:
        return MegatronCorpusWriter(directory, tokenizer)
    return ShardWriter(directory, tokenizer, shard_tokens)


def _check_options(
    vocab_size: int | None, tokenizer: Path | None, holdout: float | None, fim_rate: float, workers: int | None
) -> None:
    if (vocab_size is None) == (tokenizer is None):
        raise DataError(
            f"vocab_size = {vocab_size} and tokenizer = {tokenizer}: expected one of the two, a size to train a "
            "tokenizer of or a tokenizer.json to use"
        )
    if vocab_size is not None:
        check_vocab_size(vocab_size)
    if holdout is not None and not 0 < holdout < 1:
        raise DataError(f"holdout = {holdout}: expected a share between 0 and 1, such as 0.02")
    if not 0 <= fim_rate <= 1:
        raise DataError(f"fim_rate = {fim_rate}: expected a share from 0 to 1, such as 0.1")
    if workers is not None and workers < 1:
        raise DataError(f"workers = {workers}: expected at least 1")


def _choose_holdout(
    options: CorpusOptions, share: float | None, tokenizer: Tokenizer | None, sequence_length: int
) -> HoldoutRule:
    if tokenizer is None:
        bounds = TokenBounds(min_tokens, lambda text: len(text.encode("utf-8")) + 1)
    else:
        bounds = TokenBounds(*(2 * [lambda text: len(tokenizer.encode(text)) + 1]))
    need = f"one window of {sequence_length:,} tokens"
    return HoldoutPlanner(options.source, lambda: _texts(options), bounds, sequence_length + 1, need).choose(share)


def _check_windows(totals: dict[Split, SplitTotals], options: CorpusOptions, sequence_length: int) -> None:
    """Raises DataError if a split is shorter than a window: the text gave fewer tokens than estimated."""
    for split in SPLITS:
        tokens, size = totals[split].tokens, totals[split].bytes
        if tokens <= sequence_length:
            raise DataError(
                f"{options.source}: the split {split!r} holds {tokens:,} tokens, made of {size:,} bytes; "
                f"expected at least {sequence_length + 1:,} for one window, about "
                f"{-(-size * (sequence_length + 1) // tokens):,} bytes; add text, change holdout = "
                f"{options.holdout}, or lower the sequence length"
            )


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """Like `atomic_folder`, but under a lock; also removes the partial folders of processes that were killed.

    Raises DataError if `output` exists or cannot be written, and InUseError if another process writes it.
    """
    _refuse_if_there(output)
    with hold_lock(output.with_name(f".{output.name}.lock"), output, "choose another output directory"):
        _refuse_if_there(output)  # another process may have finished it before this one got the lock
        remove_partials(output)
        try:
            with atomic_folder(output) as partial:
                yield partial
        except OSError as error:
            raise DataError(
                f"{output}: cannot be written: {error}; make room, or choose another directory"
            ) from error


def _refuse_if_there(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise DataError(f"{output}: exists and is left as it is; remove it, or choose another output directory")


def _texts(options: CorpusOptions, *, warn: bool = False) -> Iterator[str]:
    if options.source == PYTHON_STDLIB:
        return (document.text for document in stdlib_documents())
    return (document.text for document in read_documents(options.source, options.text_field, warn=warn))


def _train(options: CorpusOptions, holdout: HoldoutRule, vocab_size: int | None) -> Tokenizer:
    assert vocab_size is not None
    with _progress("Training the tokenizer", "characters") as task:

        def texts() -> Iterator[str]:
            for text in holdout.training_texts(_texts(options)):
                task.advance(len(text), documents=1)
                yield text

        tokenizer = Tokenizer.train(texts(), vocab_size)
    if tokenizer.vocab_size < vocab_size:
        _log.warning(
            f"the tokenizer has {tokenizer.vocab_size:,} ids where {vocab_size:,} were asked for: no other pair "
            f"occurs twice in the text of {options.source}; add text, or ask for fewer ids"
        )
    return tokenizer


@contextmanager
def _progress(title: str, unit: str) -> Iterator[ProgressTask]:
    """Shows the progress in documents and in a `unit` such as tokens; the total is not known."""
    with ProgressDisplay() as display, display.task(title, None, unit, _log) as task:
        yield task
