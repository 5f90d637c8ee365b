"""The cut of long pre-tokens, which keeps the training of BPE linear, and a cheap test for texts that have any.

Merging a pre-token of n characters takes time that grows with n squared, in training and, in some programs, in
encoding. So tokenizers that are trained here cut every pre-token after each 256 of its characters. The cut is a
step of the `tokenizer.json`: whatever reads that file encodes alike. Words are shorter, so only other text is
affected: runs of one letter, of blanks or of dashes, and sequences without spaces, such as those of DNA.
"""

from __future__ import annotations

import re

LONGEST_PIECE = 256
# The pattern of the last `Split` step, which isolates its matches. Shorter pre-tokens are not searched at all.
CUT = rf"[\s\S]{{{LONGEST_PIECE}}}"

# A pre-token is a run of characters of one class, with one other character before it, or a run of signs with line
# breaks after it. So one of more than 256 characters has a run of at least 127 characters of one class, and that
# covers a whole block of 64.
_BLOCK = 64
# A digit, or a letter before a punctuation mark: pre-tokens end there.
_BORDER = re.compile(r"[0-9]|[^\W\d_][!-/:-@\[-`{-~、。，；：？！]")


def may_have_long_pieces(text: str) -> bool:
    """Whether a text may have a pre-token of more than 256 characters, by the splits of DeepSeek-V3.

    True for all texts that have one, and for few others. Takes about 2 ns per character.
    """
    stop = len(text) - _BLOCK + 1
    return any(_may_be_in_one_piece(text[start : start + _BLOCK]) for start in range(0, stop, _BLOCK))


def _may_be_in_one_piece(block: str) -> bool:
    if " " in block or "\n" in block:
        return block.isspace()
    return not _BORDER.search(block)
