"""Numbers that a policy says of pairs, worked out once and shared between runs.

An entry of the cache is a folder named by a fingerprint of all that decides its values. It holds numbered parts, each
with the values of some pairs. A part is written beside its place and linked into it, so that a process killed halfway
leaves whole parts only; parts are never changed, and of two that hold the same pair the lower number counts. So several
processes may add at once, and a value that was read once stays what it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zipfile
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from uuid import uuid4

import numpy as np

from lpc_lightning.data.tokenization.token_cache import default_cache_dir
from lpc_lightning.data.tokenization.tokens import TokenStore

log = logging.getLogger(__name__)

FORMAT = 2
"""Version of the entries. Raise it whenever the same weights, settings and tokens would now give other values."""
PART = "[0-9]" * 6 + ".npz"
"""What the files of parts are called."""
_UNFINISHED = ".unfinished"


class PairCache:
    """The known numbers of a data set's pairs, by their places in it: ids need not be unique.

    Layout and batches change the values by rounding alone, so that neither is part of the key.
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
        """Find the entry's folder; nothing is written yet.

        Args:
            kind: What the numbers are, in a word: entries of a kind stand together.
            numbers: m, how many there are of each pair.
            key: What decides the values apart from the tokens: the policy's weights and how it computes.
            pairs: The tokens. Labels are as the data has them, whatever noise there is.
            dtype: What values are read as.
            cache_dir: Root of the cache. Default: `default_cache_dir()`.
        """
        decides = json.dumps([FORMAT, dict(key), pairs.fingerprint], sort_keys=True)
        fingerprint = hashlib.sha256(decides.encode()).hexdigest()[:32]
        self.folder = (cache_dir or default_cache_dir()) / kind / fingerprint
        self._pairs, self._numbers, self._dtype = len(pairs), numbers, dtype

    def read(self, places: np.ndarray) -> np.ndarray:
        """(n, m) values of the pairs at `places` (n,), which are different ones; NaN where unknown."""
        values = np.full((len(places), self._numbers), np.nan, self._dtype)
        row_of = np.full(self._pairs, -1)
        row_of[places] = np.arange(len(places))
        for part in sorted(self.folder.glob(PART)):
            try:
                known, found = self._open(part)
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                log.warning("The cached values in %s are damaged (%s). They are made anew.", part, error)
                continue
            wanted = row_of[known] >= 0
            rows, found = row_of[known][wanted], found[wanted]
            fresh = np.isnan(values[rows, 0])
            values[rows[fresh]] = found[fresh]
        return values

    def add(self, places: np.ndarray, values: np.ndarray) -> None:
        """Keep the values of some more pairs.

        Args:
            places: (n,) their places in the data set.
            values: (n, m).

        Raises:
            OSError: The disk is full or cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        scratch = self.folder / f"{uuid4().hex}{_UNFINISHED}"
        try:
            with scratch.open("xb") as file:
                np.savez(file, places=places, values=values)  # a zip, which holds checksums
                file.flush()
                os.fsync(file.fileno())
            taken = [int(part.stem) for part in self.folder.glob(PART)]
            for number in count(max(taken, default=-1) + 1):
                try:
                    os.link(scratch, self.folder / f"{number:06d}.npz")
                    return
                except FileExistsError:  # another process was faster
                    continue
        finally:
            scratch.unlink()

    def _open(self, part: Path) -> tuple[np.ndarray, np.ndarray]:
        with part.open("rb") as file, np.load(file) as kept:
            places, values = kept["places"], kept["values"]
        if values.shape != (len(places), self._numbers) or np.isnan(values).any() or (places >= self._pairs).any():
            raise ValueError(f"they are not {self._numbers} each of {self._pairs} pairs")
        return places, values

    def _remove_leftovers(self) -> None:
        """Remove what killed processes left a day ago or more."""
        for scratch in self.folder.glob(f"*{_UNFINISHED}"):
            try:
                if time.time() - scratch.stat().st_mtime > 24 * 3600:
                    scratch.unlink()
            except FileNotFoundError:  # another process was done with it
                continue
