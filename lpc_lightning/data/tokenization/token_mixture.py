"""Tokenized pairs of several stores, some of them left out or repeated."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np

from lpc_lightning.data.tokenization.tokens import TokenStore


class TokenMixture(TokenStore):
    """Pairs of several stores, one store after another. The source of a pair is the name of its store.

    Args:
        stores: The stores by name.
        rows: For each store, the rows that belong to the mixture, in order. A repeated pair has its row several times.
        reference_logps: See `TokenStore`. Repeated pairs have the same values.
        swaps: See `TokenStore`. Repeated pairs have the same label.
        noise: See `TokenStore`.
    """

    def __init__(
        self,
        stores: Mapping[str, TokenStore],
        rows: Sequence[np.ndarray],
        reference_logps: np.ndarray | None = None,
        swaps: np.ndarray | None = None,
        noise: str = "",
    ) -> None:
        self.stores, self._rows = dict(stores), list(rows)
        self._names = list(self.stores)
        self._starts = np.cumsum([0, *map(len, rows)])
        self._reference_logps, self._swaps, self.noise = reference_logps, swaps, noise

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenMixture, (self.stores, self._rows, self._reference_logps, self._swaps, self.noise)

    def parts(self, indices: np.ndarray) -> list[tuple[TokenStore, np.ndarray, np.ndarray]]:
        """See `TokenStore.parts`. A repeated pair has the same row several times."""
        numbers = np.searchsorted(self._starts, indices, side="right") - 1
        places = [np.flatnonzero(numbers == number) for number in range(len(self._names))]
        return [
            (self.stores[name], self._rows[number][indices[places[number]] - self._starts[number]], places[number])
            for number, name in enumerate(self._names)
            if len(places[number])
        ]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _values(self, row: int) -> dict[str, Any]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        name = self._names[number]
        stored = self.stores[name]._values(int(self._rows[number][row - self._starts[number]]))
        return stored | {"source": name}

    def uses(self, name: str) -> np.ndarray:
        """Return (pairs,) the number of times that the mixture has each pair of a store."""
        return np.bincount(self._rows[self._names.index(name)], minlength=len(self.stores[name]))

    def gather(self, values: Mapping[str, Any]) -> np.ndarray:
        """Return the values of all pairs of the mixture, from the values of all rows of each store by name."""
        chosen = zip(self._names, self._rows, strict=True)
        return np.concatenate([np.asarray(values[name])[rows] for name, rows in chosen])

    def _gather(self, attribute: str) -> np.ndarray:
        return self.gather({name: getattr(store, attribute) for name, store in self.stores.items()})

    @cached_property
    def token_digest(self) -> str:
        """SHA-256 of the token ids of all stores, and of the choice of rows."""
        return self._digest_of("token_digest")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines training: that of each store, and the choice of rows."""
        return self._digest_of("fingerprint")

    def _digest_of(self, attribute: str) -> str:
        digest = hashlib.sha256()
        for store, rows in zip(self.stores.values(), self._rows, strict=True):
            digest.update(f"{getattr(store, attribute)} {len(rows)}\n".encode())
            digest.update(np.ascontiguousarray(rows, np.int64).data)
        return digest.hexdigest()

    @cached_property
    def weights(self) -> np.ndarray | None:
        """(pairs,) weight of each pair in the loss, 1 if a row has none. None if no row of any store has a weight."""
        return self._gather_numbers("weights", 1.0)

    @cached_property
    def margins(self) -> np.ndarray | None:
        """(pairs,) margin of each pair, 0 if a row has none. None if no row of any store has a margin."""
        return self._gather_numbers("margins", 0.0)

    def _gather_numbers(self, attribute: str, default: float) -> np.ndarray | None:
        columns = {name: getattr(store, attribute) for name, store in self.stores.items()}
        if all(column is None for column in columns.values()):
            return None
        filled = {
            name: np.full(len(self.stores[name]), default) if column is None else column
            for name, column in columns.items()
        }
        return self.gather(filled)

    @property
    def indices(self) -> np.ndarray:
        """(pairs,) position of each pair among all examples of its own source."""
        return self._gather("indices")

    @property
    def annotators(self) -> list[str]:
        """Annotator of each pair, "" if unknown."""
        return self._gather("annotators").tolist()

    def names(self, column: Literal["source", "factor", "annotator"]) -> set[str]:
        """See `TokenStore.names`."""
        return set(self._names) if column == "source" else set().union(*(s.names(column) for s in self.stores.values()))

    @cached_property
    def prompts(self) -> np.ndarray:
        """(pairs,) `TokenizedPair.prompt` of each pair."""
        return self._gather("prompts")

    @property
    def has_gold(self) -> np.ndarray:
        """(pairs,) bool, True for pairs with a gold label."""
        return self._gather("has_gold")

    @property
    def _stored_flips(self) -> np.ndarray:
        return self._gather("_stored_flips")

    @property
    def piece_lengths(self) -> np.ndarray:
        """(pairs, 3) number of tokens of each prompt, chosen completion and rejected completion."""
        return self._gather("piece_lengths")

    @cached_property
    def piece_ids(self) -> np.ndarray:
        """See `TokenStore.piece_ids`."""
        return self._gather("piece_ids")
