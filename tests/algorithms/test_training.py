"""Tests of whole runs: accumulation, seeds, callbacks, and that the policy learns."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.testing import assert_close

from lpc_lightning.algorithms import DPO, IPO, KTO, PreferenceModule, SimPO
from lpc_lightning.errors import ConfigError
from lpc_lightning.latent import GumbelSpace, LatentSpace, MarginalSpace
from lpc_lightning.policy import LoRA

pytestmark = pytest.mark.slow


def adam(lr: float) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr)


def marginal(**space: Any) -> MarginalSpace:
    return MarginalSpace(**({"num_codes": 4, "hidden": 8, "init_logit_std": 1.0} | space))


# Accumulation. Of 21 pairs, the third and last step of an epoch has 5, in micro-batches of 2, 2 and 1.

ALGORITHMS: dict[str, Callable[..., PreferenceModule]] = {"DPO": DPO, "IPO": IPO, "SimPO": SimPO, "KTO": KTO}


@pytest.mark.parametrize("latent", [None, marginal], ids=["plain", "marginal"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_accumulation_equals_large_batch(
    algorithm: str, latent: Callable[[], LatentSpace] | None, small_policy: Any, small_data: Any, fit_run: Any
) -> None:
    def run(batch_size: int, accumulate: int) -> Any:
        space = latent() if latent else None
        module = ALGORITHMS[algorithm](
            policy=small_policy(dtype="float64"), latent=space, optimizer=adam(1e-3), latent_lr=1e-3
        )
        data = small_data(batch_size=batch_size)
        return fit_run(module, data, max_epochs=2, precision="64-true", accumulate_grad_batches=accumulate)

    large, accumulated = run(8, 1), run(2, 4)
    assert [len(batch) for batch in large.batches] == [8, 8, 5] * 2
    assert [len(batch) for batch in accumulated.batches] == [2] * 10 + [1] + [2] * 10 + [1]
    assert sum(large.batches, ()) == sum(accumulated.batches, ())
    assert list(accumulated.training) == list(large.training) == list(range(6))
    for step, metrics in large.training.items():
        assert accumulated.training[step] == pytest.approx(metrics, rel=1e-12, abs=1e-12), step
    for name, weight in large.weights.items():
        assert weight.dtype == torch.float64
        assert_close(accumulated.weights[name], weight, rtol=0, atol=1e-12)
    start = dict(large.module.policy_spec.build().named_parameters())
    assert all((weight - large.weights[f"policy.{name}"]).abs().max() > 1e-4 for name, weight in start.items())


# Seeds.


def noisy(policy: Any) -> DPO:
    """Return a module with all sources of random numbers: new weights, dropout, Gumbel noise, sampled codes."""
    space = GumbelSpace(num_codes=4, hidden=8, init_logit_std=1.0, prior_mode="sample")
    policy = policy(lora=LoRA(rank=4, alpha=8, dropout=0.3))
    return DPO(policy=policy, latent=space, optimizer=adam(1e-2), latent_lr=1e-2)


class DrawRandomNumbers(Callback):
    """Draws random numbers of every kind in every hook."""

    def __init__(self) -> None:
        self.draws = 0

    def _draw(self, *args: Any) -> None:
        self.draws += 1
        torch.rand(self.draws)
        random.random()
        np.random.rand()

    on_train_start = on_train_epoch_start = on_train_batch_start = on_before_backward = on_before_optimizer_step = _draw
    on_train_batch_end = on_validation_start = on_validation_batch_start = on_validation_end = _draw

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._draw()


def test_run_is_determined_by_seed(small_policy: Any, fit_run: Any) -> None:
    first, again, other = (fit_run(noisy(small_policy), seed=seed, max_epochs=2) for seed in (1, 1, 2))
    assert first.training == again.training
    assert first.log.with_prefix("val/") == again.log.with_prefix("val/")
    assert all(torch.equal(weight, again.weights[name]) for name, weight in first.weights.items())
    assert other.batches != first.batches
    assert other.log.with_prefix("val/") != first.log.with_prefix("val/")
    # The policy has its own seed. The adapter and the latent space use the seed of the run.
    differing = {name for name, weight in first.weights.items() if not torch.equal(weight, other.weights[name])}
    assert differing == {name for name, weight in first.module.named_parameters() if weight.requires_grad}


def test_new_weights_depend_on_run_seed(small_policy: Any) -> None:
    def fresh(seed: int) -> dict[str, torch.Tensor]:
        seed_everything(seed, verbose=False)
        torch.rand(seed)
        (module := noisy(small_policy)).configure_model()
        return dict(module.named_parameters())

    one, again, other = fresh(1), fresh(1), fresh(2)
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    drawn = {"latent.codebook.weight", *(f"latent.{network}.first.weight" for network in ("prior", "posterior"))}
    drawn |= {name for name in one if "lora_A" in name}
    assert not any(torch.equal(one[name], other[name]) for name in drawn)
    frozen = {name for name, value in one.items() if not value.requires_grad}
    assert all(torch.equal(one[name], other[name]) for name in frozen)


class Seeds(Callback):
    """Records the seed of each batch."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def on_before_zero_grad(self, *args: Any) -> None:
        self.seeds.append(torch.initial_seed())


