"""Where the checkout and its result files are, and the first fields of a result file."""

from __future__ import annotations

from pathlib import Path

from deepseek_v3.benchmark.environment import cpu_name, environment

__all__ = ["RESULTS", "ROOT", "cpu_name", "environment"]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
