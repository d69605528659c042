"""Tests of the batches of a pass without gradient."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from torch import Tensor

from lpc_lightning.data import SyntheticPreferences
from lpc_lightning.data.batching.layouts import FixedShapesLayout
from lpc_lightning.data.tokenization.pieces import PieceTable
from lpc_lightning.policy import TinyPolicy
from lpc_lightning.reference import pair_pass
from lpc_lightning.reference.pair_pass import batches_by_length, compute_over_pairs
from lpc_lightning.types import PreferenceBatch


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), budget=st.integers(1, 60), data=st.data())
def test_batches_by_length_are_full(lengths: list[int], budget: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True, min_size=1))
    pieces = PieceTable(np.array([(length, 0, 0) for length in lengths]), np.arange(3 * len(lengths)).reshape(-1, 3))
    batches = batches_by_length(pieces, indices, budget)
    assert sorted(index for batch in batches for index in batch) == sorted(indices)
    in_order = [lengths[index] for batch in batches for index in batch]
    assert in_order == sorted(in_order, reverse=True)
    totals = [sum(lengths[index] for index in batch) for batch in batches]
    assert all(total <= budget or len(batch) == 1 for total, batch in zip(totals, batches, strict=True))
    nexts = [lengths[batch[0]] for batch in batches[1:]]
    assert all(total + following > budget for total, following in zip(totals, nexts, strict=False))


prompts_and_answers = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40
)


@given(rows=prompts_and_answers, budget=st.integers(1, 60), data=st.data())
def test_batches_count_shared_pieces_once(rows: list[tuple[int, int, int]], budget: int, data: st.DataObject) -> None:
    """Piece 0 has 3 tokens, piece 1 has 4, and so on."""
    indices = data.draw(st.lists(st.sampled_from(range(len(rows))), unique=True, min_size=1))
    batches = batches_by_length(PieceTable(np.array(rows) + 3, np.array(rows)), indices, budget)
    assert sorted(index for batch in batches for index in batch) == sorted(indices)

    def tokens(batch: list[int]) -> int:
        prompts = {rows[index][0] for index in batch}
        sequences = {(rows[index][0], answer) for index in batch for answer in rows[index][1:]}
        return sum(prompt + 3 for prompt in prompts) + sum(answer + 3 for _, answer in sequences)

    def scored(batch: list[int]) -> int:
        return sum(answer + 3 for index in batch for answer in rows[index][1:])

    def most(batch: list[int]) -> int:
        return max(tokens(batch), scored(batch))

    assert all(most(batch) <= budget or len(batch) == 1 for batch in batches)
    assert all(most([*batch, after[0]]) > budget for batch, after in itertools.pairwise(batches))
    prompts = [rows[index][0] for batch in batches for index in batch]
    assert [*dict.fromkeys(prompts)] == [prompt for prompt, _ in itertools.groupby(prompts)], "a prompt's are together"


def test_pass_has_one_planned_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU compiles a program for each shape, which takes longer than the pass."""
    monkeypatch.setattr(pair_pass, "BATCH_TOKENS", 1024)
    data = SyntheticPreferences(train_pairs=64, cache_dir=str(tmp_path))
    pairs = data.load("train", TinyPolicy().load_tokenizer())
    assert pairs is not None
    batches: list[PreferenceBatch] = []

    def count(batch: PreferenceBatch) -> Tensor:
        batches.append(batch)
        return torch.zeros(batch.pairs, 1)

    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    parts = list(compute_over_pairs(pairs, range(64), FixedShapesLayout(0, None), count, trainer, ""))
    assert sorted(index for indices, _ in parts for index in indices) == list(range(64))
    assert len({batch.tokens for batch in batches}) > 1
    assert len({batch.input_ids.shape for batch in batches}) == 1
    assert all(batch.planned for batch in batches)
