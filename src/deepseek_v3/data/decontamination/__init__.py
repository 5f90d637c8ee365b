"""Decontamination: drops documents that contain texts of evaluation sets."""

from deepseek_v3.data.decontamination.filter import Decontaminator

__all__ = ["Decontaminator"]
