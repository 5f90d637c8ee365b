"""Why documents were dropped, stage by stage, and why records were set aside."""

from __future__ import annotations

from typing import Any

from deepseek_v3.data.formats.quarantine import REASONS
from deepseek_v3.data.report.charts import bar
from deepseek_v3.data.report.markup import Body, Html, code, element, joined, table
from deepseek_v3.data.report.samples import anchor
from deepseek_v3.data.report.wording import count, share, size, stage_title

_MEANINGS = {**REASONS, "duplicate_id": "a record whose id an earlier record of the corpus has"}


def reasons(stats: dict[str, Any]) -> Html:
    """A table of all reasons with bars that compare across stages."""
    stages = stats.get("stages", [])
    most = max((reason.get("documents", 0) for stage in stages for reason in _of(stage).values()), default=0)
    bodies = [_stage(stage, most, stats.get("samples", {})) for stage in stages]
    if not bodies:
        return element("p", "No stage ran.")
    header = ["reason", "", "documents", "share", "text", "share"]
    note = "Shares are of what came to the stage. A reason that has samples leads to them."
    return joined(
        [table("Documents dropped, by stage and reason", header, *bodies), element("p", note, class_="note")]
    )


def quarantine(stats: dict[str, Any]) -> Html:
    """Reasons of records that hold no usable document."""
    found = sorted(stats.get("quarantined", {}).items(), key=lambda item: (-item[1], item[0]))
    if not found:
        return element("p", "Every record could be read.")
    most = max(found[0][1], 1)  # an empty file stands for no record
    rows = [
        (code(reason), bar(("quarantined", number / most)), count(number), _MEANINGS.get(reason, ""))
        for reason, number in found
    ]
    return table("Records set aside, by reason", ["reason", "", "records", "meaning"], Body(rows), left=[3])


def _stage(stage: dict[str, Any], most: int, samples: dict[str, Any]) -> Body:
    given, left, found = stage.get("in", {}), stage.get("out", {}), _of(stage)
    documents, num_bytes = given.get("documents", 0), given.get("bytes", 0)
    rows: list[tuple[str, ...]] = [
        (
            _name(stage["name"], reason, samples),
            bar(("dropped", each.get("documents", 0) / max(most, 1))),
            count(each.get("documents", 0)),
            share(each.get("documents", 0), documents),
            size(each.get("bytes", 0)),
            share(each.get("bytes", 0), num_bytes),
        )
        for reason, each in sorted(found.items(), key=lambda item: (-item[1].get("documents", 0), item[0]))
    ]
    shorter = num_bytes - left.get("bytes", 0) - sum(each.get("bytes", 0) for each in found.values())
    if shorter > 0:
        rows.append(
            ("text taken out of documents that go on", "", "", "", size(shorter), share(shorter, num_bytes))
        )
    heading = f"{stage_title(stage['name'])}: {count(documents)} in, {count(left.get('documents', 0))} out"
    return Body(rows, heading)


def _of(stage: dict[str, Any]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = stage.get("reasons", {})
    return found


def _name(stage: str, reason: str, samples: dict[str, Any]) -> Html:
    shown = code(reason)
    return element("a", shown, href=f"#{anchor(stage, reason)}") if samples.get(f"{stage}/{reason}") else shown
