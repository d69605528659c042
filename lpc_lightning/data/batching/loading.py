"""Which pairs make up which batch, on which device, in an order that a resumed run takes up where it stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from lpc_lightning.data.batching.annotator_batches import group_by_annotator
from lpc_lightning.data.batching.balanced_batches import balance_batches
from lpc_lightning.data.batching.length_windows import group_by_length
from lpc_lightning.data.sources.rows import DataError
from lpc_lightning.data.tokenization.tokens import TokenStore
from lpc_lightning.seeding import derive
from lpc_lightning.types import PreferenceBatch, TokenizedPair


class TrainingBatches(Sampler[list[int]]):
    """Shuffled batches of one epoch, a function of (seed, epoch) alone; each device takes every n-th pair.

    Where the pairs do not divide among the devices, the first ones are seen twice in the epoch, so that all devices
    take equally many steps.
    """

    def __init__(
        self,
        pairs: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        devices: int = 1,
        lengths: Sequence[int] | None = None,
        length_window: int | None = None,
        annotators: Sequence[str] | None = None,
        pairs_per_annotator: int | None = None,
        balance: np.ndarray | None = None,
    ) -> None:
        """Plan the batches of a device.

        Args:
            pairs: Pairs in the training set.
            batch_size: Pairs in a batch of this device; the last batch of an epoch may hold fewer.
            seed: Seed of the order.
            rank: This device's number.
            devices: Devices that share the epoch.
            lengths: Tokens of every pair, where there is a window.
            length_window: Steps among which pairs are sorted by length (see `length_windows`); None does not sort.
            annotators: Who labelled each pair, where there are runs.
            pairs_per_annotator: Pairs of one annotator that stand together in a batch (see `annotator_batches`);
                None: as drawn.
            balance: (pairs, 3) tokens of every prompt and completion, by which batches are made equally long (see
                `balanced_batches`); None: as drawn.
        """
        self.pairs, self.batch_size, self.seed = pairs, batch_size, seed
        self.rank, self.devices = rank, devices
        self.lengths, self.length_window = lengths, length_window
        self.annotators, self.pairs_per_annotator = annotators, pairs_per_annotator
        self._balance = balance
        self.epoch = self.start = 0

    @property
    def balanced(self) -> bool:
        """True if batches are made equally long."""
        return self._balance is not None

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.epoch = epoch

    @property
    def sizes(self) -> list[int]:
        """Pairs in each batch of an epoch."""
        share = math.ceil(self.pairs / self.devices)
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
        """The pairs of the first batches of an epoch, on all devices."""
        return self._order(epoch)[: batches * self.batch_size * self.devices]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive("order", self.seed, epoch))
        order = torch.randperm(self.pairs, generator=generator).tolist()
        if self.pairs_per_annotator is not None and self.annotators is not None:
            sizes = (self.batch_size, self.devices, self.pairs_per_annotator)
            order = group_by_annotator(order, self.annotators, *sizes, generator)
        share = math.ceil(self.pairs / self.devices)
        filled = [order[place % self.pairs] for place in range(share * self.devices)]
        if self._balance is not None:
            return balance_batches(filled, self._balance, self.batch_size, self.devices, generator)
        if self.length_window is None or self.lengths is None:
            return filled
        return group_by_length(filled, self.lengths, self.batch_size * self.devices, self.length_window, generator)


class EvaluationBatches(Sampler[list[int]]):
    """Each pair once over all devices, in order, in equally many batches of nearly equal size on each device."""

    def __init__(self, pairs: int, batch_size: int, rank: int = 0, devices: int = 1) -> None:
        """Plan the batches of a device; arguments as for `TrainingBatches`.

        Where some devices have a pair more than others, a batch of 1 may become one of 2.

        Raises:
            DataError: There are more devices than pairs.
        """
        if pairs < devices:
            raise DataError(
                f"evaluation: found {pairs} pairs for {devices} devices, expected at least one for each. Take fewer "
                "devices or more validation (test) pairs."
            )
        mine = range(rank, pairs, devices)
        batches = min(math.ceil(math.ceil(pairs / devices) / batch_size), pairs // devices)
        bounds = [len(mine) * number // batches for number in range(batches + 1)]
        self.batches = [list(mine[start:end]) for start, end in pairwise(bounds)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class PreferenceLoader:
    """A `DataLoader` over tokenised pairs whose batches Lightning leaves to each device alone."""

    def __init__(
        self,
        pairs: Sequence[TokenizedPair],
        batches: TrainingBatches | EvaluationBatches,
        layout: Callable[[Sequence[TokenizedPair]], PreferenceBatch],
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Put data, order and layout together.

        Args:
            pairs: The tokenised pairs.
            batches: Which of them make up each batch.
            layout: Lays a batch out.
            num_workers: Processes that lay batches out ahead of time; 0 does it in the training process.
            pin_memory: Put batches into page-locked memory, for a GPU.
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
    """A loader that can be stopped in the middle of an epoch and taken up again at the next batch.

    Its state goes into the checkpoint; the trainer calls `set_epoch` on its sampler.
    """

    def __init__(self, pairs: Sequence[TokenizedPair], batches: TrainingBatches, *layout: Any, **options: Any) -> None:
        """Put data, order and layout together; arguments as for `PreferenceLoader`."""
        super().__init__(pairs, batches, *layout, **options)
        self.sampler = batches
        self._data = pairs.fingerprint if isinstance(pairs, TokenStore) else ""
        self._noise = pairs.noise if isinstance(pairs, TokenStore) else ""
        self._epoch = self._taken = 0
        self._taken_before: dict[int, int] = {}

    @property
    def batch_sizes(self) -> list[int]:
        """Pairs in each batch of an epoch on this device."""
        return self.sampler.sizes

    def __iter__(self) -> Iterator[PreferenceBatch]:
        # A generator: nothing is drawn before the first `next`, when the trainer has set the epoch.
        self._epoch = self.sampler.epoch
        self.sampler.start = self._taken = self._taken_before.pop(self._epoch, 0)
        batches = iter(self.loader)
        self.sampler.start = 0
        for batch in batches:
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, int | str | None]:
        """Where the run is, and what decides the order."""
        return {"epoch": self._epoch, "taken": self._taken, "noise": self._noise, **self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the epoch up after the batches already taken; a later epoch starts with its first batch.

        Raises:
            DataError: The order or the labels would not be those of the run to be resumed.
        """
        if self._noise != state["noise"]:
            raise DataError(
                f"resume: found {self._noise or 'no label noise'}, expected {state['noise'] or 'no label noise'} as in "
                "the checkpoint. Resume with the same settings of LabelFlipNoise, or start anew from the weights."
            )
        expected = {name: state[name] for name in self._order}
        if self._order != expected:
            raise DataError(
                f"resume: found data order {self._order}, expected {expected} as in the checkpoint. Resume with the "
                "same seed_everything, data, data.batch_size, data.length_window, data.pairs_per_annotator, "
                "data.balance_batches and devices, or start anew from the weights."
            )
        self._epoch, self._taken = state["epoch"], state["taken"]
        self._taken_before = {self._epoch: self._taken}

    @property
    def _order(self) -> dict[str, int | str | None]:
        sampler = self.sampler
        names = ("pairs", "batch_size", "devices", "length_window", "pairs_per_annotator", "balanced")
        sizes = {name: getattr(sampler, name) for name in names}
        return {"seed": sampler.seed, "data": self._data, **sizes}
