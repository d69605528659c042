"""Step times on the device's own time line: nothing waits for the device while a step is measured."""

from __future__ import annotations

import time
from itertools import pairwise

import torch


class StepClock:
    """Marks the ends of steps; on CUDA by events, which are read after the run."""

    def __init__(self, device: str) -> None:
        """Start without marks.

        Args:
            device: `cpu` or `cuda`.
        """
        self._cuda = device == "cuda"
        self._events: list[torch.cuda.Event] = []
        self.host: list[float] = []
        """Seconds of the host's clock at each mark. A launch that compiles holds up the host."""

    def mark(self) -> None:
        """Mark the end of a step."""
        self.host.append(time.perf_counter())
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)

    def seconds(self) -> list[float]:
        """Return the seconds between each mark and the next one."""
        if not self._cuda:
            return [end - start for start, end in pairwise(self.host)]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(self._events)]
