"""Random seeds that do not depend on what ran before.

Fresh weights are drawn from the run's seed. A training step reseeds from (run seed, epoch, batch, rank). So weights,
Gumbel noise and dropout are the same if the run is resumed, if validation runs in between, or if a callback draws
random numbers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from lightning.pytorch.utilities.seed import isolate_rng

SEED_VARIABLE = "PL_GLOBAL_SEED"
"""Environment variable with the run's seed. `seed_everything` sets it, and `seed_everything: true` reads it."""


def run_seed() -> int:
    """Return the seed that Lightning's `seed_everything` has set, or 0."""
    return int(os.environ.get(SEED_VARIABLE) or 0)


@contextmanager
def seeded_run(seed: int) -> Iterator[None]:
    """Make `seed` the run's seed within the block. Afterwards, random states and the run's seed are as before."""
    before = os.environ.get(SEED_VARIABLE)
    os.environ[SEED_VARIABLE] = str(seed)
    try:
        with isolate_rng():
            yield
    finally:
        if before is None:
            del os.environ[SEED_VARIABLE]
        else:
            os.environ[SEED_VARIABLE] = before


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
