"""Losses against golden values, and against loops over pairs in plain exponentials."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from lpc_lightning.losses import add_nll, dpo_loss, ipo_loss, kto_loss, orpo_loss, simpo_loss, weighted_mean
from lpc_lightning.robust import ConservativeLoss, RobustLoss, UnbiasedLoss
from lpc_lightning.types import PairLogps, PairLosses


def tensors(**columns: list[float]) -> PairLogps:
    return PairLogps(**{name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()})


GOLDEN = tensors(
    policy_chosen=[-3, -2.5, -4, -1.5],
    policy_rejected=[-5, -3.5, -6, -2.5],
    reference_chosen=[-2.8, -2.3, -3.8, -1.4],
    reference_rejected=[-3.2, -2.7, -4.2, -1.8],
    chosen_lengths=[2, 5, 4, 1],
    rejected_lengths=[4, 2, 3, 5],
)

Loss = Callable[[PairLogps], PairLosses]
LOSSES: dict[str, Loss] = {
    "dpo": lambda logps: dpo_loss(logps, beta=0.1),
    "cdpo": partial(ConservativeLoss(0.1).pair_losses, dpo_loss),
    "rdpo": partial(UnbiasedLoss(0.1).pair_losses, dpo_loss),
    "ipo_sum": lambda logps: ipo_loss(logps, beta=0.1),
    "ipo_average": lambda logps: ipo_loss(logps, beta=0.1, length_average=True),
    "simpo": lambda logps: simpo_loss(logps, beta=2.0, gamma_beta_ratio=0.5),
    "kto": lambda logps: kto_loss(logps, beta=0.1, undesirable_weight=1.5, reference_point=0.5),
    "orpo": lambda logps: orpo_loss(logps, beta=0.1),
}
EXPECTED = {
    "dpo": [0.616344, 0.663597, 0.616344, 0.663597],
    "cdpo": [0.632344, 0.669597, 0.632344, 0.669597],
    "rdpo": [0.596344, 0.656097, 0.596344, 0.656097],
    "ipo_sum": [11.56, 19.36, 11.56, 19.36],
    "ipo_average": [21.6225, 21.5296, 19.8025, 24.6016],
    "simpo": [1.701413, 0.201413, 0.313262, 3.048587],
    # Judged by beta (r_w - 0.5) = -0.07, -0.07, -0.07, -0.06 and beta (0.5 - r_l) = 0.23, 0.13, 0.23, 0.12.
    "kto": [0.590811, 0.609406, 0.590811, 0.610025],
    # 1.5, 0.5, 1 and 1.5 nats per token of the chosen answer, and a tenth of 0.87467, 0.12790, 0.23818 and 1.85113 nats
    # from the odds, which are 1 / (e^1.5 - 1) against 1 / (e^1.25 - 1), and so on.
    "orpo": [1.587467, 0.51279, 1.023818, 1.685113],
}
every_loss = pytest.mark.parametrize("name", list(LOSSES))
with_reference = pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("simpo", "orpo")])


def random_logps(pairs: int, codes: int | None = None, seed: int = 0, margins: bool = False) -> PairLogps:
    """Draw log-probabilities of about -10. With `codes`, the policy's are (pairs, codes) and the others (pairs, 1)."""
    generator = torch.Generator().manual_seed(seed)
    rest = (pairs,) if codes is None else (pairs, 1)
    policy = (pairs,) if codes is None else (pairs, codes)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return -10 + 4 * torch.randn(shape, generator=generator, dtype=torch.float64)

    def lengths() -> Tensor:
        return torch.randint(1, 9, rest, generator=generator).double()

    logps = PairLogps(draw(policy), draw(policy), draw(rest), draw(rest), lengths(), lengths())
    return replace(logps, target_margins=torch.linspace(-0.5, 1.5, pairs).double().reshape(rest)) if margins else logps


