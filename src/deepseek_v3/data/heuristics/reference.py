"""The definition of every heuristic rule, for one document at a time.

`HeuristicFilter` computes the same values for whole batches, and is tested against this module.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from deepseek_v3.config.filter_config import HeuristicsConfig
from deepseek_v3.data.heuristics.rules import (
    BULLETS,
    CITATION,
    CURLY_BRACKET,
    ELLIPSES,
    FINAL_MARKS,
    JAVASCRIPT,
    LOREM_IPSUM,
    POLICIES,
)
from deepseek_v3.data.heuristics.words import SENTENCE_ENDS, has_letter, is_punctuation, is_symbol, split_chunk


class BrokenRule(NamedTuple):
    """A rule that a document breaks: its code, the value found, the limit, and the text that decided."""

    code: str
    found: float
    limit: float
    trigger: str | None = None


def apply_rules(text: str, options: HeuristicsConfig) -> tuple[list[BrokenRule], str]:
    """Returns the rules that a document breaks, in the order in which they apply, and the text that C4 leaves."""
    broken: list[BrokenRule] = []
    if "gopher_repetition" in options.rules:
        broken += gopher_repetition(text, options)
    if "gopher_quality" in options.rules:
        broken += gopher_quality(text, options)
    lines = text.split("\n")
    if "c4" in options.rules:
        found, lines = c4(text, options)
        broken += found
        if found:
            return broken, text
        text = "\n".join(lines).strip()
    if "fineweb" in options.rules:
        broken += fineweb(lines, options)
    return broken, text


def split_words(text: str) -> list[str]:
    """Returns all words of a text, in order."""
    return [word for chunk in text.split() for word in split_chunk(chunk)]


def at_most(code: str, found: float, limit: float | None, trigger: str | None = None) -> Iterator[BrokenRule]:
    """Yields the rule `code` if its limit is set and the value found is above it."""
    if limit is not None and found > limit:
        yield BrokenRule(code, found, limit, trigger)


def at_least(code: str, found: float, limit: float | None) -> Iterator[BrokenRule]:
    """Yields the rule `code` if its limit is set and the value found is below it."""
    if limit is not None and found < limit:
        yield BrokenRule(code, found, limit)


def seen_before(items: Sequence[str]) -> list[str]:
    """Returns the items that also occur earlier, in order."""
    seen: set[str] = set()
    found = []
    for item in items:
        if item in seen:
            found.append(item)
        seen.add(item)
    return found


def gopher_repetition(text: str, options: HeuristicsConfig) -> Iterator[BrokenRule]:
    """Repetition (Rae et al. 2021, table A1). Characters are counted as shares of the whole text."""
    size = max(len(text), 1)
    for name, items, share, characters in (
        (
            "paragraphs",
            paragraphs(text),
            options.max_duplicate_paragraphs,
            options.max_duplicate_paragraph_characters,
        ),
        ("lines", filled_lines(text), options.max_duplicate_lines, options.max_duplicate_line_characters),
    ):
        found = seen_before(items)
        first = found[0] if found else None
        yield from at_most(f"gopher_duplicate_{name}", len(found) / max(len(items), 1), share, first)
        found_characters = sum(map(len, found)) / size
        yield from at_most(f"gopher_duplicate_{name[:-1]}_characters", found_characters, characters, first)
    words = split_words(text)
    for n, limit in sorted((options.max_top_ngram_characters or {}).items()):
        ngram, count = top_ngram(words, n)
        yield from at_most(f"gopher_top_{n}gram", len(ngram) * count / size, limit, ngram)
    for n, limit in sorted((options.max_duplicate_ngram_characters or {}).items()):
        duplicates = duplicate_ngrams(words, n)
        characters = sum(len(word) for ngram in duplicates for word in ngram)
        first = " ".join(duplicates[0]) if duplicates else None
        yield from at_most(f"gopher_duplicate_{n}grams", characters / size, limit, first)


def paragraphs(text: str) -> list[str]:
    """Returns the parts that blank lines separate, without surrounding white space."""
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def filled_lines(text: str) -> list[str]:
    """Returns the lines that are not blank."""
    return [line for line in text.split("\n") if line.strip()]


def top_ngram(words: Sequence[str], n: int) -> tuple[str, int]:
    """Returns the most frequent n-gram (the first of several), joined by spaces, and its number of occurrences."""
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    ngram, count = max(counts.items(), key=lambda item: item[1], default=((), 0))
    return " ".join(ngram), count


def duplicate_ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Returns the n-grams that also start at an earlier word, taken from left to right without overlap."""
    found: list[tuple[str, ...]] = []
    seen: set[tuple[str, ...]] = set()
    free = 0
    for i in range(len(words) - n + 1):
        ngram = tuple(words[i : i + n])
        if ngram in seen and i >= free:
            found.append(ngram)
            free = i + n
        seen.add(ngram)
    return found


