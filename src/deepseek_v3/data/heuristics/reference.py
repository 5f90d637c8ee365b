"""The definition of every heuristic rule, for one document at a time.

`HeuristicFilter` computes the same values for whole batches, and is tested against this module.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

from deepseek_v3.config.filter_config import HeuristicsConfig
from deepseek_v3.data.heuristics.rules import (
    BULLETS,
    CITATION,
    CURLY_BRACKET,
    ELLIPSES,
    FINAL_MARK,
    INNER_SENTENCE,
    JAVASCRIPT,
    LIST_MARK,
    LOREM_IPSUM,
    POLICIES,
    SMALL_START,
    BrokenRule,
)
from deepseek_v3.data.heuristics.stop_words import most_stop_words, stop_words_of_other_scripts
from deepseek_v3.data.heuristics.text_table import MAX_WRAP, MIN_WRAP
from deepseek_v3.data.heuristics.words import has_letter, is_punctuation, is_symbol, split_chunk
from deepseek_v3.data.scripts import SENTENCE_ENDS, UNSPACED_CLASS


def apply_rules(text: str, options: HeuristicsConfig) -> tuple[list[BrokenRule], str]:
    """Returns the rules that a document breaks, in the order in which they apply, and the text that C4 leaves."""
    broken: list[BrokenRule] = []
    if "gopher_repetition" in options.rules:
        broken += gopher_repetition(text, options)
    if "gopher_quality" in options.rules:
        broken += gopher_quality(text, options)
    groups = unwrapped_lines(text, options.join_wrapped_lines)
    newlines = text.count("\n")
    if "c4" in options.rules:
        found, left = c4(text, options)
        broken += found
        if found:
            return broken, text
        text = rebuilt(text, [line for group in left for line in group])
        kept = ([line for line in group if line is not None] for group in left)
        groups = [group for group in kept if group]
        newlines = max(sum(map(len, groups)) - 1, 0)
    if "fineweb" in options.rules:
        broken += fineweb(groups, newlines, options)
    return broken, text


def unwrapped_lines(text: str, join: bool = True) -> list[list[str]]:
    """Returns the unwrapped lines: the lines of a wrapped paragraph as one list, every other line by itself.

    A block without blank lines is as wide as its longest line. A line continues the line before it if that fills at
    least half of a width of `MIN_WRAP` to `MAX_WRAP` characters, and if its first word would not have fit there, or
    is in lower case.
    """
    groups: list[list[str]] = []
    for block in _blocks(text):
        width = max(map(len, block))
        groups.append(block[:1])
        for before, line in pairwise(block):
            if join and MIN_WRAP <= width <= MAX_WRAP and _continues(before, line.strip(), width):
                groups[-1].append(line)
            else:
                groups.append([line])
    return groups


def _continues(before: str, line: str, width: int) -> bool:
    if 2 * len(before) < width or re.search(LIST_MARK, line):
        return False
    return len(before) + 1 + len(line.split()[0]) > width or bool(re.search(SMALL_START, line))


def _blocks(text: str) -> list[list[str]]:
    """Returns the lines between blank ones, block by block."""
    blocks: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip():
            blocks[-1].append(line)
        else:
            blocks.append([])
    return [block for block in blocks if block]


def _spaced_length(chunk: str) -> int:
    """Returns the number of characters of a chunk that are of scripts with spaces between words."""
    return len(chunk) - len(re.findall(f"[{UNSPACED_CLASS}]", chunk))


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
        (
            "lines",
            [line for line in filled_lines(text) if not is_symbol(line)],
            options.max_duplicate_lines,
            options.max_duplicate_line_characters,
        ),
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


def ngrams_of(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Returns all n-grams, in order."""
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def top_ngram(words: Sequence[str], n: int) -> tuple[str, int]:
    """Returns the most frequent n-gram (the first of several), joined by spaces, and its number of occurrences.

    Returns ("", 0) if none repeats. N-grams of symbols alone, such as a line of dashes, do not count.
    """
    counts = Counter(ngram for ngram in ngrams_of(words, n) if not all(map(is_symbol, ngram)))
    ngram, count = max(counts.items(), key=lambda item: item[1], default=((), 0))
    return (" ".join(ngram), count) if count > 1 else ("", 0)


