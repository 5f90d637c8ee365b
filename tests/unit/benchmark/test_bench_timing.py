"""What the time of an operation contains, with a clock that moves only when told to."""

from __future__ import annotations

import time

import pytest
import torch

from deepseek_v3.benchmark.timing import median_seconds


class Clock:
    """Stands for the host's clock and for a GPU that computes everything at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock, self.now, self.queued_cycles = self, 0.0, 0

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = clock.now

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) * 1e3

        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: setattr(self, "queued_cycles", cycles))

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_runs_before_a_call_is_not_timed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    found = median_seconds(lambda _: clock.wait(0.25), torch.device(device), before=lambda: clock.wait(8))
    assert found == pytest.approx(0.25)


@pytest.mark.parametrize(("launch", "seconds"), [(1e-6, 0.02), (1e-3, 0.06), (1, 0.2)])
def test_the_gpu_waits_until_all_calls_are_queued(
    launch: float, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 2 GHz, twice as long as 30 calls take to launch, within limits."""
    clock = Clock(monkeypatch)
    median_seconds(lambda _: clock.wait(launch), torch.device("cuda"))
    assert clock.queued_cycles == pytest.approx(2e9 * seconds)
