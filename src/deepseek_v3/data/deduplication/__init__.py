"""Deduplication: removes repeated documents, paragraphs or lines, and near duplicates."""

from deepseek_v3.data.deduplication.exact import ExactDeduplicator
from deepseek_v3.data.deduplication.near import MinHashDeduplicator

__all__ = ["ExactDeduplicator", "MinHashDeduplicator"]
