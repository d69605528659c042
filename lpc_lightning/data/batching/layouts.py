"""Layouts of tokenized pairs for one backbone pass. All layouts give the same log-probabilities.

- `padded`: one row for each sequence. The prompt is in both rows of a pair. Works with any attention kernel.
- `shared_prefix`: the prompt once, followed by its completions. Each completion attends to the prompt and to itself
  only, and its positions continue those of the prompt. Several prompts share a row, up to an optional token limit.
  Needs a kernel that accepts a mask.

A sequence that several pairs of a batch have is in it once, and in `shared_prefix` a prompt too. So the six comparisons
of four answers are read as one prompt and four answers, as in InstructGPT (arXiv 2203.02155, section 3.5).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lpc_lightning.data.batching.packing import (
    Piece,
    cheapest_rows,
    extent,
    fill,
    last_of,
    pack,
    place_rows,
    predictors,
    share_pieces,
)
from lpc_lightning.data.batching.shapes import MOST_SHAPES, BatchShape, ShapePlan, plan_shapes
from lpc_lightning.data.tokenization.pieces import PieceTable
from lpc_lightning.types import PreferenceBatch, TokenizedPair


@dataclass(frozen=True, slots=True)
class PlacedPair:
    """Positions of the pieces of a pair. Its two prompts may be one piece, and other pairs may have the same pieces."""

    prompts: tuple[Piece, Piece]
    completions: tuple[Piece, Piece]


class Layout(ABC):
    """Converter of tokenized pairs to a batch. It places the pieces and computes the read positions."""

    packed: bool
    """True if a row has several pieces that must not attend to each other."""

    def __init__(self, pad_id: int) -> None:
        """Set the padding token.

        Args:
            pad_id: Token id for padding. Padding is masked, so any id is valid.
        """
        self.pad_id = pad_id

    @abstractmethod
    def place(self, pairs: Sequence[TokenizedPair]) -> list[PlacedPair]:
        """Choose the positions of the pieces of each pair."""

    def shape_of(self, needed: BatchShape) -> BatchShape:
        """Return the shape of a batch whose pieces need at least the shape `needed`. Default: `needed`."""
        return needed

    def plans(self, shape: BatchShape) -> bool:
        """Return True if the shape is one of the few that `for_batches` has planned. Default: False."""
        return False

    def for_batches(self, batches: Iterable[PieceTable], most: int = MOST_SHAPES) -> Layout:
        """Return the layout for a run with the given batches.

        Args:
            batches: Pieces of the pairs of each batch.
            most: Maximum number of shapes, for a layout with planned shapes.
        """
        return self

    def __call__(self, pairs: Sequence[TokenizedPair]) -> PreferenceBatch:
        """Convert pairs to a batch. This is the `collate_fn` of a data loader."""
        placed = self.place(pairs)
        every = (piece for pair in placed for piece in (*pair.prompts, *pair.completions))
        pieces = {(piece.row, piece.column): piece for piece in every}
        answers = sum(len(piece.tokens) for pair in placed for piece in pair.completions)
        shape = self.shape_of(BatchShape(*extent(list(pieces.values())), answers))
        rows = fill(pieces.values(), self.pad_id, (shape.rows, shape.width))
        padding = shape.reads - answers
        sequences = [(pair.prompts[side], pair.completions[side]) for side in (0, 1) for pair in placed]
        lengths = torch.tensor([len(completion.tokens) for _, completion in sequences])
        reads = [predictors(prompt, answer, len(answer.tokens), rows.width) for prompt, answer in sequences]
        return PreferenceBatch(
            input_ids=rows.input_ids,
            position_ids=rows.position_ids,
            attention_mask=rows.attention_mask,
            segments=rows.segments if self.packed else None,
            read_at=torch.cat([*reads, _spread(padding, shape.tokens)]),
            targets=_pad([token for _, completion in sequences for token in completion.tokens], padding, self.pad_id),
            owner=_pad(torch.arange(len(sequences)).repeat_interleave(lengths), padding, len(sequences)),
            prompt_end=torch.tensor([last_of(pair.prompts[0], rows.width) for pair in placed]),
            completion_end=torch.tensor([last_of(completion, rows.width) for _, completion in sequences]),
            lengths=lengths,
            flipped=torch.tensor([pair.flipped for pair in pairs]),
            has_gold=tuple(pair.has_gold for pair in pairs),
            ids=tuple(pair.id for pair in pairs),
            sources=tuple(pair.source for pair in pairs),
            factors=tuple(pair.factor for pair in pairs),
            annotators=tuple(pair.annotator for pair in pairs),
            prompts=tuple(pair.prompt for pair in pairs),
            answers=tuple(pair.answers for pair in pairs),
            tokens=int(rows.attention_mask.sum()),
            planned=self.plans(shape),
            reference_bits=_reference_bits(pairs),
            weight_bits=_bits([pair.weight for pair in pairs]),
            margin_bits=_bits([pair.margin for pair in pairs]),
        )


def _reference_bits(pairs: Sequence[TokenizedPair]) -> Tensor | None:
    """Return `PreferenceBatch.reference_bits`, (2B,), or None if a pair has no reference value."""
    known = [pair.reference_logps for pair in pairs if pair.reference_logps is not None]
    if len(known) != len(pairs):
        return None
    return torch.tensor(known, dtype=torch.float64).T.flatten().view(torch.int64)


def _bits(values: Sequence[float | None]) -> Tensor | None:
    """Return the bits of (B,) weights or margins, or None if a pair has none."""
    known = [value for value in values if value is not None]
    return torch.tensor(known, dtype=torch.float64).view(torch.int64) if len(known) == len(values) else None


def _pad(values: Sequence[int] | torch.Tensor, padding: int, value: int) -> torch.Tensor:
    return torch.cat([torch.as_tensor(values, dtype=torch.long), torch.full((padding,), value)])


def _spread(padding: int, tokens: int) -> torch.Tensor:
    """Return read positions for padding, from the end of the batch backwards. They are distinct if possible."""
    return tokens - 1 - torch.arange(padding) % tokens


class PaddedLayout(Layout):
    """Layout with one row for each sequence: the chosen sequences, then the rejected ones that are not yet there."""

    packed = False

    def place(self, pairs: Sequence[TokenizedPair]) -> list[PlacedPair]:
        """Place each prompt and completion in a separate row."""
        rows: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        sides: list[list[tuple[Piece, Piece]]] = []
        for answers in ([pair.chosen_ids for pair in pairs], [pair.rejected_ids for pair in pairs]):
            sides.append([])
            for pair, ids in zip(pairs, answers, strict=True):
                row = rows.setdefault((tuple(pair.prompt_ids), tuple(ids)), len(rows))
                start = len(pair.prompt_ids)
                sides[-1].append((Piece(pair.prompt_ids, row, 0, 0, 0), Piece(ids, row, start, start, 0)))
        both = zip(*sides, strict=True)
        return [PlacedPair((prompt, again), (chosen, rejected)) for (prompt, chosen), (again, rejected) in both]


class PackedLayout(Layout):
    """Layout with a prompt and its completions in one row, next to other prompts."""

    packed = True
    row_tokens: int | None
    """Maximum number of tokens in a row. None: all pairs are in one row."""

    @abstractmethod
    def rows_of(self, sizes: Sequence[int]) -> Sequence[Sequence[int]]:
        """Choose the families of each row by their numbers of tokens."""

    def place(self, pairs: Sequence[TokenizedPair]) -> list[PlacedPair]:
        """Place each prompt and its completions once."""
        tokens = [(tuple(pair.prompt_ids), tuple(pair.chosen_ids), tuple(pair.rejected_ids)) for pair in pairs]
        lengths = [list(map(len, pieces)) for pieces in tokens]
        shared = share_pieces(tokens, lengths, self.row_tokens)
        families = [
            (tokens[family[0][0]][0], [tokens[pair][side] for pair, side in family]) for family in shared.families
        ]
        placed = place_rows(families, self.rows_of(shared.sizes(lengths)))
        return [
            PlacedPair((placed[first][0], placed[second][0]), (placed[first][1][chosen], placed[second][1][rejected]))
            for (first, chosen), (second, rejected) in shared.places
        ]


class SharedPrefixLayout(PackedLayout):
    """Layout in rows of the cheapest width."""

    def __init__(self, pad_id: int, row_tokens: int | None) -> None:
        """Set the limit of a row.

        Args:
            pad_id: Token id for padding.
            row_tokens: Maximum number of tokens in a row. A longer pair widens the rows of its batch to its length.
                None: all pairs are in one row, without padding.
        """
        super().__init__(pad_id)
        self.row_tokens = row_tokens

    def rows_of(self, sizes: Sequence[int]) -> Sequence[Sequence[int]]:
        """Choose one row, or rows of the cheapest width."""
        return [range(len(sizes))] if self.row_tokens is None else cheapest_rows(sizes, self.row_tokens)


class FixedShapesLayout(PackedLayout):
    """Layout with few batch shapes, so that a GPU program is compiled once for each.

    Rows are padded. Read positions are padded with positions whose `owner` is 2B, which no sum includes.
    """

    def __init__(self, pad_id: int, row_tokens: int | None, plan: ShapePlan | None = None) -> None:
        """Store the settings.

        Args:
            pad_id: Token id for padding.
            row_tokens: Number of tokens in a row, or the length of the longest pair if that is larger. None: all pairs
                of a batch are in one row, for attention kernels that skip fully masked blocks.
            plan: Available shapes. Default: each batch has its own rounded shape.
        """
        super().__init__(pad_id)
        self.row_tokens, self.plan = row_tokens, plan or ShapePlan()

    def rows_of(self, sizes: Sequence[int]) -> Sequence[Sequence[int]]:
        """Choose one row, or as few rows of equal width as possible."""
        return [range(len(sizes))] if self.row_tokens is None else pack(sizes, max(self.row_tokens, *sizes))

    def shape_of(self, needed: BatchShape) -> BatchShape:
        """Return the cheapest shape of the plan into which the batch fits."""
        return self.plan.fit(needed)

    def plans(self, shape: BatchShape) -> bool:
        """Return True if the plan has the shape."""
        return shape in self.plan.shapes

    def for_batches(self, batches: Iterable[PieceTable], most: int = MOST_SHAPES) -> FixedShapesLayout:
        """Return the layout with the shapes that need the least padding for these batches."""
        needed = [self._needed(pieces) for pieces in batches]
        return FixedShapesLayout(self.pad_id, self.row_tokens, plan_shapes(needed, most))

    def _needed(self, pieces: PieceTable) -> BatchShape:
        lengths = pieces.lengths.tolist()
        sizes = share_pieces(pieces.ids.tolist(), lengths, self.row_tokens).sizes(lengths)
        rows = self.rows_of(sizes)
        width = max(sum(sizes[number] for number in members) for members in rows)
        return BatchShape(len(rows), width, int(pieces.lengths[:, 1:].sum()))
