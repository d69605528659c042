"""Robust losses against values worked out by hand, plain exponentials, and exact expectations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from lpc_lightning.errors import ConfigError
from lpc_lightning.losses import add_nll, dpo_loss, ipo_loss, kto_loss, orpo_loss, simpo_loss
from lpc_lightning.robust import REPO, ConservativeLoss, DrDPO, HolderDPO, RobustLoss, UnbiasedLoss
from lpc_lightning.robust.dr_dpo import dr_dpo_loss
from lpc_lightning.robust.holder_dpo import holder_dpo_loss
from lpc_lightning.types import PairLogps, PairLosses

Loss = Callable[[PairLogps], PairLosses]
ALGORITHMS: dict[str, Loss] = {
    "dpo": partial(dpo_loss, beta=0.5),
    "ipo": partial(ipo_loss, beta=0.5),
    "simpo": partial(simpo_loss, beta=2.0, gamma_beta_ratio=0.5),
}
every_algorithm = pytest.mark.parametrize("algorithm", list(ALGORITHMS))


def pairs_with_margins(*margins: float) -> PairLogps:
    """Return pairs of answers of one token whose log-ratio differences D are `margins`."""
    rows = torch.zeros(6, len(margins), dtype=torch.float64)
    rows[0], rows[4:] = torch.tensor(margins, dtype=torch.float64), 1.0
    return PairLogps(*rows)


def random_pairs(codes: int | None = None, margins: bool = False) -> PairLogps:
    generator = torch.Generator().manual_seed(3)
    policy = (6,) if codes is None else (6, codes)
    rest = (6,) if codes is None else (6, 1)
    shapes = (policy, policy, rest, rest)
    numbers = [2 * torch.randn(shape, generator=generator, dtype=torch.float64) - 6 for shape in shapes]
    lengths = [torch.randint(1, 5, rest, generator=generator).double() for _ in range(2)]
    logps = PairLogps(*numbers, *lengths)
    return replace(logps, target_margins=torch.linspace(-0.5, 1.0, 6).double().reshape(rest)) if margins else logps


def swapped(logps: PairLogps) -> PairLogps:
    pw, pl, rw, rl, nw, nl, margins = (getattr(logps, field.name) for field in fields(logps))
    return PairLogps(pl, pw, rl, rw, nl, nw, margins)


def check_values(robust: RobustLoss, algorithm: str, logps: PairLogps, *expected: float) -> None:
    losses = robust.pair_losses(ALGORITHMS[algorithm], logps).losses
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


LOG3 = math.log(3)


def test_conservative_loss_by_hand() -> None:
    """beta D = log 3 gives sigmoid 3/4. IPO's target is 1: (3-1)^2 = 4, (-3-1)^2 = 16. SimPO's margin is 2(D-1/2)."""
    dpo = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    check_values(ConservativeLoss(0.25), "dpo", pairs_with_margins(2 * LOG3, 0.0), dpo, math.log(2))
    check_values(ConservativeLoss(0.25), "ipo", pairs_with_margins(3.0), 0.75 * 4 + 0.25 * 16)
    simpo = 0.75 * math.log(2) + 0.25 * math.log1p(math.exp(2))
    check_values(ConservativeLoss(0.25), "simpo", pairs_with_margins(0.5), simpo)


def test_unbiased_loss_by_hand() -> None:
    dpo = (-0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / 0.5
    check_values(UnbiasedLoss(0.25), "dpo", pairs_with_margins(2 * LOG3, 0.0), dpo, math.log(2))
    check_values(UnbiasedLoss(0.25), "ipo", pairs_with_margins(3.0), (0.75 * 4 - 0.25 * 16) / 0.5)
    simpo = (0.75 * math.log(2) - 0.25 * math.log1p(math.exp(2))) / 0.5
    check_values(UnbiasedLoss(0.25), "simpo", pairs_with_margins(0.5), simpo)


def test_re_po_by_hand() -> None:
    """With p = 3/4 and eta = 0.9, w = 0.675 / (0.675 + 0.025) = 27/28. At p = 1/2, w is eta."""
    w = 27 / 28
    dpo = -w * math.log(0.75) - (1 - w) * math.log(0.25)
    check_values(REPO(0.9), "dpo", pairs_with_margins(2 * LOG3, 0.0), dpo, math.log(2))
    # IPO with beta 1/2: l' - l = (D + 1)^2 - (D - 1)^2 = 4 D.
    check_values(REPO(0.9), "ipo", pairs_with_margins(LOG3 / 4, 0.0), dpo, math.log(2))
    # SimPO at D = 0: both orders have the same loss.
    check_values(REPO(0.9), "simpo", pairs_with_margins(0.0), math.log(2))
    pairs = REPO(0.9).pair_losses(ALGORITHMS["dpo"], pairs_with_margins(2 * LOG3, 0.0))
    torch.testing.assert_close(pairs.label_correct, torch.tensor([w, 0.9], dtype=torch.float64), rtol=1e-12, atol=0)


def test_holder_dpo_by_hand() -> None:
    """With p = 3/4 and gamma = 2: -3 * 9/16 + 2 * 27/64 = -27/32."""
    check_values(HolderDPO(2.0), "dpo", pairs_with_margins(2 * LOG3, 0.0), -27 / 32, -3 / 4 + 2 / 8)
    check_values(HolderDPO(1.0), "simpo", pairs_with_margins(0.5), -2 * 0.5 + 0.25)


def test_dr_dpo_by_hand() -> None:
    """Losses log 2 and log 4 at temperature 1: -log((1/2 + 1/4) / 2)."""
    losses = torch.tensor([math.log(2), math.log(4)], dtype=torch.float64)
    assert float(dr_dpo_loss(losses, 1.0)) == pytest.approx(-math.log(0.375), rel=1e-14)
    assert float(dr_dpo_loss(losses, 0.5)) == pytest.approx(-0.5 * math.log((1 / 4 + 1 / 16) / 2), rel=1e-14)
    assert float(DrDPO(1e6).batch_loss(losses)) == pytest.approx(float(losses.mean()), rel=1e-6)


def test_dr_dpo_gradient_weighs_pairs() -> None:
    losses = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(DrDPO(0.7).batch_loss(losses), losses)
    weights = [math.exp(-value / 0.7) for value in (0.2, 1.0, 5.0)]
    expected = torch.tensor([weight / sum(weights) for weight in weights], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_holder_dpo_derivative_is_published(gamma: float) -> None:
    margins = torch.tensor([-30.0, -2.0, 0.3, 4.0], dtype=torch.float64, requires_grad=True)
    losses = holder_dpo_loss(torch.nn.functional.logsigmoid(margins), gamma)
    (gradient,) = torch.autograd.grad(losses.sum(), margins)
    p = 1 / (1 + (-margins.detach()).exp())
    expected = -gamma * (1 + gamma) * p**gamma * (1 - p) ** 2
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("rate", [0.1, 0.3])
@pytest.mark.parametrize("codes", [None, 3])
def test_smoothed_dpo_matches_closed_forms(rate: float, codes: int | None) -> None:
    """cDPO's and rDPO's losses, likelihoods of a label, and losses of a mixture, in plain exponentials."""
    logps = random_pairs(codes, margins=True)
    assert logps.target_margins is not None
    difference = logps.policy_chosen - logps.reference_chosen - logps.policy_rejected + logps.reference_rejected
    wins, loses = (1 / (1 + (logps.target_margins - sign * 0.5 * difference).exp()) for sign in (1, -1))
    prior = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)

    conservative = ConservativeLoss(rate).pair_losses(ALGORITHMS["dpo"], logps)
    cdpo = -(1 - rate) * wins.log() - rate * loses.log()
    torch.testing.assert_close(conservative.losses, cdpo, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(conservative.label_log_likelihood, -cdpo, rtol=1e-12, atol=1e-12)

    def rdpo(first: Tensor, second: Tensor) -> Tensor:
        return -((1 - rate) * first.log() - rate * second.log()) / (1 - 2 * rate)

    unbiased = UnbiasedLoss(rate).pair_losses(ALGORITHMS["dpo"], logps)
    torch.testing.assert_close(unbiased.losses, rdpo(wins, loses), rtol=1e-12, atol=1e-12)
    likelihood = (1 - rate) * wins + rate * loses
    torch.testing.assert_close(unbiased.label_log_likelihood.exp(), likelihood, rtol=1e-12, atol=1e-12)
    if codes:
        mixture = -(prior * (-cdpo).exp()).sum(-1).log()
        torch.testing.assert_close(conservative.of_mixture(prior.log()), mixture, rtol=1e-12, atol=1e-12)
        mixture = rdpo((prior * wins).sum(-1), (prior * loses).sum(-1))
        torch.testing.assert_close(unbiased.of_mixture(prior.log()), mixture, rtol=1e-12, atol=1e-12)


@every_algorithm
def test_unbiased_loss_mean_is_clean_loss(algorithm: str) -> None:
    logps, log_weights = random_pairs(3, margins=True), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    clean, robust = ALGORITHMS[algorithm], UnbiasedLoss(0.2)
    observed, flipped = (robust.pair_losses(clean, pairs) for pairs in (logps, swapped(logps)))
    for value in (lambda pairs: pairs.losses, lambda pairs: pairs.of_mixture(log_weights)):
        mean = 0.8 * value(observed) + 0.2 * value(flipped)
        torch.testing.assert_close(mean, value(clean(logps)), rtol=1e-11, atol=1e-11)


@every_algorithm
def test_re_po_gradient_is_that_of_the_marginal(algorithm: str) -> None:
    """By the EM identity, -log(eta p + (1 - eta)(1 - p)) in plain exponentials has the same gradient."""
    logps, eta = random_pairs(), torch.linspace(0.55, 0.95, 6, dtype=torch.float64)
    leaf = logps.policy_chosen.requires_grad_()
    losses = REPO().pair_losses(ALGORITHMS[algorithm], logps, eta).losses
    log_odds = ALGORITHMS[algorithm](swapped(logps)).losses - ALGORITHMS[algorithm](logps).losses
    p = 1 / (1 + (-log_odds).exp())
    marginal = -(eta * p + (1 - eta) * (1 - p)).log()
    (ours,), (theirs,) = (torch.autograd.grad(values.sum(), leaf) for values in (losses, marginal))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_re_po_mixture_sums_out_codes_and_labels() -> None:
    """Against a loop over codes and over right and wrong labels, with the joint posterior of the label."""
    logps, eta = random_pairs(3), torch.linspace(0.55, 0.95, 6, dtype=torch.float64)
    prior = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    pairs = REPO().pair_losses(ALGORITHMS["dpo"], logps, eta)
    mixture = pairs.of_mixture(prior.log())
    posterior = (prior.log() + pairs.label_log_likelihood).softmax(-1)
    assert pairs.label_correct is not None
    right = (posterior * pairs.label_correct).sum(-1)
    for pair in range(6):
        joint = {True: 0.0, False: 0.0}
        for code in range(3):
            chosen = float(logps.policy_chosen[pair, code] - logps.reference_chosen[pair, 0])
            rejected = float(logps.policy_rejected[pair, code] - logps.reference_rejected[pair, 0])
            p = 1 / (1 + math.exp(-0.5 * (chosen - rejected)))
            joint[True] += float(prior[code] * eta[pair]) * p
            joint[False] += float(prior[code] * (1 - eta[pair])) * (1 - p)
        assert float(mixture[pair]) == pytest.approx(-math.log(sum(joint.values())), rel=1e-12)
        assert float(right[pair]) == pytest.approx(joint[True] / sum(joint.values()), rel=1e-12)


@every_algorithm
@pytest.mark.parametrize("codes", [None, 3])
def test_objective_of_robust_losses(algorithm: str, codes: int | None) -> None:
    """It is the loss, and for RE-PO the negative log-likelihood, also if the SFT term is added."""
    logps, loss = random_pairs(codes, margins=True), ALGORITHMS[algorithm]
    for robust in (ConservativeLoss(0.2), UnbiasedLoss(0.2), *([] if algorithm == "ipo" else [HolderDPO()])):
        pairs = robust.pair_losses(loss, logps)
        torch.testing.assert_close(pairs.objective, pairs.losses, rtol=1e-12, atol=1e-12)
    p = 1 / (1 + (loss(logps).losses - loss(swapped(logps)).losses).exp())
    text = -0.7 * logps.policy_chosen / logps.chosen_lengths
    pairs = add_nll(REPO(0.9).pair_losses(loss, logps), logps, 0.7)
    torch.testing.assert_close(pairs.objective, text - (0.9 * p + 0.1 * (1 - p)).log(), rtol=1e-9, atol=1e-9)


def test_holder_dpo_mixture_uses_mixed_likelihood() -> None:
    logps, prior = random_pairs(3), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    plain = dpo_loss(logps, 0.5)
    p = (prior * (-plain.losses).exp()).sum(-1)
    expected = -3 * p**2 + 2 * p**3
    pairs = HolderDPO(2.0).pair_losses(ALGORITHMS["dpo"], logps)
    torch.testing.assert_close(pairs.of_mixture(prior.log()), expected, rtol=1e-12, atol=1e-14)
    text = -(prior * logps.policy_chosen.exp()).sum(-1).log() / logps.chosen_lengths[:, 0]
    with_text = add_nll(pairs, logps, 0.7).of_mixture(prior.log())
    torch.testing.assert_close(with_text, expected + 0.7 * text, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("robust", [ConservativeLoss(0.2), UnbiasedLoss(0.2), REPO(), HolderDPO()])
@pytest.mark.parametrize("margin", [-4000.0, 4000.0])
def test_robust_losses_finite_at_extreme_margins(robust: RobustLoss, margin: float) -> None:
    zero, chosen = torch.zeros(1), torch.full((1,), margin, requires_grad=True)
    for algorithm in ("dpo", "simpo", "ipo"):
        if isinstance(robust, HolderDPO) and algorithm == "ipo":
            continue
        losses = robust.pair_losses(ALGORITHMS[algorithm], PairLogps(chosen, *[zero] * 3, zero + 1, zero + 1)).losses
        (gradient,) = torch.autograd.grad(losses.sum(), chosen)
        assert losses.isfinite().all()
        assert gradient.isfinite().all()


SEVERAL_TERMS: dict[str, Loss] = {"kto": partial(kto_loss, beta=0.5), "orpo": partial(orpo_loss, beta=0.5)}


@pytest.mark.parametrize("algorithm", list(SEVERAL_TERMS))
@pytest.mark.parametrize(
    ("robust", "kept", "flipped"), [(ConservativeLoss(0.2), 0.8, 0.2), (UnbiasedLoss(0.2), 4 / 3, -1 / 3)]
)
def test_smoothing_of_losses_with_several_terms(
    algorithm: str, robust: RobustLoss, kept: float, flipped: float
) -> None:
    """Of a mixture too, if the terms of both labels do not share a weight. KTO's are linear, and texts have lengths."""
    loss, logps, codes = SEVERAL_TERMS[algorithm], random_pairs(), random_pairs(codes=3)
    expected = kept * loss(logps).losses + flipped * loss(swapped(logps)).losses
    torch.testing.assert_close(robust.pair_losses(loss, logps).losses, expected, rtol=1e-12, atol=1e-12)
    log_weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log().expand(6, 3)
    mixture = robust.pair_losses(loss, codes).of_mixture(log_weights)
    if algorithm == "kto" or isinstance(robust, UnbiasedLoss):
        of_labels = [loss(pairs).of_mixture(log_weights) for pairs in (codes, swapped(codes))]
        torch.testing.assert_close(mixture, kept * of_labels[0] + flipped * of_labels[1], rtol=1e-12, atol=1e-12)
    rows = PairLogps(*(getattr(logps, field.name)[:, None] for field in fields(PairLogps)[:6]))
    same = replace(
        rows, policy_chosen=rows.policy_chosen.expand(6, 3), policy_rejected=rows.policy_rejected.expand(6, 3)
    )
    torch.testing.assert_close(robust.pair_losses(loss, same).of_mixture(log_weights), expected, rtol=1e-12, atol=1e-12)


