"""Words, sentence ends and symbols, as the heuristic filters count them.

A text is split at white space into chunks. A chunk of letters is one word, or two if it is a contraction written
without an apostrophe. Any other chunk is split as follows:

1. Each mark at either end is a separate word. So is a run of two or more dots, a final 's, a unit after a digit
   (10km, 50%, 2GB), and a final full stop that does not belong to an abbreviation or an initial.
2. The rest is one word if it is an address (example.org/a-b) or an abbreviation (e.g.), and two words if it is a
   contraction (do|n't, we|'ll, can|not).
3. Any other rest is split at hyphens, slashes, colons and similar marks between letters, at a full stop between a
   small and a capital letter, and at signs between numbers.

The published filters are commonly run with spaCy's tokenizer. These rules agree with its English rules except for
about one chunk in a thousand; smileys, for example, are not words here. Chunks longer than `MAX_CHUNK_CHARACTERS`
are not split.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from deepseek_v3.data.scripts import SENTENCE_ENDS

MAX_CHUNK_CHARACTERS = 1000


def _of_category(*categories: str) -> str:
    """Returns the characters beyond ASCII of these categories; only those below U+20000 have one used here."""
    beyond_ascii = map(chr, range(0x80, 0x20000))
    return "".join(char for char in beyond_ascii if unicodedata.category(char) in categories)


_CURRENCY = "$" + _of_category("Sc")
# Marks of every script, without the ASCII marks that are common in names and numbers: - . / \ @ % ^ | ~ = + $
_MARKS = ",:;!?()[]{}<>_#*&'\"`—–…¿¡·،؛؟٪۔।、。！，．：；？～" + _of_category("Ps", "Pe", "Pi", "Pf", "So")
_CLOSING = frozenset(_MARKS)
_OPENING = frozenset(_MARKS + _CURRENCY + "%=§")

_LETTER = r"[^\W\d_]"
_SMALL, _CAPITAL = "a-zß-öø-ÿ", "A-ZÀ-ÖØ-Þ"
_QUOTES = "'\"`´‘’‚“”„«»"
_UNIT = re.compile(rf"(?<=[0-9])(?:\+|%|[{re.escape(_CURRENCY)}]|[kcmµn]?m|[kmµ]?g|[kKMGT][bB]|[KMGTt]|in|ft)\Z")
_UNUSUAL_ENDS = frozenset(".sS+%mgbBKMGTnt" + _CURRENCY)
_INITIAL = re.compile(rf"(?:\A[{_SMALL}]|(?:\A|[^{_CAPITAL}])[{_CAPITAL}])\.\Z")
_INFIX = re.compile(
    r"(\.\.+|…"
    r"|(?<=[0-9])[+\-*^](?=[0-9-])"
    rf"|(?<=[{_SMALL}{_QUOTES}])\.(?=[{_CAPITAL}{_QUOTES}])"
    rf"|(?<={_LETTER}),(?={_LETTER})"
    rf"|(?<=[^\W_])(?:-{{1,3}}|–|—|~|[:<>=/])(?={_LETTER}))"
)
_ADDRESS = re.compile(
    r"(?:[\w+.-]+://)?(?:[^\s@]+@)?"
    rf"(?:(?:[^\W_][\w-]*\.)+[{_SMALL}]{{2,}}|[0-9]+(?:\.[0-9]+){{3}})"
    r"(?::[0-9]{2,5})?(?:[/?#]\S*)?\Z"
)

_ABBREVIATIONS = frozenset(
    "a.m. p.m. e.g. E.g. E.G. i.e. I.e. I.E. vs. v.s. co. Co. Corp. Inc. Ltd. Bros. Dr. Mr. Mrs. Ms. Messrs. Prof. "
    "Ph.D. Jr. St. Mt. Adm. Gen. Gov. Rep. Rev. Sen. D.C. N.Y. S.C. Jan. Feb. Mar. Apr. Jun. Jul. Aug. Sep. Sept. "
    "Oct. Nov. Dec. Ala. Ariz. Ark. Calif. Colo. Conn. Del. Fla. Ga. Ia. Id. Ill. Ind. Kan. Ky. La. Md. Mo. Mont. "
    "Mass. Mich. Minn. Miss. Neb. Nev. Okla. Ore. Pa. Tenn. Va. Wash. Wis.".split()
)
_WHOLE = _ABBREVIATIONS | {"and/or", "w/o"}


def _contractions() -> dict[str, tuple[str, str]]:
    """Maps two words written as one to the two, with or without an apostrophe: do|n't, do|nt, they|re, can|not."""
    endings = {
        "i": "'m 'll 'd 've",
        "you we they": "'ll 'd 've 're",
        "he she it": "'ll 'd 's",
        "that this": "'ll 'd 's",
        "who what when where why how there": "'ll 'd 's 've 're",
        "these those": "'ll 'd 've 're",
        "could might must should would": "n't 've",
        "ca do does did had may need ought sha wo ai are is was were have has dare": "n't",
        "can": "not",
        "gon": "na",
        "got": "ta",
    }
    pairs = [
        (start, ending)
        for starts, all_endings in endings.items()
        for start in starts.split()
        for ending in all_endings.split()
    ]
    hours = [(str(hour), half) for hour in range(1, 13) for half in ("am", "pm")]
    contractions = [
        (start, marked)
        for small, ending in pairs
        for start in (small, small.title())
        for marked in (ending, ending.replace("'", "’"), ending.replace("'", ""))
    ]
    as_one = {"".join(pair): pair for pair in contractions + hours}
    for other in ("ill", "its", "hell", "shell", "shed", "were", "well"):  # these are words themselves
        as_one.pop(other, None)
        as_one.pop(other.title(), None)
    return as_one


