"""Tests of whole steps by a real trainer against loops, and of every latent against no latent."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from lpc_lightning.algorithms import DPO, IPO, KTO, ORPO, PreferenceModule, SimPO
from lpc_lightning.data.batching.layouts import Layout, PaddedLayout, SharedPrefixLayout
from lpc_lightning.data.batching.loading import TrainingBatches, TrainingLoader
from lpc_lightning.latent import (
    ExpectedSpace,
    Exponential,
    GaussianSpace,
    GumbelSpace,
    LatentSpace,
    MarginalSpace,
    MLPSpace,
    PosteriorOnlySpace,
    PriorOnlySpace,
    VectorSpace,
)
from lpc_lightning.losses import dpo_loss, ipo_loss, kto_loss, orpo_loss, simpo_loss
from lpc_lightning.policy import LoRA
from lpc_lightning.reference.live import SharedModel
from lpc_lightning.types import PairLogps, TokenizedPair

LENGTHS = [(5, 3, 7), (11, 9, 1), (1, 1, 4), (3, 13, 5)]
LAYOUTS: dict[str, Layout] = {"padded": PaddedLayout(0), "shared prefix": SharedPrefixLayout(0, row_tokens=40)}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log(1 + torch.exp(-x))


def odds(probability: Tensor) -> Tensor:
    return probability / (1 - probability)


# Each algorithm: the module, its settings, our loss, and the loss of one pair from the log-probabilities of policy and
# reference on winner and loser, and from their lengths.
ALGORITHMS: dict[str, tuple[type[PreferenceModule], dict[str, Any], Callable[..., Any], Callable[..., Tensor]]] = {
    "dpo": (
        DPO,
        {"beta": 0.3},
        lambda logps: dpo_loss(logps, 0.3),
        lambda pw, pl, rw, rl, nw, nl: -log_sigmoid(0.3 * (pw - rw - pl + rl)),
    ),
    "cdpo": (
        DPO,
        {"beta": 0.3, "label_smoothing": 0.2},
        lambda logps: dpo_loss(logps, 0.3, 0.2),
        lambda pw, pl, rw, rl, nw, nl: (
            -0.8 * log_sigmoid(0.3 * (pw - rw - pl + rl)) - 0.2 * log_sigmoid(0.3 * (pl - rl - pw + rw))
        ),
    ),
    "rdpo": (
        DPO,
        {"beta": 0.3, "label_smoothing": 0.2, "robust": True},
        lambda logps: dpo_loss(logps, 0.3, 0.2, robust=True),
        lambda pw, pl, rw, rl, nw, nl: (
            (-0.8 * log_sigmoid(0.3 * (pw - rw - pl + rl)) + 0.2 * log_sigmoid(0.3 * (pl - rl - pw + rw))) / 0.6
        ),
    ),
    "ipo": (
        IPO,
        {"beta": 0.2},
        lambda logps: ipo_loss(logps, 0.2),
        lambda pw, pl, rw, rl, nw, nl: (pw - rw - pl + rl - 2.5) ** 2,
    ),
    "averaged ipo": (
        IPO,
        {"beta": 0.2, "length_average": True},
        lambda logps: ipo_loss(logps, 0.2, length_average=True),
        lambda pw, pl, rw, rl, nw, nl: ((pw - rw) / nw - (pl - rl) / nl - 2.5) ** 2,
    ),
    "simpo": (
        SimPO,
        {"beta": 2.5, "gamma_beta_ratio": 0.4},
        lambda logps: simpo_loss(logps, 2.5, 0.4),
        lambda pw, pl, rw, rl, nw, nl: -log_sigmoid(2.5 * (pw / nw - pl / nl - 0.4)),
    ),
    "kto": (
        KTO,
        {"beta": 0.3, "desirable_weight": 0.8, "reference_point": 0.6},
        lambda logps: kto_loss(logps, 0.3, 0.8, reference_point=0.6),
        lambda pw, pl, rw, rl, nw, nl: (
            0.4 * (1 - torch.exp(log_sigmoid(0.3 * (pw - rw - 0.6))))
            + 0.5 * (1 - torch.exp(log_sigmoid(0.3 * (0.6 - pl + rl))))
        ),
    ),
    "orpo": (
        ORPO,
        {"beta": 0.4},
        lambda logps: orpo_loss(logps, 0.4),
        lambda pw, pl, rw, rl, nw, nl: (
            -pw / nw + 0.4 * torch.log(1 + odds(torch.exp(pl / nl)) / odds(torch.exp(pw / nw)))
        ),
    ),
}
every_algorithm = pytest.mark.parametrize("algorithm", list(ALGORITHMS))
Make = Callable[..., PreferenceModule]


@pytest.fixture
def pairs(make_pairs: Callable[..., list[TokenizedPair]]) -> list[TokenizedPair]:
    return make_pairs(LENGTHS)


@pytest.fixture
def make(tiny_spec: Callable[..., Any], perturb: Callable[..., None]) -> Make:
    """Return a function that always builds the same module, whose policy differs from its reference."""

    def module(algorithm: str = "dpo", latent: LatentSpace | None = None, **policy: Any) -> PreferenceModule:
        kind, settings, *_ = ALGORITHMS[algorithm]
        torch.manual_seed(5)
        live = {"reference": "live"} if kind.needs_reference else {}
        made = kind(policy=tiny_spec("llama", **policy), latent=latent, **live, **settings)
        made.configure_model()
        if latent is not None and policy.get("dtype", "float64") == "float64":
            latent.double()
        trained = [parameter for parameter in made.policy.parameters() if parameter.requires_grad]
        perturb(torch.nn.ParameterList(trained), deviation=0.1)
        return made

    return module


@pytest.fixture(scope="module")
def once() -> Callable[[Any, Callable[[], Any]], Any]:
    """Return a function that computes the value of a key once, for all tests that compare with it."""
    values: dict[Any, Any] = {}

    def value(key: Any, compute: Callable[[], Any]) -> Any:
        if key not in values:
            values[key] = compute()
        return values[key]

    return value


def policy_gradients(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: gradient for name, gradient in gradients.items() if name.startswith("policy.")}


# The plain algorithms


@pytest.mark.slow
@every_algorithm
@every_layout
def test_step_equals_loop_over_pairs(
    algorithm: str,
    layout: Layout,
    pairs: list[TokenizedPair],
    make: Make,
    exact: Callable[..., Any],
    naive_logps: Callable[..., Tensor],
    train_step: Callable[..., Any],
) -> None:
    module = make(algorithm)
    policy = exact(module.policy)
    reference = None if module.reference is None else exact(module.reference.policy)
    assert (reference is None) == (algorithm in ("simpo", "orpo"))
    policy_of = naive_logps(policy.model, pairs)
    reference_of = torch.full_like(policy_of, torch.nan)
    if reference is not None:
        reference_of = naive_logps(reference.model, pairs).detach()
        assert (policy_of - reference_of).abs().min() > 1e-3
    naive = ALGORITHMS[algorithm][3]
    losses = [
        naive(
            *(policy_of[number], policy_of[number + 4], reference_of[number], reference_of[number + 4]),
            *(len(pair.chosen_ids), len(pair.rejected_ids)),
        )
        for number, pair in enumerate(pairs)
    ]
    expected = torch.stack(losses).mean()
    named = dict(policy.named_parameters())
    gradients = dict(zip(named, torch.autograd.grad(expected, list(named.values())), strict=True))

    ours = train_step(module, pairs, layout)
    torch.testing.assert_close(ours.loss, expected.detach(), rtol=1e-9, atol=1e-9)
    assert set(ours.gradients) == {f"policy.{name}" for name in named}, "the reference does not train"
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours.gradients[f"policy.{name}"], gradient, rtol=1e-8, atol=1e-9)


@pytest.mark.slow
@every_algorithm
@every_layout
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_step_without_latent_is_bitwise_plain(
    algorithm: str,
    layout: Layout,
    dtype: str,
    pairs: list[TokenizedPair],
    make: Make,
    train_step: Callable[..., Any],
) -> None:
    module = make(algorithm, dtype=dtype)
    policy, reference = copy.deepcopy(module.policy), copy.deepcopy(module.reference)
    batch = layout(pairs)
    logps = policy(batch).logps()
    of_reference = (None, None)
    if reference is not None:
        of_reference = reference.policy(batch).logps().detach().chunk(2)
    lengths = batch.lengths.to(logps.dtype).chunk(2)
    loss = ALGORITHMS[algorithm][2](PairLogps(*logps.chunk(2), *of_reference, *lengths)).losses.mean()
    loss.backward()

    ours = train_step(module, pairs, layout)
    assert torch.equal(ours.loss, loss.detach())
    assert {f"policy.{name}" for name, _ in policy.named_parameters()} == set(ours.gradients)
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(ours.gradients[f"policy.{name}"], parameter.grad), name


@every_layout
def test_adapter_reference_is_policy_without_it(
    layout: Layout,
    pairs: list[TokenizedPair],
    make: Make,
    tiny_spec: Callable[..., Any],
    naive_logps: Callable[..., Tensor],
    train_step: Callable[..., Any],
) -> None:
    module = make("dpo", lora=LoRA(rank=3))
    assert isinstance(module.reference, SharedModel)
    with torch.no_grad():
        policy, reference = (
            naive_logps(module.policy.model, pairs),
            naive_logps(tiny_spec("llama").build().model, pairs),
        )
    ratios = policy - reference
    assert ratios.abs().min() > 1e-4
    expected = -log_sigmoid(0.3 * (ratios[:4] - ratios[4:])).mean()
    ours = train_step(module, pairs, layout)
    torch.testing.assert_close(ours.loss, expected, rtol=1e-9, atol=1e-9)
    assert all("lora_" in name for name in ours.gradients)


def test_untrained_policy_has_zero_margins(
    pairs: list[TokenizedPair], tiny_spec: Callable[..., Any], train_step: Callable[..., Any]
) -> None:
    metrics = train_step(DPO(policy=tiny_spec("llama"), reference="live"), pairs).metrics
    assert float(metrics["train/loss"]) == pytest.approx(math.log(2), abs=1e-15)
    assert float(metrics["train/rewards/margins"]) == 0
    assert float(metrics["train/rewards/accuracies"]) == 0.5


# A codebook of zeros


ZERO: dict[str, Callable[..., LatentSpace]] = {
    "gumbel": lambda **space: GumbelSpace(num_codes=3, init_logit_std=0.0, **space),
    "hard gumbel": lambda **space: GumbelSpace(num_codes=3, init_logit_std=0.0, hard=True, **space),
    "posterior only": lambda **space: PosteriorOnlySpace(num_codes=3, init_logit_std=0.0, **space),
    "expected": lambda **space: ExpectedSpace(num_codes=3, init_logit_std=0.0, **space),
    "gaussian": lambda **space: GaussianSpace(num_codes=3, init_logit_std=0.0, **space),
    "prior only": lambda **space: PriorOnlySpace(num_codes=3, init_logit_std=0.0),
    "marginal": lambda **space: MarginalSpace(num_codes=3, init_logit_std=0.0),
    "mlp": lambda **space: MLPSpace(hidden=8),
    "vector": lambda **space: VectorSpace(),
}
PER_CODE = ("expected", "marginal")
"""Spaces whose losses are sums over codes, which are rounded. All others use the plain log-probabilities."""


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ZERO))
@pytest.mark.parametrize("algorithm", ["dpo", "ipo", "simpo", "kto", "orpo"])
@every_layout
def test_step_with_zero_codes_is_plain(
    name: str,
    algorithm: str,
    layout: Layout,
    pairs: list[TokenizedPair],
    make: Make,
    train_step: Callable[..., Any],
    once: Callable[..., Any],
) -> None:
    plain = once(("plain", algorithm, layout), lambda: train_step(make(algorithm), pairs, layout))
    latent = train_step(make(algorithm, ZERO[name](kl_weight=0.7)), pairs, layout)
    tolerance = 1e-12 if name in PER_CODE else 0.0
    torch.testing.assert_close(latent.loss.double(), plain.loss, rtol=tolerance, atol=0)
    gradients = policy_gradients(latent.gradients)
    assert set(gradients) == set(plain.gradients)
    for weight, gradient in plain.gradients.items():
        torch.testing.assert_close(gradients[weight], gradient, rtol=10 * tolerance, atol=10 * tolerance)
    assert latent.metrics["train/latent/z_norm_ratio"] == 0


@pytest.mark.parametrize("name", list(ZERO))
def test_validation_with_zero_codes_is_plain(
    name: str,
    pairs: list[TokenizedPair],
    make: Make,
    make_trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
    once: Callable[..., Any],
) -> None:
    def validated(latent: LatentSpace | None) -> dict[str, float]:
        trainer = make_trainer()
        trainer.validate(make("dpo", latent), make_loader(pairs), verbose=False)
        return {metric: float(value) for metric, value in trainer.callback_metrics.items()}

    plain, latent_metrics = once("validated", lambda: validated(None)), validated(ZERO[name]())
    assert set(plain) == {
        *("val/loss", "val/logps/chosen", "val/logps/rejected"),
        *(f"val/rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")),
    }
    for metric, value in plain.items():
        assert latent_metrics[metric] == value


# Latents in whole steps


FULL: dict[str, Callable[[], LatentSpace]] = {
    "gumbel": lambda: GumbelSpace(num_codes=3, init_logit_std=1.0),
    "posterior only": lambda: PosteriorOnlySpace(num_codes=3, init_logit_std=1.0),
    "expected": lambda: ExpectedSpace(num_codes=3, init_logit_std=1.0),
    "marginal": lambda: MarginalSpace(num_codes=3, init_logit_std=1.0),
    "prior only": lambda: PriorOnlySpace(num_codes=3, init_logit_std=1.0),
    "gaussian": lambda: GaussianSpace(num_codes=3, init_logit_std=1.0),
    "vector": lambda: VectorSpace(init_logit_std=1.0),
    "mlp": lambda: MLPSpace(),
}


@pytest.mark.parametrize("name", list(FULL))
def test_layouts_give_the_same_step(
    name: str, pairs: list[TokenizedPair], make: Make, train_step: Callable[..., Any]
) -> None:
    padded, packed = (train_step(make("dpo", FULL[name]()), pairs, layout) for layout in LAYOUTS.values())
    torch.testing.assert_close(packed.loss, padded.loss, rtol=1e-9, atol=1e-9)
    assert set(padded.gradients) == set(packed.gradients)
    for weight, gradient in padded.gradients.items():
        scale = float(gradient.abs().max())
        # The norms of the backbone are float32, in its backward pass too.
        torch.testing.assert_close(packed.gradients[weight], gradient, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("name", ["none", *FULL])
def test_equal_margins_are_simpos_target_margin(
    name: str, pairs: list[TokenizedPair], make: Make, train_step: Callable[..., Any]
) -> None:
    """The margin 0.5 of every pair, beside gamma / beta = 0.4, is gamma / beta = 0.6 under every latent."""
    steps = []
    for ratio, margin in ((0.4, 0.5), (0.6, None), (0.4, None)):
        module = make("simpo", FULL[name]() if name in FULL else None)
        module.gamma_beta_ratio = ratio
        steps.append(train_step(module, [replace(pair, margin=margin) for pair in pairs]))
    of_margin, of_setting, without = steps
    torch.testing.assert_close(of_margin.loss, of_setting.loss, rtol=1e-9, atol=1e-12)
    assert abs(of_margin.loss - without.loss) > 1e-3
    for weight, gradient in of_setting.gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(of_margin.gradients[weight], gradient, rtol=1e-5, atol=1e-6 * scale + 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", *FULL])
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
        latent = FULL[name]() if name in FULL else None
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


@pytest.mark.parametrize("name", list(FULL))
def test_nonzero_latent_changes_the_step(
    name: str, pairs: list[TokenizedPair], make: Make, train_step: Callable[..., Any], once: Callable[..., Any]
) -> None:
    plain = once("plain", lambda: train_step(make("dpo"), pairs))
    latent = train_step(make("dpo", FULL[name]()), pairs)
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
    module = make("dpo", FULL[name]())
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
    whole = train_step(make("dpo", FULL[latent]() if latent else None), pairs)
    results: dict[str, Tensor] = {}

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            results.update({name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None})

    loader = TrainingLoader(pairs, TrainingBatches(pairs, 2, seed=0), PaddedLayout(0))
    assert loader.batch_sizes == [2, 2, 1]
    trainer = make_trainer(max_steps=1, limit_val_batches=0, callbacks=[Watch()], accumulate_grad_batches=3)
    trainer.fit(make("dpo", FULL[latent]() if latent else None), loader, make_loader(pairs))
    assert set(results) == set(whole.gradients)
    for name, gradient in whole.gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(results[name], gradient, rtol=1e-5, atol=1e-5 * scale)
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(whole.loss.item(), rel=1e-6)
