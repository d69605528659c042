"""Description of a machine: processor, versions, load, and the speed of its matrix products."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

SHAPES = ((2048, 2048, 2048), (4096, 4096, 4096), (2048, 576, 1536), (8192, 2048, 5632))
"""(rows, inner, columns) of the products tried: squares, and layers of a 135M and of a 1.1B Llama."""
CUDA_SHAPES = (*SHAPES, (8192, 8192, 8192))
"""The same on a GPU, which needs larger products to reach its peak."""


def describe(device: str) -> dict[str, Any]:
    """Return processor, memory, versions and load."""
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    facts: dict[str, Any] = {
        "processor": cpus[0].partition(":")[2].strip() if cpus else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "features": sorted(name for name in _BF16 if torch.cpu.get_capabilities().get(name)),
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts | {name: version(name) for name in ("torch", "lightning", "transformers", "trl")}


_BF16 = ("avx512_bf16", "amx_bf16")


def peak_flops(device: str, dtype: torch.dtype, seconds: float) -> float:
    """Measure the fastest matrix product of a few shapes, in floating-point operations a second.

    Args:
        device: `cpu` or `cuda`.
        dtype: Type of the factors.
        seconds: About how long to try each shape.
    """
    shapes = CUDA_SHAPES if device == "cuda" else SHAPES
    return max(_rate(shape, device, dtype, seconds) for shape in shapes)


def _rate(shape: tuple[int, int, int], device: str, dtype: torch.dtype, seconds: float) -> float:
    rows, inner, columns = shape
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    right = torch.randn(columns, inner, device=device, dtype=dtype)
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        torch.nn.functional.linear(left, right)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2.0 * rows * inner * columns / best


def main() -> None:
    """`python -m benchmarks.machine cpu 1.0 machine.json`, in a process of its own."""
    device, seconds, output = sys.argv[1:]
    peaks = {name: peak_flops(device, getattr(torch, name), float(seconds)) for name in ("bfloat16", "float32")}
    Path(output).write_text(json.dumps(describe(device) | {"peak_flops": peaks}))


if __name__ == "__main__":
    main()
