"""Two ways to lay tokenised pairs out for one backbone pass. Both read the same log-probabilities.

- `padded`: one row a sequence, the prompt in both. Works with any attention kernel.
- `shared_prefix`: the prompt once, then both completions, each seeing the prompt and itself alone, positions restarted;
  several pairs share a row, up to a token budget where there is one. Needs a kernel that takes a mask.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lpc_lightning.data.batching.packing import (
    Piece,
    extent,
    fill,
    last_of,
    pack,
    place_families,
    place_rows,
    predictors,
)
from lpc_lightning.data.batching.shapes import BatchShape, ShapePlan, plan_shapes
from lpc_lightning.types import PreferenceBatch, TokenizedPair


@dataclass(frozen=True, slots=True)
class PlacedPair:
    """Where a pair's pieces lie. The prompt may lie there twice, once before each completion."""

    prompts: tuple[Piece, Piece]
    completions: tuple[Piece, Piece]


class Layout(ABC):
    """Tokenised pairs to a batch: places the pieces, and says where to read."""

    packed: bool
    """Whether a row holds several pieces that must not see each other."""

    def __init__(self, pad_id: int) -> None:
        """Keep the padding token.

        Args:
            pad_id: Token id that fills rows up; masked, so that any id will do.
        """
        self.pad_id = pad_id

    @abstractmethod
    def place(self, pairs: Sequence[TokenizedPair]) -> list[PlacedPair]:
        """Decide where the pieces of each pair lie."""

    def shape_of(self, needed: BatchShape) -> BatchShape:
        """Return the shape of a batch whose pieces need `needed`. Default: no larger than they need."""
        return needed

    def for_batches(self, piece_lengths: Iterable[np.ndarray]) -> Layout:
        """Return the layout of a run that reads given batches.

        Args:
            piece_lengths: (pairs, 3) tokens of each prompt, chosen and rejected completion, for each batch.
        """
        return self

    def __call__(self, pairs: Sequence[TokenizedPair]) -> PreferenceBatch:
        """Lay `pairs` out (the `collate_fn` of a data loader)."""
        placed = self.place(pairs)
        pieces = [piece for pair in placed for piece in (*pair.prompts, *pair.completions)]
        answers = sum(len(piece.tokens) for pair in placed for piece in pair.completions)
        shape = self.shape_of(BatchShape(*extent(pieces), answers))
        rows = fill(pieces, self.pad_id, (shape.rows, shape.width))
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
            ids=tuple(pair.id for pair in pairs),
            sources=tuple(pair.source for pair in pairs),
            factors=tuple(pair.factor for pair in pairs),
            annotators=tuple(pair.annotator for pair in pairs),
            tokens=int(rows.attention_mask.sum()),
            reference_bits=_reference_bits(pairs),
        )


def _reference_bits(pairs: Sequence[TokenizedPair]) -> Tensor | None:
    """(2B,) `PreferenceBatch.reference_bits`."""
    known = [pair.reference_logps for pair in pairs if pair.reference_logps is not None]
    if len(known) != len(pairs):
        return None
    return torch.tensor(known, dtype=torch.float64).T.flatten().view(torch.int64)


def _pad(values: Sequence[int] | torch.Tensor, padding: int, value: int) -> torch.Tensor:
    return torch.cat([torch.as_tensor(values, dtype=torch.long), torch.full((padding,), value)])


def _spread(padding: int, tokens: int) -> torch.Tensor:
    """Read positions that stand for none: from the end backwards, where padding is, all different where they can be."""
    return tokens - 1 - torch.arange(padding) % tokens


class PaddedLayout(Layout):
    """One row a sequence: the chosen ones, then the rejected ones."""

    packed = False

    def place(self, pairs: Sequence[TokenizedPair]) -> list[PlacedPair]:
        """Prompt and completion side by side in a row of their own."""
        placed = []
        for number, pair in enumerate(pairs):
            rows = (number, len(pairs) + number)
            start = len(pair.prompt_ids)
            prompts = [Piece(pair.prompt_ids, row, 0, 0, 0) for row in rows]
            answers = (pair.chosen_ids, pair.rejected_ids)
            completions = [Piece(ids, row, start, start, 0) for ids, row in zip(answers, rows, strict=True)]
            placed.append(PlacedPair((prompts[0], prompts[1]), (completions[0], completions[1])))
        return placed


class SharedPrefixLayout(Layout):
    """Prompt, chosen and rejected answer in one row, pairs side by side."""

    packed = True

    def __init__(self, pad_id: int, row_tokens: int | None) -> None:
        """Set the budget.

        Args:
            pad_id: Token id that fills rows up.
            row_tokens: Most tokens a row may hold. A longer pair widens the rows of its batch to its own length. None
                puts all pairs into one row, without padding.
        """
        super().__init__(pad_id)
        self.row_tokens = row_tokens

    def place(self, pairs: Sequence[TokenizedPair]) -> list[PlacedPair]:
        """All in one row, or rows as wide as costs least."""
        families = [(pair.prompt_ids, (pair.chosen_ids, pair.rejected_ids)) for pair in pairs]
        return [
            PlacedPair((prompt, prompt), (chosen, rejected))
            for prompt, (chosen, rejected) in place_families(families, self.row_tokens)
        ]


class FixedShapesLayout(Layout):
    """Pairs packed as in `SharedPrefixLayout`, in batches of few shapes: what a GPU can compile and plan for.

    Rows are padded, and read positions with positions of no answer (`owner` is 2B), which no sum takes in.
    """

    packed = True

    def __init__(self, pad_id: int, row_tokens: int | None, plan: ShapePlan | None = None) -> None:
        """Keep the settings.

        Args:
            pad_id: Token id that fills rows up.
            row_tokens: Tokens of a row; rows are as wide as the longest pair if that is longer. None puts all pairs of
                a batch into one row, for attention that leaves out blocks in which nothing is seen.
            plan: Shapes to choose from. Default: each batch has a shape of its own, rounded.
        """
        super().__init__(pad_id)
        self.row_tokens, self.plan = row_tokens, plan or ShapePlan()

    def place(self, pairs: Sequence[TokenizedPair]) -> list[PlacedPair]:
        """All in one row, or in as few rows of one width as hold them."""
        families = [(pair.prompt_ids, (pair.chosen_ids, pair.rejected_ids)) for pair in pairs]
        sizes = [len(prompt) + sum(map(len, completions)) for prompt, completions in families]
        placed = place_rows(families, self._rows(sizes))
        return [PlacedPair((prompt, prompt), (chosen, rejected)) for prompt, (chosen, rejected) in placed]

    def shape_of(self, needed: BatchShape) -> BatchShape:
        """Return the cheapest shape of the plan that holds the batch."""
        return self.plan.fit(needed)

    def for_batches(self, piece_lengths: Iterable[np.ndarray]) -> FixedShapesLayout:
        """Return the layout whose shapes hold these batches with the least padding."""
        needed = [self._needed(lengths) for lengths in piece_lengths]
        return FixedShapesLayout(self.pad_id, self.row_tokens, plan_shapes(needed))

    def _rows(self, sizes: Sequence[int]) -> list[list[int]]:
        if self.row_tokens is None:
            return [list(range(len(sizes)))]
        return pack(sizes, max(self.row_tokens, *sizes))

    def _needed(self, lengths: np.ndarray) -> BatchShape:
        sizes = lengths.sum(1).tolist()
        rows = self._rows(sizes)
        width = max(sum(sizes[number] for number in members) for members in rows)
        return BatchShape(len(rows), width, int(lengths[:, 1:].sum()))
