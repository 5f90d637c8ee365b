"""The table of `dsv3 bench train`: every figure with its floor beside it."""

from __future__ import annotations

import torch

from deepseek_v3.benchmark.train_benchmark import SystemResult, TrainBenchmark, speed_figures
from deepseek_v3.planning.flops import training_flops_per_token
from deepseek_v3.utils.text import gibibytes, table

_FIGURES = (
    "tokens/s",
    "TFLOP/s",
    "MFU of the published peak",
    "ms a step",
    "share of the floor",
    "peak GiB",
    "s to the first step",
    "loss, first → last step",
)


def result_table(result: TrainBenchmark) -> list[str]:
    """The lines of a table with a column per system, `figure / floor` in its cells; dashes for no figures."""
    header = ["figure / floor", *(system.name for system in result.systems)]
    rows = zip(_FIGURES, *(_cells(system) for system in result.systems), strict=True)
    return [
        f"{result.shape}, {result.systems[0].config.tokens_per_step:,} tokens a step",
        *table(header, list(rows)),
        "",
    ]


def _cells(system: SystemResult) -> list[str]:
    figures = system.figures
    if figures is None or system.problem is not None:
        return ["–"] * len(_FIGURES)
    config, floor = system.config, system.floor
    found = speed_figures(config, figures, floor)
    best = config.tokens_per_step / floor.seconds
    best_tflops = best * training_flops_per_token(config.model, config.training.sequence_length) / 1e12
    losses = list(figures.losses.values())
    return [
        f"{figures.tokens_per_second:,.0f} / {best:,.0f}",
        f"{found['tflops']:,.1f} / {best_tflops:,.1f}",
        "–" if found["mfu"] is None else f"{found['mfu']:.1%}",
        f"{1e3 * config.tokens_per_step / figures.tokens_per_second:,.1f} / {1e3 * floor.seconds:,.1f}",
        f"{found['share_of_floor']:.0%}",
        f"{gibibytes(figures.memory_bytes)} / {gibibytes(floor.memory_bytes)}",
        f"{figures.first_step_seconds:.1f}",
        f"{losses[0]:.3f} → {losses[-1]:.3f}",
    ]


def explanations(result: TrainBenchmark, device: torch.device) -> list[str]:
    """What the reader of the table must know: the ceilings, notes of systems, and why some have no figures."""
    lines = [result.ceilings.describe(device)]
    for system in result.systems:
        if system.figures is not None and system.figures.notes:
            lines.append(f"{system.name}: {system.figures.notes}")
        if system.problem is not None:
            lines.append(f"{system.name}: no figures: {system.problem}")
    return lines
