"""The pass over the pairs of a warm start. What it finds does not depend on labels or algorithm, and is shared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lpc_lightning.algorithms.warm_start.linearized_policy import relabelled, row_of
from lpc_lightning.data import PreferenceDataModule
from lpc_lightning.policy import CausalPolicy, fingerprint
from lpc_lightning.reference.cached import how_computed
from lpc_lightning.reference.live import Reference
from lpc_lightning.reference.pair_cache import PairCache
from lpc_lightning.reference.pair_pass import Ask, ask_of_pairs
from lpc_lightning.reference.shared_pass import shared_pass
from lpc_lightning.types import PreferenceBatch

if TYPE_CHECKING:
    from lpc_lightning.algorithms.policy_module import PolicyModule


def labelled_rows(module: PolicyModule, data: PreferenceDataModule, indices: Sequence[int]) -> tuple[Tensor, int]:
    """What the policy says of training pairs, labelled as they are trained on.

    Args:
        module: Its policy, as it is now.
        data: The data.
        indices: (n,) of the pairs.

    Returns:
        (n, 5 d + 4) rows on the module's device, in the order of `indices` (see `row_of`), and of how many pairs they
        were not known before.
    """
    trainer: Any = module.trainer
    pairs, policy = data.pairs["train"], module.policy
    key = how_computed(fingerprint(policy, adapter=True), policy, trainer)
    cache = PairCache("warm_start", 5 * policy.width + 4, key, pairs, data.cache_dir, np.float32)
    asking = partial(_asking, policy)
    found, computed = shared_pass(cache, pairs, indices, data.make_layout(), asking, trainer, "warm start")
    rows = torch.from_numpy(found[np.searchsorted(np.sort(indices), indices)])
    swaps = torch.from_numpy((data.training_pairs.flipped != pairs.flipped)[list(indices)])
    return relabelled(rows, swaps).to(module.device), computed


def reference_logps(reference: Reference, data: PreferenceDataModule, indices: Sequence[int], trainer: Any) -> Tensor:
    """(n, 2) log-probabilities of both answers under the reference, labelled as they are trained on."""
    pairs = data.training_pairs
    known = [pairs[place].reference_logps for place in indices]
    if None not in known:
        return torch.tensor(known, dtype=torch.float32, device=trainer.strategy.root_device)
    rows: dict[int, np.ndarray] = {}

    def ask(batch: PreferenceBatch) -> Tensor:
        return reference.logps(batch).view(2, -1).T

    for found, logps in ask_of_pairs(pairs, indices, data.make_layout(), ask, trainer, "warm start, reference"):
        rows |= dict(zip(found.tolist(), logps, strict=True))
    asked = torch.from_numpy(np.stack([rows[place] for place in indices]))
    return asked.to(trainer.strategy.root_device, torch.float32)


@contextmanager
def evaluating(policy: CausalPolicy) -> Iterator[None]:
    """Without an adapter's dropout."""
    modes = [(part, part.training) for part in policy.modules()]
    policy.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _asking(policy: CausalPolicy) -> Iterator[Ask]:
    with evaluating(policy):
        yield partial(_rows, policy)


@torch.no_grad()
def _rows(policy: CausalPolicy, batch: PreferenceBatch) -> Tensor:
    reading = policy.read(batch)
    return row_of(reading.states, *reading.first_order(), batch)
