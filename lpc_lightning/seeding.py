"""Random numbers that do not depend on what ran before: each draw belongs to a place in the run.

Fresh weights are drawn by the run's seed, and a training step reseeds from (run seed, epoch, batch, rank). Weights,
Gumbel noise and dropout then come out the same whether the run was resumed, validated in between, or looked at by a
callback.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import AbstractContextManager

import torch


def run_seed() -> int:
    """The run's seed: what `seed_everything` (Lightning) was given, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED") or 0)


def derive(*parts: object) -> int:
    """A seed (63 bits) that belongs to `parts`, the same in every process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def own_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Put the random states of the CPU and of `device` back at the end. Those of other GPUs are not touched."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)
