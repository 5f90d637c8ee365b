"""The tokens of a run: opens them, checks them against the model, and moves batches to the device."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.arrays import Int64Array
from deepseek_v3.data.tokens.loader import prefetch
from deepseek_v3.data.tokens.open_source import open_tokens_of
from deepseek_v3.data.tokens.source import RunTokens
from deepseek_v3.data.tokens.tokenize_corpus import tokenize_corpus
from deepseek_v3.utils.distributed.collectives import run_on_all_ranks
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.fault_points import reach
from deepseek_v3.utils.logging import get_logger

Item = TypeVar("Item")


def open_tokens(config: RunConfig) -> RunTokens:
    """Opens the run's tokens; builds token shards from `data.corpus` first if nothing is there yet.

    Raises DataError if they are missing or damaged, or if their tokenizer has more ids than the model.
    """
    _build_missing(config)
    tokens = open_tokens_of(config.data)
    check_vocabulary(tokens, config.model)
    return tokens


def open_tokens_on_all_ranks(config: RunConfig, group: ProcessGroup) -> RunTokens:
    """`open_tokens` on all ranks: rank 0 builds missing token shards while the others wait."""
    run_on_all_ranks(group, lambda: _build_missing(config) if dist.get_rank(group) == 0 else None)
    return run_on_all_ranks(group, lambda: open_tokens(config))


def _build_missing(config: RunConfig) -> None:
    """Builds token shards from `data.corpus`, if it is given and nothing is at `data.path`."""
    data = config.data
    if data.corpus is None or data.exist:
        return
    get_logger("Data").info(f"{data.path} does not exist yet: building it from {data.corpus.source}")
    options = data.corpus.model_dump()
    length = config.training.sequence_length
    tokenize_corpus(output=data.path, tokenizer=None, sequence_length=length, **options)


def check_vocabulary(tokens: RunTokens, model: ModelConfig) -> None:
    """Raises DataError if the tokenizer of the tokens has more ids than the model's vocabulary."""
    if tokens.vocab_size > model.vocab_size:
        raise DataError(
            f"{tokens.name}: its tokenizer has {tokens.vocab_size} ids, model.vocab_size = "
            f"{model.vocab_size} has room for fewer; raise it, set it to null, which follows the tokenizer, or "
            "tokenize with a smaller vocabulary"
        )


def token_batches(
    read: Callable[[Item], Int64Array],
    groups: Iterable[Sequence[Item]],
    device: torch.device,
    ranks: ProcessGroup | None = None,
) -> Generator[Iterator[Tensor]]:
    """Yields for each group of items its micro-batches `read(item)` on `device`, int64 (sequences, length + 1).

    A background thread reads the next group. A group is yielded once it has been read completely, so a step that
    has begun cannot fail because tokens cannot be read. If reading fails on any rank of `ranks`, all of them raise
    its DataError in place of the group; with `ranks` None, this rank does not ask the others.
    """

    def on_device(batch: Int64Array) -> Tensor:
        tokens = torch.from_numpy(batch)
        return tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens

    def read_group(group: Sequence[Item]) -> list[Int64Array]:
        reach("data")
        return [read(item) for item in group]

    with closing(prefetch(read_group, groups)) as ahead:
        while (batches := run_on_all_ranks(ranks, lambda: next(ahead, None))) is not None:
            yield map(on_device, batches)


def document_ids(tokens_BS: Tensor, end_of_text: int) -> Tensor:
    """Document ids of packed sequences, from 0 in each; end-of-text belongs to the document that it ends."""
    ends_BS = (tokens_BS == end_of_text).long()
    return ends_BS.cumsum(1) - ends_BS


class DocumentIds:
    """Computes the document ids of tokens, if the run masks attention between documents."""

    def __init__(self, tokens: RunTokens, masked: bool) -> None:
        self._end_of_text = tokens.end_of_text if masked else None

    def __call__(self, tokens_BX: Tensor) -> Tensor | None:
        """Returns the `document_ids`; None if documents are not masked."""
        return None if self._end_of_text is None else document_ids(tokens_BX, self._end_of_text)
