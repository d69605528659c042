"""Tests of batch shapes: the best split against all splits, and the padding over epochs of real files."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lpc_lightning.algorithms import DPO
from lpc_lightning.data import Balanced, PreferenceData, SyntheticPreferences
from lpc_lightning.data.batching.layouts import FixedShapesLayout, Layout, SharedPrefixLayout
from lpc_lightning.data.batching.shapes import MOST_SHAPES, BatchShape, ShapePlan, plan_shapes
from lpc_lightning.data.datamodule import PLANNED_EPOCHS, PreferenceDataModule
from lpc_lightning.data.tokenization.pieces import PieceTable
from lpc_lightning.latent import MarginalSpace
from lpc_lightning.policy import CausalPolicy, TinyPolicy
from lpc_lightning.types import PreferenceBatch, TokenizedPair
from tests.fixtures.policies import piece_table
from tests.fixtures.real_data import DATA_DIR

PREFERENCES = DATA_DIR / "preferences"
Tiny = Callable[..., CausalPolicy]
sizes = st.builds(BatchShape, st.just(1), st.integers(1, 3000), st.integers(1, 2000))


def work(plan: ShapePlan, needed: list[BatchShape]) -> float:
    return sum(plan.fit(each).work for each in needed)


@given(needed=st.lists(sizes, min_size=1, max_size=7), most=st.integers(1, 3))
def test_plan_no_cut_is_cheaper(needed: list[BatchShape], most: int) -> None:
    plan = plan_shapes(needed, most)
    assert len(plan.shapes) <= most
    assert all(plan.fit(each) in plan.shapes and plan.fit(each).holds(each) for each in needed)
    if len(plan.shapes) < most:
        return  # further shapes would have saved little
    rounded = sorted((each.rounded(plan.step) for each in needed), key=lambda each: (each.tokens, each.reads))
    cheapest = min(
        sum(len(run) * (max(e.tokens for e in run) + 0.25 * max(e.reads for e in run)) for run in runs if run)
        for cuts in itertools.combinations_with_replacement(range(len(needed) + 1), most - 1)
        for runs in [[rounded[a:b] for a, b in itertools.pairwise([0, *cuts, len(needed)])]]
    )
    # A batch may fit into the cheaper shape of another group.
    assert work(plan, needed) <= cheapest + 1e-6


def test_plan_of_equal_batches_is_one_shape() -> None:
    needed = [BatchShape(1, 5000 - n, 3000 - n) for n in range(50)]
    assert plan_shapes(needed).shapes == (BatchShape(1, 5120, 3072),)


def test_plan_unknown_batch_has_its_own_shape() -> None:
    plan = plan_shapes([BatchShape(1, 3000, 1000)])
    assert plan.fit(BatchShape(1, 4000, 1000)) == BatchShape(1, 4096, 1024)
    assert plan.fit(BatchShape(1, 100, 10)) == plan.shapes[0]


def unique_tokens(pieces: PieceTable) -> int:
    """Return the number of tokens of all prompts and completions of a batch, each counted once."""
    prompts = {row[0]: sizes[0] for row, sizes in zip(pieces.ids.tolist(), pieces.lengths.tolist(), strict=True)}
    completions = {
        (row[0], row[side]): sizes[side]
        for row, sizes in zip(pieces.ids.tolist(), pieces.lengths.tolist(), strict=True)
        for side in (1, 2)
    }
    return sum(prompts.values()) + sum(completions.values())


def shapes_of_epochs(data: PreferenceDataModule, balance: bool) -> tuple[set[BatchShape], float]:
    """Return the shapes over the planned epochs, and the share of padding in their tokens."""
    store = data.load("train", TinyPolicy().load_tokenizer())
    assert store is not None
    batches = data.training_batches(store, 0, default=Balanced() if balance else None)
    lengths = store.piece_lengths
    epochs = [batch for epoch in range(PLANNED_EPOCHS) for batch in batches.all_devices(epoch)]
    layout = FixedShapesLayout(0, None).for_batches(store.pieces[batch] for batch in epochs)
    needed = [BatchShape(1, unique_tokens(store.pieces[batch]), int(lengths[batch][:, 1:].sum())) for batch in epochs]
    shapes = [layout.shape_of(each) for each in needed]
    for batch, shape in list(zip(epochs, shapes, strict=True))[:: max(1, len(epochs) // 20)]:
        laid_out = layout([store[number] for number in batch])
        assert laid_out.planned
        assert laid_out.input_ids.shape == (shape.rows, shape.width)
        assert laid_out.read_at.shape == laid_out.owner.shape == laid_out.targets.shape == (shape.reads,)
    return set(shapes), 1 - sum(n.tokens for n in needed) / sum(shape.tokens for shape in shapes)


@pytest.fixture(scope="module")
def real_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Token cache of the real files."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(not PREFERENCES.is_dir(), reason="no $LPC_DATA_DIR/preferences")
@pytest.mark.parametrize("pairs", [8, 16])
@pytest.mark.parametrize("file", sorted(PREFERENCES.glob("*.jsonl")), ids=lambda file: file.stem)
def test_real_epochs_have_four_shapes(file: Path, pairs: int, real_cache: str) -> None:
    data = PreferenceData(str(file), batch_size=pairs, too_long="truncate_answer", cache_dir=real_cache)
    shapes, padding = shapes_of_epochs(data, balance=True)
    assert len(shapes) <= MOST_SHAPES
    assert padding <= 0.1


@pytest.mark.parametrize("pairs", [4, 16])
def test_built_in_epochs_have_four_shapes(pairs: int, tmp_path: Path) -> None:
    data = SyntheticPreferences(train_pairs=500, batch_size=pairs, cache_dir=str(tmp_path))
    shapes, padding = shapes_of_epochs(data, balance=True)
    assert len(shapes) <= MOST_SHAPES
    assert padding <= 0.1


class AsOnGpu(SyntheticPreferences):
    """The built-in pairs in the layout of a GPU whose compiled attention skips hidden blocks."""

    def make_layout(self) -> Layout:
        return FixedShapesLayout(0, None)


@pytest.mark.slow
def test_run_has_planned_shapes_only(
    small_policy: Any, fit_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of another shape would run uncompiled: in the reference's pass, a warm start, validation or training."""
    batches: list[tuple[bool, PreferenceBatch]] = []
    original = CausalPolicy.hidden

    def hidden(policy: CausalPolicy, batch: PreferenceBatch) -> torch.Tensor:
        batches.append((torch.is_grad_enabled(), batch))
        return original(policy, batch)

    monkeypatch.setattr(CausalPolicy, "hidden", hidden)
    data = AsOnGpu(train_pairs=24, validation_pairs=4, batch_size=2, cache_dir=str(tmp_path))
    latent = MarginalSpace(num_codes=2, warm_start_pairs=12)
    fit_run(DPO(policy=small_policy(), latent=latent), data, max_epochs=1, num_sanity_val_steps=1)
    assert all(batch.planned for _, batch in batches)
    trained = {batch.input_ids.shape for trains, batch in batches if trains}
    assert 1 < len(trained) <= MOST_SHAPES


