"""The published heuristic filters of Gopher, C4 and FineWeb: length, repetition, symbols, stop words and lines."""

from deepseek_v3.data.heuristics.filter import HeuristicFilter

__all__ = ["HeuristicFilter"]
