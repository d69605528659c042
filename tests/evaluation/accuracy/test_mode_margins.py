"""Tests of the margin of each mode against single sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest
import torch
from torch import Tensor

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.data.batching.layouts import PaddedLayout, SharedPrefixLayout
from lpc_lightning.evaluation.accuracy.mode_margins import LENGTH_SCALES, SWAPPED, mode_margins, shuffle_partners
from lpc_lightning.latent import GaussianSpace, MarginalSpace, MLPSpace, VectorSpace
from lpc_lightning.robust import REPO, ConservativeLoss, DrDPO, HolderDPO, RobustLoss, UnbiasedLoss
from lpc_lightning.types import TokenizedPair
from tests.evaluation.accuracy.conftest import ALGORITHMS, CODES, LENGTHS, Build, evaluated
from tests.fixtures.spaces import make_space

DETERMINISTIC = {"prior", "no_latent", "shuffled"}
PARTNERS = [3, 4, 0, 1, 2]
"""Partners in mode `shuffled` of five pairs of different prompts."""
ALL = DETERMINISTIC | {"marginal", "posterior", SWAPPED}
MODES = {
    "gumbel": ALL,
    "posterior only": ALL,
    "expected": ALL,
    "marginal": ALL,
    "prior only": DETERMINISTIC | {"marginal"},
    "gaussian": DETERMINISTIC | {"posterior", SWAPPED},
    "vector": DETERMINISTIC,
    "mlp": DETERMINISTIC,
}


# Naive computation


def backbone(policy: Any, tokens: list[int]) -> Tensor:
    return policy.backbone(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[0]


def answer_logp(policy: Any, prompt: list[int], answer: list[int], z: Tensor | float = 0.0) -> Tensor:
    states = backbone(policy, prompt + answer) + z
    logps = torch.log_softmax(policy.causal_lm.lm_head(states), -1)
    return sum(logps[len(prompt) - 1 + index, token] for index, token in enumerate(answer))  # type: ignore[return-value]


def network(net: Any, *states: Tensor) -> Tensor:
    inputs = torch.cat([state / state.square().mean().sqrt() for state in states])
    hidden = net.first.weight @ inputs + net.first.bias
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    return net.second.weight @ hidden + net.second.bias


@dataclass
class Naive:
    """Naive computation for one pair: each sequence is run separately, with the formulas of the method."""

    algorithm: str
    module: PreferenceModule
    pair: TokenizedPair

    def __post_init__(self) -> None:
        prompt, chosen, rejected = self.pair.prompt_ids, self.pair.chosen_ids, self.pair.rejected_ids
        policy = self.module.policy
        self.h_x = backbone(policy, prompt)[-1]
        self.h_w, self.h_l = (backbone(policy, prompt + answer)[-1] for answer in (chosen, rejected))

    def rewards(self, z: Tensor | float) -> tuple[Tensor, Tensor]:
        """Compute the rewards of the chosen and the rejected answer, without beta."""
        rewards = []
        for answer in (self.pair.chosen_ids, self.pair.rejected_ids):
            logp = answer_logp(self.module.policy, self.pair.prompt_ids, answer, z)
            if self.algorithm == "simpo":
                rewards.append(logp / len(answer))
            else:
                rewards.append(logp - answer_logp(self.module.reference.policy, self.pair.prompt_ids, answer))
        return rewards[0], rewards[1]

    def margin(self, z: Tensor | float) -> Tensor:
        chosen, rejected = self.rewards(z)
        return {"dpo": 0.3, "cdpo": 0.3, "ipo": 0.2, "simpo": 2.5}[self.algorithm] * (chosen - rejected)

    def loss(self, z: Tensor, swapped: bool, noise: bool) -> Tensor:
        chosen, rejected = self.rewards(z)
        d = rejected - chosen if swapped else chosen - rejected

        def nll(x: Tensor) -> Tensor:
            return (-x).clamp(min=0) + torch.log(1 + torch.exp(-x.abs()))

        return {
            "dpo": lambda: nll(0.3 * d),
            "cdpo": lambda: 0.8 * nll(0.3 * d) + 0.2 * nll(-0.3 * d) if noise else nll(0.3 * d),
            "ipo": lambda: (d - 2.5) ** 2,
            "simpo": lambda: nll(2.5 * (d - 0.4)),
        }[self.algorithm]()

    def likelihoods(self, swapped: bool, noise: bool = False) -> list[Decimal]:
        """Compute p_k exp(-l_k) by code, with many digits. IPO's loss is divided by its value at a margin of 0.

        The posterior of the codes allows for wrong labels (`noise`), the mode `marginal` does not.
        """
        space: Any = self.module.latent
        prior = network(space.prior, self.h_x).exp()
        nats = 1 / 2.5**2 if self.algorithm == "ipo" else 1.0
        losses = [nats * self.loss(code, swapped, noise) for code in space.codebook.weight]
        return [
            Decimal(float(p / prior.sum())) * Decimal(-float(loss)).exp() for p, loss in zip(prior, losses, strict=True)
        ]

    def prior_z(self) -> Tensor:
        space: Any = self.module.latent
        if isinstance(space, VectorSpace):
            return space.vector
        if isinstance(space, MLPSpace):
            return network(space.network, self.h_x)
        weights = network(space.prior, self.h_x)
        weights = weights[:3] if isinstance(space, GaussianSpace) else weights.exp() / weights.exp().sum()
        return weights @ space.codebook.weight

    def posterior_z(self, swapped: bool) -> Tensor:
        space: Any = self.module.latent
        if isinstance(space, MarginalSpace):
            likelihoods = self.likelihoods(swapped, noise=True)
            weights = torch.tensor(
                [float(likelihood / sum(likelihoods)) for likelihood in likelihoods], dtype=torch.float64
            )
        else:
            answer_states = (self.h_l, self.h_w) if swapped else (self.h_w, self.h_l)
            weights = network(space.posterior, *answer_states)
            weights = weights[:3] if isinstance(space, GaussianSpace) else weights.exp() / weights.exp().sum()
        return weights @ space.codebook.weight

    def margins(self, others_z: Tensor, modes: set[str]) -> dict[str, Tensor]:
        margins = {
            "prior": lambda: self.margin(self.prior_z()),
            "no_latent": lambda: self.margin(0.0),
            "shuffled": lambda: self.margin(others_z),
            "posterior": lambda: self.margin(self.posterior_z(swapped=False)),
            SWAPPED: lambda: self.margin(self.posterior_z(swapped=True)),
            "marginal": lambda: sum(self.likelihoods(False)).ln() - sum(self.likelihoods(True)).ln(),
        }
        return {mode: margins[mode]() for mode in modes}


@dataclass
class Scaled(Naive):
    """The same with rewards that are sums over tokens or means per token, whatever the algorithm does."""

    scale: str

    def rewards(self, z: Tensor | float) -> tuple[Tensor, Tensor]:
        rewards = []
        for answer in (self.pair.chosen_ids, self.pair.rejected_ids):
            reward = answer_logp(self.module.policy, self.pair.prompt_ids, answer, z)
            if self.algorithm != "simpo":
                reward = reward - answer_logp(self.module.reference.policy, self.pair.prompt_ids, answer)
            rewards.append(reward / len(answer) if self.scale == "per_token" else reward)
        return rewards[0], rewards[1]


# Margins


def test_shuffle_partners_have_another_prompt() -> None:
    assert shuffle_partners("abcde") == PARTNERS
    assert shuffle_partners("abcd") == [2, 3, 0, 1]
    assert shuffle_partners("aaaabbbb") == [4, 5, 6, 7, 0, 1, 2, 3]
    assert shuffle_partners("aaaaaabb") == [7, 7, 6, 7, 7, 7, 2, 3]
    assert shuffle_partners("aaaa") == [None] * 4
    assert shuffle_partners("a") == [None]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
@pytest.mark.parametrize("space", list(MODES))
def test_mode_margins_match_single_sequences(
    algorithm: str, space: str, build: Build, make_pairs: Callable[..., list[TokenizedPair]]
) -> None:
    pairs = make_pairs(LENGTHS)
    module = build(algorithm, make_space(space, init_logit_std=3.0))
    actual = mode_margins(evaluated(module, SharedPrefixLayout(0, row_tokens=40)(pairs)), module.latent, PARTNERS)
    assert set(actual) == MODES[space]
    naive = [Naive(algorithm, module, pair) for pair in pairs]
    for number, one in enumerate(naive):
        for mode, margin in one.margins(naive[(number - 2) % 5].prior_z(), MODES[space]).items():
            assert float(actual[mode][number]) == pytest.approx(float(margin), rel=1e-9, abs=1e-9), mode
    different = {mode for mode in actual if (actual[mode] - actual["prior"]).abs().max() > 1e-3}
    assert different == MODES[space] - {"prior"} - ({"shuffled"} if space == "vector" else set()), (
        "all modes must differ"
    )


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_scaled_margins_match_single_sequences(
    algorithm: str, build: Build, make_pairs: Callable[..., list[TokenizedPair]]
) -> None:
    """Without and with length normalization. The posterior's z is that of the algorithm's own loss."""
    pairs = make_pairs(LENGTHS[:3])
    module = build(algorithm, MarginalSpace(**CODES))
    batch = SharedPrefixLayout(0, row_tokens=40)(pairs)
    actual = mode_margins(evaluated(module, batch), module.latent, [2, 0, 1], LENGTH_SCALES)
    assert set(actual) == ALL | {f"{mode}/{scale}" for mode in ALL - {SWAPPED} for scale in LENGTH_SCALES}
    own = [Naive(algorithm, module, pair) for pair in pairs]
    for scale in LENGTH_SCALES:
        for row, pair in enumerate(pairs):
            naive = Scaled(algorithm, module, pair, scale)
            expected = naive.margins(own[row - 1].prior_z(), {"prior", "no_latent", "shuffled", "marginal"})
            expected["posterior"] = naive.margin(own[row].posterior_z(swapped=False))
            margins = {mode: float(actual[f"{mode}/{scale}"][row]) for mode in expected}
            values = {mode: float(value) for mode, value in expected.items()}
            assert margins == pytest.approx(values, rel=1e-6, abs=1e-9)
    same = "per_token" if algorithm == "simpo" else "summed"
    for mode in ALL - {SWAPPED}:
        assert torch.allclose(actual[f"{mode}/{same}"], actual[mode], rtol=1e-9, atol=1e-12)


def test_mode_margins_without_latent(build: Build, make_pairs: Callable[..., list[TokenizedPair]]) -> None:
    pairs, module = make_pairs(LENGTHS), build("dpo", None)
    actual = mode_margins(evaluated(module, PaddedLayout(0)(pairs)), None, PARTNERS)
    assert set(actual) == {"prior"}
    for number, pair in enumerate(pairs):
        assert float(actual["prior"][number]) == pytest.approx(float(Naive("dpo", module, pair).margin(0.0)), abs=1e-9)


def test_marginal_margin_of_dpo_is_label_log_odds(build: Build, make_pairs: Callable[..., list[TokenizedPair]]) -> None:
    """Compare with the log-odds of sum_k p_k sigmoid(beta D_k)."""
    pairs, module = make_pairs(LENGTHS), build("dpo", MarginalSpace(**CODES))
    actual = mode_margins(evaluated(module, PaddedLayout(0)(pairs)), module.latent, PARTNERS)["marginal"]
    for number, pair in enumerate(pairs):
        naive, space = Naive("dpo", module, pair), module.latent
        assert isinstance(space, MarginalSpace)
        prior = torch.softmax(network(space.prior, naive.h_x), -1)
        margins = [Decimal(float(naive.margin(code))) for code in space.codebook.weight]
        right, wrong = (
            sum(Decimal(float(p)) / (1 + (sign * margin).exp()) for p, margin in zip(prior, margins, strict=True))
            for sign in (-1, 1)
        )
        assert float(actual[number]) == pytest.approx(float((right / wrong).ln()), rel=1e-9)


@pytest.mark.parametrize(
    "robust_loss",
    [ConservativeLoss(0.2), UnbiasedLoss(0.3), DrDPO(), HolderDPO(), REPO(initial=0.1)],
    ids=lambda loss: type(loss).__name__,
)
def test_marginal_margin_has_no_label_noise(robust_loss: RobustLoss, build: Build, make_pairs: Any) -> None:
    """With one code it is the reward margin, also for annotators whose labels are mostly wrong."""
    module = build("dpo", MarginalSpace(**CODES | {"num_codes": 1}))
    module.robust_loss = robust_loss
    margins = mode_margins(
        evaluated(module, PaddedLayout(0)(make_pairs(LENGTHS))), module.latent, PARTNERS, LENGTH_SCALES
    )
    assert margins["prior"].abs().min() > 1e-3
    for scale in ("", "/summed", "/per_token"):
        torch.testing.assert_close(margins[f"marginal{scale}"], margins[f"prior{scale}"], rtol=1e-9, atol=1e-12)


def test_mode_margins_number_of_passes(
    build: Build, make_pairs: Callable[..., list[TokenizedPair]], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build("dpo", MarginalSpace(**CODES))
    calls: dict[str, int] = {}

    def count_calls(kind: type, name: str) -> None:
        original = getattr(kind, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return original(*arguments, **options)

        monkeypatch.setattr(kind, name, wrapped)

    count_calls(type(module.policy), "states")
    count_calls(type(evaluated(module, PaddedLayout(0)(make_pairs(LENGTHS)))["score"]._forward), "logps_per_code")
    calls.clear()
    mode_margins(evaluated(module, PaddedLayout(0)(make_pairs(LENGTHS))), module.latent, PARTNERS)
    assert calls == {"states": 2, "logps_per_code": 1}, "one pass of the policy and one of the reference"
