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
    kinds = {
        kind: AcceleratorRegistry[kind]["accelerator"] for kind in sorted(AcceleratorRegistry.available_accelerators())
    }
    found = [kind for kind, each in kinds.items() if each.is_available()]
    if name == "gpu":
        known, available = True, bool({"cuda", "mps"} & set(found))
    else:
        known, available = name in kinds, name in found
    if known and not available:
        raise ConfigError(
            f"trainer.accelerator: found {name}, which this machine does not have, expected one of auto, "
            f"{', '.join(found)}. For a CPU take `--trainer configs/trainer/cpu.yaml`."
        )


def default_precision(accelerator: str) -> str:
    """Return bf16-mixed if the device multiplies bfloat16 fast (see `is_bfloat16_fast`), otherwise 32-true."""
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if is_bfloat16_fast("cuda" if on_gpu else "cpu") else "32-true"