def duplicate_ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Returns the n-grams that also start at an earlier word, taken from left to right without overlap.

    N-grams of symbols alone do not count.
    """
    found: list[tuple[str, ...]] = []
    seen: set[tuple[str, ...]] = set()
    free = 0
    for i, ngram in enumerate(ngrams_of(words, n)):
        if ngram in seen and i >= free and not all(map(is_symbol, ngram)):
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
    if options.stop_words:
        stop_words = len({*words} & {*options.stop_words})
    else:
        stop_words = most_stop_words({*words})
        if stop_words < (options.min_stop_words or 0):
            stop_words = max(stop_words, stop_words_of_other_scripts(text))
    yield from at_least("gopher_few_stop_words", stop_words, options.min_stop_words)


def c4(text: str, options: HeuristicsConfig) -> tuple[list[BrokenRule], list[list[str | None]]]:
    """Clean lines (Raffel et al. 2020, §2.2).

    Returns the rules that a document breaks, and its unwrapped lines without white space around and citations; None
    in place of each line that is removed.
    """
    lorem: list[str] = []
    curly: list[str] = []
    groups: list[list[str | None]] = []
    for group in unwrapped_lines(text, options.join_wrapped_lines):
        shown = [re.sub(CITATION, "", line.strip()) if options.remove_citations else line.strip() for line in group]
        groups.append([*shown] if _is_kept(group, shown, options, lorem, curly) else [None] * len(group))
    broken = [
        BrokenRule(code, len(lines), 0, lines[0])
        for code, lines in (("c4_lorem_ipsum", lorem), ("c4_curly_bracket", curly))
        if lines
    ]
    total = sum(sentences(line) for group in groups for line in group if line is not None)
    broken += at_least("c4_too_few_sentences", total, options.min_sentences)
    return broken, groups


def _is_kept(
    group: Sequence[str], shown: Sequence[str], options: HeuristicsConfig, lorem: list[str], curly: list[str]
) -> bool:
    """Whether an unwrapped line is kept; adds its lines that break rules on documents to `lorem` and `curly`."""
    if not _well_formed([chunk for line in group for chunk in line.split()], shown[-1], options):
        return False
    lorem += [line for line in shown if options.drop_lorem_ipsum and _contains(line, LOREM_IPSUM)]
    if options.remove_javascript_lines and any(_contains(line, JAVASCRIPT) for line in shown):
        return False
    curly += [line for line in shown if options.drop_curly_brackets and _contains(line, CURLY_BRACKET)]
    return not (options.remove_policy_lines and any(_contains(line, POLICIES) for line in shown))


def rebuilt(text: str, shown: Sequence[str | None]) -> str:
    """Returns the text with its filled lines as `shown`, but indented, and without those shown as None.

    Blank lines around removed ones become one; a text without change stays as it is.
    """
    if [*shown] == [line.strip() for line in filled_lines(text)]:
        return text
    lines: list[str] = []
    left = iter(shown)
    is_gap = True
    for line in text.split("\n"):
        if not line.strip():
            lines += [] if is_gap else [""]
        elif (kept := next(left)) is not None:
            lines.append(line[: len(line) - len(line.lstrip())] + kept)
            is_gap = False
        else:
            is_gap = is_gap or lines[-1] == ""
    return "\n".join(lines).rstrip("\n")


def _well_formed(chunks: Sequence[str], last: str, options: HeuristicsConfig) -> bool:
    """Whether an unwrapped line ends like a sentence and, citations included, has enough words and no overlong one.

    A character of a script without spaces is a word by itself.
    """
    if (
        options.max_word_length is not None
        and max(map(_spaced_length, chunks), default=0) > options.max_word_length
    ):
        return False
    if options.require_final_punctuation and (not re.search(FINAL_MARK, last) or last.endswith("...")):
        return False
    words = sum(max(len(chunk) - _spaced_length(chunk), 1) for chunk in chunks)
    return options.min_words_per_line is None or words >= options.min_words_per_line


def _contains(line: str, phrases: Sequence[str]) -> bool:
    return any(re.search(re.escape(phrase), line, re.IGNORECASE | re.ASCII) for phrase in phrases)


def sentences(line: str) -> int:
    """Counts the sentences of a line; a new one starts at the first word after an end mark, punctuation aside.

    In scripts without spaces, where end marks stand within words, it starts right after the mark.
    """
    count, ended = 1, False
    for word in split_words(line):
        if word in SENTENCE_ENDS:
            ended = True
        elif ended and not is_punctuation(word):
            count, ended = count + 1, False
    return max(count, 1 + len(re.findall(INNER_SENTENCE, line)))


def fineweb(groups: Sequence[Sequence[str]], num_newlines: int, options: HeuristicsConfig) -> Iterator[BrokenRule]:
    """Lines that do not look like prose (Penedo et al. 2024, §3.6), of a text given as its unwrapped lines."""
    filled = [line for group in groups for line in group]
    count = max(len(groups), 1)
    found = seen_before(filled)
    punctuated = sum(group[-1].rstrip()[-1:] in SENTENCE_ENDS for group in groups) / count
    short = sum(sum(map(len, group)) <= options.short_line_length for group in groups) / count
    repeated = sum(map(len, found)) / max(sum(map(len, filled)), 1)
    newlines = num_newlines / max(len(split_words("\n".join(filled))), 1)
    yield from at_least("fineweb_unpunctuated_lines", punctuated, options.min_punctuated_lines)
    yield from at_most("fineweb_short_lines", short, options.max_short_lines)
    yield from at_most(
        "fineweb_repeated_lines", repeated, options.max_repeated_line_characters, found[0] if found else None
    )
    yield from at_most("fineweb_newlines", newlines, options.max_newlines_per_word)
