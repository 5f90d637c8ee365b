"""The options of the heuristic filters: published rules on length, repetition, symbols, stop words and lines."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from deepseek_v3.config.base import Fraction, Integer, PositiveInt, Real
from deepseek_v3.config.preprocessing.stage import StageConfig
from deepseek_v3.utils.printing import value_text

RuleGroup = Literal["gopher_repetition", "gopher_quality", "c4", "fineweb"]
RULE_GROUPS: tuple[RuleGroup, ...] = ("gopher_repetition", "gopher_quality", "c4", "fineweb")

Share: TypeAlias = Fraction | None
Ratio: TypeAlias = Annotated[Real, Field(ge=0)] | None
Count: TypeAlias = Annotated[Integer, Field(ge=0)] | None
NgramLength = Annotated[Integer, Field(ge=1, le=100)]
NgramLimits: TypeAlias = dict[NgramLength, Share]
_TOP_NGRAMS: NgramLimits = {2: 0.20, 3: 0.18, 4: 0.16}
_DUPLICATE_NGRAMS: NgramLimits = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


class HeuristicsConfig(StageConfig):
    """Thresholds of each rule; null switches a rule off. A value equal to its threshold passes.

    Sources: Gopher is Rae et al. 2021 (arXiv:2112.11446), appendix A.1; C4 is Raffel et al. 2020 (JMLR 21), §2.2,
    with the phrases of the code that made C4 and the numbers of datatrove, which made FineWeb; FineWeb is Penedo et
    al. 2024 (arXiv:2406.17557), §3.6.
    "Share" is a fraction of a whole between 0 and 1; lengths are characters (Unicode code points).
    """

    rules: Annotated[tuple[RuleGroup, ...], Field(min_length=1)] = RULE_GROUPS  # asked in the order of RULE_GROUPS

    # Gopher, repetition (table A1). Shares of lines or paragraphs that stood before, or of the text's characters.
    max_duplicate_paragraphs: Share = 0.30
    max_duplicate_paragraph_characters: Share = 0.20
    max_duplicate_lines: Share = 0.30
    max_duplicate_line_characters: Share = 0.20
    # By words n of an n-gram, the share of the text's characters that are in the most frequent n-gram, and in
    # n-grams that stood before.
    max_top_ngram_characters: NgramLimits | None = _TOP_NGRAMS
    max_duplicate_ngram_characters: NgramLimits | None = _DUPLICATE_NGRAMS

    # Gopher, quality.
    min_words: Count = 50  # words that are not mere symbols
    max_words: Count = 100_000
    min_mean_word_length: Ratio = 3.0  # characters
    max_mean_word_length: Ratio = 10.0
    max_symbols_per_word: Ratio = 0.1  # of "#", and of ellipses
    max_bullet_lines: Share = 0.9
    max_ellipsis_lines: Share = 0.3
    min_alphabetic_words: Share = 0.8  # share of words with a letter
    min_stop_words: Count = 2  # how many different ones
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")

    # C4. Lines go that lack final punctuation, have too few words or too long ones, or name JavaScript or a policy.
    require_final_punctuation: bool = True
    min_words_per_line: Count = 3  # 5 in C4's code and published paper
    max_word_length: PositiveInt | None = 1000  # characters
    remove_citations: bool = True  # such as [1] and [citation needed]
    remove_javascript_lines: bool = True
    remove_policy_lines: bool = True
    drop_lorem_ipsum: bool = True
    drop_curly_brackets: bool = True
    min_sentences: Count = 5  # in the lines that are left; 3 in C4's code and published paper

    # FineWeb.
    min_punctuated_lines: Share = 0.12
    max_short_lines: Share = 0.67
    short_line_length: PositiveInt = 30  # characters
    max_repeated_line_characters: Share = 0.01  # as in its code and appendix E.4; §3.6 prints 0.1
    max_newlines_per_word: Ratio = 0.3

    @model_validator(mode="after")
    def _each_group_once(self) -> HeuristicsConfig:
        if len(set(self.rules)) < len(self.rules):
            raise ValueError(f"rules = {value_text(self.rules)}: names a group twice; expected each at most once")
        return self
