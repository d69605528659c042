"""A pass over pairs whose numbers are kept for other runs: what is known is read, what is missing worked out."""

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
from lpc_lightning.reference.pair_pass import Ask, ask_of_pairs

WAIT = 300
"""Seconds that several devices wait for another run: longer, and those that wait for the first device give up."""


def shared_pass(
    cache: PairCache,
    pairs: TokenStore,
    places: Iterable[int],
    layout: Layout,
    asking: Callable[[], AbstractContextManager[Ask]],
    trainer: Any,
    title: str,
) -> tuple[np.ndarray, int]:
    """Read the values of some pairs from the cache; ask for those that it does not hold, and keep them.

    Args:
        cache: Of these pairs.
        pairs: The data set, labelled as the data has it.
        places: Which of its pairs; the same on every device, in any order.
        layout: Lays batches out.
        asking: Entered if anything is missing: gets ready what is asked.
        trainer: Whose devices, precision and progress bar are taken.
        title: What stands before the bar.

    Returns:
        (n, m) values in the order of the places' numbers, the same on every device, and of how many pairs they were
        not known before.
    """
    wanted = np.array(sorted(places), dtype=int)
    values, missing = _known(cache, wanted, trainer)
    if not len(missing):
        return values, 0
    with _alone(cache, trainer):
        values, missing = _known(cache, wanted, trainer)
        if len(missing):
            with asking() as ask:
                for found, numbers in ask_of_pairs(pairs, missing.tolist(), layout, ask, trainer, title):
                    values[np.searchsorted(wanted, found)] = numbers
                    if trainer.is_global_zero:
                        _keep(cache, found, numbers)
    # Another run may have added the same pairs first. What a resumed run will find counts for this one, too.
    kept = trainer.strategy.broadcast(cache.read(wanted))
    return np.where(np.isnan(kept), values, kept), len(missing)


def _known(cache: PairCache, wanted: np.ndarray, trainer: Any) -> tuple[np.ndarray, np.ndarray]:
    """What the cache holds, and which of the pairs it does not, as the first device sees it."""
    values = trainer.strategy.broadcast(cache.read(wanted))
    return values, wanted[np.isnan(values[:, 0])]


def _alone(cache: PairCache, trainer: Any) -> AbstractContextManager[None]:
    """Has other runs that miss the same values wait for this one's."""
    if not trainer.is_global_zero:
        return nullcontext()
    return one_at_a_time(cache.folder, None if trainer.world_size == 1 else WAIT)


def _keep(cache: PairCache, places: np.ndarray, values: np.ndarray) -> None:
    try:
        cache.add(places, values)
    except OSError as error:
        rank_zero_warn(
            f"What the policy says of the pairs cannot be kept in {cache.folder}: {error}. This run goes on without; "
            "the next one works it out again. Set data.cache_dir to a folder with room."
        )
