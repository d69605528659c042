"""Tests of the training batches: order, `overfit_batches`, a stage without pairs, and the cache."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

from lpc_lightning.algorithms import DPO
from lpc_lightning.data import ByAnnotator, ByLength, SyntheticPreferences
from lpc_lightning.data.sources.rows import DataError
from lpc_lightning.errors import ConfigError
from tests.data.datamodule.conftest import Fit, row, tiny


class Ids(Callback):
    """Ids of the training pairs of each epoch."""

    def __init__(self) -> None:
        self.epochs: dict[int, list[str]] = defaultdict(list)

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, number: int) -> None:
        self.epochs[trainer.current_epoch] += batch.ids


@pytest.mark.parametrize("limits", [{"max_epochs": 3}, {"max_steps": 6}])
def test_overfit_batches_are_the_same_in_each_epoch(limits: dict[str, int], tmp_path: Path) -> None:
    made = SyntheticPreferences(train_pairs=40, validation_pairs=4, batch_size=4, cache_dir=str(tmp_path))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    seen = Ids()
    trainer = Trainer(overfit_batches=2, callbacks=[seen], enable_model_summary=False, **quiet, **limits)
    with pytest.warns(UserWarning, match="We are turning off the train dataloader shuffling"):
        trainer.fit(DPO(policy=tiny()), datamodule=made)
    first, second, third = seen.epochs.values()
    assert first == second == third
    assert len(set(first)) == 8
    assert {made.pairs["train"][index].id for index in made.reads("train")} == set(first)


def test_order_by_length_groups_similar_lengths(tmp_path: Path) -> None:
    def spread(window: int | None) -> tuple[float, list[str]]:
        sizes: dict[str, Any] = {"train_pairs": 40, "validation_pairs": 0, "batch_size": 4}
        order = None if window is None else ByLength(window)
        made = SyntheticPreferences(**sizes, batch_order=order, cache_dir=str(tmp_path / "cache"))
        Fit(tmp_path / f"window {window}", made)
        pairs = made.pairs["train"]
        of = {pair.id: length for pair, length in zip(pairs, pairs.piece_lengths.sum(1), strict=True)}
        batches = [[of[name] for name in batch.ids] for batch in made.train_dataloader()]
        names = [name for batch in made.train_dataloader() for name in batch.ids]
        return sum(max(batch) - min(batch) for batch in batches) / len(batches), sorted(names)

    (plain, names), (grouped, same) = spread(None), spread(10)
    assert grouped < plain / 4
    assert names == same


def test_order_by_annotator_groups_pairs(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"train_pairs": 64, "validation_pairs": 0, "batch_size": 4, "batch_order": ByAnnotator(4)}
    made = SyntheticPreferences(deciding="hidden", annotators=8, **sizes, cache_dir=str(tmp_path / "cache"))
    Fit(tmp_path, made)
    batches = list(made.train_dataloader())
    assert sorted(name for batch in batches for name in batch.ids) == sorted(pair.id for pair in made.pairs["train"])
    alone = [batch for batch in batches if len(set(batch.annotators)) == 1]
    assert sum(len(batch.annotators) for batch in alone) >= 64 - 8 * 3


def test_order_by_annotator_without_annotators(tmp_path: Path) -> None:
    made = SyntheticPreferences(
        train_pairs=8, validation_pairs=0, batch_order=ByAnnotator(2), cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(
        DataError,
        match=r"data\.batch_order: found ByAnnotator\(.*=2, .*\) and no annotator in 8 training pairs",
    ):
        Fit(tmp_path, made)


def test_training_order_follows_the_run_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = SyntheticPreferences(train_pairs=30, validation_pairs=0, batch_size=4, cache_dir=str(tmp_path / "cache"))
    Fit(tmp_path, made)

    def order(seed: int) -> list[tuple[str, ...]]:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        return [batch.ids for batch in made.train_dataloader()]

    assert order(3) == order(3) != order(4)
    assert sorted(sum(order(3), ())) == sorted(sum(order(4), ())) == sorted(pair.id for pair in made.pairs["train"])


def test_stage_without_pairs_has_no_batches(tmp_path: Path) -> None:
    made = SyntheticPreferences(train_pairs=2, validation_pairs=0, test_pairs=0, cache_dir=str(tmp_path / "cache"))
    run = Fit(tmp_path, made)
    assert run.trainer.global_step == 1
    assert made.val_dataloader() == []
    assert made.test_dataloader() == []
    assert not any(name.startswith("data/validation") for name in run.metrics)


def test_fit_without_training_pairs(tmp_path: Path) -> None:
    """It is refused before the model is built. Other commands need none."""
    made = SyntheticPreferences(train_pairs=0, validation_pairs=3, test_pairs=2, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(
        ConfigError, match=r"^fit: found no training pairs, expected .* Set data\.train_pairs for built"
    ):
        Fit(tmp_path, made)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    for command, pairs in (("validate", 3), ("test", 2)):
        seen: list[str] = []
        module = DPO(policy=tiny())
        for hook in ("on_validation_batch_end", "on_test_batch_end"):
            setattr(module, hook, lambda outputs, batch, *_, seen=seen: seen.extend(batch.ids))
        getattr(Trainer(enable_model_summary=False, **quiet), command)(module, datamodule=made, verbose=False)
        assert len(seen) == pairs


@pytest.mark.parametrize("stage", ["train", "validation", "test"])
def test_built_in_pairs_below_zero(stage: str) -> None:
    with pytest.raises(ValueError, match=rf"^data\.{stage}_pairs: found -1, expected 0 or more\.$"):
        SyntheticPreferences(**{f"{stage}_pairs": -1})  # type: ignore[arg-type]


def test_cache_is_used_by_the_next_run(data: Any, write_rows: Any, tmp_path: Path) -> None:
    path = write_rows([row(n) for n in range(8)])
    first = Fit(tmp_path / "one", data(path, validation_share=0.0))
    entries = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*") if file.is_file()}
    second = Fit(tmp_path / "two", data(path, validation_share=0.0))
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*") if file.is_file()} == entries
    assert second.metrics == first.metrics
