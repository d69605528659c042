"""Settings that depend on the machine: its accelerators, its threads, and its precision."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.accelerators import AcceleratorRegistry

from lpc_lightning.errors import ConfigError
from lpc_lightning.policy.precision import is_bfloat16_fast

NARROW = 64
"""Width of a tiny policy up to which one thread computes it."""


def is_narrow(policy: Any) -> bool:
    """Return whether a policy is computed by one thread, unless the user sets the number of threads.

    The products of a tiny policy are too small to share: two threads are less than a third faster, and several times
    slower beside one busy process (benchmarks/neighbour.py).
    """
    return policy.class_path.endswith(".TinyPolicy") and policy.init_args.width <= NARROW


def check_accelerator(name: Any) -> None:
    """Check that this machine has the accelerator. Names that Lightning does not know are left to it.

    Args:
        name: `trainer.accelerator`.

    Raises:
        ConfigError: The machine has no such accelerator.
    """
    kinds, found = AcceleratorRegistry.available_accelerators(), _accelerators()
    if name == "gpu":
        known, available = True, bool({"cuda", "mps"} & set(found))
    else:
        known, available = name in kinds, name in found
    if known and not available:
        raise ConfigError(
            f"trainer.accelerator: found {name}, which this machine does not have, expected one of auto, "
            f"{', '.join(found)}. For a CPU take `--trainer configs/trainer/cpu.yaml`."
        )


def check_devices(devices: Any, accelerator: Any) -> None:
    """Check the number of processes on a CPU. That of other devices is left to Lightning.

    Args:
        devices: `trainer.devices`.
        accelerator: `trainer.accelerator`, which this machine has.

    Raises:
        ConfigError: It is neither a positive integer nor `auto`.
    """
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and _accelerators() == ["cpu"])
    text = str(devices)
    if on_cpu and text != "auto" and not (text.isdecimal() and int(text) > 0):
        raise ConfigError(
            f"trainer.devices: found {text}, expected a number of processes from 1 on, or auto: the accelerator is "
            "the CPU."
        )


def _accelerators() -> list[str]:
    """Return the names of the accelerators that this machine has."""
    kinds = sorted(AcceleratorRegistry.available_accelerators())
    return [kind for kind in kinds if AcceleratorRegistry[kind]["accelerator"].is_available()]


def default_precision(accelerator: str) -> str:
    """Return bf16-mixed if the device multiplies bfloat16 fast (see `is_bfloat16_fast`), otherwise 32-true."""
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if is_bfloat16_fast("cuda" if on_gpu else "cpu") else "32-true"
