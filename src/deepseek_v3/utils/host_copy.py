"""Values that travel from the device to the host while the device runs ahead, and the moment of their arrival."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor


class Moment:
    """The moment at which a device has done the work that it was given so far; a CPU has done it already.

    Creating it waits for nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._seconds = time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Waits for this moment, but not for work that the device was given later."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Moment) -> float:
        """Seconds between two moments of one device; both must have passed."""
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        return earlier._event.elapsed_time(self._event) / 1e3


class HostCopy:
    """A copy of a tensor in CPU memory; from a GPU it is under way, into pinned memory, until `arrival`."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True, copy=True)
        self.arrival = Moment(values.device)

    def read(self) -> list[Any]:
        """Waits for the arrival, and returns the values, nested in lists as the tensor has axes."""
        self.arrival.wait()
        values: list[Any] = self._values.tolist()
        return values
