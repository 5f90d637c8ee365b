"""Repairs of HTML, encoding, characters and white space, before any filter sees a text."""

from deepseek_v3.data.preliminary_cleaning.cleaner import PreliminaryCleaner

__all__ = ["PreliminaryCleaner"]
