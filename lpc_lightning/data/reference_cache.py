"""Log-probabilities under the reference, worked out once and shared between runs.

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

from lpc_lightning.data.token_cache import default_cache_dir
from lpc_lightning.data.tokens import TokenStore

log = logging.getLogger(__name__)

FORMAT = 1
"""Version of the entries. Raise it whenever the same weights, settings and tokens would now give other values."""
PART = "[0-9]" * 6 + ".npz"
"""What the files of parts are called."""
_UNFINISHED = ".unfinished"


class ReferenceCache:
    """The known log-probabilities of a data set's pairs, by their places in it: ids need not be unique.

    Layout and batches change the values by rounding alone, so that neither is part of the key.
    """

    def __init__(self, key: Mapping[str, str], pairs: TokenStore, cache_dir: Path | None = None) -> None:
        """Find the entry's folder; nothing is written yet.

        Args:
            key: What decides the values apart from the tokens: the reference's weights and how it computes.
            pairs: The tokens.
            cache_dir: Root of the cache. Default: `default_cache_dir()`.
        """
        decides = json.dumps([FORMAT, dict(key), pairs.fingerprint], sort_keys=True)
        fingerprint = hashlib.sha256(decides.encode()).hexdigest()[:32]
        self.folder = (cache_dir or default_cache_dir()) / "reference" / fingerprint
        self._pairs = len(pairs)

    def read(self) -> np.ndarray:
        """(pairs, 2) float64 log-probabilities of the chosen and of the rejected answers, NaN where unknown."""
        values = np.full((self._pairs, 2), np.nan)
        for part in sorted(self.folder.glob(PART)):
            try:
                places, logps = self._open(part)
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                log.warning("The cached log-probabilities in %s are damaged (%s). They are made anew.", part, error)
                continue
            fresh = np.isnan(values[places, 0])
            values[places[fresh]] = logps[fresh]
        return values

    def add(self, places: np.ndarray, logps: np.ndarray) -> None:
        """Keep the values of some more pairs.

        Args:
            places: (n,) their places in the data set.
            logps: (n, 2) log-probabilities of their chosen and rejected answers.

        Raises:
            OSError: The disk is full or cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        scratch = self.folder / f"{uuid4().hex}{_UNFINISHED}"
        try:
            with scratch.open("xb") as file:
                np.savez(file, places=places, logps=logps)  # a zip, which holds checksums
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
            places, logps = kept["places"], kept["logps"]
        if logps.shape != (len(places), 2) or np.isnan(logps).any() or (places >= self._pairs).any():
            raise ValueError(f"they are not those of {self._pairs} pairs")
        return places, logps

    def _remove_leftovers(self) -> None:
        """Remove what killed processes left a day ago or more."""
        for scratch in self.folder.glob(f"*{_UNFINISHED}"):
            try:
                if time.time() - scratch.stat().st_mtime > 24 * 3600:
                    scratch.unlink()
            except FileNotFoundError:  # another process was done with it
                continue