def test_conservative_ipo_mixture_in_exponentials() -> None:
    """It is the soft minimum over codes of the mean loss of both labels, in nats of 1 / (2 beta)^2."""
    logps, prior = random_pairs(3, margins=True), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    difference = (logps.policy_chosen - logps.reference_chosen) - (logps.policy_rejected - logps.reference_rejected)
    target = (0.5 + logps.target_margins) / 0.2
    nats = 0.16 * (0.8 * (difference - target) ** 2 + 0.2 * (difference + target) ** 2)
    pairs = ConservativeLoss(0.2).pair_losses(partial(ipo_loss, beta=0.2), logps)
    torch.testing.assert_close(pairs.label_log_likelihood, -nats, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pairs.losses, nats / 0.16, rtol=1e-12, atol=1e-12)
    expected = -(prior * (-nats).exp()).sum(-1).log() / 0.16
    torch.testing.assert_close(pairs.of_mixture(prior.log()), expected, rtol=1e-12, atol=1e-12)


def test_conservative_orpo_mixture_in_exponentials() -> None:
    """The labels' mean log-likelihood is mixed as one term, the texts of both answers each alone."""
    logps, prior = random_pairs(3, margins=True), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    means = [(logps.policy_chosen / logps.chosen_lengths).exp(), (logps.policy_rejected / logps.rejected_lengths).exp()]
    odds = (means[0] / (1 - means[0])) / (means[1] / (1 - means[1]))
    offset = logps.target_margins.exp()
    mean = 0.8 * (odds / (odds + offset)).log() + 0.2 * (1 / (1 + odds * offset)).log()
    pairs = ConservativeLoss(0.2).pair_losses(partial(orpo_loss, beta=0.5), logps)
    torch.testing.assert_close(pairs.label_log_likelihood, mean, rtol=1e-10, atol=1e-12)
    texts = [
        (prior * policy.exp()).sum(-1).log() / lengths[:, 0]
        for policy, lengths in (
            (logps.policy_chosen, logps.chosen_lengths),
            (logps.policy_rejected, logps.rejected_lengths),
        )
    ]
    expected = -0.5 * (prior * mean.exp()).sum(-1).log() - 0.8 * texts[0] - 0.2 * texts[1]
    torch.testing.assert_close(pairs.of_mixture(prior.log()), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("codes", [None, 3])
def test_label_part_of_orpo_has_no_text(codes: int | None) -> None:
    logps = random_pairs(codes, margins=True)
    part = orpo_loss(logps, beta=0.3).label_part
    assert logps.target_margins is not None
    odds = [
        1 / ((-logps.policy_chosen / logps.chosen_lengths).exp() - 1),
        1 / ((-logps.policy_rejected / logps.rejected_lengths).exp() - 1),
    ]
    likelihood = odds[0] / (odds[0] + odds[1] * logps.target_margins.exp())
    torch.testing.assert_close(part.losses, -0.3 * likelihood.log(), rtol=1e-10, atol=1e-12)
    if codes:
        prior = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
        mixture = -0.3 * (prior * likelihood).sum(-1).log()
        torch.testing.assert_close(part.of_mixture(prior.log()), mixture, rtol=1e-10, atol=1e-12)


@every_algorithm
@pytest.mark.parametrize("robust", [ConservativeLoss(0.2), UnbiasedLoss(0.2), DrDPO(), REPO(), HolderDPO()])
def test_rewards_are_those_of_the_algorithm(algorithm: str, robust: RobustLoss) -> None:
    if algorithm == "ipo" and isinstance(robust, HolderDPO):
        return
    pairs, plain = robust.pair_losses(ALGORITHMS[algorithm], random_pairs()), ALGORITHMS[algorithm](random_pairs())
    assert torch.equal(pairs.chosen_rewards, plain.chosen_rewards)
    assert torch.equal(pairs.rejected_rewards, plain.rejected_rewards)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_re_po_of_sure_reliabilities(dtype: torch.dtype) -> None:
    """Moving averages may reach 0 and 1. A label against them then has the likelihood 1e-6, whatever the margin."""
    leaf = torch.tensor([-90.0, 90.0, -90.0, 90.0], dtype=dtype, requires_grad=True)
    rest = [torch.zeros(4, dtype=dtype)] * 3 + [torch.ones(4, dtype=dtype)] * 2
    reliability = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    pairs = REPO().pair_losses(partial(dpo_loss, beta=1.0), PairLogps(leaf, *rest), reliability)
    (gradient,) = torch.autograd.grad(pairs.losses.sum(), leaf)
    likelihood = [0.0, math.log(1e-6), math.log(1e-6), 0.0]
    assert pairs.label_log_likelihood.tolist() == pytest.approx(likelihood, abs=0.1)
    for values in (pairs.losses, pairs.label_log_likelihood, gradient):
        assert values.isfinite().all()
        assert values.dtype == dtype


@pytest.mark.parametrize("algorithm", list(SEVERAL_TERMS))
@pytest.mark.parametrize("robust", [REPO(), HolderDPO()])
def test_robust_losses_refuse_several_terms(algorithm: str, robust: RobustLoss) -> None:
    with pytest.raises(ValueError, match=rf"robust_loss: found {type(robust).__name__} with a loss .* expected DPO"):
        robust.pair_losses(SEVERAL_TERMS[algorithm], random_pairs())


def test_holder_dpo_refuses_ipo() -> None:
    with pytest.raises(ValueError, match="found HolderDPO with a loss that is not a negative log-likelihood, expected"):
        HolderDPO().pair_losses(ALGORITHMS["ipo"], random_pairs())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConservativeLoss(0.6), r"rate: found 0\.6, expected a share from 0 to 0\.5"),
        (lambda: UnbiasedLoss(0.5), r"rate: found 0\.5, expected a share from 0 to below 0\.5"),
        (lambda: DrDPO(0.0), r"temperature: found 0\.0, expected a number above 0"),
        (lambda: HolderDPO(-1.0), r"gamma: found -1\.0, expected a number above 0"),
        (lambda: REPO(1.0), r"initial: found 1\.0, expected a share above 0 and below 1"),
        (lambda: REPO(rate=2.0), r"rate: found 2\.0, expected a share from 0 to 1"),
    ],
)
def test_robust_settings_out_of_range(make: Callable[[], RobustLoss], message: str) -> None:
    with pytest.raises(ValueError, match=rf"robust_loss\.{message}"):
        make()


