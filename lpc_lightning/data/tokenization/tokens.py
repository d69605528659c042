"""Tokenization of examples, and tokenized pairs on disk."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.sources.rows import BadRow
from lpc_lightning.data.tokenization.lengths import LengthPolicy
from lpc_lightning.data.tokenization.pieces import PieceTable
from lpc_lightning.data.tokenization.template import Template
from lpc_lightning.types import PreferenceExample, TokenizedPair, token_hash

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
        ("has_gold", pa.bool_()),
        ("weight", pa.float64()),
        ("margin", pa.float64()),
        ("question", pa.string()),
        ("index", pa.int64()),
    ]
)
PIECE_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
NUMBERS = ("weight", "margin")
"""Columns that may be empty."""
assert [*SCHEMA.names, "reference_logps"] == [f.name for f in fields(TokenizedPair)]


def tokenize_examples(
    examples: Iterable[PreferenceExample], template: Template, lengths: LengthPolicy, report: DataReport
) -> Iterator[TokenizedPair]:
    """Tokenize examples one by one. Examples that are invalid or too long are dropped and counted.

    Args:
        examples: The pairs as text.
        template: Template that converts the text to token ids.
        lengths: Policy for pairs that are too long.
        report: Report that counts every example.

    Raises:
        DataError: A pair is too long, and the length policy is `error`.
    """
    for index, example in enumerate(examples):
        changes: dict[str, None] = {}
        try:
            pair = template.tokenize(example, changes.setdefault)
        except BadRow as fault:
            report.count_bad(f"id {example.id!r}", fault)
            continue
        fitted = lengths(pair, template.bos_id)
        if fitted.pair is None:
            report.count_dropped(fitted.dropped)
            continue
        if fitted.cut:
            report.count_cut(fitted.cut)
        for change in changes:
            report.count_changed(change)
        report.kept += 1
        yield replace(fitted.pair, index=index)


class TokenStore(Sequence[TokenizedPair]):
    """Tokenized pairs on disk, read through a memory map.

    A pickle of the store holds the path and not the tokens, so that each worker process opens the file itself.

    Args:
        folder: An entry of the token cache.
        reference_logps: (pairs, 2) log-probabilities of the chosen and rejected answers under the reference. NaN means
            unknown. None if there are no values.
        swaps: (pairs,) bool, True for pairs whose label is reversed. None if no label is reversed.
        noise: Description of the label noise. Empty if the labels are those of the data.
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
            raise pa.ArrowInvalid(f"{folder}: found columns {self._table.schema.names}, expected {SCHEMA.names}")

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path, np.ndarray | None, np.ndarray | None, str]]:
        return TokenStore, (self.folder, self._reference_logps, self._swaps, self.noise)

    def parts(self, indices: np.ndarray) -> list[tuple[TokenStore, np.ndarray, np.ndarray]]:
        """Return the stores that hold pairs, each with (n,) its rows and (n,) their places in `indices`."""
        return [(self, indices, np.arange(len(indices)))]

    def with_reference(self, logps: np.ndarray) -> Self:
        """Return the same pairs with their log-probabilities under the reference, (pairs, 2). NaN means unknown.

        The columns are the answers that are chosen and rejected in the data. Where a label is reversed, the two values
        are swapped as well.
        """
        return self._with(_reference_logps=logps)

    def relabelled(self, swaps: np.ndarray | None, noise: str) -> Self:
        """Return the same pairs with reversed labels where `swaps` (pairs,) is True. `noise` describes the reason."""
        return self._with(_swaps=swaps, noise=noise)

    def _with(self, **fields: Any) -> Self:
        """Return a store of the same opened tokens with other labels or reference values.

        It does not open the file again, which may have been removed, as `copy.copy` would. Both share the cached
        properties, none of which depends on these fields.
        """
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__ | fields)
        return other

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
            raise IndexError(f"TokenStore: found index {index}, expected one below {len(self)}")
        row = index % len(self)
        pair = TokenizedPair(**self._values(row) | self._numbers_of(row), reference_logps=self._reference_of(row))
        return pair if self._swaps is None or not self._swaps[row] else pair.swapped()

    def _values(self, row: int) -> dict[str, Any]:
        """Return the cells of a row by column name, without weight and margin."""
        return {name: self._table[name][row].as_py() for name in SCHEMA.names if name not in NUMBERS}

    def _numbers_of(self, row: int) -> dict[str, float]:
        """Return weight and margin of a row, those that the data has."""
        columns = {"weight": self.weights, "margin": self.margins}
        return {name: float(column[row]) for name, column in columns.items() if column is not None}

    def _reference_of(self, row: int) -> tuple[float, float] | None:
        if self._reference_logps is None:
            return None
        chosen, rejected = self._reference_logps[row].tolist()
        return None if math.isnan(chosen) else (chosen, rejected)

    @cached_property
    def token_digest(self) -> str:
        """SHA-256 of the token ids of all pairs, in their order. It takes about a second per gigabyte."""
        return self._digest(*PIECE_COLUMNS)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines training: token ids, annotators, weights and margins of the pairs."""
        parts = [self.token_digest, self._digest("annotator")]
        for column in (self.weights, self.margins):
            parts.append("" if column is None else hashlib.sha256(column.tobytes()).hexdigest())
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def flips_digest(self) -> str:
        """SHA-256 of the choice of reversed labels. Empty if no label is reversed."""
        return "" if self._swaps is None else hashlib.sha256(np.packbits(self._swaps).tobytes()).hexdigest()

    @cached_property
    def weights(self) -> np.ndarray | None:
        """(pairs,) weight of each pair in the loss, 1 if a row has none. None if no row has a weight."""
        return self._filled("weight", 1.0)

    @cached_property
    def margins(self) -> np.ndarray | None:
        """(pairs,) margin of each pair, 0 if a row has none. None if no row has a margin."""
        return self._filled("margin", 0.0)

    def _filled(self, name: str, default: float) -> np.ndarray | None:
        column = self._table[name]
        return None if column.null_count == len(column) else column.fill_null(default).to_numpy()

    def _digest(self, *names: str) -> str:
        """Hash the values of columns, whatever the batches of rows in which they are stored."""
        digest = hashlib.sha256()
        for name in names:
            column = self._table[name].combine_chunks()
            if pa.types.is_string(column.type):
                column = column.cast(pa.binary())
            lengths = pc.binary_length(column) if pa.types.is_binary(column.type) else pc.list_value_length(column)
            digest.update(np.ascontiguousarray(lengths.to_numpy(zero_copy_only=False), np.int64).data)
            if pa.types.is_binary(column.type):
                digest.update(b"".join(column.to_pylist()))
            else:
                digest.update(np.ascontiguousarray(column.flatten().to_numpy(), np.int32).data)
        return digest.hexdigest()

    @property
    def indices(self) -> np.ndarray:
        """(pairs,) position of each pair among all examples of the source (`TokenizedPair.index`)."""
        return self._table["index"].to_numpy()

    @property
    def annotators(self) -> list[str]:
        """Annotator of each pair, "" if unknown."""
        return self._table["annotator"].to_pylist()

    def names(self, column: Literal["source", "factor", "annotator"]) -> set[str]:
        """Return the different values of a column of all pairs. "" is among them if a pair has no value."""
        return set(self._table[column].unique().to_pylist())

    @cached_property
    def prompts(self) -> np.ndarray:
        """(pairs,) `TokenizedPair.prompt` of each pair."""
        questions = self._table["question"].to_pylist()
        hashes = zip(questions, self._hashes("prompt_ids"), strict=True)
        return np.array([question or of_tokens for question, of_tokens in hashes])

    def count_prompts_of(self, other: TokenStore) -> int:
        """Return the number of pairs whose prompt is the prompt of a pair of another store, as token ids."""
        return int(np.isin(self.prompts, other.prompts).sum())

    @property
    def flipped(self) -> np.ndarray:
        """(pairs,) bool, True for pairs with a wrong label."""
        return self._stored_flips if self._swaps is None else self._stored_flips ^ self._swaps

    @property
    def has_gold(self) -> np.ndarray:
        """(pairs,) bool, True for pairs with a gold label."""
        return self._table["has_gold"].to_numpy()

    @property
    def _stored_flips(self) -> np.ndarray:
        return self._table["flipped"].to_numpy()

    @property
    def piece_lengths(self) -> np.ndarray:
        """(pairs, 3) number of tokens of each prompt, chosen completion and rejected completion."""
        return np.stack([pc.list_value_length(self._table[name]).to_numpy() for name in PIECE_COLUMNS], axis=1)

    @cached_property
    def piece_ids(self) -> np.ndarray:
        """(pairs, 3) int64 hash of the tokens of each prompt, chosen completion and rejected completion."""
        hashes = [bytes.fromhex("".join(self._hashes(name))) for name in PIECE_COLUMNS]
        return np.stack([np.frombuffer(each, dtype=np.int64) for each in hashes], axis=1)

    def _hashes(self, name: str) -> list[str]:
        """Return the `token_hash` of each cell of a column of tokens."""
        column = self._table[name].combine_chunks()
        bounds, ids = column.offsets.to_numpy(), column.values.to_numpy().astype(np.int64)
        return [token_hash(ids[start:end].tobytes()) for start, end in pairwise(bounds)]

    @cached_property
    def pieces(self) -> PieceTable:
        """Sizes and identities of the prompts and completions."""
        return PieceTable(self.piece_lengths, self.piece_ids)
