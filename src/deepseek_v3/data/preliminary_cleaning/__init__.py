"""Repairs of encoding, HTML, characters and white space, before anything judges a text."""

from deepseek_v3.data.preliminary_cleaning.cleaner import PreliminaryCleaner

__all__ = ["PreliminaryCleaner"]