def gopher_quality(text: str, options: HeuristicsConfig) -> Iterator[BrokenRule]:
    """Quality (Rae et al. 2021, A.1). Word counts and lengths exclude symbols; lines include blank ones."""
    words = split_words(text)
    total = max(len(words), 1)
    proper = [word for word in words if not is_symbol(word)]
    mean = sum(map(len, proper)) / max(len(proper), 1)
    lines = text.split("\n")
    bullets = sum(line.lstrip().startswith(BULLETS) for line in lines) / len(lines)
    ellipses = sum(line.rstrip().endswith(ELLIPSES) for line in lines) / len(lines)
    yield from at_least("gopher_too_few_words", len(proper), options.min_words)
    yield from at_most("gopher_too_many_words", len(proper), options.max_words)
    yield from at_least("gopher_short_words", mean, options.min_mean_word_length)
    yield from at_most("gopher_long_words", mean, options.max_mean_word_length)
    yield from at_most("gopher_hashes", text.count("#") / total, options.max_symbols_per_word)
    yield from at_most("gopher_ellipses", sum(map(text.count, ELLIPSES)) / total, options.max_symbols_per_word)
    yield from at_most("gopher_bullet_lines", bullets, options.max_bullet_lines)
    yield from at_most("gopher_ellipsis_lines", ellipses, options.max_ellipsis_lines)
    yield from at_least(
        "gopher_few_alphabetic_words", sum(map(has_letter, words)) / total, options.min_alphabetic_words
    )
    yield from at_least("gopher_few_stop_words", len({*words} & {*options.stop_words}), options.min_stop_words)


def c4(text: str, options: HeuristicsConfig) -> tuple[list[BrokenRule], list[str]]:
    """Clean lines (Raffel et al. 2020, §2.2). Returns the rules that a document breaks, and its remaining lines."""
    kept: list[str] = []
    lorem: list[str] = []
    curly: list[str] = []
    for line in filled_lines(text):
        shown = re.sub(CITATION, "", line.strip()) if options.remove_citations else line.strip()
        if not _well_formed(line.split(), shown, options):
            continue
        if options.drop_lorem_ipsum and _contains(shown, LOREM_IPSUM):
            lorem.append(shown)
        if options.remove_javascript_lines and _contains(shown, JAVASCRIPT):
            continue
        if options.drop_curly_brackets and _contains(shown, CURLY_BRACKET):
            curly.append(shown)
        if options.remove_policy_lines and _contains(shown, POLICIES):
            continue
        kept.append(shown)
    broken = [
        BrokenRule(code, len(lines), 0, lines[0])
        for code, lines in (("c4_lorem_ipsum", lorem), ("c4_curly_bracket", curly))
        if lines
    ]
    broken += at_least("c4_too_few_sentences", sum(map(sentences, kept)), options.min_sentences)
    return broken, kept


def _well_formed(chunks: Sequence[str], shown: str, options: HeuristicsConfig) -> bool:
    """Whether a line ends like a sentence and, citations included, has enough words and no overlong one."""
    if options.max_word_length is not None and max(map(len, chunks), default=0) > options.max_word_length:
        return False
    if options.require_final_punctuation and (not shown.endswith(FINAL_MARKS) or shown.endswith("...")):
        return False
    return options.min_words_per_line is None or len(chunks) >= options.min_words_per_line


def _contains(line: str, phrases: Sequence[str]) -> bool:
    return any(re.search(re.escape(phrase), line, re.IGNORECASE | re.ASCII) for phrase in phrases)


def sentences(line: str) -> int:
    """Counts the sentences of a line; a new one starts at the first word after an end mark, punctuation aside."""
    count, ended = 1, False
    for word in split_words(line):
        if word in SENTENCE_ENDS:
            ended = True
        elif ended and not is_punctuation(word):
            count, ended = count + 1, False
    return count


def fineweb(lines: Sequence[str], options: HeuristicsConfig) -> Iterator[BrokenRule]:
    """Lines that do not look like prose (Penedo et al. 2024, §3.6)."""
    filled = [line for line in lines if line.strip()]
    count = max(len(filled), 1)
    found = seen_before(filled)
    punctuated = sum(line.rstrip()[-1] in SENTENCE_ENDS for line in filled) / count
    short = sum(len(line) <= options.short_line_length for line in filled) / count
    repeated = sum(map(len, found)) / max(sum(map(len, lines)), 1)
    newlines = (len(lines) - 1) / max(len(split_words("\n".join(lines))), 1)
    yield from at_least("fineweb_unpunctuated_lines", punctuated, options.min_punctuated_lines)
    yield from at_most("fineweb_short_lines", short, options.max_short_lines)
    yield from at_most(
        "fineweb_repeated_lines", repeated, options.max_repeated_line_characters, found[0] if found else None
    )
    yield from at_most("fineweb_newlines", newlines, options.max_newlines_per_word)
