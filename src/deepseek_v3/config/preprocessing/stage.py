"""What the options of every stage of the data pipeline have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from deepseek_v3.config.base import Real, Section


class StageConfig(Section):
    """`alarm`: the share of its documents that a stage may remove before the run warns of it."""

    alarm: Annotated[Real, Field(gt=0, le=1)] = 0.5