@pytest.mark.parametrize("row_tokens", [None, 60])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_padding_adds_nothing(
    family: str, row_tokens: int | None, make_pairs: Callable[..., list[TokenizedPair]], tiny: Tiny
) -> None:
    """Log-probabilities, states and gradients in float64 equal those of rows without padding."""
    pairs = make_pairs([(5, 3, 7), (11, 9, 1), (1, 1, 4), (3, 13, 5), (1, 6, 1), (17, 2, 11)])
    policy = tiny(family, attention="sdpa")
    fixed = FixedShapesLayout(0, row_tokens, ShapePlan((BatchShape(4, 160, 90),)))
    codes = torch.randn(3, policy.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found: list[Any] = []
    for layout in (fixed, SharedPrefixLayout(0, None)):
        policy.zero_grad()
        forward = policy(layout(pairs))
        plain, per_code = forward.logps(), forward.logps_per_code(codes)
        under = forward.logps(codes[[0, 1, 2, 0, 1, 2]])
        (plain.square().sum() + per_code.sum() + under.sum() + forward.states.chosen.sum()).backward()
        first = forward.first_order()
        gradients = [parameter.grad.clone() for parameter in policy.parameters() if parameter.grad is not None]
        found.append([plain, per_code, under, *first, forward.mean_token(), *gradients])
    padded = fixed(pairs)
    assert padded.input_ids.shape == (4, 160)
    assert padded.owner.shape == (90,)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_layout_of_one_row_has_the_planned_shape(make_pairs: Callable[..., list[TokenizedPair]]) -> None:
    pairs = make_pairs([(50, 30, 70), (110, 90, 10)])
    layout = FixedShapesLayout(0, None).for_batches([piece_table(pairs)])
    batch = layout(pairs)
    assert batch.input_ids.shape == (1, 384)
    assert batch.read_at.shape == (224,)
    assert (batch.owner[200:] == 4).all()
    assert batch.segments is not None
    assert (batch.segments[0, 360:] == -1).all()
