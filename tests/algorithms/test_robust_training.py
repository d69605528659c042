"""Robust losses in training: reliabilities over windows and resumes, every latent, and refused settings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lpc_lightning.algorithms import DPO, IPO, PreferenceModule, SimPO
from lpc_lightning.latent import ExpectedSpace, GumbelSpace, LatentSpace, MarginalSpace
from lpc_lightning.robust import REPO, ConservativeLoss, DrDPO, HolderDPO, RobustLoss, UnbiasedLoss


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def marginal() -> MarginalSpace:
    return MarginalSpace(num_codes=3, hidden=8, init_logit_std=1.0)


@pytest.fixture
def module(small_policy: Any) -> Callable[..., PreferenceModule]:
    """Return a function that makes a module with a large learning rate."""

    def make(
        robust: RobustLoss, latent: LatentSpace | None = None, algorithm: type[PreferenceModule] = DPO
    ) -> PreferenceModule:
        return algorithm(policy=small_policy(), latent=latent, optimizer=adam, robust_loss=robust)

    return make


class Posteriors(Callback):
    """Records each micro-batch's annotators with the margins and losses, and the reliabilities after each step."""

    def __init__(self) -> None:
        self.windows: list[dict[str, list[float]]] = [defaultdict(list)]
        self.after: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for name, margin in zip(batch.annotators, outputs["margins"].tolist(), strict=True):
            self.windows[-1][name].append(margin)
        learned = pl_module.robust_loss.learned
        if trainer.global_step > len(self.after):
            self.after.append(dict(zip(learned.names, learned.values.tolist(), strict=True)))
            self.windows.append(defaultdict(list))


def test_reliabilities_follow_each_optimizer_step(module: Any, small_data: Any, fit_run: Any) -> None:
    """Against a loop over the annotators of each window, from the margins that the steps report."""
    watch, data = Posteriors(), small_data(deciding="hidden", annotators=3)
    fit_run(module(REPO(0.9, rate=0.2)), data, max_epochs=1, accumulate_grad_batches=4, callbacks=[watch])
    assert len(watch.after) == 3
    eta = dict.fromkeys(watch.after[0], 0.9)
    assert len(eta) == 3
    for window, after in zip(watch.windows[:3], watch.after, strict=True):
        for name, margins in window.items():
            p = torch.tensor(margins, dtype=torch.float64).sigmoid()
            right = eta[name] * p / (eta[name] * p + (1 - eta[name]) * (1 - p))
            eta[name] = 0.8 * eta[name] + 0.2 * float(right.mean())
        assert after == pytest.approx(eta, rel=1e-5)
    assert len({round(value, 4) for value in eta.values()}) == 3


class Save(Callback):
    """Saves after the third micro-batch: one step of two, and one micro-batch of the next step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if args[-1] == 2:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("latent", [lambda: None, marginal], ids=["plain", "marginal"])
def test_reliabilities_resume_to_the_last_bit(
    latent: Any, module: Any, small_data: Any, fit_run: Any, tmp_path: Path
) -> None:
    data: dict[str, Any] = {"deciding": "hidden", "annotators": 3}
    options: dict[str, Any] = {"max_epochs": 1, "accumulate_grad_batches": 2, "limit_val_batches": 0}
    whole = fit_run(module(REPO(), latent()), small_data(**data), callbacks=[Save(tmp_path / "stop.ckpt")], **options)
    resumed = fit_run(module(REPO(), latent()), small_data(**data), ckpt_path=tmp_path / "stop.ckpt", **options)
    first, second = (run.module.robust_loss.state_dict() for run in (whole, resumed))
    assert first["names"] == second["names"]
    assert torch.equal(first["values"], second["values"])
    assert (first["values"] != 0.9).all()
    assert all(torch.equal(value, resumed.weights[name]) for name, value in whole.weights.items())
    # A new run from the weights starts at the initial reliability.
    stored = torch.load(tmp_path / "stop.ckpt", weights_only=True)["robust_loss"]["values"]
    assert not torch.equal(stored, first["values"])


@pytest.mark.slow
@pytest.mark.parametrize("robust", [ConservativeLoss(0.2), UnbiasedLoss(0.2), DrDPO(), REPO(), HolderDPO()])
def test_robust_losses_train_with_estimators(robust: RobustLoss, module: Any, small_data: Any, fit_run: Any) -> None:
    latents: list[Callable[[], LatentSpace | None]] = [
        lambda: None,
        marginal,
        lambda: GumbelSpace(num_codes=3, hidden=8),
        lambda: ExpectedSpace(num_codes=3, hidden=8),
    ]
    for algorithm in (DPO, IPO, SimPO):
        if isinstance(robust, HolderDPO) and algorithm is IPO:
            with pytest.raises(ValueError, match="not a negative log-likelihood"):
                module(robust, algorithm=algorithm)
            continue
        for latent in latents if algorithm is DPO else latents[:2]:
            run = fit_run(
                module(robust, latent(), algorithm), small_data(train_pairs=8, validation_pairs=2), max_steps=2
            )
            assert all(torch.isfinite(torch.tensor(loss)) for loss in run.losses)
            assert all(weight.isfinite().all() for weight in run.weights.values())


def test_dr_dpo_step_has_batch_loss(module: Any, small_data: Any, fit_run: Any) -> None:
    """At the first step of DPO all losses are log 2, and so is the loss of a batch. Later pairs differ."""
    outputs: list[Any] = []

    class Outputs(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, output: Any, *args: Any) -> None:
            outputs.append((float(output["loss"]), output["losses"].double()))

    fit_run(module(DrDPO(0.1)), small_data(batch_size=7), max_epochs=2, limit_val_batches=0, callbacks=[Outputs()])
    assert outputs[0][0] == pytest.approx(0.693147, abs=1e-5)
    for loss, losses in outputs:
        assert loss == pytest.approx(-0.1 * float((-losses / 0.1).exp().mean().log()), abs=1e-4)
    assert max(float(losses.mean()) - loss for loss, losses in outputs) > 1e-3


@pytest.mark.parametrize("space", [None, MarginalSpace, ExpectedSpace, GumbelSpace])
def test_dr_dpo_averages_texts(space: Any, small_policy: Any, small_data: Any, fit_run: Any) -> None:
    """At the first step all labels cost log 2, so that no pair has a larger weight, whatever its text costs."""
    outputs: list[tuple[float, torch.Tensor]] = []

    class Outputs(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, output: Any, *args: Any) -> None:
            outputs.append((float(output["loss"]), output["losses"].double()))

    latent = space and space(num_codes=3, hidden=8, init_logit_std=0.0)
    module = DPO(policy=small_policy(), latent=latent, robust_loss=DrDPO(1e-3), nll_weight=2.0)
    fit_run(module, small_data(batch_size=7), max_steps=1, limit_val_batches=0, callbacks=[Outputs()])
    ((loss, losses),) = outputs
    assert losses.std() > 5e-3
    assert loss == pytest.approx(float(losses.mean()), abs=1e-5)
