"""From raw text to a trained, exported and generating DeepSeek-V3-style model."""

__version__ = "0.1.0"
