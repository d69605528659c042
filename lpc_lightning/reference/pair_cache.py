"""Values that a policy gives to pairs, computed once and shared between runs.

An entry of the cache is a folder. Its name is a fingerprint of everything that decides the values. It holds numbered
parts with the values of some pairs each. A part is an npz file with its SHA-256 at the end. It is written to a
temporary file and then linked to its name, so that a killed process leaves only complete parts. Parts never change. If
two parts hold the same pair, the lower number counts. So several processes can add parts at the same time, and a value
that has been read stays the same.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Mapping
from itertools import count
from pathlib import Path

import numpy as np

from lpc_lightning.data.tokenization.token_cache import default_cache_dir
from lpc_lightning.data.tokenization.tokens import TokenStore
from lpc_lightning.files.unfinished import remove_leftovers, unfinished_path

log = logging.getLogger(__name__)

PART = "[0-9]" * 6 + ".npz"
"""Pattern of the file names of parts."""
DIGEST_SIZE = hashlib.sha256().digest_size


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
        decides = json.dumps([dict(key), pairs.token_digest], sort_keys=True)
        fingerprint = hashlib.sha256(decides.encode()).hexdigest()[:32]
        self.folder = (cache_dir or default_cache_dir()) / kind / fingerprint
        self._pairs, self._numbers, self._dtype = len(pairs), numbers, dtype

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Return (n, m) values of the pairs at `indices` (n,), which are distinct. Missing values are NaN."""
        values = np.full((len(indices), self._numbers), np.nan, self._dtype)
        row_of = np.full(self._pairs, -1)
        row_of[indices] = np.arange(len(indices))
        for part in sorted(self.folder.glob(PART)):
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
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        scratch = unfinished_path(self.folder, "part")
        try:
            with scratch.open("xb") as file:
                file.write(_packed(indices, values))
                file.flush()
                os.fsync(file.fileno())
            taken = [int(part.stem) for part in self.folder.glob(PART)]
            for number in count(max(taken, default=-1) + 1):
                try:
                    os.link(scratch, self.folder / f"{number:06d}.npz")
                    return
                except FileExistsError:  # another process took this number
                    continue
        finally:
            scratch.unlink(missing_ok=True)

    def _open(self, part: Path) -> tuple[np.ndarray, np.ndarray]:
        content = part.read_bytes()
        arrays, digest = content[:-DIGEST_SIZE], content[-DIGEST_SIZE:]
        if hashlib.sha256(arrays).digest() != digest:
            raise ValueError("their content does not have its digest")
        with np.load(io.BytesIO(arrays), allow_pickle=False) as stored:
            indices, values = stored["indices"], stored["values"]
        if values.shape != (len(indices), self._numbers) or np.isnan(values).any() or (indices >= self._pairs).any():
            raise ValueError(f"they are not {self._numbers} each of {self._pairs} pairs")
        return indices, values


def _packed(indices: np.ndarray, values: np.ndarray) -> bytes:
    """Return the content of a part."""
    file = io.BytesIO()
    np.savez(file, indices=indices, values=values)
    arrays = file.getvalue()
    return arrays + hashlib.sha256(arrays).digest()