def columns(logps: PairLogps) -> dict[str, Tensor]:
    """Return the log-probabilities and other numbers of pairs by name, those that are not None."""
    named = {column.name: getattr(logps, column.name) for column in fields(PairLogps)}
    return {name: values for name, values in named.items() if values is not None}


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def naive(
    name: str, pw: Tensor, pl: Tensor, rw: Tensor, rl: Tensor, nw: Tensor, nl: Tensor, margin: float = 0.0
) -> Tensor:
    """Compute the loss of one pair from the log-probabilities and lengths of both answers."""
    beta, eps = 0.1, 0.1
    if name == "simpo":
        return -torch.log(sigmoid(2.0 * pw / nw - 2.0 * pl / nl - 1.0 - margin))
    if name == "orpo":
        odds_w, odds_l = (torch.exp(p / n) / (1 - torch.exp(p / n)) for p, n in ((pw, nw), (pl, nl)))
        return -pw / nw - 0.1 * torch.log(odds_w / (odds_w + odds_l * math.exp(margin)))
    if name == "kto":
        return ((1 - sigmoid(0.1 * (pw - rw - 0.5))) + 1.5 * (1 - sigmoid(0.1 * (0.5 - (pl - rl))))) / 2
    if name == "ipo_sum":
        return ((pw - rw) - (pl - rl) - (0.5 + margin) / beta) ** 2
    if name == "ipo_average":
        return ((pw - rw) / nw - (pl - rl) / nl - (0.5 + margin) / beta) ** 2
    # The probability that the winner beats the loser, as a Bradley-Terry model of the two rewards.
    reward_w, reward_l = beta * (pw - rw), beta * (pl - rl)
    wins = torch.exp(reward_w) / (torch.exp(reward_w) + torch.exp(reward_l + margin))
    loses = torch.exp(reward_l) / (torch.exp(reward_l) + torch.exp(reward_w + margin))
    if name == "dpo":
        return -torch.log(wins)
    if name == "cdpo":
        return -(1 - eps) * torch.log(wins) - eps * torch.log(loses)
    assert name == "rdpo"
    return -((1 - eps) * torch.log(wins) - eps * torch.log(loses)) / (1 - 2 * eps)


@every_loss
def test_losses_golden_values(name: str) -> None:
    expected = torch.tensor(EXPECTED[name], dtype=torch.float64)
    torch.testing.assert_close(LOSSES[name](GOLDEN).losses, expected, rtol=0, atol=1e-6)


@every_loss
@pytest.mark.parametrize("codes", [None, 1, 3])
@pytest.mark.parametrize("margins", [False, True])
def test_losses_match_loop_over_pairs(name: str, codes: int | None, margins: bool) -> None:
    logps = random_logps(5, codes, margins=margins and name != "kto")
    leaves = [logps.policy_chosen.requires_grad_(), logps.policy_rejected.requires_grad_()]
    losses = LOSSES[name](logps).losses
    assert losses.shape == logps.policy_chosen.shape

    rest = (logps.reference_chosen, logps.reference_rejected, logps.chosen_lengths, logps.rejected_lengths)
    expected = []
    for pair in range(5):
        numbers = [column.reshape(-1)[pair] for column in rest]
        margin = 0.0 if logps.target_margins is None else logps.target_margins.flatten()[pair].item()
        for code in range(codes or 1):
            policies = [leaf.reshape(5, -1)[pair, code] for leaf in leaves]
            expected.append(naive(name, *policies, *numbers, margin))
    loop = torch.stack(expected).reshape(losses.shape)
    torch.testing.assert_close(losses, loop, rtol=1e-12, atol=1e-12)

    weights = torch.linspace(0.5, 1.5, losses.numel(), dtype=torch.float64).reshape(losses.shape)
    ours = torch.autograd.grad((weights * losses).sum(), leaves)
    theirs = torch.autograd.grad((weights * loop).sum(), leaves)
    assert all(gradient.abs().max() > 0 for gradient in theirs)  # a hinge has none at pairs beyond its margin
    for gradient, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-11, atol=1e-13)