def test_reliabilities_are_moving_averages() -> None:
    """Two micro-batches make a step. Annotator c has no pair in the first step."""
    robust = REPO(0.9, rate=0.1)
    robust.start(["b", "a", "c", "a"], torch.device("cpu"))

    def values() -> Tensor:
        return robust.reliabilities(["a", "b", "c", "unknown"], torch.device("cpu"))

    robust.observe(["a", "b"], torch.tensor([0.5, 1.0]))
    robust.observe(["a", "a"], torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(values(), torch.full((4,), 0.9).double())
    robust.update()
    a, b, c = 0.9 * 0.9 + 0.1 * 0.5, 0.9 * 0.9 + 0.1, 0.9
    torch.testing.assert_close(values(), torch.tensor([a, b, c, (a + b + c) / 3], dtype=torch.float64))
    robust.observe(["c"], torch.tensor([0.0]))
    robust.update()
    torch.testing.assert_close(values()[:3], torch.tensor([a, b, 0.81], dtype=torch.float64))
    restored = REPO(0.9)
    restored.load_state_dict(robust.state_dict())
    assert torch.equal(restored.reliabilities(["a", "b", "c"], torch.device("cpu")), values()[:3])


def test_one_reliability_for_all_annotators() -> None:
    robust = REPO(0.8, rate=0.5, by_annotator=False)
    robust.start(["a", "b"], torch.device("cpu"))
    robust.observe(["a", "b"], torch.tensor([0.2, 0.6]))
    robust.update()
    values = robust.reliabilities(["a", "new"], torch.device("cpu"))
    torch.testing.assert_close(values, torch.full((2,), 0.6).double())


def test_dr_dpo_weights_repeat_pairs() -> None:
    losses = torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64)
    repeated = torch.tensor([0.5, 0.5, 2.0], dtype=torch.float64)
    weighted = DrDPO(0.7).batch_loss(losses, torch.tensor([2.0, 1.0, 0.0]))
    torch.testing.assert_close(weighted, DrDPO(0.7).batch_loss(repeated), rtol=1e-7, atol=0)
    assert DrDPO(0.7).batch_loss(losses, torch.zeros(3)) == 0


