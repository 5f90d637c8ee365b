"""What the published filters look for in a line; the expressions mean the same to Python and to Arrow."""

from __future__ import annotations

BULLETS = ("•", "-")
ELLIPSES = ("...", "…")
# C4. Phrases are found in any case of ASCII.
FINAL_MARKS = (".", "?", "!", '"', "'")
CITATION = r"\[(?:[0-9]*|edit|citation needed)\]"
LOREM_IPSUM = ("lorem ipsum",)
JAVASCRIPT = ("javascript",)
CURLY_BRACKET = ("{",)
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