@every_loss
def test_losses_of_single_pairs_match_batch(name: str) -> None:
    logps = random_logps(4, margins=name != "kto")
    alone = [
        PairLogps(**{field: values[pair : pair + 1] for field, values in columns(logps).items()}) for pair in range(4)
    ]
    torch.testing.assert_close(
        LOSSES[name](logps).losses, torch.cat([LOSSES[name](pair).losses for pair in alone]), rtol=0, atol=0
    )


@every_loss
def test_rewards_are_scaled_and_detached(name: str) -> None:
    logps = random_logps(3)
    logps.policy_chosen.requires_grad_()
    logps.policy_rejected.requires_grad_()
    result = LOSSES[name](logps)
    for side, rewards in (("chosen", result.chosen_rewards), ("rejected", result.rejected_rewards)):
        assert not rewards.requires_grad
        for pair in range(3):
            policy, reference = (
                getattr(logps, f"{model}_{side}").detach()[pair].item() for model in ("policy", "reference")
            )
            length = float(getattr(logps, f"{side}_lengths")[pair])
            expected = {
                "simpo": 2.0 * policy / length,
                "orpo": 0.1 * policy / length,
                "ipo_average": 0.1 * (policy - reference) / length,
            }.get(name, 0.1 * (policy - reference))
            assert float(rewards[pair]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_dpo_of_reference_policy_is_log_2(beta: float) -> None:
    logps = random_logps(6)
    unchanged = replace(logps, policy_chosen=logps.reference_chosen, policy_rejected=logps.reference_rejected)
    loss = partial(dpo_loss, beta=beta)
    for robust in (RobustLoss(), ConservativeLoss(0.3), UnbiasedLoss(0.3)):
        losses = robust.pair_losses(loss, unchanged).losses
        torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), rtol=1e-14, atol=0)


def swapped(logps: PairLogps) -> PairLogps:
    return PairLogps(
        logps.policy_rejected,
        logps.policy_chosen,
        logps.reference_rejected,
        logps.reference_chosen,
        logps.rejected_lengths,
        logps.chosen_lengths,
        logps.target_margins,
    )


def test_dpo_half_smoothing_ignores_label() -> None:
    logps = random_logps(6)
    half, other = (ConservativeLoss(0.5).pair_losses(dpo_loss, pairs).losses for pairs in (logps, swapped(logps)))
    torch.testing.assert_close(half, other, rtol=1e-14, atol=0)
    original, reversed_ = (
        ConservativeLoss(0.4).pair_losses(dpo_loss, pairs).losses for pairs in (logps, swapped(logps))
    )
    assert (original - reversed_).abs().min() > 1e-3


@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.45])
def test_robust_dpo_unbiased_at_flip_rate(rate: float, margins: bool) -> None:
    logps = random_logps(6, margins=margins)
    clean, flipped = (UnbiasedLoss(rate).pair_losses(dpo_loss, pairs).losses for pairs in (logps, swapped(logps)))
    torch.testing.assert_close((1 - rate) * clean + rate * flipped, dpo_loss(logps, 0.1).losses, rtol=1e-12, atol=1e-13)


@every_loss
def test_of_mixture_of_equal_codes_is_loss(name: str) -> None:
    logps = random_logps(6, margins=name != "kto")
    rows = PairLogps(**{column: values[:, None] for column, values in columns(logps).items()})
    codes = replace(rows, policy_chosen=rows.policy_chosen.expand(6, 3))
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    mixture = LOSSES[name](codes).of_mixture(weights.log().expand(6, 3))
    torch.testing.assert_close(mixture, LOSSES[name](logps).losses, rtol=1e-12, atol=1e-12)


