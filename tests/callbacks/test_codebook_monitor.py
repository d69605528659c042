"""Tests of CodebookMonitor in real runs: metrics, plots, and no output without a latent."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lpc_lightning.algorithms import DPO
from lpc_lightning.algorithms.metrics import entropy
from lpc_lightning.callbacks import BestAndLast, CodebookMonitor, CodeExplanations, FinalValidation
from lpc_lightning.data import SyntheticPreferences
from lpc_lightning.latent import GaussianSpace, GumbelSpace, LatentSpace, MarginalSpace, MLPSpace, VectorSpace
from lpc_lightning.policy import TinyPolicy

PICTURES = {"use", "heatmap_source", "heatmap_factor", "z"}
CODES: dict[str, Any] = {"num_codes": 4, "init_logit_std": 1.0}


@pytest.fixture
def fit(tmp_path: Path, cache_dir: Path, make_trainer: Callable[..., Trainer]) -> Callable[..., Trainer]:
    """Function that runs a fit: 12 training pairs in 6 steps an epoch, 10 validation pairs in 4 batches."""

    def run(monitor: CodebookMonitor, latent: LatentSpace | None, **settings: Any) -> Trainer:
        data = SyntheticPreferences(
            train_pairs=12, validation_pairs=10, batch_size=2, eval_batch_size=3, cache_dir=str(cache_dir)
        )
        loggers = [logger(str(tmp_path), name="", version="run") for logger in (CSVLogger, TensorBoardLogger)]
        module = DPO(policy=TinyPolicy(width=16, layers=1, heads=2), latent=latent)
        trainer = make_trainer(
            callbacks=[monitor], **({"logger": loggers, "max_epochs": 1, "log_every_n_steps": 1} | settings)
        )
        trainer.fit(module, data)
        return trainer

    return run


def pictures(folder: Path) -> dict[str, set[str]]:
    """Return the names of the plots by step."""
    names: dict[str, set[str]] = {}
    for path in (folder / "codebook").glob("*.png"):
        _, step, name = path.stem.split("_", 2)
        names.setdefault(step, set()).add(name)
    return names


@pytest.mark.slow
def test_plots_in_run_folder_and_tensorboard(fit: Any, tmp_path: Path) -> None:
    fit(CodebookMonitor(every=1), MarginalSpace(**CODES))
    assert pictures(tmp_path / "run") == {"000006": PICTURES}
    (events,) = (tmp_path / "run").glob("events*")
    board = EventAccumulator(str(events))
    board.Reload()
    assert set(board.Tags()["images"]) == {f"codebook/{name}" for name in PICTURES}
    for name in PICTURES:
        (image,) = board.Images(f"codebook/{name}")
        assert image.step == 6
        logged = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB"))
        written = np.asarray(Image.open(tmp_path / "run" / "codebook" / f"step_000006_{name}.png").convert("RGB"))
        assert np.array_equal(logged, written)
        assert logged.shape[0] > 300
        assert logged.std() > 5, "the image is empty"


@pytest.mark.slow
def test_plots_every_nth_validation_and_the_last(fit: Any, tmp_path: Path) -> None:
    fit(CodebookMonitor(every=2), GumbelSpace(**CODES), val_check_interval=2, num_sanity_val_steps=-1)
    # Validations are after 2, 4 and 6 steps. The sanity check does not count.
    assert set(pictures(tmp_path / "run")) == {"000004", "000006"}


@pytest.mark.slow
def test_plots_the_last_validation_once(fit: Any, tmp_path: Path) -> None:
    fit(CodebookMonitor(every=5), GumbelSpace(**CODES), val_check_interval=3, max_epochs=1)
    assert set(pictures(tmp_path / "run")) == {"000006"}


class Ended(Callback):
    """Ends the run after its last checkpoint, before other callbacks see the end of the training."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise RuntimeError("ended")


@pytest.mark.slow
def test_last_round_is_kept_before_its_checkpoint(fitted: Callable[..., Trainer], tmp_path: Path) -> None:
    """A resume from this checkpoint has no validation and no end of the training."""
    callbacks = [Ended(), CodebookMonitor(every=9), CodeExplanations(examples=1), FinalValidation(), BestAndLast()]
    with pytest.raises(RuntimeError, match="ended"):
        fitted(*callbacks, max_epochs=2)
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 10
    assert set(pictures(tmp_path / "run")) == {"000010"}
    assert json.loads((tmp_path / "run" / "codes.json").read_text())["step"] == 10


def test_validate_plots_without_training(tmp_path: Path, make_trainer: Callable[..., Trainer]) -> None:
    data = SyntheticPreferences(validation_pairs=6, batch_size=3, cache_dir=str(tmp_path / "cache"))
    module = DPO(policy=TinyPolicy(width=16, layers=1, heads=2), latent=MarginalSpace(**CODES))
    monitor = CodebookMonitor()
    (logged,) = make_trainer(callbacks=[monitor], default_root_dir=tmp_path).validate(module, data, verbose=False)
    assert pictures(tmp_path) == {"000000": PICTURES}
    # A new prior is uniform, and the first code is the most likely one for all pairs.
    assert logged["val/mutual_information/source"] == 0
    assert logged["val/latent/dead_codes"] == 3


