"""The events of a run, in `events.jsonl` beside its metrics: starts, anomalies, rollbacks, and how it ended."""

from __future__ import annotations

import json
import math
import platform
import socket
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from deepseek_v3 import __version__
from deepseek_v3.config.parallel_config import ParallelConfig
from deepseek_v3.data.tokens.mixture import MixtureLoader
from deepseek_v3.data.tokens.source import RunTokens
from deepseek_v3.training.schedule import ScheduledStep
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.monitoring import set_aside

FILE = "events.jsonl"
_EXCERPT = 80  # characters of each document
_log = get_logger("Metrics")


class EventLog:
    """Appends events to `events.jsonl`, each `{"time", "event", "step", …}`, on the rank that `writes`.

    Events are kept when a run resumes, because they happened. A file that cannot be written is reported once, and
    never ends the run.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self._path, self.writes, self._is_failing = folder / FILE, writes, False

    def begin(self, step: int, environment: Mapping[str, Any]) -> None:
        """Writes that a run starts after `step`; one from step 0 sets the events of a previous run aside."""
        if self.writes and step == 0 and self._path.exists():
            set_aside(self._path)
        self.write("start", step, **environment)

    def write(self, event: str, step: int, **fields: Any) -> None:
        """Appends one event after `step`; NaN and infinity become null."""
        if not self.writes:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        record = {"time": now, "event": event, "step": step, **fields}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(record), ensure_ascii=False) + "\n")
        except OSError as error:
            if not self._is_failing:
                _log.warning(f"{self._path}: cannot be written: {error.strerror}; training continues")
            self._is_failing = True


def environment(device: torch.device, parallel: ParallelConfig) -> dict[str, Any]:
    """What a run starts on: host, device, number of ranks, and versions."""
    return {
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "ranks": parallel.world_size,
        "versions": {
            "deepseek_v3": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        },
    }


def samples_of(step: ScheduledStep, loader: MixtureLoader, tokens: RunTokens) -> list[dict[str, Any]]:
    """Where each sample of a step comes from, so that data can be blamed for an anomaly.

    Each has its number `sample` in the run, its `source` (empty for a run with one), its `epoch` over it, its
    `first_token` in the train split, its `files` as `FILE:FIRST-END` in tokens, and the beginning of each of its
    `documents`. Documents of tokens that can no longer be read are left out.
    """
    numbers = range(step.first_sample, step.first_sample + step.num_samples)
    return [_sample(number, loader, tokens) for number in numbers]


def _sample(number: int, loader: MixtureLoader, tokens: RunTokens) -> dict[str, Any]:
    place, length = loader.place(number), loader.sequence_length + 1
    found = {
        "sample": number,
        "source": place.source.name,
        "epoch": place.epoch,
        "first_token": place.first_token,
        "files": place.source.source.places("train", place.first_token, length),
    }
    try:
        ids = place.source.source.read("train", place.first_token, length).tolist()
    except DataError:
        return found
    return {**found, "documents": _documents(ids, tokens)}


def _documents(ids: list[int], tokens: RunTokens) -> list[str]:
    """The first characters of each document in a sample; the first document may have begun before it."""
    starts = [0, *(index + 1 for index, id_ in enumerate(ids[:-1]) if id_ == tokens.end_of_text)]
    tokenizer = tokens.load_tokenizer()
    pieces = [ids[start:end] for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]
    return [tokenizer.decode(piece[:_EXCERPT], skip_markers=True)[:_EXCERPT] for piece in pieces]


def _finite(value: Any) -> Any:
    """The value with null for every NaN and infinity inside it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list) else value
