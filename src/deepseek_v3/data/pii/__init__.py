"""Personal data and secrets in texts: found by patterns and checks, and masked."""

from deepseek_v3.data.pii.masker import PiiMasker

__all__ = ["PiiMasker"]
