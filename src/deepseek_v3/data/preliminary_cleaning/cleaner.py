"""The stage that repairs texts."""

from __future__ import annotations

import unicodedata
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepseek_v3.config.filter_config import CleaningConfig
from deepseek_v3.config.loading import section_from_dict
from deepseek_v3.data.arrays import BoolArray
from deepseek_v3.data.documents import with_texts
from deepseek_v3.data.preliminary_cleaning.characters import (
    BIDI_CONTROLS,
    JOINERS,
    REPLACED,
    TAGS,
    normalize,
    replace_characters,
    tidy_white_space,
    without_surrogates,
)
from deepseek_v3.data.preliminary_cleaning.html import html_to_text, is_html
from deepseek_v3.data.preliminary_cleaning.mojibake import SUSPECT, repair_mojibake
from deepseek_v3.data.stages import Drop, Outcome, Stage, outcome


class PreliminaryCleaner(Stage):
    """Turns HTML into text, repairs wrongly decoded text, and settles characters, Unicode form and white space.

    Documents that are empty afterwards are dropped. Options are those of `CleaningConfig`; raises ConfigError for
    others.
    """

    name: ClassVar[str] = "preliminary_cleaning"

    def __init__(self, **options: Any) -> None:
        self.options = section_from_dict(CleaningConfig, options, "PreliminaryCleaner")
        self._dirt = _dirt(self.options)

    def clean(self, text: str) -> str:
        """The cleaned text. Never raises; cleaning the result again changes nothing.

        One repair can call for another: HTML may hold escaped HTML, or mojibake. So all are repeated until nothing
        changes. That ends: taking the text of HTML uses up the tag it begins with, ftfy makes one character of
        several, references such as &lt; are longer than the ASCII they become, and the other steps, done once,
        leave nothing to do.
        """
        while (cleaned := self._clean_once(text)) != text:
            text = cleaned
        return text

    def _clean_once(self, text: str) -> str:
        options = self.options
        text = without_surrogates(text)
        if options.html != "keep" and is_html(text):
            text = html_to_text(text, options.html == "main_content")
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
        for row in rows:
            before, texts[row] = texts[row], self.clean(texts[row])
            if not texts[row]:
                drops.append(Drop(row, "empty", {"characters": len(before)}))
        return outcome(self.name, with_texts(batch, texts) if rows else batch, drops)

    def _may_change(self, column: pa.Array, texts: list[str]) -> BoolArray:
        """Texts that `clean` may change; it leaves all others as they are."""
        found = pc.match_substring_regex(column, self._dirt).to_numpy(zero_copy_only=False)
        form = self.options.unicode_form
        denormal = [not text.isascii() and not unicodedata.is_normalized(form, text) for text in texts]
        return found | np.array(denormal, np.bool_)


def _dirt(options: CleaningConfig) -> str:
    """An expression, for Arrow, that finds something in every text that `clean` changes, Unicode form aside."""
    marked = [*REPLACED, *JOINERS, *TAGS] + [*BIDI_CONTROLS] * options.remove_bidi_controls
    signs = [
        "^$",
        "[" + "".join(f"\\x{{{ord(char):x}}}" for char in marked) + "]",
        r"^\n|[ \t]\n|[ \t\n]$",
        rf"\n{{{options.max_blank_lines + 2}}}",
    ]
    if options.html != "keep":
        signs.append(r"^[ \t\n]*<")
    if options.repair_mojibake:
        signs.append(SUSPECT)
    return "|".join(signs)