@every_loss
@pytest.mark.parametrize("codes", [None, 3])
def test_objective_is_loss(name: str, codes: int | None) -> None:
    """Also with the SFT term, whose weights are those of single pairs."""
    logps = random_logps(6, codes, margins=name != "kto")
    pairs = LOSSES[name](logps)
    for each in (pairs, add_nll(pairs, logps, 0.7)):
        torch.testing.assert_close(each.objective, each.losses, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.45])
def test_robust_dpo_mixture_unbiased(rate: float) -> None:
    logps, weights = random_logps(6, codes=3), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    observed, opposite = (UnbiasedLoss(rate).pair_losses(dpo_loss, pairs) for pairs in (logps, swapped(logps)))
    mixtures = [losses.of_mixture(weights.log().expand(6, 3)) for losses in (observed, opposite)]
    for pair in range(6):
        rewards = [logps.policy_chosen[pair, code] - logps.policy_rejected[pair, code] for code in range(3)]
        reference_margin = logps.reference_chosen[pair, 0] - logps.reference_rejected[pair, 0]
        right = [1 / (1 + math.exp(-0.1 * float(reward - reference_margin))) for reward in rewards]
        marginal = -math.log(sum(float(weight) * chance for weight, chance in zip(weights, right, strict=True)))
        expected = (1 - rate) * mixtures[0][pair] + rate * mixtures[1][pair]
        assert float(expected) == pytest.approx(marginal, rel=1e-12)
        for code, chance in enumerate(right):
            likelihood = (1 - rate) * chance + rate * (1 - chance)
            assert float(observed.label_log_likelihood[pair, code].exp()) == pytest.approx(likelihood, rel=1e-12)
            assert float(opposite.label_log_likelihood[pair, code].exp()) == pytest.approx(1 - likelihood, rel=1e-12)


def test_dpo_mixture_with_margins() -> None:
    """The likelihood of a label under a code is sigmoid(beta D - m). Against a loop in plain exponentials."""
    logps = random_logps(6, codes=3, margins=True)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    assert logps.target_margins is not None
    mixture = dpo_loss(logps, 0.1).of_mixture(weights.log().expand(6, 3))
    for pair in range(6):
        chance = 0.0
        for code in range(3):
            chosen = logps.policy_chosen[pair, code] - logps.reference_chosen[pair, 0]
            rejected = logps.policy_rejected[pair, code] - logps.reference_rejected[pair, 0]
            offset = 0.1 * float(chosen - rejected) - float(logps.target_margins[pair, 0])
            chance += float(weights[code]) / (1 + math.exp(-offset))
        assert float(mixture[pair]) == pytest.approx(-math.log(chance), rel=1e-12)


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_weighted_mean_repeats_pairs(scale: float) -> None:
    losses = torch.tensor([0.5, 3.0, 7.0], dtype=torch.float64)
    repeated = torch.tensor([0.5, 0.5, 3.0], dtype=torch.float64)
    weights = scale * torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(weighted_mean(losses, weights), repeated.mean(), rtol=1e-15, atol=0)
    assert weighted_mean(losses.float(), weights).dtype == torch.float32
    assert weighted_mean(losses, torch.zeros(3)) == 0
    assert torch.equal(weighted_mean(losses, None), losses.mean())


@every_loss
def test_add_nll_golden_values(name: str) -> None:
    """The chosen answers have 3/2, 2.5/5, 4/4 and 1.5/1 nats per token."""
    result = add_nll(LOSSES[name](GOLDEN), GOLDEN, 0.5)
    expected = torch.tensor(EXPECTED[name], dtype=torch.float64) + torch.tensor([0.75, 0.25, 0.5, 0.75])
    torch.testing.assert_close(result.losses, expected.double(), rtol=0, atol=1e-6)


