"""The head of the report: warnings, the main counts, and the funnel of documents that each stage leaves."""

from __future__ import annotations

from typing import Any, NamedTuple

from deepseek_v3.charts.markup import Html, TableBody, byte_size, concat, element, html_table
from deepseek_v3.charts.svg import bar
from deepseek_v3.utils.text import format_integer, format_percent, format_si, humanize

QUARANTINE = "quarantine"  # the name under which a warning stands for the records that could not be read
_ABBREVIATIONS = ("pii",)
_PARTS = {
    "kept": "documents in the output",
    "dropped": "documents that a stage dropped, each with a reason",
    "quarantined": "records that hold no usable document",
}


def overview_section(stats: dict[str, Any]) -> Html:
    """The warnings, the main counts, and the sum of the outcomes, which should equal the input."""
    counts = {name: stats.get("counts", {}).get(name, 0) for name in ("input", *_PARTS, "copies")}
    cards = [_card("input", counts["input"], counts["input"], "records in the input files")]
    cards += [_card(name, counts[name], counts["input"], meaning) for name, meaning in _PARTS.items()]
    if counts["copies"]:
        cards.append(_card("copies", counts["copies"], counts["input"], "written again, beyond those kept"))
    parts = bar(*((name, counts[name] / max(counts["input"], 1)) for name in _PARTS))
    return concat(
        [
            _alarms(stats, counts),
            element("dl", *cards, class_="cards"),
            element("div", parts, class_="whole"),
            element("p", _sum(counts), class_="sum"),
            element("p", *_output(stats)),
        ]
    )


def stage_title(name: str) -> str:
    """The name of a stage as a heading: "Heuristic filters", "PII"."""
    return name.upper() if name in _ABBREVIATIONS else humanize(name).capitalize()


def estimate_tokens(stats: dict[str, Any], num_bytes: int) -> float:
    """Estimates the tokens in `num_bytes` of text, by the bytes per token of this run."""
    return num_bytes / stats["bytes_per_token"] if stats.get("bytes_per_token") else 0


def tokens_kept(stats: dict[str, Any]) -> int:
    """Tokens of the output: counted with the tokenizer of the run, or else estimated."""
    kept = stats.get("kept", {})
    if stats.get("tokens_counted") and "tokens" in kept:
        return int(kept["tokens"])
    return round(estimate_tokens(stats, kept.get("bytes", 0)))


def _card(name: str, number: int, whole: int, meaning: str) -> Html:
    return element(
        "div",
        element("dt", name.capitalize()),
        element(
            "dd", element("strong", format_integer(number)), " ", element("span", format_percent(number, whole))
        ),
        element("dd", meaning, class_="meaning"),
        class_=f"card {name}",
    )


def _sum(counts: dict[str, int]) -> str:
    kept, dropped, quarantined = (counts[name] for name in _PARTS)
    total = kept + dropped + quarantined
    sum_ = f"{kept:,} kept + {dropped:,} dropped + {quarantined:,} quarantined = {total:,}"
    return f"{sum_}, every record of the input." if total == counts["input"] else f"{sum_}."


def _output(stats: dict[str, Any]) -> list[str]:
    kept = stats.get("kept", {})
    if not kept.get("bytes"):
        return ["Nothing was written."]
    how = (
        "counted" if stats.get("tokens_counted") else f"estimated at {stats.get('bytes_per_token', 0):g} bytes each"
    )
    tokens = format_si(tokens_kept(stats), "")
    return ["The output holds ", byte_size(kept["bytes"]), f" of text, about {tokens} tokens ({how})."]


def _alarms(stats: dict[str, Any], counts: dict[str, int]) -> Html:
    alarms = [_alarm(alarm) for alarm in stats.get("alarms", [])]
    total = sum(counts[name] for name in _PARTS)
    if total != counts["input"]:
        alarms.append(
            element(
                "li",
                f"Of {counts['input']:,} records of the input {total:,} are accounted for.",
            )
        )
    if not alarms:
        return concat([])
    heading = element("h2", "Warnings", id="alarms")
    return element("section", heading, element("ul", *alarms), class_="alarms", aria_labelledby="alarms")


def _alarm(alarm: dict[str, Any]) -> Html:
    removed, limit = format_percent(alarm["removed"], 1), format_percent(alarm["limit"], 1)
    if alarm["stage"] == QUARANTINE:
        found, section = f" holds {removed} of the records, above the max_quarantine_warning of ", "quarantine"
    else:
        found, section = f" removed {removed} of its documents, above its max_drop_warning of ", "samples"
    link = element("a", "samples" if section == "samples" else "reasons", href=f"#{section}")
    title = element("strong", stage_title(alarm["stage"]))
    return element("li", title, found, f"{limit}. Look at the ", link, " before you use the output.")


