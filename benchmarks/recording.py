"""Record of one run: the end, loss and margin of each step, and the peak memory of the process."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Recording:
    """Lists run over the optimizer steps; a side fills it and writes it as JSON."""

    ended: list[float] = field(default_factory=list)
    """Wall clock at the end of each step, in seconds. The time between two ends is a step with all that belongs to it:
    data, logging, schedules."""
    cpu: list[float] = field(default_factory=list)
    """CPU seconds of all threads of the process so far, at the same moments. They depend less on the load of the
    machine."""
    loss: list[float] = field(default_factory=list)
    margin: list[float] = field(default_factory=list)
    """Mean reward margin of the step's pairs."""
    pairs: list[list[str]] = field(default_factory=list)
    """Ids of the step's pairs."""
    shares: list[dict[str, float]] = field(default_factory=list)
    """Seconds of each step by part, if requested."""
    reference: dict[str, Any] = field(default_factory=lambda: {"in_step": True, "pairs": 0, "seconds": 0.0})
    """Whether a step runs the reference; and over how many pairs the reference went before the first step, in how many
    seconds."""
    facts: dict[str, Any] = field(default_factory=dict)

    def end_step(self, loss: float, margin: float, pairs: list[str]) -> None:
        """Record the end of a step.

        Args:
            loss: Its loss.
            margin: Its mean reward margin.
            pairs: Ids of its pairs.
        """
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        used = os.times()
        self.ended.append(time.perf_counter())
        self.cpu.append(used.user + used.system)
        self.loss.append(loss)
        self.margin.append(margin)
        self.pairs.append(pairs)

    def write(self, path: str | Path) -> None:
        """Add the peaks, and write the file."""
        self.facts["peak_bytes"] = peak_bytes()
        self.facts["gpu_peak_bytes"] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        self.facts["threads"] = torch.get_num_threads()
        Path(path).write_text(json.dumps(asdict(self)))


def peak_bytes() -> int:
    """Return the largest resident size of this process so far, in bytes.

    From /proc: `getrusage` also includes the size of the parent process.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM: the benchmark runs on Linux only.")
