"""Rules on length, repetition, symbols, stop words and lines, as Gopher, C4 and FineWeb published them."""

from deepseek_v3.data.heuristics.filter import HeuristicFilter

__all__ = ["HeuristicFilter"]
