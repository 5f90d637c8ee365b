"""Removes documents, paragraphs or lines that stand in the corpus more than once, and near duplicates."""

from deepseek_v3.data.deduplication.exact import ExactDeduplicator
from deepseek_v3.data.deduplication.near import MinHashDeduplicator

__all__ = ["ExactDeduplicator", "MinHashDeduplicator"]
