"""The options of the stage that masks personal data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from deepseek_v3.config.preprocessing.stage import StageConfig

PiiKind = Literal["key", "email", "card", "ip_address", "phone"]
PII_KINDS: tuple[PiiKind, ...] = ("key", "email", "card", "ip_address", "phone")


class PiiConfig(StageConfig):
    """Which `kinds` to mask, and what with: `replacement`, in which `{kind}` is the kind's name in capitals.

    The form, such as `<EMAIL>`, is that of BigCode's corpora (Li et al. 2023, StarCoder). The signs around the name
    must be none that an address, number or key could have, so that masking twice changes nothing.
    """

    kinds: Annotated[tuple[PiiKind, ...], Field(min_length=1)] = PII_KINDS
    replacement: Annotated[str, Field(pattern=r"^[<\[({|#$]+\{kind\}[>\])}|#$]+$")] = "<{kind}>"
