"""Numbers and names as people read them."""

from __future__ import annotations

from typing import Any

from deepseek_v3.data.report.markup import Html, element, shortened
from deepseek_v3.utils.printing import spelled

_STEPS = ("", "k", "M", "G", "T", "P", "E")
_WORD_CHARACTERS = 120
_ABBREVIATIONS = ("pii",)


def stage_title(name: str) -> str:
    """A stage's name as a heading."""
    return name.upper() if name in _ABBREVIATIONS else spelled(name).capitalize()


def count(number: int) -> str:
    """1,234,567."""
    return f"{number:,}"


def size(num_bytes: int) -> Html:
    """Bytes as 1.2 MB (10⁶), with the exact number beside it for whoever asks."""
    return element("data", scaled(num_bytes, "B"), value=num_bytes, title=f"{count(num_bytes)} bytes")


def scaled(number: float, unit: str) -> str:
    """A number of units in thousands, millions and so on: 217.5 MB, with a space that breaks no line."""
    step = 0
    while round(abs(number), 1) >= 1000 and step < len(_STEPS) - 1:
        number, step = number / 1000, step + 1
    digits = f"{number:.1f}" if step else f"{number:,.0f}"
    return f"{digits}\u00a0{_STEPS[step]}{unit}".rstrip()


def share(part: float, whole: float) -> str:
    """A part of a whole in percent: 12.3%. What is not nothing is never 0.0%, and what is not all never 100.0%."""
    if whole <= 0:
        return "–"
    percent = 100 * part / whole
    if 0 < percent < 0.05:
        return "<0.1%"
    if 99.95 <= percent < 100:
        return ">99.9%"
    return f"{percent:,.1f}%"


def figure(value: Any) -> str:
    """Any figure of a stage: numbers to four digits, lists in a row, anything else as it prints, shortened."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int):
        return count(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list):
        return shortened(", ".join(map(figure, value)), _WORD_CHARACTERS)
    return shortened(str(value), _WORD_CHARACTERS)
