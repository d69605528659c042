"""What the profiler saw in a few steady steps: launches, waits for the device, and where the time went."""

from __future__ import annotations

import gzip
import json
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile, record_function

from lpc_lightning.callbacks.step_parts import covered

WINDOW = "measured steps"
SYNCHRONizING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
READING = ("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero")
"""Operations that wait for a value of the device."""
TOP = 15


class StepProfiler(Callback):
    """Profiles some steps after the warm-up."""

    def __init__(self, warmup: int, steps: int, trace: Path) -> None:
        """Keep the settings.

        Args:
            warmup: Steps before the first profiled one.
            steps: Steps to profile.
            trace: File for the trace, compressed.
        """
        self.warmup, self.steps, self.trace = warmup, steps, trace
        self.summary: dict[str, Any] = {}
        self._profile: Any = None
        self._taken = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the profiler in front of the first step that counts."""
        if self._taken == self.warmup:
            activities = [ProfilerActivity.CPU]
            if pl_module.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
                torch.cuda.synchronize()
            self._profile = profile(activities=activities)
            self._profile.start()
            self._window = record_function(WINDOW)
            self._window.__enter__()
            self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the profiler behind the last one."""
        self._taken += 1
        if self._taken != self.warmup + self.steps:
            return
        self._window.__exit__(None, None, None)
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        wall = time.perf_counter() - self._start
        self._profile.stop()
        plain = self.trace.with_suffix("")
        self._profile.export_chrome_trace(str(plain))
        content = plain.read_text()
        with gzip.open(self.trace, "wt", compresslevel=4) as file:
            file.write(content)
        plain.unlink()
        self.summary = summarize(json.loads(content)["traceEvents"], self.steps, wall)
        trainer.should_stop = True


def summarize(events: Iterable[dict[str, Any]], steps: int, wall: float) -> dict[str, Any]:
    """Count and add up the events of a trace in Chrome's format.

    Args:
        events: The trace's events; times in microseconds. One of them is `WINDOW`, around all steps.
        steps: Steps in the window.
        wall: Seconds from the beginning of the window until the device was idle again.

    Returns:
        Numbers a step: launches, synchronizations, copies that wait, operations that read a value; the share of the
        wall clock in which a kernel ran; the longest kernels and CPU operations.
    """
    events = [event for event in events if event.get("ph") == "X"]
    window = next(event for event in events if event["name"] == WINDOW and event["cat"] == "user_annotation")
    start, end = window["ts"], window["ts"] + window["dur"]
    host = [event for event in events if event["cat"] in ("cuda_runtime", "cuda_driver", "cpu_op")]
    host = [event for event in host if start <= event["ts"] <= end]
    runtime = [event for event in host if event["cat"] != "cpu_op"]
    operations = [event for event in host if event["cat"] == "cpu_op"]
    kernels = [event for event in events if event["cat"] == "kernel"]
    copies = [event for event in events if event["cat"] == "gpu_memcpy"]
    busy = covered((event["ts"], event["ts"] + event["dur"]) for event in kernels)
    return {
        "steps": steps,
        "wall_ms": 1e3 * wall / steps,
        "busy_ms": busy / 1e3 / steps,
        "busy_share": busy / 1e6 / wall,
        "kernels": len(kernels) / steps,
        "launches": sum("Launch" in event["name"] for event in runtime) / steps,
        "graph_launches": sum("GraphLaunch" in event["name"] for event in runtime) / steps,
        "synchronizations": sum(event["name"].startswith(SYNCHRONizING) for event in runtime if _waits(event)) / steps,
        "copies": len(copies) / steps,
        "pageable_copies": sum("Pageable" in event["name"] for event in copies) / steps,
        "reads": {name: sum(event["name"] == name for event in operations) / steps for name in READING},
        "operations": len(operations) / steps,
        "top_kernels": _top(kernels, {id(event): event["dur"] for event in kernels}, steps),
        "top_operations": _top(operations, _own_time(operations), steps),
    }


def _waits(event: dict[str, Any]) -> bool:
    """Return whether an operation waits. cudaMemcpyAsync and the like, whose names begin alike, do not."""
    return "Async" not in event["name"]


def _own_time(operations: list[dict[str, Any]]) -> dict[int, float]:
    """Return the microseconds of each operation without those that it calls, by id of the event."""
    own = {id(event): float(event["dur"]) for event in operations}
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in sorted(operations, key=lambda event: (event["ts"], -event["dur"])):
        stack = threads[event["tid"]]
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"]:
            stack.pop()
        if stack:
            own[id(stack[-1])] -= event["dur"]
        stack.append(event)
    return own


def _top(events: list[dict[str, Any]], durations: dict[int, float], steps: int) -> list[dict[str, Any]]:
    """Return the names with the most time, with milliseconds and calls of a step."""
    times: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in events:
        times[event["name"]] += durations[id(event)]
        calls[event["name"]] += 1
    names = sorted(times, key=lambda name: -times[name])[:TOP]
    return [{"name": name[:120], "ms": times[name] / 1e3 / steps, "calls": calls[name] / steps} for name in names]
