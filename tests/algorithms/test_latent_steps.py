"""Tests of whole steps with every latent: layouts, precisions, micro-batches, schedules and validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from lpc_lightning.data.batching.layouts import Layout, PaddedLayout
from lpc_lightning.data.batching.loading import TrainingBatches, TrainingLoader
from lpc_lightning.latent import Exponential, GumbelSpace, MarginalSpace
from lpc_lightning.types import TokenizedPair
from tests.algorithms.conftest import LAYOUTS, LENGTHS, Make, every_layout
from tests.fixtures.spaces import SPACES, make_space


@pytest.mark.parametrize("name", list(SPACES))
def test_layouts_give_the_same_step(
    name: str, pairs: list[TokenizedPair], make: Make, train_step: Callable[..., Any]
) -> None:
    padded, packed = (train_step(make("dpo", make_space(name)), pairs, layout) for layout in LAYOUTS.values())
    torch.testing.assert_close(packed.loss, padded.loss, rtol=1e-9, atol=1e-9)
    assert set(padded.gradients) == set(packed.gradients)
    for weight, gradient in padded.gradients.items():
        scale = float(gradient.abs().max())
        # The norms of the backbone are float32, in its backward pass too.
        torch.testing.assert_close(packed.gradients[weight], gradient, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("name", ["none", *SPACES])
def test_equal_margins_are_simpos_target_margin(
    name: str, pairs: list[TokenizedPair], make: Make, train_step: Callable[..., Any]
) -> None:
    """The margin 0.5 of every pair, beside gamma / beta = 0.4, is gamma / beta = 0.6 under every latent."""
    steps = []
    for ratio, margin in ((0.4, 0.5), (0.6, None), (0.4, None)):
        module = make("simpo", make_space(name) if name in SPACES else None)
        module.gamma_beta_ratio = ratio
        steps.append(train_step(module, [replace(pair, margin=margin) for pair in pairs]))
    of_margin, of_setting, without = steps
    torch.testing.assert_close(of_margin.loss, of_setting.loss, rtol=1e-9, atol=1e-12)
    assert abs(of_margin.loss - without.loss) > 1e-3
    for weight, gradient in of_setting.gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(of_margin.gradients[weight], gradient, rtol=1e-5, atol=1e-6 * scale + 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", *SPACES])
@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", 1e-5), ("bf16-mixed", 2**-7), ("bf16-true", 2**-7)])
def test_precisions_give_the_same_step(
    name: str,
    precision: str,
    tolerance: float,
    pairs: list[TokenizedPair],
    make: Make,
    train_step: Callable[..., Any],
    once: Callable[..., Any],
) -> None:
    def step(precision: str) -> Any:
        latent = make_space(name) if name in SPACES else None
        return train_step(make("dpo", latent, dtype="float32"), pairs, precision=precision)

    steps = [once(("32-true", name), lambda: step("32-true")), step(precision)]
    # bfloat16 has a relative precision of 2^-8. Under 64-true the noise is float64, which gives other draws.
    if precision != "64-true" or name in ("none", "expected", "marginal", "vector", "mlp"):
        assert steps[1].loss.item() == pytest.approx(steps[0].loss.item(), rel=tolerance)
    assert all(torch.isfinite(gradient).all() for gradient in steps[1].gradients.values())
    assert set(steps[0].gradients) == set(steps[1].gradients)


@every_layout
def test_annotators_reach_the_latent(
    layout: Layout, pairs: list[TokenizedPair], make: Make, train_step: Callable[..., Any]
) -> None:
    named = [replace(pair, annotator=name) for pair, name in zip(pairs, "abab", strict=True)]
    losses = {}
    for shares, examples in ((False, named), (True, pairs), (True, named)):
        latent = MarginalSpace(num_codes=4, init_logit_std=2.0, annotators=shares)
        losses[shares, examples is named] = train_step(make("dpo", latent), examples, layout).loss
    assert torch.equal(losses[True, False], losses[False, True])
    assert abs(losses[True, True] - losses[True, False]) > 1e-3


@every_layout
def test_copies_are_no_evidence_in_a_step(
    layout: Layout, pairs: list[TokenizedPair], make: Make, train_step: Callable[..., Any]
) -> None:
    """A pair of each annotator is there again, with another id, once with the other label."""
    both = [pairs[0], pairs[1], replace(pairs[0], id="again"), replace(pairs[1], id="changed").swapped()]
    named = [replace(pair, annotator=name) for pair, name in zip(both, "abab", strict=True)]
    losses = []
    for shares in (False, True):
        latent = MarginalSpace(num_codes=4, init_logit_std=2.0, annotators=shares)
        losses.append(train_step(make("dpo", latent), named, layout).loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize("name", list(SPACES))
def test_nonzero_latent_changes_the_step(
    name: str, pairs: list[TokenizedPair], make: Make, train_step: Callable[..., Any], once: Callable[..., Any]
) -> None:
    plain = once("plain", lambda: train_step(make("dpo"), pairs))
    latent = train_step(make("dpo", make_space(name)), pairs)
    trained = {weight for weight in latent.gradients if weight.startswith("latent.")}
    assert trained
    if name != "mlp":  # it starts at zero
        assert abs(latent.loss.item() - plain.loss.item()) > 1e-3


@pytest.mark.parametrize("name", ["gumbel", "posterior only", "expected", "gaussian"])
def test_posterior_runs_only_in_training(
    name: str,
    pairs: list[TokenizedPair],
    make: Make,
    make_trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
    train_step: Callable[..., Any],
) -> None:
    module = make("dpo", make_space(name))
    runs: list[str] = []
    module.latent.posterior.register_forward_hook(lambda *_: runs.append("posterior"))
    module.latent.prior.register_forward_hook(lambda *_: runs.append("prior"))
    for stage in ("validate", "test", "predict"):
        getattr(make_trainer(), stage)(module, make_loader(pairs))
        assert "prior" in runs
        assert "posterior" not in runs, stage
        runs.clear()
    train_step(module, pairs)
    assert runs.count("posterior") == 1


def test_predict_returns_rewards_under_prior(
    pairs: list[TokenizedPair],
    make: Make,
    make_trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
    naive_logps: Callable[..., Tensor],
) -> None:
    module = make("dpo", MarginalSpace(num_codes=3, init_logit_std=1.0, prior_mode=2))
    batches = make_trainer().predict(module, make_loader(pairs, batch_size=3))
    assert [name for batch in batches for name in batch["ids"]] == [pair.id for pair in pairs]
    code = module.latent.codebook.weight[2]
    module.policy.backbone.norm.register_forward_hook(lambda _, inputs, states: states + code)
    with torch.no_grad():
        ratios = naive_logps(module.policy.model, pairs) - naive_logps(module.reference.policy.model, pairs)
    for name, expected in (
        ("rewards/chosen", 0.3 * ratios[:4]),
        ("rewards/rejected", 0.3 * ratios[4:]),
        ("rewards/margins", 0.3 * (ratios[:4] - ratios[4:])),
    ):
        torch.testing.assert_close(torch.cat([batch[name] for batch in batches]), expected, rtol=1e-9, atol=1e-9)
    prior = torch.cat([batch["prior"] for batch in batches])
    assert prior.shape == (4, 3)
    torch.testing.assert_close(prior.sum(-1), torch.ones(4, dtype=prior.dtype))


def test_schedules_span_all_steps(
    pairs: list[TokenizedPair], make: Make, make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    schedule: list[tuple[float, float]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx % 2:
                schedule.append(tuple(float(trainer.callback_metrics[f"train/latent/{name}"]) for name in ("g", "tau")))

    module = make("dpo", GumbelSpace(num_codes=3, tau=Exponential(1.0, 0.0625)))
    loader = make_loader(pairs * 2, batch_size=1)
    settings: dict[str, Any] = {"limit_val_batches": 0, "accumulate_grad_batches": 2, "log_every_n_steps": 1}
    trainer = make_trainer(max_steps=5, callbacks=[Watch()], **settings)
    trainer.fit(module, loader, loader)
    assert schedule == [(0.0, 1.0), (0.25, 0.5), (0.5, 0.25), (0.75, 0.125), (1.0, 0.0625)]


@pytest.mark.parametrize("latent", [None, "marginal"])
def test_unequal_micro_batches_equal_one_batch(
    latent: str | None,
    make_pairs: Callable[..., list[TokenizedPair]],
    make: Make,
    make_trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
    train_step: Callable[..., Any],
) -> None:
    pairs = make_pairs([*LENGTHS, (2, 6, 3)])
    whole = train_step(make("dpo", make_space(latent) if latent else None), pairs)
    results: dict[str, Tensor] = {}

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            results.update({name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None})

    loader = TrainingLoader(pairs, TrainingBatches(pairs, 2, seed=0), PaddedLayout(0))
    assert loader.batch_sizes == [2, 2, 1]
    trainer = make_trainer(max_steps=1, limit_val_batches=0, callbacks=[Watch()], accumulate_grad_batches=3)
    trainer.fit(make("dpo", make_space(latent) if latent else None), loader, make_loader(pairs))
    assert set(results) == set(whole.gradients)
    for name, gradient in whole.gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(results[name], gradient, rtol=1e-5, atol=1e-5 * scale)
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(whole.loss.item(), rel=1e-6)