def test_step_seeds_are_distinct(small_policy: Any, fit_run: Any) -> None:
    one, again, other = Seeds(), Seeds(), Seeds()
    for seeds, seed in ((one, 1), (again, 1), (other, 2)):
        fit_run(DPO(policy=small_policy()), seed=seed, max_epochs=2, callbacks=[seeds])
    assert one.seeds == again.seeds
    assert len({*one.seeds, *other.seeds}) == 2 * 22


@pytest.fixture(scope="module")
def alone(small_policy: Any, fit_run: Any) -> Any:
    """A run of one epoch with all sources of random numbers, without onlookers."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PL_GLOBAL_SEED", "0")
        return fit_run(noisy(small_policy), max_epochs=1)


@pytest.mark.parametrize(
    "onlooker",
    [
        pytest.param(lambda: {"callbacks": [DrawRandomNumbers()]}, id="a callback that draws"),
        pytest.param(lambda: {"val_check_interval": 3}, id="validations in between"),
        pytest.param(lambda: {"limit_val_batches": 0}, id="no validation"),
        pytest.param(lambda: {"num_sanity_val_steps": -1}, id="a sanity check"),
    ],
)
def test_run_unchanged_by_callbacks_and_validation(
    onlooker: Callable[[], Any], alone: Any, small_policy: Any, fit_run: Any
) -> None:
    options = onlooker()
    watched = fit_run(noisy(small_policy), max_epochs=1, **options)
    assert watched.training == alone.training
    assert all(torch.equal(weight, watched.weights[name]) for name, weight in alone.weights.items())
    assert all(callback.draws > 30 for callback in options.get("callbacks", []))


def test_validation_is_repeatable(small_policy: Any, small_data: Any, fit_run: Any) -> None:
    done = fit_run(noisy(small_policy), max_epochs=1)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    torch.manual_seed(77)
    results = [trainer.validate(done.module, datamodule=small_data(), verbose=False) for _ in range(2)]
    (last,) = done.log.with_prefix("val/").values()
    assert results == [[last]] * 2


# Learning.


@pytest.mark.parametrize("latent", [None, marginal], ids=["plain", "marginal"])
def test_dpo_learns_domain_preferences(
    latent: Callable[..., LatentSpace] | None, small_policy: Any, small_data: Any, fit_run: Any
) -> None:
    """All pairs are new, validation prompts are held out. Measured: losses 0.53 to 0.57, accuracies 0.70 and 0.71."""
    space = latent(num_codes=8, hidden=32, init_logit_std=0.1) if latent else None
    module = DPO(policy=small_policy(width=32), latent=space, optimizer=adam(1e-2), latent_lr=4e-3)
    data = small_data(train_pairs=1600, validation_pairs=256, batch_size=32)
    done = fit_run(module, data, max_epochs=1)
    (held_out,) = done.log.with_prefix("val/").values()
    assert done.losses[0] == pytest.approx(np.log(2), abs=0.01)
    assert np.mean(done.losses[-12:]) < 0.62
    assert held_out["val/loss"] < 0.64
    assert held_out["val/rewards/accuracies"] > 0.6  # chance is 0.5, with a standard error of 0.03
    assert held_out["val/rewards/margins"] > 0.2


# Settings of the run.


def test_gradient_checkpointing_keeps_results(small_policy: Any, fit_run: Any) -> None:
    passes: list[list[int]] = []

    class CountPasses(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            passes.append([])
            layer = pl_module.policy.backbone.layers[0]
            layer.self_attn.register_forward_hook(lambda *_: passes[-1].append(1))

    runs = []
    for checkpointing in (False, True):
        module = DPO(
            policy=small_policy(gradient_checkpointing=checkpointing),
            latent=GumbelSpace(num_codes=4, hidden=8, init_logit_std=1.0),
            optimizer=adam(1e-2),
        )
        runs.append(fit_run(module, max_epochs=1, limit_val_batches=0, callbacks=[CountPasses()]))
    plain, saving = runs
    assert saving.training == plain.training
    assert all(torch.equal(weight, saving.weights[name]) for name, weight in plain.weights.items())
    assert [len(counted) for counted in passes] == [11, 22]


class Poison(Callback):
    """Sets one weight of each matrix to NaN before the third batch. The row of an unused token has no effect."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.pairs = batch.ids
            for weight in pl_module.policy.parameters():
                weight.data.view(-1)[0] = torch.nan


