"""The shapes that this package ships for comparisons, and how a run of a benchmark follows from one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from deepseek_v3.config.loading import load_config
from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.utils.errors import ConfigError

Precision = Literal["bf16", "fp8"]
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp8")

INTERVAL = 5  # steps of one rate; the first interval compiles and lets the allocator settle, so it is left out

_FOLDER = Path(__file__).parent / "shapes"

_SCHEDULED = 10  # times as many steps as are timed, so that the measured ones are the first of a longer run


def shape_names() -> list[str]:
    """The names of the shipped shapes."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def shape_file(name: str) -> Path:
    """The file of a shipped shape, or the run's YAML file that `name` is.

    Raises ConfigError, listing the shapes, for anything else.
    """
    shipped = _FOLDER / f"{name}.yaml"
    if name in shape_names():
        return shipped
    if not Path(name).is_file():
        raise ConfigError(f"--shape {name}: expected {' or '.join(shape_names())}, or a run's YAML file")
    return Path(name)


def main_model(shape: str) -> ModelConfig:
    """The model of a shape without its prediction layers. Raises ConfigError for a shape that cannot be used."""
    model = load_config(shape_file(shape)).model
    return model.model_copy(update={"num_nextn_predict_layers": 0})


def run_config(
    shape: str, folder: Path, steps: int, batch: int | None, precision: Precision, overrides: Sequence[str]
) -> RunConfig:
    """The config of a run that trains a shape on one device and leaves everything but its tokens in `folder`.

    It reports after the first step and after every `INTERVAL` steps, and saves and validates nothing within
    `steps`. `batch` is the number of sequences of a step, at once; None leaves it to the shape.

    Raises ConfigError for a shape or an override that cannot be used, or a layout of several devices.
    """
    path = shape_file(shape)
    sizes = [] if batch is None else [f"training.global_batch_size={batch}", f"parallel.micro_batch_size={batch}"]
    chosen = [*sizes, f"parallel.precision={precision}", *overrides]
    config = load_config(path, chosen)
    if config.parallel.precision != precision:
        raise ConfigError(
            f"--set parallel.precision={config.parallel.precision}: a benchmark takes the precisions of its runs "
            "from --precision"
        )
    config = load_config(
        path,
        [
            *chosen,
            f"training.total_tokens={_SCHEDULED * steps * config.tokens_per_step}",
            "training.evaluation.interval_steps=0",
            "checkpoint.interval_steps=0",
            f"checkpoint.directory={folder}/checkpoints",
            f"logging.directory={folder}/run",
            f"logging.interval_steps={INTERVAL}",
            "logging.tensorboard=false",
        ],
    )
    if config.parallel.world_size != 1 or config.parallel.layout == "auto":
        raise ConfigError(f"--shape {shape}: expected a layout of one device, such as those of the shipped shapes")
    return config