_CONTRACTIONS = _contractions()


def split_chunk(chunk: str) -> tuple[str, ...]:
    """Splits a chunk, a text without white space, into words. Joined, they give the chunk again."""
    if chunk.isalpha():
        return _CONTRACTIONS.get(chunk) or (chunk,)
    if len(chunk) > MAX_CHUNK_CHARACTERS:
        return (chunk,)
    before, core = _without_opening(chunk)
    core, after = _without_closing(core)
    return (*before, *_split_core(core), *after)


def _without_opening(text: str) -> tuple[list[str], str]:
    marks = []
    while length := 1 if text[:1] in _OPENING else _unusual_opening(text):
        marks.append(text[:length])
        text = text[length:]
    return marks, text


def _unusual_opening(text: str) -> int:
    """Returns the length of a separate word at the start of `text`: a plus before no digit, or dots; else 0."""
    if text[:1] not in ("+", "."):
        return 0
    if text[0] == "+":
        return int(not text[1:2].isdigit())
    return _run_of_dots(len(text) - len(text.lstrip(".")))


def _without_closing(text: str) -> tuple[str, list[str]]:
    marks = []
    while length := 1 if text[-1:] in _CLOSING else _unusual_closing(text):
        marks.append(text[-length:])
        text = text[:-length]
    return text, marks[::-1]


def _unusual_closing(text: str) -> int:
    """Returns the length of a separate word at the end of `text`: a full stop, dots, 's, or a unit; else 0."""
    last = text[-1:]
    if last not in _UNUSUAL_ENDS:
        return 0
    if last == ".":
        belongs = text in _ABBREVIATIONS or _INITIAL.search(text)
        return _run_of_dots(len(text) - len(text.rstrip("."))) or int(not belongs)
    if last in ("s", "S"):
        return 2 if text[-2:-1] in ("'", "’") else 0
    unit = _UNIT.search(text)
    return len(unit.group()) if unit else 0


def _run_of_dots(length: int) -> int:
    return length if length > 1 else 0


def _split_core(core: str) -> Sequence[str]:
    if core in _CONTRACTIONS:
        return _CONTRACTIONS[core]
    if core.isalnum() or core in _WHOLE or ("." in core and _ADDRESS.match(core)):
        return (core,)
    return [part for part in _INFIX.split(core) if part]


def is_symbol(word: str) -> bool:
    """Whether a word has neither letter nor digit."""
    return not any(map(str.isalnum, word))


def has_letter(word: str) -> bool:
    """Whether a word has a letter of any script."""
    return any(map(str.isalpha, word))


def is_punctuation(word: str) -> bool:
    """Whether every character of a word is punctuation (a Unicode category P)."""
    return all(unicodedata.category(char)[0] == "P" for char in word)


SYMBOL, LETTER, PUNCTUATION, SENTENCE_END = 1, 2, 4, 8


def word_traits(word: str) -> int:
    """Returns the sum of those of SYMBOL, LETTER, PUNCTUATION and SENTENCE_END that apply to a word."""
    if word.isalpha():
        return LETTER
    if not is_symbol(word):
        return LETTER * has_letter(word)
    return SYMBOL + PUNCTUATION * is_punctuation(word) + SENTENCE_END * (word in SENTENCE_ENDS)
