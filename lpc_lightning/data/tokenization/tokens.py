"""Examples to tokenized pairs, and such pairs on disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.sources.rows import BadRow
from lpc_lightning.data.tokenization.lengths import LengthPolicy
from lpc_lightning.data.tokenization.template import Template
from lpc_lightning.types import PreferenceExample, TokenizedPair

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("chosen_ids", pa.list_(pa.int32())),
        ("rejected_ids", pa.list_(pa.int32())),
        ("source", pa.string()),
        ("factor", pa.string()),
        ("annotator", pa.string()),
        ("flipped", pa.bool_()),
        ("place", pa.int64()),
    ]
)
assert [*SCHEMA.names, "reference_logps"] == [f.name for f in fields(TokenizedPair)]


def tokenize_examples(
    examples: Iterable[PreferenceExample], template: Template, lengths: LengthPolicy, report: DataReport
) -> Iterator[TokenizedPair]:
    """Tokenize examples one by one; those that cannot be used or are too long are left out and counted.

    Args:
        examples: The pairs as text.
        template: What turns them into ids.
        lengths: What becomes of long ones.
        report: Where all of them are counted.

    Raises:
        DataError: A pair is too long, and the length policy is `error`.
    """
    for place, example in enumerate(examples):
        try:
            pair = template.tokenize(example)
        except BadRow as fault:
            report.count_bad(f"id {example.id!r}", fault)
            continue
        fitted = lengths(pair, template.bos_id)
        if fitted.pair is None:
            report.count_dropped(fitted.dropped)
            continue
        if fitted.cut:
            report.count_cut(fitted.cut)
        report.kept += 1
        yield replace(fitted.pair, place=place)


class TokenStore(Sequence[TokenizedPair]):
    """Tokenized pairs on disk, read by memory map. It pickles as its path, so that workers open the file themselves.

    Args:
        folder: An entry of the cache.
        reference_logps: (pairs, 2) log-probabilities of the chosen and of the rejected answers under the reference, NaN
            where they are unknown; or None.
        swaps: (pairs,) bool, which pairs are given labelled the other way round; or None.
        noise: What made the labels wrong, in words. Empty: they are as in the data.
    """

    def __init__(
        self,
        folder: Path,
        reference_logps: np.ndarray | None = None,
        swaps: np.ndarray | None = None,
        noise: str = "",
    ) -> None:
        self.folder, self._reference_logps = folder, reference_logps
        self._swaps, self.noise = swaps, noise
        with pa.memory_map(str(folder / "pairs.arrow")) as file:
            self._table = pa.ipc.open_stream(file).read_all()
        if self._table.schema != SCHEMA:
            raise pa.ArrowInvalid(f"{folder} holds other columns: {self._table.schema.names}")

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path, np.ndarray | None, np.ndarray | None, str]]:
        return TokenStore, (self.folder, self._reference_logps, self._swaps, self.noise)

    def with_reference(self, logps: np.ndarray) -> TokenStore:
        """The same pairs with their log-probabilities under the reference, (pairs, 2), NaN where unknown.

        They are those of the answers as the data has them chosen and rejected, and change places where labels do.
        """
        return TokenStore(self.folder, logps, self._swaps, self.noise)

    def relabelled(self, swaps: np.ndarray | None, noise: str) -> TokenStore:
        """The same pairs, those of `swaps` (pairs,) labelled the other way round, and `noise` saying why."""
        return TokenStore(self.folder, self._reference_logps, swaps, noise)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, index: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedPair]: ...
    def __getitem__(self, index: int | slice) -> TokenizedPair | list[TokenizedPair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        place = index % len(self)
        values = {name: self._table[name][place].as_py() for name in SCHEMA.names}
        pair = TokenizedPair(**values, reference_logps=self._reference_of(place))
        return pair if self._swaps is None or not self._swaps[place] else pair.swapped()

    def _reference_of(self, place: int) -> tuple[float, float] | None:
        if self._reference_logps is None:
            return None
        chosen, rejected = self._reference_logps[place].tolist()
        return None if math.isnan(chosen) else (chosen, rejected)

    @property
    def fingerprint(self) -> str:
        """Names all that decided these tokens: the rows, the template and the limits."""
        return self.folder.name

    @property
    def places(self) -> np.ndarray:
        """(pairs,) number of each pair among the examples that were read."""
        return self._table["place"].to_numpy()

    @property
    def annotators(self) -> list[str]:
        """Who labelled each pair."""
        return self._table["annotator"].to_pylist()

    @property
    def flipped(self) -> np.ndarray:
        """(pairs,) bool: which pairs have the wrong label."""
        stored = self._table["flipped"].to_numpy()
        return stored if self._swaps is None else stored ^ self._swaps

    @property
    def piece_lengths(self) -> np.ndarray:
        """(pairs, 3) tokens of each prompt, chosen and rejected completion."""
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        return np.stack([pc.list_value_length(self._table[name]).to_numpy() for name in names], axis=1)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each pair: its prompt once and both completions."""
        return [int(total) for total in self.piece_lengths.sum(axis=1)]
