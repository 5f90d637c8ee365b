"""Fill-in-the-middle (FIM): some documents are reordered, so that a model learns to fill a gap.

As in the DeepSeek-V3 technical report, §4.1: whole documents, before packing, at a rate of 0.1, in the order
`begin prefix hole suffix end middle`. The two cuts are uniform over characters (Bavarian et al. 2022, §3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from deepseek_v3.data.tokens.tokenizer import FimMarkers
from deepseek_v3.utils.errors import DataError


@dataclass(frozen=True)
class FillInMiddle:
    """Reorders the share `rate` of the documents; the choice and the cuts depend only on the text and `seed`.

    Raises DataError if `rate` is above 0 and the tokenizer has no FIM markers.
    """

    rate: float
    seed: int
    markers: FimMarkers | None

    def __post_init__(self) -> None:
        if self.rate > 0 and self.markers is None:
            raise DataError(
                f"fim_rate = {self.rate} needs a tokenizer with markers for fill-in-the-middle, and this one has "
                "none known here; set fim_rate to 0 or use another tokenizer"
            )

    def split(self, text: str) -> list[str]:
        """`[prefix, middle, suffix]`, each possibly empty, or `[text]` for a document that stays in order."""
        digest = blake2b(text.encode("utf-8"), digest_size=24, key=f"fim {self.seed}".encode()).digest()
        chance, *cuts = (int.from_bytes(digest[i : i + 8], "little") for i in (0, 8, 16))
        if chance >= self.rate * 2**64:
            return [text]
        start, stop = sorted(cut * (len(text) + 1) >> 64 for cut in cuts)
        return [text[:start], text[start:stop], text[stop:]]

    def join(self, parts: Sequence[list[int]]) -> list[int]:
        """The ids of a document from the ids of the parts that `split` returned."""
        if len(parts) == 1:
            return parts[0]
        assert self.markers is not None
        prefix, middle, suffix = parts
        return [self.markers.begin, *prefix, self.markers.hole, *suffix, self.markers.end, *middle]