def test_nan_loss_error_names_step_and_pairs(small_policy: Any, fit_run: Any) -> None:
    poison = Poison()
    with pytest.raises(FloatingPointError) as error:
        fit_run(DPO(policy=small_policy()), max_epochs=1, callbacks=[poison])
    names = ", ".join(poison.pairs)
    assert str(error.value).startswith(
        f"train/loss: found nan at step 2 (epoch 0, batch 2, pairs {names}), expected a "
    )


def test_divergence_error_for_huge_learning_rate(small_policy: Any, fit_run: Any) -> None:
    module = DPO(policy=small_policy(), optimizer=adam(1e30), lr_schedule="constant_with_warmup", warmup_ratio=0.0)
    with pytest.raises(FloatingPointError, match=r"found (nan|inf) at step \d \(epoch 0, .*Lower the learning rates"):
        fit_run(module, max_epochs=1)


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_invalid_beta_is_refused_at_init(algorithm: Any, small_policy: Any) -> None:
    with pytest.raises(ValueError, match=r"beta: found -1\.0, expected a number above 0\."):
        algorithm(policy=small_policy(), beta=-1.0)


@pytest.mark.parametrize(
    ("setting", "value", "found"),
    [
        ("policy", "models/some", "'models/some', expected an object such as PretrainedPolicy"),
        ("policy", torch.nn.Sequential(torch.nn.Linear(1, 1)), r"Sequential\(, expected an object such as Pretrained"),
        ("latent", MarginalSpace, r"<class '.*\.MarginalSpace'>, expected an object such as Marginal"),
        ("robust_loss", "REPO", r"'REPO', expected an object such as REPO\(\), or None"),
    ],
)
def test_settings_of_another_class_are_refused(setting: str, value: Any, found: str, small_policy: Any) -> None:
    """In Python, as users of TRL and of the command line may write them."""
    with pytest.raises(ConfigError, match=f"^{setting}: found {found}"):
        DPO(**{"policy": small_policy(), setting: value})


def test_fit_without_end_is_refused(small_policy: Any, fit_run: Any) -> None:
    with pytest.raises(ValueError, match="trainer: found no end of training, expected max_steps or max_epochs"):
        fit_run(DPO(policy=small_policy()), max_epochs=-1)