def test_add_nll_twice() -> None:
    """Texts are no part of the losses of the labels, however many there are."""
    once, twice = orpo_loss(GOLDEN), add_nll(orpo_loss(GOLDEN), GOLDEN, 0.5)
    assert once.label_losses is not None
    assert twice.label_losses is not None
    torch.testing.assert_close(twice.label_losses, once.label_losses)
    torch.testing.assert_close(twice.label_part.losses, once.label_part.losses)
    torch.testing.assert_close(twice.losses - once.losses, torch.tensor([0.75, 0.25, 0.5, 0.75]).double())


@every_loss
def test_add_nll_of_mixture(name: str) -> None:
    """Label and answer are two events. The likelihood of each is averaged over the codes, in plain exponentials."""
    logps, weights = random_logps(6, codes=3), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    plain, log_weights = LOSSES[name](logps), weights.log().expand(6, 3)
    result = add_nll(plain, logps, 0.7)
    assert torch.equal(result.label_log_likelihood, plain.label_log_likelihood)
    for pair in range(6):
        chances = [math.exp(float(logps.policy_chosen[pair, code])) for code in range(3)]
        answer = -math.log(sum(float(w) * chance for w, chance in zip(weights, chances, strict=True)))
        expected = float(plain.of_mixture(log_weights)[pair]) + 0.7 * answer / float(logps.chosen_lengths[pair])
        assert float(result.of_mixture(log_weights)[pair]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_losses_ignore_reference(name: str) -> None:
    logps = random_logps(6)
    without = replace(logps, reference_chosen=None, reference_rejected=None)
    assert torch.equal(LOSSES[name](logps).losses, LOSSES[name](without).losses)


def test_kto_mixture_averages_judgements() -> None:
    """The mixture judges each answer alone, with the mean of its codes' probabilities, in plain exponentials."""
    logps, weights = random_logps(6, codes=3), [0.2, 0.5, 0.3]
    result = kto_loss(logps, beta=0.1, desirable_weight=0.8, undesirable_weight=1.5, reference_point=0.5)
    mixture = result.of_mixture(torch.tensor(weights, dtype=torch.float64).log().expand(6, 3))
    for pair in range(6):
        z0 = 0.5
        judged_w, judged_l = (
            [
                1 / (1 + math.exp(-sign * 0.1 * (float(policy[pair, code]) - float(reference[pair, 0]) - z0)))
                for code in range(3)
            ]
            for sign, policy, reference in (
                (1, logps.policy_chosen, logps.reference_chosen),
                (-1, logps.policy_rejected, logps.reference_rejected),
            )
        )
        desirable, undesirable = (
            sum(w * chance for w, chance in zip(weights, chances, strict=True)) for chances in (judged_w, judged_l)
        )
        assert float(mixture[pair]) == pytest.approx((0.8 * (1 - desirable) + 1.5 * (1 - undesirable)) / 2, rel=1e-12)
        for code in range(3):
            loss = (0.8 * (1 - judged_w[code]) + 1.5 * (1 - judged_l[code])) / 2
            assert float(result.losses[pair, code]) == pytest.approx(loss, rel=1e-12)
            likelihood = judged_w[code] * judged_l[code]
            assert float(result.label_log_likelihood[pair, code].exp()) == pytest.approx(likelihood, rel=1e-12)


def test_orpo_mixture_averages_label_and_text() -> None:
    logps, weights = random_logps(6, codes=3, seed=2), [0.2, 0.5, 0.3]
    result = LOSSES["orpo"](logps)
    mixture = result.of_mixture(torch.tensor(weights, dtype=torch.float64).log().expand(6, 3))
    for pair in range(6):
        means = [
            (
                float(logps.policy_chosen[pair, code] / logps.chosen_lengths[pair]),
                float(logps.policy_rejected[pair, code] / logps.rejected_lengths[pair]),
            )
            for code in range(3)
        ]
        odds = [[math.exp(mean) / (1 - math.exp(mean)) for mean in code] for code in means]
        chances = [chosen / (chosen + rejected) for chosen, rejected in odds]
        label = sum(w * chance for w, chance in zip(weights, chances, strict=True))
        texts = [math.exp(float(logps.policy_chosen[pair, code])) for code in range(3)]
        text = sum(w * chance for w, chance in zip(weights, texts, strict=True))
        expected = -0.1 * math.log(label) - math.log(text) / float(logps.chosen_lengths[pair])
        assert float(mixture[pair]) == pytest.approx(expected, rel=1e-12)
        for code, chance in enumerate(chances):
            assert float(result.label_log_likelihood[pair, code].exp()) == pytest.approx(chance, rel=1e-12)


def test_orpo_of_certain_answers() -> None:
    """Rounding makes answers of probability 1. Equal odds have a loss of beta log 2."""
    certain, half = torch.zeros(1, requires_grad=True), torch.full((1,), -math.log(2))
    ones = torch.ones(1)
    losses = orpo_loss(PairLogps(certain, certain, None, None, ones, ones), beta=0.1).losses
    torch.testing.assert_close(losses, torch.tensor([0.1 * math.log(2)]))
    losses = orpo_loss(PairLogps(certain, half, None, None, ones, ones), beta=0.1).losses
    (gradient,) = torch.autograd.grad(losses.sum(), certain)
    assert 0 < losses.item() < 1e-6
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("desirable_weight", 0.0),
        ("undesirable_weight", -1.0),
        ("desirable_weight", math.nan),
        ("reference_point", -0.1),
    ],
)
def test_kto_settings_out_of_range(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{setting}: found {value}, expected"):
        kto_loss(GOLDEN, **{setting: value})


def test_kto_refuses_margins() -> None:
    with pytest.raises(ValueError, match=r"margins: found margins of pairs.*Set data\.columns\.margin to null"):
        LOSSES["kto"](random_logps(2, margins=True))


def test_ipo_gradient_zero_at_target_margin() -> None:
    logps = replace(
        random_logps(3), reference_chosen=torch.zeros(3).double(), reference_rejected=torch.zeros(3).double()
    )
    rejected = logps.policy_rejected
    chosen = (rejected + 1 / (2 * 0.25)).requires_grad_()
    losses = ipo_loss(replace(logps, policy_chosen=chosen), beta=0.25).losses
    (gradient,) = torch.autograd.grad(losses.sum(), chosen)
    torch.testing.assert_close(gradient, torch.zeros(3).double(), rtol=0, atol=1e-13)


@every_loss
@pytest.mark.parametrize("margin", [-4000.0, 4000.0])
def test_losses_finite_at_extreme_margins(name: str, margin: float) -> None:
    zero = torch.zeros(1)
    chosen = torch.full((1,), margin, requires_grad=True)
    losses = LOSSES[name](PairLogps(chosen, zero, zero, zero, zero + 1, zero + 1)).losses
    (gradient,) = torch.autograd.grad(losses.sum(), chosen)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss, simpo_loss, kto_loss, orpo_loss])
@pytest.mark.parametrize("beta", [0, -0.1, math.nan, math.inf])
def test_losses_beta_out_of_range(loss: Callable[..., PairLosses], beta: float) -> None:
    with pytest.raises(ValueError, match=rf"^beta: found {beta}, expected a number above 0\.$"):
        loss(GOLDEN, beta=beta)


@pytest.mark.parametrize("ratio", [math.nan, math.inf, -math.inf])
def test_simpo_target_margin_not_finite(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"^gamma_beta_ratio: found {ratio}, expected a finite number\.$"):
        simpo_loss(GOLDEN, gamma_beta_ratio=ratio)


@with_reference
@pytest.mark.parametrize("missing", ["reference_chosen", "reference_rejected"])
def test_losses_missing_reference(name: str, missing: str) -> None:
    with pytest.raises(ValueError, match="found no reference log-probabilities"):
        LOSSES[name](replace(GOLDEN, **{missing: None}))
