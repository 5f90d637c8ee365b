"""Training a small language model of good documents, and the perplexities that divide a corpus by it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, ValidationError

from deepseek_v3.config.base import Section
from deepseek_v3.config.problems import describe
from deepseek_v3.data.quality.kneser_ney import train_kneser_ney
from deepseek_v3.data.quality.ngram_model import BEGIN, END, UNKNOWN, NgramModel
from deepseek_v3.data.quality.perplexity import LanguageModel
from deepseek_v3.data.quality.sentences import NEW_LINE, sentences, tokens
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.files import written_atomically

PERCENTILES = (30, 60)


class Limits(Section):
    """The perplexities that divide documents into head, middle and tail: the file beside a model.

    They are the percentiles 30 and 60 of `documents` reference documents, as in CCNet's code; the paper (Wenzek et
    al. 2020) speaks of thirds. Below `head` a document belongs to the head, else below `middle` to the middle.
    """

    format_version: Literal[1] = 1
    head: Annotated[float, Field(gt=0)]
    middle: Annotated[float, Field(gt=0)]
    documents: Annotated[int, Field(ge=1)]

    @classmethod
    def of(cls, model: LanguageModel, reference: Sequence[str]) -> Limits:
        """The limits by reference documents. Raises DataError where none of them has a word."""
        perplexities = model.perplexities(reference)
        perplexities = perplexities[np.isfinite(perplexities)]
        if not len(perplexities):
            raise DataError("reference documents: found none with words; give more text, or --reference FILES")
        head, middle = np.percentile(perplexities, PERCENTILES).tolist()
        return cls(head=head, middle=middle, documents=len(perplexities))

    @classmethod
    def read(cls, model: Path) -> Limits | None:
        """The limits beside a model's file; None where there are none. Raises DataError where they are damaged."""
        path = _path(model)
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        except ValidationError as error:
            raise DataError(f"{describe(error, cls, {(): str(path)})}; train the model anew") from None

    def write(self, model: Path) -> None:
        """Writes them beside a model's file."""
        with written_atomically(_path(model)) as partial:
            partial.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def train_language_model(texts: Iterable[str], order: int) -> NgramModel:
    """A model of the lines of texts. Raises DataError where they have no words."""
    marks = {UNKNOWN: 0, BEGIN: 1, END: 2, NEW_LINE: -1}
    rows = defaultdict(count(3).__next__, marks)
    numbered = [np.fromiter(map(rows.__getitem__, tokens(text)), np.int64) for text in texts]
    words = sentences(chain.from_iterable(numbered), [*map(len, numbered)], rows[BEGIN], rows[END]).words
    if not len(words):
        raise DataError("documents to train a language model on: found no words; give files with text")
    del rows[NEW_LINE]
    return train_kneser_ney(words, [*rows], order)


def _path(model: Path) -> Path:
    return model.with_name(f"{model.name}.limits.json")
