"""States of prompts and answers by key, in memory up to a limit, and in a folder that runs share."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lpc_lightning.files.numbered_parts import NumberedParts, read_part

log = logging.getLogger(__name__)

GIB = 2**30
PART_BYTES = 2**23
"""Size of new states from which they are written. What a killed process has not written is computed again."""


class StateStore:
    """States by key. A key stands for everything that decides the states, except for what decides the folder."""

    def __init__(self, gib: float) -> None:
        """Make an empty store.

        Args:
            gib: Most memory for states, in GiB. States beyond it are not kept.
        """
        self._limit = round(gib * GIB)
        self.clear()

    def clear(self) -> None:
        """Forget all states, and the folder."""
        self._states: dict[str, Tensor] = {}
        self._bytes, self._is_full = 0, False
        self._parts: NumberedParts | None = None
        self._indexed: set[Path] = set()
        self._part_of: dict[str, Path] = {}
        self._new: dict[str, Tensor] = {}

    def share(self, folder: Path) -> None:
        """Read states from a folder from now on, and write new ones to it."""
        self._parts = NumberedParts(folder, ".safetensors")

    def get(self, key: str) -> Tensor | None:
        """Return the (n, d) states of a key. None: they are not known."""
        if key not in self._states and not self._is_full:
            self._index()
            if (part := self._part_of.get(key)) is not None:
                self._load(part, key)
        return self._states.get(key)

    def add(self, key: str, states: Tensor) -> None:
        """Keep the (n, d) states of a key, if there is room."""
        if self._keep(key, states) and self._parts is not None:
            self._new[key] = states
            if sum(each.nbytes for each in self._new.values()) >= PART_BYTES:
                self.write()

    def write(self) -> None:
        """Write new states to the folder."""
        if self._parts is None or not self._new:
            return
        try:
            self._parts.add(save(self._new))
        except OSError as error:
            rank_zero_warn(
                f"policy.frozen_states_gib: found that states cannot be stored in {self._parts.folder} ({error}). This "
                "run continues, and others compute them again. Set data.cache_dir to a folder with free space."
            )
        self._new = {}

    def _keep(self, key: str, states: Tensor) -> bool:
        if self._bytes + states.nbytes > self._limit:
            if not self._is_full:
                self._is_full = True
                rank_zero_warn(
                    f"policy.frozen_states_gib: found more states than {self._limit / GIB:g} GiB hold, after "
                    f"{len(self._states)} prompts and answers. Further ones are computed each time. Expected a larger "
                    "value, or 0 if sequences occur rarely."
                )
            return False
        self._states[key] = states
        self._bytes += states.nbytes
        return True

    def _index(self) -> None:
        """Read which keys further parts in the folder have. Other runs may have written them since."""
        for part in () if self._parts is None else self._parts.paths():
            if part in self._indexed:
                continue
            self._indexed.add(part)
            try:
                with part.open("rb") as file:
                    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
                self._part_of |= dict.fromkeys(header, part)
            except (OSError, ValueError, TypeError, OverflowError, MemoryError) as error:
                _report_damage(part, error)

    def _load(self, part: Path, first: str) -> None:
        """Keep the states of a part, those of the key `first` before others."""
        self._part_of = {key: other for key, other in self._part_of.items() if other != part}
        try:
            stored = load(read_part(part))
        except (OSError, ValueError, SafetensorError) as error:
            _report_damage(part, error)
            return
        for key in sorted(stored, key=lambda each: each != first):
            if key not in self._states:
                self._keep(key, stored[key])


def _report_damage(part: Path, error: Exception) -> None:
    log.warning("The stored states in %s are damaged (%s). They are computed again.", part, error)
