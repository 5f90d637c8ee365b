"""The head of the report: what became of the input in a few numbers, and what somebody should look at first."""

from __future__ import annotations

from typing import Any

from deepseek_v3.data.report.charts import bar
from deepseek_v3.data.report.markup import Html, element, joined
from deepseek_v3.data.report.wording import count, scaled, share, size, stage_title

_PARTS = {
    "kept": "documents in the output",
    "dropped": "judged and left out, each with a reason",
    "quarantined": "records that hold no usable document",
}


def overview(stats: dict[str, Any]) -> Html:
    """The alarms, the numbers and how they add up."""
    counts = {name: stats.get("counts", {}).get(name, 0) for name in ("input", *_PARTS, "copies")}
    cards = [_card("input", counts["input"], counts["input"], "records in the input files")]
    cards += [_card(name, counts[name], counts["input"], meaning) for name, meaning in _PARTS.items()]
    if counts["copies"]:
        cards.append(_card("copies", counts["copies"], counts["input"], "written again, beyond those kept"))
    parts = bar(*((name, counts[name] / max(counts["input"], 1)) for name in _PARTS))
    return joined(
        [
            _alarms(stats, counts),
            element("dl", *cards, class_="cards"),
            element("div", parts, class_="whole"),
            element("p", _sum(counts), class_="sum"),
            element("p", *_output(stats)),
        ]
    )


def tokens_of(stats: dict[str, Any], num_bytes: int) -> float:
    """Tokens in so many bytes of text, at the rate of this run."""
    return num_bytes / stats["bytes_per_token"] if stats.get("bytes_per_token") else 0


def tokens_kept(stats: dict[str, Any]) -> int:
    """Tokens of the output, counted where there was a tokenizer."""
    kept = stats.get("kept", {})
    if stats.get("tokens_counted") and "tokens" in kept:
        return int(kept["tokens"])
    return round(tokens_of(stats, kept.get("bytes", 0)))


def _card(name: str, number: int, whole: int, meaning: str) -> Html:
    return element(
        "div",
        element("dt", name.capitalize()),
        element("dd", element("strong", count(number)), " ", element("span", share(number, whole))),
        element("dd", meaning, class_="meaning"),
        class_=f"card {name}",
    )


def _sum(counts: dict[str, int]) -> str:
    kept, dropped, quarantined = (counts[name] for name in _PARTS)
    total = kept + dropped + quarantined
    sum_ = f"{count(kept)} kept + {count(dropped)} dropped + {count(quarantined)} quarantined = {count(total)}"
    return f"{sum_}, every record of the input." if total == counts["input"] else f"{sum_}."


def _output(stats: dict[str, Any]) -> list[str]:
    kept = stats.get("kept", {})
    if not kept.get("bytes"):
        return ["Nothing was written."]
    how = (
        "counted" if stats.get("tokens_counted") else f"estimated at {stats.get('bytes_per_token', 0):g} bytes each"
    )
    tokens = scaled(tokens_kept(stats), "")
    return ["The output holds ", size(kept["bytes"]), f" of text, about {tokens} tokens ({how})."]


def _alarms(stats: dict[str, Any], counts: dict[str, int]) -> Html:
    alarms = [
        element(
            "li",
            element("strong", stage_title(alarm["stage"])),
            f" removed {share(alarm['removed'], 1)} of its documents; its alarm stands at ",
            f"{share(alarm['limit'], 1)}. Look at the ",
            element("a", "samples", href="#samples"),
            " before you use the output.",
        )
        for alarm in stats.get("alarms", [])
    ]
    total = sum(counts[name] for name in _PARTS)
    if total != counts["input"]:
        alarms.append(
            element("li", f"Of {count(counts['input'])} records of the input {count(total)} are accounted for.")
        )
    if not alarms:
        return joined([])
    heading = element("h2", "Alarms", id="alarms")
    return element("section", heading, element("ul", *alarms), class_="alarms", aria_labelledby="alarms")
