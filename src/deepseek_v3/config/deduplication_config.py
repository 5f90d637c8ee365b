"""Options of the deduplication stages: equal documents, repeated paragraphs or lines, near duplicates."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from deepseek_v3.config.base import Fraction, Integer, NonNegativeInt, PositiveInt, Real, RenamedFrom, StageConfig

# Minimum probability that two documents whose similarity equals the threshold become a candidate pair.
_MIN_CANDIDATE_PROBABILITY = 0.94


class ExactDeduplicationConfig(StageConfig):
    """Exact deduplication: each `unit` of text is kept once in the corpus; letter case and white space are ignored.

    Paragraphs and lines with fewer than `min_characters` code points, white space not counted, are always kept:
    list marks, headings and code may repeat. CCNet (Wenzek et al. 2020) removes repeated paragraphs.
    """

    unit: Literal["document", "paragraph", "line"] = "document"
    min_characters: NonNegativeInt = 40


class DeduplicationConfig(StageConfig):
    """Near duplicates by MinHash (Broder 1997) and locality-sensitive hashing (Leskovec et al., MMDS, §3.4).

    Two documents are duplicates if the Jaccard similarity of their sets of `ngram` consecutive words is at least
    `threshold`. A signature has `num_perm` values, cut into `bands` bands of num_perm // bands values; documents
    that agree in a band become a candidate pair. `bands: null` takes the longest bands that still find a pair at
    the threshold with a probability of 0.94: 16 bands of 8 for 128 values and a threshold of 0.8. `seed` draws the
    permutations.

    Duplicate pairs connect documents into clusters. The first document of a cluster is kept; another one is dropped
    if its similarity to the kept document is at least `cluster_threshold` (null: the threshold, 0.8). With 0,
    every other document is dropped, even one that only a chain of pairs connects to the kept document.

    `accelerator: auto` uses Numba if it is installed; all accelerators give bit-identical results.

    Sources of the defaults: shingles of 5 words as in Lee et al. 2022 (arXiv:2107.06499) and FineWeb, the threshold
    of Lee et al. (appendix A) and SlimPajama (Soboleva et al. 2023), the number of values of datasketch's MinHash.
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
        """Minimum Jaccard similarity of a dropped document to the document that is kept in its place."""
        return self.threshold if self.cluster_threshold is None else self.cluster_threshold

    def banding(self) -> tuple[int, int]:
        """The number of bands, and the number of signature values (rows) in each."""
        if self.bands is not None:
            return self.bands, self.num_perm // self.bands
        for rows in range(self.num_perm, 1, -1):
            bands = self.num_perm // rows
            if candidate_probability(self.threshold, bands, rows) >= _MIN_CANDIDATE_PROBABILITY:
                return bands, rows
        return self.num_perm, 1

    @model_validator(mode="after")
    def _finds_pairs(self) -> DeduplicationConfig:
        if self.bands is not None and self.bands > self.num_perm:
            raise ValueError(f"bands = {self.bands}: expected at most num_perm = {self.num_perm}")
        found = candidate_probability(self.threshold, *self.banding())
        if self.bands is None and found < _MIN_CANDIDATE_PROBABILITY:
            raise ValueError(
                f"num_perm = {self.num_perm} values find only {found:.0%} of the pairs at threshold = "
                f"{self.threshold}; raise num_perm or the threshold, or set bands"
            )
        return self


def candidate_probability(similarity: float, bands: int, rows: int) -> float:
    """Probability that two documents of this Jaccard similarity agree in at least one band (MMDS, §3.4.2)."""
    return 1 - (1 - similarity**rows) ** bands
