"""The options of the preliminary cleaning: encoding, HTML, characters, white space."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from deepseek_v3.config.base import Integer
from deepseek_v3.config.preprocessing.stage import StageConfig


class CleaningConfig(StageConfig):
    """What is repaired besides line endings, control characters and white space, which always are.

    `html`: what becomes of a text that is HTML: it is kept, its visible text is taken, or only the main content,
    without navigation and the like. `repair_mojibake`: text decoded with the wrong encoding (ftfy). `unicode_form`:
    NFC keeps what is written, NFKC also folds ligatures, full-width and superscript characters (Unicode Standard
    Annex 15). `remove_bidi_controls`: marks, embeddings, overrides and isolates of right-to-left scripts.
    `max_blank_lines`: blank lines in a row that stay.
    """

    html: Literal["keep", "text", "main_content"] = "text"
    repair_mojibake: bool = True
    unicode_form: Literal["NFC", "NFKC"] = "NFC"
    remove_bidi_controls: bool = False
    max_blank_lines: Annotated[Integer, Field(ge=0, le=100)] = 1
