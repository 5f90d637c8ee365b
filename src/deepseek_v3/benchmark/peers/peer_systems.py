"""The other systems by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from deepseek_v3.benchmark.decode_benchmark import DecodePeer
from deepseek_v3.benchmark.generate_benchmark import GenerationPeer
from deepseek_v3.benchmark.own_generation import GenerationFigures, GenerationTask
from deepseek_v3.benchmark.own_training import TrainingFigures
from deepseek_v3.benchmark.peers.flashmla import FLASH_MLA
from deepseek_v3.config.train_config import RunConfig

TrainPeer = Callable[[RunConfig, int, str, float], TrainingFigures]


def train_torchtitan(config: RunConfig, steps: int, device: str, started: float) -> TrainingFigures:
    """Trains with torchtitan; see `torchtitan_training`."""
    from deepseek_v3.benchmark.peers.torchtitan_training import train_alone

    return train_alone(config, steps, device, started)


def train_transformers(config: RunConfig, steps: int, device: str, started: float) -> TrainingFigures:
    """Trains with Transformers; see `transformers_training`."""
    from deepseek_v3.benchmark.peers.transformers_training import train_alone

    return train_alone(config, steps, device, started)


def generate_with_transformers(task: GenerationTask, folder: Path, tokens: tuple[int, ...]) -> GenerationFigures:
    """Generates with Transformers; see `transformers_generation`."""
    from deepseek_v3.benchmark.peers.transformers_generation import generate

    return generate(task, folder, tokens)


PEERS: dict[str, TrainPeer] = {"torchtitan": train_torchtitan, "transformers": train_transformers}
DECODE_PEERS: dict[str, DecodePeer] = {"flashmla": FLASH_MLA}
GENERATION_PEERS: dict[str, GenerationPeer] = {"transformers": generate_with_transformers}
