"""Pairs of each batch on each device, and loaders that a resumed run continues after its last batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from lpc_lightning.data.batch_order.base import BatchOrder, OrderedPairs, Shuffled
from lpc_lightning.data.sources.rows import DataError
from lpc_lightning.data.tokenization.tokens import TokenStore
from lpc_lightning.seeding import derive
from lpc_lightning.types import PreferenceBatch, TokenizedPair

NEW_RUN = "start a new fit from the checkpoint's weights, its latent included (`--policy TrainedPolicy`)"


class TrainingBatches(Sampler[list[int]]):
    """Shuffled batches of one epoch. The order is a function of (seed, epoch) only. Each device takes every n-th pair.

    If the number of pairs is no multiple of the number of devices, the first pairs are used twice in the epoch. So all
    devices take the same number of steps.
    """

    def __init__(
        self,
        pairs: OrderedPairs,
        batch_size: int,
        seed: int,
        rank: int = 0,
        devices: int = 1,
        order: BatchOrder | None = None,
        repeats: bool = False,
    ) -> None:
        """Plan the batches of a device.

        Args:
            pairs: The training pairs.
            batch_size: Number of pairs in a batch of this device. The last batch of an epoch may be smaller.
            seed: Seed of the order.
            rank: Index of this device.
            devices: Number of devices.
            order: Order of the pairs in an epoch. None: `Shuffled`.
            repeats: True if all epochs have the batches of the first one, as `trainer.overfit_batches` needs.
        """
        self.pairs, self.batch_size, self.seed = pairs, batch_size, seed
        self.rank, self.devices = rank, devices
        self.order = Shuffled() if order is None else order
        self.repeats = repeats
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch. The trainer calls this before each epoch."""
        self.epoch = epoch

    @property
    def sizes(self) -> list[int]:
        """Number of pairs in each batch of an epoch."""
        share = math.ceil(len(self.pairs) / self.devices)
        return [min(self.batch_size, share - start) for start in range(0, share, self.batch_size)]

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        mine = self._order(self.epoch)[self.rank :: self.devices]
        starts = range(self.start * self.batch_size, len(mine), self.batch_size)
        return iter([mine[start : start + self.batch_size] for start in starts])

    def all_devices(self, epoch: int) -> list[list[int]]:
        """Return the batches of an epoch on all devices."""
        order = self._order(epoch)
        mine = [order[rank :: self.devices] for rank in range(self.devices)]
        size = self.batch_size
        return [one[start : start + size] for one in mine for start in range(0, len(one), size)]

    def first(self, batches: int, epoch: int) -> list[int]:
        """Return the pairs of the first batches of an epoch, on all devices."""
        return self._order(epoch)[: batches * self.batch_size * self.devices]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive("order", self.seed, 0 if self.repeats else epoch))
        count = len(self.pairs)
        shuffled = torch.randperm(count, generator=generator).tolist()
        share = math.ceil(count / self.devices)
        filled = [shuffled[place % count] for place in range(share * self.devices)]
        return self.order.arrange(filled, self.pairs, self.batch_size, self.devices, generator)


def next_to_each_other(prompts: Sequence[Hashable]) -> list[int]:
    """Return the indices of pairs, those of one prompt next to each other, at the place of the first of them."""
    first: dict[Hashable, int] = {}
    for index, prompt in enumerate(prompts):
        first.setdefault(prompt, index)
    return sorted(range(len(prompts)), key=lambda index: first[prompts[index]])


