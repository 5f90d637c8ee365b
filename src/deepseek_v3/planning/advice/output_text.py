"""Prints the advice of `dsv3 plan`: the sizes that fit, their costs, what others lack, and the next commands."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

import typer

from deepseek_v3.planning.advice.advisor import ESTIMATE_ONLY, Advice, launch_command, sources
from deepseek_v3.planning.advice.request import OBJECTIVES, PlanRequest
from deepseek_v3.planning.advice.size_plan import SizePlan
from deepseek_v3.planning.fp8_choice import describe_layers, has_all_in_fp8
from deepseek_v3.planning.hardware import Device
from deepseek_v3.planning.layout_search import Layout
from deepseek_v3.planning.scaling_laws import ExpectedLoss
from deepseek_v3.utils.command_line import print_next_steps
from deepseek_v3.utils.text import (
    dollars,
    format_count,
    gibibytes,
    humanize,
    paragraph,
    side_by_side,
    table,
    three_figures,
)

_LEGEND = (
    "layout: replicas × shards; ep, pp: degrees of expert and pipeline parallelism; mb: micro-batch size; "
    "re: full recomputation. MFU: the model's operations over the devices' peak. "
    "T/P: tokens per active parameter. *: outside the fitted range of the law."
)


def print_advice(advice: Advice, price_given: bool) -> None:
    """Prints the whole advice to standard output."""
    for text in _header(advice.request, price_given):
        typer.echo(paragraph(text))
    _print_table(_fit_table(advice), advice)
    _print_table(side_by_side(_cost_table(advice), _loss_table(advice)), advice)
    typer.echo(f"\n{paragraph(_LEGEND)}")
    _print_fp8(advice)
    _print_missing(advice)
    _print_parts(advice)
    typer.echo()
    for name, source in sources(advice).items():
        typer.echo(paragraph(f"{name[0].upper()}{name[1:]}: {source}."))
    _print_recommendation(advice)


def print_devices(devices: Iterable[Device]) -> None:
    """Prints the figures of each device and their sources."""
    header = "device GiB fp8_TFLOP/s bf16_TFLOP/s fp32_TFLOP/s memory_GB/s link_GB/s network_GB/s $_an_hour"
    rows: list[list[str]] = []
    named: dict[str, list[str]] = {}
    for device in devices:
        products = (device.fp8_tflops, device.bfloat16_tflops, device.float32_tflops)
        bandwidths = (device.memory_gb_per_s, device.link_gb_per_s, device.network_gb_per_s)
        rates = (device.memory_gib, *products, *bandwidths)
        shown = ["–" if rate is None else f"{rate:,g}" for rate in rates]
        rows.append([device.name, *shown, f"{device.dollars_per_hour:.2f}"])
        named.setdefault(device.source, []).append(device.name)
    typer.echo("\n".join(table([name.replace("_", " ") for name in header.split()], rows)) + "\n")
    for source, names in named.items():
        typer.echo(paragraph(f"{', '.join(names)}: {source}."))
    typer.echo(paragraph("Choose one with --gpu, or describe yours in a file for --hardware. Rates are dense."))


def _header(request: PlanRequest, price_given: bool) -> tuple[str, str]:
    device = request.device
    limits = request.budgets + ([f"{format_count(request.tokens)} tokens"] if request.tokens else [])
    within = ", ".join(limits)
    return (
        f"{request.devices:,} × {device.name}, {device.memory_gib:g} GiB each, "
        f"${device.dollars_per_hour:.2f} an hour each ({'rent as given' if price_given else device.source})",
        f"{f'Within {within}' if within else 'No limits'}; the aim is {OBJECTIVES[request.objective]} "
        f"(--objective {request.objective})",
    )


def _fit_table(advice: Advice) -> list[str]:
    device = advice.request.device
    memory = f"GiB of {gibibytes(device.memory_bytes)}"
    rows = []
    for row in advice.rows:
        layout = row.layout
        counts = (format_count(row.total_parameters), format_count(row.active_parameters))
        shape = (f"{layout.devices:,}", _shape(layout)) if layout else ("–", "–")
        rows.append([row.name, *counts, "✓" if row.fits else "✗", *shape, gibibytes(row.needed_bytes)])
    return table(["size", "total", "active", "fits", "devices", "layout", memory], rows, left=["layout"])


def _memory_table(advice: Advice) -> list[str]:
    """GiB by part on the fullest device of each size; for a size that does not fit, in its smallest layout."""
    parts = [row.memory_parts for row in advice.rows]
    rows = [[humanize(name), *(gibibytes(part[name]) for part in parts)] for name in parts[0]]
    return table(["GiB", *(row.name for row in advice.rows)], rows)


def _cost_table(advice: Advice) -> list[str]:
    header = ["size", "step s", "MFU", "hours", "device hours", "cost"]
    return table(header, [[row.name, *_costs(row)] for row in advice.rows])


def _loss_table(advice: Advice) -> list[str]:
    rows = [
        [
            row.name,
            format_count(row.tokens),
            f"{row.ratio:.1f}",
            f"{row.steps:,}",
            f"{row.compute:.1e}",
            _loss(row.loss) if row.loss else "–",
        ]
        for row in advice.rows
    ]
    return table(["size", "tokens", "T/P", "steps", "FLOPs", "loss (low–high)"], rows)


def _costs(row: SizePlan) -> tuple[str, ...]:
    layout, cost = row.layout, row.cost
    if layout is None or cost is None:
        return ("–",) * 5
    hours = (three_figures(hours) if hours >= 0.001 else "<0.001" for hours in (cost.hours, cost.device_hours))
    return three_figures(layout.step.total), f"{cost.mfu:.0%}", *hours, dollars(cost.dollars)


def _print_table(lines: list[str], advice: Advice) -> None:
    """Prints lines with the recommended size in bold and the sizes that do not fit dimmed."""
    typer.echo()
    unfit = {row.name for row in advice.rows if not row.fits}
    best = advice.recommended.name if advice.recommended else None
    for line in lines:
        name = line.split(" ")[0]
        styled = typer.style(line.rstrip(), bold=name == best or None, dim=name in unfit or None)
        typer.echo(styled if name in {best, *unfit} else line.rstrip())


def _print_fp8(advice: Advice) -> None:
    """Prints which layers are in FP8 in each layout that has some, but not all, in FP8."""
    lines = [
        f"FP8 layers of {row.name}: {describe_layers(row.layout.execution.fp8)}; the others compute in bf16."
        for row in advice.rows
        if row.layout and _precision(row.layout) == "fp8+bf16"
    ]
    if lines:
        typer.echo("\n" + "\n".join(map(paragraph, lines)))


def _print_missing(advice: Advice) -> None:
    lines = [f"✗ {row.name} {reason}" for row in advice.rows for reason in row.reasons]
    if lines:
        typer.echo("\n" + "\n".join(map(paragraph, lines)))


def _print_parts(advice: Advice) -> None:
    """Prints the memory of every size and the step time of the recommended one, by part."""
    row, lines = advice.recommended, _memory_table(advice)
    title = "Memory by part on the fullest device, at its fullest moment"
    if row and row.layout:
        seconds = {**row.layout.step.parts(), "a step": row.layout.step.total}
        times = [[humanize(name), three_figures(part)] for name, part in seconds.items()]
        lines = side_by_side(lines, table([f"{row.name}, seconds", ""], times))
        title += f"; for {row.name} the {row.memory.moment}"
    typer.echo("\n" + paragraph(f"{title}:"))
    typer.echo("\n".join(lines))


def _print_recommendation(advice: Advice) -> None:
    typer.echo()
    row = advice.recommended
    if row is None or row.cost is None:
        typer.echo(paragraph(f"Recommended: none; {advice.reason}."))
        return
    loss = f", expected loss {row.loss.value:.2f}" if row.loss else ""
    takes = f"{three_figures(row.cost.hours)} hours, {dollars(row.cost.dollars)}{loss}"
    typer.secho(paragraph(f"Recommended: {row.name} ({takes}); {advice.reason}."), bold=True)
    if row.config.parallel.world_size > 1:
        typer.echo(paragraph(f"Note: {ESTIMATE_ONLY}."))
    data = row.config.data
    commands = [shlex.split(launch_command(row, advice.request.device.devices_per_node, advice.overrides))]
    if data.corpus is None and not (data.sources or data.exist):
        words = ["dsv3", "tokenize", "--input", "FOLDER", "--vocab-size", str(row.config.model.vocab_size)]
        commands.insert(0, [*words, "--output", str(data.path)])
    print_next_steps(*commands)


def _shape(layout: Layout) -> str:
    """The layout in the abbreviations of the legend."""
    parallel = layout.config.parallel
    words = [f"{parallel.data_replicate}×{parallel.data_shard}"]
    words += [f"ep{parallel.expert}"] if parallel.expert > 1 else []
    words += [f"pp{parallel.pipeline}"] if parallel.pipeline > 1 else []
    words += [f"mb{parallel.micro_batch_size}"]
    words += ["re"] if parallel.recomputation == "full" else []
    return " ".join([*words, _precision(layout)])


def _precision(layout: Layout) -> str:
    """The precision of a layout: fp32, bf16, fp8, or fp8+bf16 if only some layers are in FP8 that could be."""
    run = layout.execution
    if run.width == 4:
        return "fp32"
    if not run.fp8:
        return "bf16"
    return "fp8" if has_all_in_fp8(layout.config, run.fp8) else "fp8+bf16"


def _loss(loss: ExpectedLoss) -> str:
    mark = "*" if loss.extrapolated else ""
    return f"{loss.value:.2f}{mark} ({loss.low:.2f}–{loss.high:.2f})"