@pytest.mark.slow
def test_validated_checkpoint_has_its_own_step(fit: Any, tmp_path: Path) -> None:
    """The weights of a checkpoint are those of its step, and those after a fit are those of the last step."""
    trainer = fit(CodebookMonitor(every=9), MarginalSpace(**CODES), max_epochs=2, limit_train_batches=3)
    trainer.save_checkpoint(path := tmp_path / "a.ckpt", weights_only=False)
    explanations = CodeExplanations(examples=1)
    trainer = fit(
        CodebookMonitor(every=9), MarginalSpace(**CODES), limit_train_batches=4, logger=False, default_root_dir=tmp_path
    )
    trainer.callbacks.append(explanations)
    for folder, checkpoint, step in (("trained", None, 4), ("loaded", path, 6)):
        (tmp_path / folder).mkdir()
        trainer._default_root_dir = str(tmp_path / folder)
        trainer.validate(trainer.lightning_module, trainer.datamodule, checkpoint, verbose=False)
        assert set(pictures(tmp_path / folder)) == {f"{step:06d}"}
        codes = json.loads((tmp_path / folder / "codes.json").read_text())
        assert (codes["step"], codes["checkpoint"]) == (step, None if checkpoint is None else str(checkpoint))


@pytest.mark.slow
def test_metrics_against_the_module(fit: Any, perturb: Callable[..., None]) -> None:
    """Prior and posterior of each pair, computed from the states with the trained module."""
    monitor = CodebookMonitor()
    trainer = fit(monitor, GumbelSpace(**CODES))
    module: Any = trainer.lightning_module
    loader = trainer.datamodule.val_dataloader()
    priors, posteriors = [], []
    with torch.no_grad():
        for batch in loader:
            states = module.policy(batch).states
            priors.append(module.latent.prior(states.prompt).log_softmax(-1))
            posteriors.append(module.latent.posterior(states.chosen, states.rejected).log_softmax(-1))
    prior, posterior = torch.cat(priors), torch.cat(posteriors)
    metrics = trainer.callback_metrics
    assert float(metrics["val/latent/posterior_entropy"]) == pytest.approx(float(entropy(posterior).mean()), rel=1e-4)
    agreement = (prior.argmax(-1) == posterior.argmax(-1)).float().mean()
    assert float(metrics["val/latent/agreement"]) == pytest.approx(float(agreement))
    kl = (posterior.exp() * (posterior - prior)).sum(-1).mean()
    assert float(metrics["val/latent/kl"]) == pytest.approx(float(kl), abs=1e-6)
    assert monitor.report.codes is not None
    assert monitor.report.codes.tolist() == prior.argmax(-1).tolist()
    assert monitor.report.prior == pytest.approx(prior.exp().mean(0).numpy(), rel=1e-4)
    for name in ("mutual_information", "posterior_mutual_information"):
        for label in ("source", "factor", "length_difference"):
            assert 0 <= float(metrics[f"val/{name}/{label}"]) <= math.log(4)
    assert not any("mutual" in name or "posterior" in name for name in trainer.progress_bar_metrics)


def test_run_without_latent(fit: Any, tmp_path: Path) -> None:
    trainer = fit(CodebookMonitor(every=1), None)
    assert not (tmp_path / "run" / "codebook").exists()
    assert not any("information" in name or "latent" in name for name in trainer.callback_metrics)


@pytest.mark.slow
@pytest.mark.parametrize("latent", [GaussianSpace(**CODES), MLPSpace(), VectorSpace()])
def test_space_without_codes_plots_z(latent: LatentSpace, fit: Any, tmp_path: Path) -> None:
    trainer = fit(CodebookMonitor(), latent)
    assert pictures(tmp_path / "run") == {"000006": {"z"}}
    assert not any("information" in name for name in trainer.callback_metrics)


def test_state_dict_keeps_the_count(tmp_path: Path) -> None:
    monitor, resumed = CodebookMonitor(every=3), CodebookMonitor(every=3)
    monitor._rounds = 2
    resumed.load_state_dict(monitor.state_dict())
    assert resumed._rounds == 2


def test_failed_plot_does_not_end_the_run(fit: Any, tmp_path: Path) -> None:
    """A file has the name of the folder."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "codebook").write_text("")
    with pytest.warns(UserWarning, match="codebook: the plots of step 6 failed: FileExistsError"):
        trainer = fit(
            CodebookMonitor(), MarginalSpace(**CODES), logger=TensorBoardLogger(tmp_path, name="", version="run")
        )
    assert trainer.global_step == 6


def test_every_below_one() -> None:
    with pytest.raises(ValueError, match=r"CodebookMonitor.every: found 0, expected at least 1"):
        CodebookMonitor(every=0)
