"""The stage that masks personal data and secrets in texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepseek_v3.config.filter_config import PII_KINDS, PiiConfig, PiiKind
from deepseek_v3.config.loading import section_from_dict
from deepseek_v3.data.arrays import BoolArray, Int64Array
from deepseek_v3.data.documents import with_texts
from deepseek_v3.data.pii.detectors import CARD, IP_ADDRESS, PHONE, Detector
from deepseek_v3.data.pii.emails import EMAIL
from deepseek_v3.data.pii.secrets import KEY
from deepseek_v3.data.stages import Outcome, Stage, outcome

_DETECTORS: dict[PiiKind, Detector] = {
    "key": KEY,
    "email": EMAIL,
    "card": CARD,
    "ip_address": IP_ADDRESS,
    "phone": PHONE,
}


class PiiMasker(Stage):
    """Replaces keys, e-mail addresses, payment cards, public IP addresses and telephone numbers by placeholders.

    Takes the options of `PiiConfig`. Drops nothing, and is idempotent. Observes, for each document, the number of
    replacements, as `pii`, and of each kind, such as `pii_email`.
    """

    name = "pii"

    def __init__(self, **options: Any) -> None:
        self.options = section_from_dict(PiiConfig, options, "PiiMasker")
        self._kinds = [kind for kind in PII_KINDS if kind in self.options.kinds]

    def apply(self, batch: pa.RecordBatch) -> Outcome:
        """Masks the texts of a batch."""
        texts = batch.column("text")
        suspects = {kind: _matches(texts, _DETECTORS[kind].pretest) for kind in self._kinds}
        rows = np.flatnonzero(np.any([*suspects.values()], axis=0))
        counts = {kind: np.zeros(batch.num_rows, np.int64) for kind in self._kinds}
        masked = []
        for row, text in zip(rows.tolist(), texts.take(pa.array(rows)).to_pylist(), strict=True):
            kinds = [kind for kind in self._kinds if suspects[kind][row]]
            masked.append(self._masked(text, kinds, counts, row))
        if masked:
            mask = np.zeros(batch.num_rows, np.bool_)
            mask[rows] = True
            batch = with_texts(batch, pc.replace_with_mask(texts, pa.array(mask), pa.array(masked, texts.type)))
        observed = {f"pii_{kind}": count.tolist() for kind, count in counts.items()}
        totals = np.sum([*counts.values()], axis=0).tolist()
        return outcome(self.name, batch, [], {"pii": totals, **observed})

    def _masked(self, text: str, kinds: list[PiiKind], counts: dict[PiiKind, Int64Array], row: int) -> str:
        """The text with everything masked; repeats the search, as a replacement can uncover another match."""
        found = True
        while found:
            found = False
            for kind in kinds:
                spans = [*_DETECTORS[kind].find(text)]
                if spans:
                    found = True
                    counts[kind][row] += len(spans)
                    text = _replaced(text, spans, self.options.replacement.format(kind=kind.upper()))
        return text


def _matches(texts: pa.Array, pattern: str) -> BoolArray:
    matches: BoolArray = pc.match_substring_regex(texts, pattern).to_numpy(zero_copy_only=False)
    return matches


def _replaced(text: str, spans: list[tuple[int, int]], replacement: str) -> str:
    ends = [0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), len(text)]
    return replacement.join(text[end:start] for end, start in zip(ends, starts, strict=True))
