"""Tests of `best.ckpt` and `last.ckpt`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger

from lpc_lightning.callbacks import BestAndLast
from lpc_lightning.callbacks.best_and_last import _copy

# The resumed runs are longer than the first one.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:resume. found trainer.max_epochs 2")]


class Score(Callback):
    """Logs the monitored metric."""

    def __init__(self, scores: dict[int, float]) -> None:
        self.scores = scores

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("val/score", self.scores[trainer.global_step])


class Remember(Callback):
    """Keeps the step of `last.ckpt` at the start of each batch."""

    def __init__(self) -> None:
        self.steps: dict[int, int | None] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.steps[trainer.global_step] = step_of(folder_of(trainer) / "last.ckpt")


def folder_of(trainer: Trainer) -> Path:
    return Path(str(trainer.log_dir)) / "checkpoints"


def step_of(path: Path) -> int | None:
    return int(torch.load(path, weights_only=True)["global_step"]) if path.exists() else None


NO_BEST = "checkpoint: this run had no validation, so that there is no best.ckpt. Use last.ckpt."
# 20 pairs are 10 micro-batches and 5 steps.
SCORES = {2: 0.5, 4: 0.4, 7: 0.3, 9: 0.9, 10: 0.2}


def test_last_is_written_at_every_validation(fitted: Callable[..., Trainer], caplog: pytest.LogCaptureFixture) -> None:
    remembered = Remember()
    caplog.set_level("INFO", "lightning.pytorch")
    trainer = fitted(
        BestAndLast("val/score"), Score(SCORES), remembered, max_epochs=2, val_check_interval=4, num_sanity_val_steps=0
    )
    assert remembered.steps == {
        0: None, 1: None, 2: 2, 3: 2, 4: 4, 5: 5, 6: 5, 7: 7, 8: 7, 9: 9,
    }  # fmt: skip
    assert step_of(folder_of(trainer) / "last.ckpt") == 10
    assert step_of(folder_of(trainer) / "best.ckpt") == 9
    assert "weights_only" not in caplog.text, "a line at each checkpoint"
    assert NO_BEST not in caplog.text


def test_last_without_validation(fitted: Callable[..., Trainer], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lightning.pytorch")
    trainer = fitted(BestAndLast("val/score"), max_steps=3, max_epochs=-1, limit_val_batches=0, num_sanity_val_steps=0)
    assert step_of(folder_of(trainer) / "last.ckpt") == 3
    assert caplog.text.count(NO_BEST) == 1
    assert "for the built-in data data.validation_pairs" in caplog.text
    assert not (folder_of(trainer) / "best.ckpt").exists()


class Epochs(Callback):
    """Keeps the weights after each epoch, and `last.ckpt` after the first one of a new run."""

    def __init__(self, kept: Path) -> None:
        self.kept, self.weights = kept, list[dict[str, torch.Tensor]]()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights.append({name: value.detach().clone() for name, value in pl_module.named_parameters()})

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1 and trainer.ckpt_path is None:
            shutil.copy(folder_of(trainer) / "last.ckpt", self.kept)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_last_has_the_average_of_all_epochs(fitted: Callable[..., Trainer], tmp_path: Path) -> None:
    """Two epochs average to 0.7 of the weights after the first one, and 0.3 of those after the second."""

    def fit(version: str, **options: Any) -> tuple[dict[str, Any], Epochs]:
        average = EMAWeightAveraging(decay=0.7, update_every_n_steps=0, update_starting_at_epoch=0)
        epochs = Epochs(tmp_path / f"{version}.ckpt")
        logger = CSVLogger(tmp_path, name="", version=version)
        trainer = fitted(average, epochs, BestAndLast("val/loss", "min"), max_epochs=2, logger=logger, **options)
        return torch.load(folder_of(trainer) / "last.ckpt", weights_only=True), epochs

    whole, epochs = fit("whole")
    first, second = epochs.weights
    trained = [name for name in whole["state_dict"] if name in first]
    assert any(not torch.equal(first[name], second[name]) for name in trained)
    for name in trained:
        assert torch.equal(whole["current_model_state"][name], second[name])
        expected = 0.7 * first[name].double() + 0.3 * second[name].double()
        torch.testing.assert_close(whole["state_dict"][name].double(), expected, rtol=1e-6, atol=1e-8)
    resumed, _ = fit("resumed", ckpt_path=tmp_path / "whole.ckpt")
    for key in ("state_dict", "current_model_state", "averaging_state"):
        assert all(torch.equal(resumed[key][name], value) for name, value in whole[key].items()), key


def test_best_is_remembered_in_another_folder(fitted: Callable[..., Trainer], tmp_path: Path) -> None:
    options: dict[str, Any] = {"val_check_interval": 4, "num_sanity_val_steps": 0}
    first = folder_of(fitted(BestAndLast("val/score"), Score(SCORES), max_epochs=1, **options))
    assert (step_of(first / "best.ckpt"), step_of(first / "last.ckpt")) == (2, 5)
    content = (first / "best.ckpt").read_bytes()
    for name, scores, best in (("worse", SCORES | {9: 0.4}, 2), ("better", SCORES, 9)):
        logger = CSVLogger(tmp_path, name="", version=name)
        resumed = fitted(
            BestAndLast("val/score"),
            Score(scores),
            max_epochs=2,
            logger=logger,
            ckpt_path=first / "last.ckpt",
            **options,
        )
        assert step_of(folder_of(resumed) / "best.ckpt") == best
        assert resumed.checkpoint_callback.best_model_path == str(folder_of(resumed) / "best.ckpt")
        assert (first / "best.ckpt").read_bytes() == content


@pytest.mark.filterwarnings("ignore:.* exists and is not empty")
def test_run_whose_folder_has_moved_resumes_in_it(fitted: Callable[..., Trainer], tmp_path: Path) -> None:
    """Its checkpoint is given by a path through a link, so that two paths lead to one `best.ckpt`."""
    options: dict[str, Any] = {"val_check_interval": 4, "num_sanity_val_steps": 0}
    first = folder_of(fitted(BestAndLast("val/score"), Score(SCORES), max_epochs=1, **options))
    content = (first / "best.ckpt").read_bytes()
    moved = first.parent.rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(moved)
    resumed = fitted(
        BestAndLast("val/score"),
        Score(SCORES | {9: 0.4}),
        max_epochs=2,
        logger=CSVLogger(tmp_path, name="", version="moved"),
        ckpt_path=tmp_path / "link" / "checkpoints" / "last.ckpt",
        **options,
    )
    best = moved / "checkpoints" / "best.ckpt"
    assert best.read_bytes() == content
    assert resumed.checkpoint_callback.best_model_path == str(best)
    assert resumed.checkpoint_callback.best_model_score == 0.5
    assert step_of(best.with_name("last.ckpt")) == 10


@pytest.mark.parametrize("form", ["file", "folder"])
def test_copy_replaces_another_checkpoint_whole(form: str, tmp_path: Path) -> None:
    """The files of the earlier checkpoint go, and another name of it keeps its content."""
    for name in ("source", "target"):
        if form == "file":
            (tmp_path / name).write_text(name)
        else:
            (tmp_path / name).mkdir()
            (tmp_path / name / f"shard of {name}").write_text(name)
    if form == "file":
        (tmp_path / "other").hardlink_to(tmp_path / "target")
    _copy(tmp_path / "source", tmp_path / "target")
    if form == "file":
        assert (tmp_path / "target").read_text() == "source"
        assert (tmp_path / "other").read_text() == "target"
    else:
        assert [file.name for file in (tmp_path / "target").iterdir()] == ["shard of source"]
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_best_that_is_gone_is_forgotten(fitted: Callable[..., Trainer]) -> None:
    options: dict[str, Any] = {"val_check_interval": 4, "num_sanity_val_steps": 0}
    first = folder_of(fitted(BestAndLast("val/score"), Score(SCORES), max_epochs=1, **options))
    (first / "best.ckpt").unlink()
    last = first.parent / "last.ckpt"
    (first / "last.ckpt").rename(last)
    first.rename(first.with_name("earlier"))
    logger = CSVLogger(first.parents[1], name="", version="other")
    with pytest.warns(UserWarning, match=r"checkpoint: found no .*best\.ckpt of step 2, expected the best one"):
        resumed = fitted(
            BestAndLast("val/score"), Score(SCORES | {9: 0.25}), max_epochs=2, logger=logger, ckpt_path=last, **options
        )
    assert step_of(folder_of(resumed) / "best.ckpt") == 7
