"""Masking of personal data and secrets in texts, which patterns and checks detect."""

from deepseek_v3.data.pii.masker import PiiMasker

__all__ = ["PiiMasker"]
