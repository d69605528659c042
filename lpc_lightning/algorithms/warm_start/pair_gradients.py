"""The pass over the pairs of a warm start. Runs share its values, which depend on neither labels nor algorithm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lpc_lightning.algorithms.warm_start.linearized_policy import make_rows, swap_labels
from lpc_lightning.data import PreferenceDataModule
from lpc_lightning.policy import CausalPolicy, policy_fingerprint
from lpc_lightning.policy.causal import BatchForward
from lpc_lightning.policy.eval_mode import eval_mode
from lpc_lightning.reference.cached import computation_key
from lpc_lightning.reference.live import Reference
from lpc_lightning.reference.pair_cache import PairCache
from lpc_lightning.reference.pair_pass import PairFunction, compute_over_pairs
from lpc_lightning.reference.shared_pass import shared_pass
from lpc_lightning.types import PreferenceBatch

if TYPE_CHECKING:
    from lpc_lightning.algorithms.policy_module import PolicyModule


def labelled_rows(module: PolicyModule, data: PreferenceDataModule, indices: Sequence[int]) -> tuple[Tensor, int]:
    """Compute the rows of training pairs under the module's current policy, with the labels of training.

    Args:
        module: The module. Its policy computes the rows that are not in the cache.
        data: The data.
        indices: (n,) indices of the pairs.

    Returns:
        (n, 5 d + 4) rows on the module's device, in the order of `indices` (see `make_rows`), and the number of pairs
        that were not in the cache.
    """
    trainer: Any = module.trainer
    pairs, policy = data.pairs["train"], module.policy
    key = computation_key(policy_fingerprint(policy, adapter=True), policy, trainer)
    cache = PairCache("warm_start", 5 * policy.width + 4, key, pairs, data.cache_dir, np.float32)
    open_function = partial(_open_rows, policy)
    values, computed = shared_pass(cache, pairs, indices, data.make_layout(), open_function, trainer, "warm start")
    rows = torch.from_numpy(values[np.searchsorted(np.sort(indices), indices)])
    swaps = torch.from_numpy((data.training_pairs.flipped != pairs.flipped)[list(indices)])
    return swap_labels(rows, swaps).to(module.device), computed


def reference_logps(reference: Reference, data: PreferenceDataModule, indices: Sequence[int], trainer: Any) -> Tensor:
    """Return (n, 2) log-probabilities of both answers under the reference, with the labels of training."""
    pairs = data.training_pairs
    cached = [pairs[index].reference_logps for index in indices]
    if None not in cached:
        return torch.tensor(cached, dtype=torch.float32, device=trainer.strategy.root_device)
    rows: dict[int, np.ndarray] = {}

    def function(batch: PreferenceBatch) -> Tensor:
        return reference.logps(batch).view(2, -1).T

    parts = compute_over_pairs(pairs, indices, data.make_layout(), function, trainer, "warm start, reference")
    for computed, logps in parts:
        rows |= dict(zip(computed.tolist(), logps, strict=True))
    ordered = torch.from_numpy(np.stack([rows[index] for index in indices]))
    return ordered.to(trainer.strategy.root_device, torch.float32)


@contextmanager
def _open_rows(policy: CausalPolicy) -> Iterator[PairFunction]:
    with eval_mode(policy):
        yield partial(_rows, policy)


@torch.no_grad()
def _rows(policy: CausalPolicy, batch: PreferenceBatch) -> Tensor:
    forward: BatchForward = policy(batch)
    return make_rows(forward.states, *forward.first_order(), batch)
