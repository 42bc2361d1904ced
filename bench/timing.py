"""How long work takes, on a CPU and on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def thread_clock() -> Callable[[], float]:
    """Return the clock of what a single thread has had of the CPU; of several, that on the wall."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def now(device: torch.device) -> float:
    """Return the time on the wall, once the device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Clock:
    """Measures seconds; on a GPU by events.

    Parameters
    ----------
    device : torch.device
    now : callable
        The clock where that is no GPU.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self.on_gpu = device.type == "cuda"
        self.now = now

    def __call__(self, work: Callable[[], object]) -> float:
        """Return how long some work takes."""
        if not self.on_gpu:
            start = self.now()
            work()
            return self.now() - start
        event: Any = torch.cuda.Event
        begin, end = event(enable_timing=True), event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
