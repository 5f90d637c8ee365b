"""The stage that cleans texts."""

from __future__ import annotations

import unicodedata
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepseek_v3.config.filter_config import CleaningConfig
from deepseek_v3.config.loading import section_from_dict
from deepseek_v3.data.arrays import BoolArray
from deepseek_v3.data.content import Content, contents_of, looks_like_code
from deepseek_v3.data.documents import with_texts
from deepseek_v3.data.preliminary_cleaning.characters import (
    BIDI_CONTROLS,
    JOINERS,
    REPLACED,
    TAGS,
    normalize,
    replace_characters,
    replace_in_code,
    tidy_white_space,
    without_surrogates,
)
from deepseek_v3.data.preliminary_cleaning.html import html_to_text, is_html
from deepseek_v3.data.preliminary_cleaning.mojibake import SUSPECT, repair_mojibake
from deepseek_v3.data.stages import Drop, Outcome, Stage, outcome


class PreliminaryCleaner(Stage):
    """Converts HTML to text, repairs wrongly decoded text, and normalizes characters, Unicode form and white space.

    Source code keeps its characters, indentation and blank lines; only line ends and control characters change.

    Documents that are empty afterwards are dropped. Takes the options of `CleaningConfig`; raises ConfigError for
    any other option.
    """

    name: ClassVar[str] = "preliminary_cleaning"

    def __init__(self, **options: Any) -> None:
        self.options = section_from_dict(CleaningConfig, options, "PreliminaryCleaner")
        self._dirt = _dirt_pattern(self.options)

    def clean(self, text: str, content: Content = None) -> str:
        """The cleaned text of a document that holds `content`. Never raises, and is idempotent without `content`.

        One repair can make another necessary: HTML may contain escaped HTML, or mojibake. So all steps are repeated
        until nothing changes; what was extracted from HTML is HTML again only if it has the structure of HTML. This
        terminates: extracting the text of HTML removes the tag at its start, ftfy replaces several characters by
        one, references such as &lt; are longer than the character that they denote, and the other steps change
        nothing the second time.
        """
        if content == "code":
            return self._clean_once(text, content)
        while (cleaned := self._clean_once(text, content)) != text:
            text, content = cleaned, None if content == "html" else content
        return text

    def _clean_once(self, text: str, content: Content) -> str:
        options = self.options
        text = without_surrogates(text)
        if options.html != "keep" and is_html(text, content):
            text = html_to_text(text, options.html == "main_content")
        elif content == "code" or (content is None and looks_like_code(text)):
            return tidy_white_space(replace_in_code(text), None)
        if options.repair_mojibake:
            text = repair_mojibake(text)
        text = replace_characters(text, options.remove_bidi_controls)
        text = normalize(text, options.unicode_form)
        return tidy_white_space(text, options.max_blank_lines)

    def apply(self, batch: pa.RecordBatch) -> Outcome:
        """Cleans a batch of `RECORDS`. Never raises for any text."""
        texts = batch.column("text").to_pylist()
        rows = np.flatnonzero(self._may_change(batch.column("text"), texts)).tolist()
        drops = []
        for row, content in zip(rows, _contents(batch, rows), strict=True):
            before, texts[row] = texts[row], self.clean(texts[row], content)
            if not texts[row]:
                drops.append(Drop(row, "empty", {"characters": len(before)}))
        return outcome(self.name, with_texts(batch, texts) if rows else batch, drops)

    def _may_change(self, column: pa.Array, texts: list[str]) -> BoolArray:
        """Marks the texts that `clean` may change: bool [n]. It does not change the others."""
        found = pc.match_substring_regex(column, self._dirt).to_numpy(zero_copy_only=False)
        form = self.options.unicode_form
        denormal = [not text.isascii() and not unicodedata.is_normalized(form, text) for text in texts]
        return found | np.array(denormal, np.bool_)


def _contents(batch: pa.RecordBatch, rows: list[int]) -> list[Content]:
    return contents_of(batch.select(["source", "metadata"]).take(pa.array(rows, pa.int64())))


def _dirt_pattern(options: CleaningConfig) -> str:
    """A regex for Arrow that matches every text that `clean` changes, except for changes of the Unicode form."""
    marked = [*REPLACED, *JOINERS, *TAGS] + [*BIDI_CONTROLS] * options.remove_bidi_controls
    patterns = [
        "^$",
        "[" + "".join(f"\\x{{{ord(char):x}}}" for char in marked) + "]",
        r"^\n|[ \t]\n|[ \t\n]$",
        rf"\n{{{options.max_blank_lines + 2}}}",
    ]
    if options.html != "keep":
        patterns.append(r"^[ \t\n]*<")
    if options.repair_mojibake:
        patterns.append(SUSPECT)
    return "|".join(patterns)
