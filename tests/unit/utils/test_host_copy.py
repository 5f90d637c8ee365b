"""Copies to the host, and the moments of their arrival: on the CPU at once, on a GPU when its events say so."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from deepseek_v3.utils.host_copy import HostCopy, Moment

CPU = torch.device("cpu")


def test_a_copy_holds_the_values_of_its_moment() -> None:
    values = torch.tensor([1.5, float("inf")])
    copy = HostCopy(values)
    values.zero_()
    assert copy.read() == copy.read() == [1.5, float("inf")]


def test_seconds_between_moments_of_the_cpu() -> None:
    start = Moment(CPU)
    time.sleep(0.01)
    end = Moment(CPU)
    end.wait()
    assert 0.01 <= end.seconds_since(start) < 10


def test_moments_of_a_gpu_are_events(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.calls: list[Any] = []
            events.append(self)

        def record(self, stream: str) -> None:
            self.calls.append(stream)

        def synchronize(self) -> None:
            self.calls.append("synchronize")

        def elapsed_time(self, later: Event) -> float:
            return 1500.0 * (events.index(later) - events.index(self))  # milliseconds

    events: list[Event] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    start, end = (Moment(torch.device("cuda", 1)) for _ in range(2))
    assert [event.calls for event in events] == [["stream of cuda:1"]] * 2
    assert end.seconds_since(start) == 1.5
    end.wait()
    assert [len(event.calls) for event in events] == [1, 2]
