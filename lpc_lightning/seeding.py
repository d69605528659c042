"""Random seeds that do not depend on what ran before.

Fresh weights are drawn from the run's seed. A training step reseeds from (run seed, epoch, batch, rank). So weights,
Gumbel noise and dropout are the same if the run is resumed, if validation runs in between, or if a callback draws
random numbers.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import AbstractContextManager

import torch


def run_seed() -> int:
    """Return the seed that Lightning's `seed_everything` has set, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED") or 0)


def derive(*parts: object) -> int:
    """Return a 63-bit seed derived from `parts`. It is the same in every process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_draws(seed: int, device: torch.device) -> None:
    """Seed the random numbers of a device and of the CPU.

    `torch.manual_seed` alone would also queue each seed, with a stack trace, for kinds of GPUs that the run never uses.
    That takes milliseconds of each step, and memory until the end.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


def own_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Put the random states of the CPU and of `device` back at the end. Those of other GPUs are not touched."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)
