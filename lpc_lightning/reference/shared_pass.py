"""A pass over pairs with a cache: stored values are read, missing values are computed and stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lpc_lightning.data import Layout
from lpc_lightning.data.tokenization.cache_lock import one_at_a_time
from lpc_lightning.data.tokenization.tokens import TokenStore
from lpc_lightning.reference.pair_cache import PairCache
from lpc_lightning.reference.pair_pass import PairFunction, compute_over_pairs

WAIT = 300
"""Seconds that a run on several devices waits for another run. The other devices wait too, and would time out."""


def shared_pass(
    cache: PairCache,
    pairs: TokenStore,
    indices: Iterable[int],
    layout: Layout,
    open_function: Callable[[], AbstractContextManager[PairFunction]],
    trainer: Any,
    title: str,
) -> tuple[np.ndarray, int]:
    """Read values of pairs from the cache, and compute and store those that it lacks.

    Args:
        cache: Cache of the values of these pairs.
        pairs: The data set, with the labels of the data and without label noise.
        indices: Indices of the pairs, in any order, the same on every device.
        layout: Function from pairs to a batch.
        open_function: Context manager that yields the function to compute. It is entered only if values are missing.
        trainer: Trainer whose devices, precision and progress bar are used.
        title: Text before the progress bar.

    Returns:
        (n, m) values in increasing order of the indices, the same on every device, and the number of pairs that were
        not in the cache.
    """
    requested = np.array(sorted(indices), dtype=int)
    values, missing = _read_cached(cache, requested, trainer)
    if not len(missing):
        return values, 0
    with _lock(cache, trainer):
        values, missing = _read_cached(cache, requested, trainer)
        if len(missing):
            with open_function() as function:
                parts = compute_over_pairs(pairs, missing.tolist(), layout, function, trainer, title)
                for computed, part in parts:
                    values[np.searchsorted(requested, computed)] = part
                    if trainer.is_global_zero:
                        _store(cache, computed, part)
    # Another run may have stored the same pairs first. Its values count here too, because a resumed run will read them.
    stored = trainer.strategy.broadcast(cache.read(requested))
    return np.where(np.isnan(stored), values, stored), len(missing)


def _read_cached(cache: PairCache, requested: np.ndarray, trainer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Read the first device's cached values, NaN if missing, and return them with the indices of the missing pairs."""
    values = trainer.strategy.broadcast(cache.read(requested))
    return values, requested[np.isnan(values[:, 0])]


def _lock(cache: PairCache, trainer: Any) -> AbstractContextManager[None]:
    """Lock the cache, so that other runs wait for this run's values. Only the first device takes the lock."""
    if not trainer.is_global_zero:
        return nullcontext()
    return one_at_a_time(cache.folder, None if trainer.world_size == 1 else WAIT)


def _store(cache: PairCache, indices: np.ndarray, values: np.ndarray) -> None:
    try:
        cache.add(indices, values)
    except OSError as error:
        rank_zero_warn(
            f"The values of the pairs cannot be stored in {cache.folder}: {error}. This run continues without the "
            "cache, and the next run computes them again. Set data.cache_dir to a folder with free space."
        )
