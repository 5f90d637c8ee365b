"""What the server counts and measures, in the text format of Prometheus.

The engine's thread and the event loop both write, so every change holds a lock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from threading import Lock

# Upper limits of the buckets, in seconds.
_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)


class Histogram:
    """Counts of observations by bucket, and their sum."""

    def __init__(self, limits: tuple[float, ...]) -> None:
        self._limits = limits
        self._counts = [0] * (len(limits) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Counts a value; a bucket holds those up to its limit."""
        self._counts[bisect_left(self._limits, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        """The lines of a metric of this name; each bucket also counts those below it."""
        total = 0
        for limit, count in zip((*map(str, self._limits), "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{limit}"}} {total}'
        yield f"{name}_sum {self._sum}"
        yield f"{name}_count {total}"


class ServerMetrics:
    """The counters and histograms of one server."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._prompt_tokens = self._generated_tokens = 0
        self._finished: Counter[str] = Counter()
        self._responses: Counter[str] = Counter()
        self._first_token = Histogram(_FIRST_TOKEN)
        self._between_tokens = Histogram(_BETWEEN_TOKENS)

    def count_first_token(self, prompt_tokens: int, seconds: float) -> None:
        """Counts the first token of a request, this long after the request reached the engine."""
        with self._lock:
            self._prompt_tokens += prompt_tokens
            self._generated_tokens += 1
            self._first_token.observe(seconds)

    def count_next_token(self, seconds: float) -> None:
        """Counts a further token of a request, this long after the one before it."""
        with self._lock:
            self._generated_tokens += 1
            self._between_tokens.observe(seconds)

    def count_finished(self, reason: str) -> None:
        """Counts a request that has ended."""
        with self._lock:
            self._finished[reason] += 1

    def count_response(self, status: int) -> None:
        """Counts an HTTP response."""
        with self._lock:
            self._responses[str(status)] += 1

    def text(self, gauges: Mapping[str, tuple[str, int]]) -> str:
        """All metrics in the text format of Prometheus; `gauges` are further names with their help and value."""
        with self._lock:
            return "".join(f"{line}\n" for line in self._lines(gauges))

    def _lines(self, gauges: Mapping[str, tuple[str, int]]) -> Iterator[str]:
        for name, (meaning, value) in gauges.items():
            yield from _metric(name, "gauge", meaning, [f"{name} {value}"])
        for name, meaning, count in (
            ("dsv3_prompt_tokens_total", "Tokens of prompts that were computed.", self._prompt_tokens),
            ("dsv3_generated_tokens_total", "Tokens that were generated.", self._generated_tokens),
        ):
            yield from _metric(name, "counter", meaning, [f"{name} {count}"])
        for name, meaning, label, counts in (
            ("dsv3_requests_finished_total", "Completions by why they ended.", "reason", self._finished),
            ("dsv3_http_responses_total", "HTTP responses by status.", "status", self._responses),
        ):
            lines = [f'{name}{{{label}="{key}"}} {count}' for key, count in sorted(counts.items())]
            yield from _metric(name, "counter", meaning, lines)
        for name, meaning, histogram in (
            ("dsv3_time_to_first_token_seconds", "From a request to its first token.", self._first_token),
            ("dsv3_time_between_tokens_seconds", "Between tokens of a request.", self._between_tokens),
        ):
            yield from _metric(name, "histogram", meaning, histogram.lines(name))


def _metric(name: str, kind: str, meaning: str, lines: Iterable[str]) -> Iterator[str]:
    yield f"# HELP {name} {meaning}"
    yield f"# TYPE {name} {kind}"
    yield from lines
