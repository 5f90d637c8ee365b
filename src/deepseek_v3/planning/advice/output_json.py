"""The advice of `dsv3 plan` as one JSON object of raw numbers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from deepseek_v3.planning.advice.advisor import ESTIMATE_ONLY, Advice, launch_command, overrides, sources
from deepseek_v3.planning.advice.request import PlanRequest
from deepseek_v3.planning.advice.size_plan import SizePlan
from deepseek_v3.planning.hardware import Device


def advice_as_json(advice: Advice) -> dict[str, Any]:
    """All assumptions and results, in bytes, seconds, hours, dollars and operations; null if unknown."""
    return {
        "request": _request(advice.request),
        "device": advice.request.device.model_dump(mode="json"),
        "rows": [_row(row, advice.request.device) for row in advice.rows],
        "recommendation": _recommendation(advice),
        "sources": sources(advice),
    }


def _request(request: PlanRequest) -> dict[str, Any]:
    names = ("devices", "budget_hours", "budget_dollars", "tokens", "objective")
    return {name: getattr(request, name) for name in names}


def _recommendation(advice: Advice) -> dict[str, Any]:
    """The recommended size; `name` and `command` are null if nothing fits, `note` states a limitation."""
    row = advice.recommended
    several = row is not None and row.config.parallel.world_size > 1
    return {
        "name": row.name if row else None,
        "reason": advice.reason,
        "command": launch_command(row, advice.request.device.devices_per_node, advice.overrides) if row else None,
        "overrides": overrides(row.given, row.config) if row else [],
        "note": ESTIMATE_ONLY if several else None,
    }


def _row(row: SizePlan, device: Device) -> dict[str, Any]:
    layout = row.layout
    return {
        "name": row.name,
        "config": str(row.path),
        "total_parameters": row.total_parameters,
        "active_parameters": row.active_parameters,
        "fits": row.fits,
        "shortages": [asdict(shortage) for shortage in row.shortages],
        "devices": layout.devices if layout else None,
        "parallel": layout.config.parallel.model_dump(mode="json") if layout else None,
        "fp8_layers": sorted(layout.execution.fp8) if layout else None,
        "memory": {
            "available_bytes": device.memory_bytes,
            "needed_bytes": row.needed_bytes,
            "moment": row.memory.moment,
            "parts": row.memory_parts,
        },
        "step_seconds": {"total": layout.step.total, "parts": layout.step.parts()} if layout else None,
        "tokens": row.tokens,
        "steps": row.steps,
        "tokens_per_active_parameter": row.ratio,
        "operations": row.compute,
        "cost": asdict(row.cost) if row.cost else None,
        "loss": asdict(row.loss) if row.loss else None,
    }
