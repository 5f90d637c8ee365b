"""The options of the stages that remove copies: equal documents, repeated paragraphs or lines, near duplicates."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from deepseek_v3.config.base import Fraction, Integer, NonNegativeInt, PositiveInt, Real, RenamedFrom, StageConfig

# The least probability with which two documents exactly as similar as the threshold become candidates.
_LEAST_CANDIDATE_PROBABILITY = 0.94
_CHAIN = 0.1


class ExactDeduplicationConfig(StageConfig):
    """Which `unit` of text stands only once in the corpus; letter case and white space do not count.

    Paragraphs and lines of fewer than `min_characters` code points, white space left out, stay where they are: list
    marks, headings and code have a right to repeat. CCNet (Wenzek et al. 2020) removes repeated paragraphs.
    """

    unit: Literal["document", "paragraph", "line"] = "document"
    min_characters: NonNegativeInt = 40


class DeduplicationConfig(StageConfig):
    """Near duplicates by MinHash (Broder 1997) and locality-sensitive hashing (Leskovec et al., MMDS, §3.4).

    Two documents are alike from a Jaccard similarity of `threshold` on between their sets of `ngram` consecutive
    words. Signatures have `num_perm` values; `bands` of them, of num_perm // bands values each, propose pairs. With
    `bands: null` a band has as many values as still propose a pair at the threshold with a probability of 0.94 or
    more: for 128 values and 0.8 there are 16 bands of 8. `seed` draws the permutations.

    A chain of alike documents is one cluster, of which the earliest is kept, as far as its members are
    `cluster_threshold` alike to that one; null is the threshold less 0.1. With the threshold itself a document is
    dropped only if it is alike to the one that is kept; 0 follows every chain to its end.

    `accelerator: auto` takes Numba where it is installed; results are the same bit for bit.

    Sources of the defaults: shingles of 5 words as in Lee et al. 2022 (arXiv:2107.06499) and FineWeb, the threshold
    of Lee et al. (appendix A) and SlimPajama (Soboleva et al. 2023), as many values as datasketch's MinHash has.
    """

    num_perm: Annotated[Integer, Field(ge=16, le=2048)] = 128
    threshold: Annotated[Real, Field(gt=0, le=1)] = 0.8
    cluster_threshold: Annotated[Fraction | None, RenamedFrom("kept_threshold")] = None
    ngram: Annotated[Integer, Field(ge=1, le=64)] = 5
    bands: PositiveInt | None = None
    seed: NonNegativeInt = 0
    accelerator: Literal["auto", "numpy", "numba"] = "auto"

    @property
    def min_similarity_to_kept(self) -> float:
        """How alike a document must be to the one that is kept in its place."""
        return max(self.threshold - _CHAIN, 0.0) if self.cluster_threshold is None else self.cluster_threshold

    def banding(self) -> tuple[int, int]:
        """Bands, and signature values (rows) in each."""
        if self.bands is not None:
            return self.bands, self.num_perm // self.bands
        for rows in range(self.num_perm, 1, -1):
            bands = self.num_perm // rows
            if candidate_probability(self.threshold, bands, rows) >= _LEAST_CANDIDATE_PROBABILITY:
                return bands, rows
        return self.num_perm, 1

    @model_validator(mode="after")
    def _finds_pairs(self) -> DeduplicationConfig:
        if self.bands is not None and self.bands > self.num_perm:
            raise ValueError(f"bands = {self.bands}: expected at most num_perm = {self.num_perm}")
        found = candidate_probability(self.threshold, *self.banding())
        if self.bands is None and found < _LEAST_CANDIDATE_PROBABILITY:
            raise ValueError(
                f"num_perm = {self.num_perm} values find only {found:.0%} of the pairs at threshold = "
                f"{self.threshold}; raise num_perm or the threshold, or set bands"
            )
        return self


def candidate_probability(similarity: float, bands: int, rows: int) -> float:
    """How likely two documents of this Jaccard similarity agree in a whole band (MMDS, §3.4.2)."""
    return 1 - (1 - similarity**rows) ** bands
