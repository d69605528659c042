"""Base class of batch orders, and plain shuffling."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Generator


class OrderedPairs(Protocol):
    """Properties of training pairs that an order may use. `TokenStore` has them."""

    def __len__(self) -> int: ...

    @property
    def piece_lengths(self) -> np.ndarray:
        """(pairs, 3) number of tokens of each prompt, chosen completion and rejected completion."""

    @property
    def piece_ids(self) -> np.ndarray:
        """(pairs, 3) hash of the tokens of each prompt, chosen completion and rejected completion."""

    @property
    def prompts(self) -> np.ndarray:
        """(pairs,) prompt of each pair, without a name that is written into it (see `TokenizedPair.prompt`)."""

    @property
    def annotators(self) -> list[str]:
        """Annotator of each pair, "" if unknown."""


class BatchOrder(ABC):
    """Order of the training pairs in an epoch, which decides the pairs that share a batch.

    Its attributes are its settings: a resumed run must have the same ones.
    """

    pairs_per_annotator: int | None = None
    """Number of pairs of the same annotator that are placed together. None: pairs are not grouped by annotator."""

    @abstractmethod
    def arrange(
        self, shuffled: Sequence[int], pairs: OrderedPairs, batch_size: int, devices: int, generator: Generator
    ) -> list[int]:
        """Reorder the shuffled pairs of an epoch. Each batch of a device is filled with its next pairs.

        Args:
            shuffled: Numbers of all pairs in random order. Their number is a multiple of `devices`: a pair may be
                there twice. Device d of n takes every n-th pair, starting with pair d.
            pairs: The training pairs.
            batch_size: Number of pairs in a batch of one device.
            devices: Number of devices.
            generator: Random generator of the epoch, which is the same on all devices.
        """

    def check_batch_size(self, batch_size: int) -> None:  # noqa: B027  # most orders take any size
        """Check that the order can fill batches of this size.

        Raises:
            ValueError: It cannot.
        """

    def check_pairs(self, pairs: OrderedPairs) -> None:  # noqa: B027  # most orders take any pairs
        """Check that the pairs have what the order needs.

        Raises:
            DataError: They have not.
        """

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"


class Shuffled(BatchOrder):
    """Plain shuffling."""

    def arrange(
        self, shuffled: Sequence[int], pairs: OrderedPairs, batch_size: int, devices: int, generator: Generator
    ) -> list[int]:
        """Return the pairs as they are."""
        return list(shuffled)