class FunnelStep(NamedTuple):
    """The documents that a step leaves. `num_bytes` is None for the input, whose records are not all documents."""

    name: str
    documents: int
    num_bytes: int | None


def funnel_steps(stats: dict[str, Any]) -> list[FunnelStep]:
    """The steps of the funnel: input, documents read, each stage, quarantine of repeated ids, output."""
    counts, read, kept = (stats.get(name, {}) for name in ("counts", "read", "kept"))
    steps = [FunnelStep("Input", counts.get("input", 0), None)]
    steps.append(FunnelStep("Read as documents", read.get("documents", 0), read.get("bytes", 0)))
    for stage in stats.get("stages", []):
        _set_aside(steps, stage.get("in", {}).get("documents"), stage.get("in", {}).get("bytes", 0))
        left = stage.get("out", {})
        steps.append(FunnelStep(stage_title(stage["name"]), left.get("documents", 0), left.get("bytes", 0)))
    _set_aside(steps, counts.get("kept"), kept.get("bytes", 0))
    copies = counts.get("copies", 0)
    name = "Written, with copies" if copies else "Written"
    return [*steps, FunnelStep(name, counts.get("kept", 0) + copies, kept.get("bytes", 0))]


def funnel_section(stats: dict[str, Any]) -> Html:
    """The funnel as a chart, and as a table with all its numbers."""
    steps = funnel_steps(stats)
    most = max(1, *(step.documents for step in steps)), max(1, *(step.num_bytes or 0 for step in steps))
    items = [_item(step, before, steps[0], *most) for step, before in zip(steps[1:], steps, strict=False)]
    figure = element(
        "figure",
        element("ol", *items, class_="funnel"),
        element(
            "figcaption",
            "Thick bars are documents, thin bars their bytes of text, as shares of the input. ",
            "Orange is the share that the step removed.",
        ),
    )
    return concat([figure, _table(stats, steps)])


def _set_aside(steps: list[FunnelStep], documents: int | None, num_bytes: int) -> None:
    """Adds a step if the next stage received fewer documents than the last step left, because of repeated ids."""
    if documents is not None and documents != steps[-1].documents:
        steps.append(FunnelStep("Repeated ids quarantined", documents, num_bytes))


def _item(step: FunnelStep, before: FunnelStep, first: FunnelStep, most_documents: int, most_bytes: int) -> Html:
    num_bytes = step.num_bytes or 0
    lost_bytes = max((before.num_bytes or num_bytes) - num_bytes, 0)
    lost = max(before.documents - step.documents, 0)
    return element(
        "li",
        element("span", step.name, class_="step"),
        element(
            "span",
            format_integer(step.documents),
            " ",
            element("b", format_percent(step.documents, first.documents)),
        ),
        element(
            "div",
            bar(("kept", step.documents / most_documents), ("dropped", lost / most_documents)),
            bar(("kept", num_bytes / most_bytes), ("dropped", lost_bytes / most_bytes)),
        ),
    )


def _table(stats: dict[str, Any], steps: list[FunnelStep]) -> Html:
    rate = f"{stats.get('bytes_per_token', 0):.3g} bytes of text"
    estimate = (
        f"Tokens of the output are counted; the steps before it assume {rate} per token, as in the output."
        if stats.get("tokens_counted")
        else f"Tokens are estimated: {rate} each."
    )
    header = ["step", "documents", "share", "removed", "text", "share", "tokens", "share"]
    if not stats.get("tokens_counted"):
        header[6] = "tokens (estimated)"
    tokens = [estimate_tokens(stats, step.num_bytes or 0) for step in steps[:-1]] + [tokens_kept(stats)]
    rows = [
        _row(step, before, steps, tokens[index], tokens[1])
        for index, (step, before) in enumerate(zip(steps, [steps[0], *steps], strict=False))
    ]
    return concat(
        [html_table("What is left after each step", header, TableBody(rows)), element("p", estimate, class_="note")]
    )


def _row(
    step: FunnelStep, before: FunnelStep, steps: list[FunnelStep], tokens: float, all_tokens: float
) -> list[str]:
    lost = before.documents - step.documents
    documents = [
        step.name,
        format_integer(step.documents),
        format_percent(step.documents, steps[0].documents),
        _change(lost),
    ]
    if step.num_bytes is None:
        return [*documents, "–", "–", "–", "–"]
    text = [byte_size(step.num_bytes), format_percent(step.num_bytes, steps[1].num_bytes or 0)]
    return [*documents, *text, format_si(tokens, ""), format_percent(tokens, all_tokens)]


def _change(lost: int) -> str:
    return f"+{-lost:,}" if lost < 0 else format_integer(lost)
