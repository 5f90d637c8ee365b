"""The other systems by name."""

from __future__ import annotations

from collections.abc import Callable

from deepseek_v3.benchmark.decode_benchmark import DecodePeer
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


PEERS: dict[str, TrainPeer] = {"torchtitan": train_torchtitan, "transformers": train_transformers}
DECODE_PEERS: dict[str, DecodePeer] = {"flashmla": FLASH_MLA}
