"""Chooses the text to hold out: whole documents by the hash of their text, or the end of one if there are few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

from deepseek_v3.data.tokens.index import Split
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.text import pluralize

DEFAULT_SHARE = 0.02

# With at least this many documents, the share whose hash is below a threshold is close to the given share.
_MANY_DOCUMENTS = 200
# Ordinary text has fewer characters per token, so the tokens of much longer texts need not be counted.
_MAX_CHARACTERS_PER_TOKEN = 16

Texts = Callable[[], Iterable[str]]
Count = Callable[[str], int]

_log = get_logger("Tokens")


def text_hash(text: str) -> int:
    """64 bits of BLAKE2b of the UTF-8 text, as a number."""
    return int.from_bytes(blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def is_held_out(text: str, holdout: float) -> bool:
    """Whether a text belongs to the share `holdout`, which is never trained on: a pure function of the text."""
    return text_hash(text) < holdout * 2**64


@dataclass(frozen=True)
class HoldoutRule:
    """Holds out every document whose hash is less than `threshold`.

    The document whose hash is `cut_hash`, and every copy of it, is cut: its first `cut_at` characters are for
    training, and the rest is held out. Copies of a text are never on both sides.
    """

    threshold: float
    cut_hash: int | None = None
    cut_at: int = 0

    def split(self, text: str) -> list[tuple[Split, str]]:
        """The text with its split, or the two parts of a text that is cut."""
        found = text_hash(text)
        if found == self.cut_hash:
            parts: list[tuple[Split, str]] = [("train", text[: self.cut_at]), ("holdout", text[self.cut_at :])]
            return [(split, part) for split, part in parts if part]
        return [("holdout" if found < self.threshold else "train", text)]

    def training_texts(self, texts: Iterable[str]) -> Iterator[str]:
        """The texts, and parts of texts, that are for training."""
        for text in texts:
            yield from (part for split, part in self.split(text) if split == "train")


@dataclass(frozen=True)
class TokenBounds:
    """Lower and upper bounds of the tokens of a text, as functions; equal if the tokenizer is already known."""

    least: Count
    most: Count


@dataclass(frozen=True)
class HoldoutPlanner:
    """Chooses the hold-out of a corpus, before a tokenizer or a model is trained on the rest.

    Each call of `texts` reads the corpus again. Each split must hold `window` tokens; for token shards these are
    one sequence and the token after it. Error messages call the tokens `unit` and a window `need`, and advise
    `remedy`.
    """

    source: str
    texts: Texts
    bounds: TokenBounds
    window: int
    need: str
    unit: str = "tokens"
    remedy: str = "add text, or lower the sequence length"

    def choose(self, share: float | None, default: float = DEFAULT_SHARE) -> HoldoutRule:
        """The rule that holds out at most `share` of the text; None is `default`, or more if a window needs more.

        Of 200 documents or more, those with the smallest hashes are held out, so the share is right on average. Of
        fewer documents, whole ones are held out in the order of their hashes while the share allows it; if they are
        less than three quarters of the share, or less than a window, the next document is cut. Raises DataError,
        with the size found and the size needed, if a split cannot hold a window.
        """
        asked = default if share is None else share
        by_hash = HoldoutRule(asked * 2**64)
        if self._suffices(by_hash, self.bounds.least, _MANY_DOCUMENTS):
            return by_hash
        copies, sizes = self._documents()
        candidates = [(found, self._within(found, copies, sizes)) for found in _shares_from(asked)]
        safe = [(found, chosen) for found, chosen in candidates if self._suffices(chosen, self.bounds.least)]
        possible = safe or [pair for pair in candidates[::-1] if self._suffices(pair[1], self.bounds.most)]
        if share is not None and self._suffices(candidates[0][1], self.bounds.most):
            possible = candidates[:1]
        if not possible or (share is not None and possible[0][0] != share):
            raise DataError(self._too_small(sizes, asked, possible[0][0] if possible else None))
        self._announce(possible[0][1], sizes)
        return possible[0][1]

    def _suffices(self, holdout: HoldoutRule, count: Count, num_documents: int = 0) -> bool:
        """Whether there are `num_documents` and each split holds a window; stops reading once that is known."""
        tokens: Counter[Split] = Counter()
        for number, text in enumerate(self.texts(), start=1):
            for split, part in holdout.split(text):
                if tokens[split] < self.window:
                    tokens[split] += self._uncounted(part) or count(part)
            if number >= num_documents and min(tokens["train"], tokens["holdout"]) >= self.window:
                return True
        return False

    def _uncounted(self, text: str) -> int:
        """The size of a window if the text is so long that its tokens need not be counted, else 0."""
        return self.window if len(text) >= _MAX_CHARACTERS_PER_TOKEN * self.window else 0

    def _documents(self) -> tuple[Counter[int], dict[int, int]]:
        """For each hash the number of its documents, and their bytes in total."""
        copies: Counter[int] = Counter()
        sizes: Counter[int] = Counter()
        for text in self.texts():
            found = text_hash(text)
            copies[found] += 1
            sizes[found] += len(text.encode("utf-8"))
        return copies, dict(sorted(sizes.items()))

    def _within(self, share: float, copies: Counter[int], sizes: dict[int, int]) -> HoldoutRule:
        """The rule for at most the share: whole documents, and if these are too few, a part of the next one."""
        most = left = int(share * sum(sizes.values()))
        for found, size in sizes.items():
            if size > left:
                whole = HoldoutRule(found)
                if left <= most // 4 and self._suffices(whole, self.bounds.least):
                    return whole
                text = next(text for text in self.texts() if text_hash(text) == found)
                return HoldoutRule(found, found, len(text) - len(_end_of(text, left // copies[found])))
            left -= size
        raise AssertionError("a share below 1 leaves a document")

    def _announce(self, holdout: HoldoutRule, sizes: dict[int, int]) -> None:
        total = sum(sizes.values())
        size = sum(size for found, size in sizes.items() if found < holdout.threshold)
        whole = sum(found < holdout.threshold for found in sizes)
        words = [f"{whole:,} of {pluralize(len(sizes), 'document')}"] if whole else []
        if holdout.cut_hash is not None:
            text = next(text for text in self.texts() if text_hash(text) == holdout.cut_hash)
            end = len(text[holdout.cut_at :].encode("utf-8"))
            size += end * sizes[holdout.cut_hash] // len(text.encode("utf-8"))
            which = (
                "another" if whole else "the only document" if len(sizes) == 1 else f"1 of {len(sizes):,} documents"
            )
            words.append(f"the last {end:,} bytes of {which}")
        _log.info(f"Hold-out: {' and '.join(words)}, {size / total:.1%} of the text")

    def _too_small(self, sizes: dict[int, int], asked: float, suited: float | None) -> str:
        size = sum(sizes.values())
        has = f"{self.source}: holds {size:,} bytes of text in {pluralize(len(sizes), 'document')}"
        if suited is not None:
            return (
                f"{has}; holdout = {asked} leaves less than {self.need} to one of the splits; "
                f"expected a holdout such as {suited:.6g}, or more text"
            )
        least, most = (sum(map(count, self.texts())) for count in (self.bounds.least, self.bounds.most))
        return (
            f"{has}, at most {most:,} {self.unit}; expected at least {2 * self.window:,} {self.unit}, about "
            f"{-(-2 * self.window * size // least):,} bytes: training and hold-out need {self.need} each; "
            f"{self.remedy}"
        )


def _shares_from(share: float) -> Iterator[float]:
    """The share, and then shares whose smaller part doubles each time, up to a half."""
    smaller = min(share, 1 - share)
    yield share
    while smaller < 0.5:
        smaller = min(0.5, float(f"{2 * smaller:.3g}"))
        yield smaller if share < 0.5 else 1 - smaller


def _end_of(text: str, num_bytes: int) -> str:
    """The last `num_bytes` bytes of a text, or a little less, to start with a line or a word."""
    data = text.encode("utf-8")
    end = data[max(0, len(data) - num_bytes) :].decode("utf-8", "ignore")
    for border in ("\n", " "):
        start = end.find(border) + 1
        if 0 < start <= len(end) // 8:
            return end[start:]
    return end
