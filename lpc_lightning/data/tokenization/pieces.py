"""Sizes and identities of prompts and completions, from which batches are planned without their tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class PieceTable:
    """Prompt, chosen completion and rejected completion of some pairs."""

    lengths: np.ndarray
    """(pairs, 3) number of tokens of each piece."""
    ids: np.ndarray
    """(pairs, 3) int64 hash of the tokens of each piece. Equal pieces have equal hashes."""

    def __getitem__(self, pairs: list[int]) -> PieceTable:
        """Return the pieces of some of the pairs."""
        return PieceTable(self.lengths[pairs], self.ids[pairs])
