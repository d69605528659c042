"""Values that a policy gives to pairs, computed once and shared between runs.

An entry of the cache is a folder. Its name is a fingerprint of everything that decides the values. It holds numbered
parts with the values of some pairs each. If two parts hold the same pair, the lower number counts. So several processes
can add parts at the same time, and a value that has been read stays the same.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lpc_lightning.data.tokenization.token_cache import default_cache_dir
from lpc_lightning.data.tokenization.tokens import TokenStore
from lpc_lightning.files.numbered_parts import NumberedParts, read_part

log = logging.getLogger(__name__)


def entry_folder(kind: str, decides: Any, cache_dir: Path | None = None) -> Path:
    """Return the folder of an entry of the cache.

    Args:
        kind: Name of the values. Entries of a kind share a folder.
        decides: Everything that decides the values, as JSON.
        cache_dir: Root of the cache. Default: `default_cache_dir()`.
    """
    fingerprint = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]
    return (cache_dir or default_cache_dir()) / kind / fingerprint


class PairCache:
    """Cached values of a data set's pairs, by index, because ids need not be unique.

    Layout and batches change the values by rounding only. So they are not part of the key.
    """

    def __init__(
        self,
        kind: str,
        numbers: int,
        key: Mapping[str, str],
        pairs: TokenStore,
        cache_dir: Path | None = None,
        dtype: type[np.floating] = np.float64,
    ) -> None:
        """Determine the entry's folder. Nothing is written.

        Args:
            kind: Name of the values. Entries of a kind share a folder.
            numbers: m, number of values per pair.
            key: Everything but the tokens that decides the values: weights, kernel, device, precision, code, libraries.
            pairs: The pairs, with the labels of the data and without label noise. Their tokens are part of the key.
            dtype: Type of the values that `read` returns.
            cache_dir: Root of the cache. Default: `default_cache_dir()`.
        """
        self.folder = entry_folder(kind, [dict(key), pairs.token_digest], cache_dir)
        self._parts = NumberedParts(self.folder, ".npz")
        self._pairs, self._numbers, self._dtype = len(pairs), numbers, dtype

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Return (n, m) values of the pairs at `indices` (n,), which are distinct. Missing values are NaN."""
        values = np.full((len(indices), self._numbers), np.nan, self._dtype)
        row_of = np.full(self._pairs, -1)
        row_of[indices] = np.arange(len(indices))
        for part in self._parts.paths():
            try:
                stored, stored_values = self._open(part)
            except (OSError, ValueError, KeyError) as error:
                log.warning("The cached values in %s are damaged (%s). They are computed again.", part, error)
                continue
            requested = row_of[stored] >= 0
            rows, part_values = row_of[stored][requested], stored_values[requested]
            missing = np.isnan(values[rows, 0])
            values[rows[missing]] = part_values[missing]
        return values

    def add(self, indices: np.ndarray, values: np.ndarray) -> None:
        """Store the values of further pairs.

        Args:
            indices: (n,) indices of the pairs in the data set.
            values: (n, m).

        Raises:
            OSError: The disk is full or not writable.
        """
        file = io.BytesIO()
        np.savez(file, indices=indices, values=values)
        self._parts.add(file.getvalue())

    def _open(self, part: Path) -> tuple[np.ndarray, np.ndarray]:
        with np.load(io.BytesIO(read_part(part)), allow_pickle=False) as stored:
            indices, values = stored["indices"], stored["values"]
        if values.shape != (len(indices), self._numbers) or np.isnan(values).any() or (indices >= self._pairs).any():
            raise ValueError(f"they are not {self._numbers} each of {self._pairs} pairs")
        return indices, values