class EvaluationBatches(Sampler[list[int]]):
    """Batches that use each pair once, in order. All devices have the same number of batches, of nearly equal size."""

    def __init__(self, order: Sequence[int], batch_size: int, rank: int = 0, devices: int = 1) -> None:
        """Plan the batches of a device, which takes a part of the order.

        If some devices have one pair more than others, a batch may have 2 pairs although `batch_size` is 1.

        Args:
            order: Indices of the pairs of all devices.
            batch_size: Largest number of pairs in a batch.
            rank: Index of this device.
            devices: Number of devices.

        Raises:
            DataError: There are more devices than pairs.
        """
        pairs = len(order)
        if pairs < devices:
            raise DataError(
                f"evaluation: found {pairs} pairs for {devices} devices, expected at least one for each. Use fewer "
                "devices or more validation (test) pairs."
            )
        mine = order[pairs * rank // devices : pairs * (rank + 1) // devices]
        batches = min(math.ceil(math.ceil(pairs / devices) / batch_size), pairs // devices)
        bounds = [len(mine) * number // batches for number in range(batches + 1)]
        self.batches = [list(mine[start:end]) for start, end in pairwise(bounds)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class PreferenceLoader:
    """Loader of batches of tokenized pairs. It wraps a `DataLoader`, so that Lightning does not replace its sampler."""

    def __init__(
        self,
        pairs: Sequence[TokenizedPair],
        batches: TrainingBatches | EvaluationBatches,
        layout: Callable[[Sequence[TokenizedPair]], PreferenceBatch],
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Build the loader.

        Args:
            pairs: Tokenized pairs.
            batches: Pairs of each batch.
            layout: Function that converts the pairs of a batch to tensors.
            num_workers: Number of processes that prepare batches in advance. 0: the training process prepares them.
            pin_memory: True to copy batches to page-locked memory, for a GPU.
        """
        self.loader: DataLoader[Any] = DataLoader(
            pairs,  # type: ignore[arg-type]  # a Sequence is a map-style data set
            batch_sampler=batches,
            collate_fn=layout,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[PreferenceBatch]:
        return iter(self.loader)


class TrainingLoader(PreferenceLoader):
    """Loader of training batches that can stop within an epoch and continue with the next batch.

    Its state is part of the checkpoint. The trainer calls `set_epoch` on its sampler.
    """

    def __init__(self, pairs: Sequence[TokenizedPair], batches: TrainingBatches, *layout: Any, **options: Any) -> None:
        """Build the loader. See `PreferenceLoader` for the arguments."""
        super().__init__(pairs, batches, *layout, **options)
        self.sampler = batches
        self._data = pairs.fingerprint if isinstance(pairs, TokenStore) else ""
        self._noise = pairs.noise if isinstance(pairs, TokenStore) else ""
        self._flips = pairs.flips_digest if isinstance(pairs, TokenStore) else ""
        self._epoch = self._taken = 0
        self._pairs = pairs
        self._weights_of, self._weights_in_order = -1, np.zeros(0)
        self._taken_before: dict[int, int] = {}

    def weight_sum(self, start: int, end: int) -> float | None:
        """Return the sum of the weights of the pairs in batches `start` to `end` - 1 of this epoch, on all devices.

        None if the data has no weights.
        """
        weights = self._pairs.weights if isinstance(self._pairs, TokenStore) else None
        if weights is None:
            return None
        if self._weights_of != self._epoch:
            order = self.sampler.first(len(self.sampler), self._epoch)
            self._weights_in_order, self._weights_of = weights[order], self._epoch
        step = self.sampler.batch_size * self.sampler.devices
        return float(self._weights_in_order[start * step : end * step].sum())

    @property
    def batch_sizes(self) -> list[int]:
        """Number of pairs in each batch of an epoch on this device."""
        return self.sampler.sizes

    def __iter__(self) -> Iterator[PreferenceBatch]:
        # This is a generator: no batch is drawn before the first `next`. The trainer has set the epoch by then.
        self._epoch = self.sampler.epoch
        self.sampler.start = self._taken = self._taken_before.pop(self._epoch, 0)
        batches = iter(self.loader)
        self.sampler.start = 0
        for batch in batches:
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the epoch, and everything that determines the order."""
        return {"epoch": self._epoch, "taken": self._taken, "noise": self._noise, "flips": self._flips, **self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the epoch after the batches that were taken. A later epoch starts with its first batch.

        Raises:
            DataError: The order or the labels differ from those of the checkpoint.
        """
        if self._noise != state["noise"]:
            raise DataError(
                f"resume: found {self._noise or 'no label noise'}, expected {state['noise'] or 'no label noise'} as in "
                f"the checkpoint. Resume with the same settings of LabelFlipNoise, or {NEW_RUN}."
            )
        expected = {name: state[name] for name in self._order}
        if self._order != expected:
            raise DataError(
                f"resume: found data order {self._order}, expected {expected} as in the checkpoint. Resume with the "
                "same seed_everything, data, data.batch_size, data.batch_order, trainer.overfit_batches and devices, "
                f"or {NEW_RUN}."
            )
        if self._flips != state["flips"]:
            raise DataError(
                f"resume: {self._noise} flipped other pairs than in the checkpoint, although their texts are the same. "
                "Expected pairs with the same ids; rows without an id are identified by file name and line. Give the "
                f"file its former name, or {NEW_RUN}."
            )
        self._epoch, self._taken = state["epoch"], state["taken"]
        self._taken_before = {self._epoch: self._taken}

    @property
    def _order(self) -> dict[str, int | str | bool]:
        sampler = self.sampler
        return {
            "seed": sampler.seed,
            "data": self._data,
            "pairs": len(sampler.pairs),
            "batch_size": sampler.batch_size,
            "devices": sampler.devices,
            "batch_order": str(sampler.order),
            "repeats": sampler.repeats,
        }