def test_reliabilities_converge_to_the_truth() -> None:
    """The policy is calibrated: an answer is preferred with probability p. Labels are wrong at known rates."""
    generator = torch.Generator().manual_seed(5)
    truth = {"careful": 0.95, "careless": 0.7, "opposite": 0.2}
    robust = REPO(0.9, rate=0.1)
    robust.start(list(truth), torch.device("cpu"))
    for _ in range(150):
        for name, reliability in truth.items():
            margins = 4 * torch.randn(200, generator=generator, dtype=torch.float64)
            preferred = torch.rand(200, generator=generator) < margins.sigmoid()
            right = torch.rand(200, generator=generator) < reliability
            labelled = torch.where(preferred == right, margins, -margins)  # margin of the answer labelled as chosen
            eta = robust.reliabilities([name] * 200, torch.device("cpu"))
            pairs = robust.pair_losses(partial(dpo_loss, beta=1.0), pairs_with_margins(*labelled.tolist()), eta)
            assert pairs.label_correct is not None
            robust.observe([name] * 200, pairs.label_correct)
        robust.update()
    learned = robust.reliabilities(list(truth), torch.device("cpu")).tolist()
    assert learned == pytest.approx(list(truth.values()), abs=0.04)


def test_re_po_refuses_unknown_annotators() -> None:
    """Loaders of one's own name no annotator in advance. Their pairs may leave the annotator empty."""
    loss = REPO()
    loss.start([""], torch.device("cpu"))
    loss.observe(["", ""], torch.tensor([0.5, 0.7]))
    with pytest.raises(ConfigError, match=r"robust_loss\.by_annotator: found true, and the annotator 'ann1'"):
        loss.observe(["", "ann1"], torch.tensor([0.5, 0.7]))
    shared = REPO(rate=1.0, by_annotator=False)
    shared.start([""], torch.device("cpu"))
    shared.observe(["ann2", "ann1"], torch.tensor([0.5, 0.7]))
    shared.update()
    assert shared.reliabilities(["ann1"], torch.device("cpu")).tolist() == pytest.approx([0.6])
