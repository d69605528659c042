"""Tests of the modes against single sequences, of groups against loops, and of leaking posteriors made by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import pytest
import torch
from torch import Tensor

from lpc_lightning.algorithms import DPO, IPO, PreferenceModule, SimPO
from lpc_lightning.algorithms.latent_mixin import EvaluationOutput
from lpc_lightning.data.batching.layouts import Layout, PaddedLayout, SharedPrefixLayout
from lpc_lightning.evaluation.accuracy.accuracy_modes import (
    LENGTH_SCALES,
    OTHERS,
    SWAPPED,
    AccuracyModes,
    AccuracyReport,
    keep_largest,
    mode_margins,
    turnover,
)
from lpc_lightning.evaluation.accuracy.pair_table import PairTable
from lpc_lightning.evaluation.statistics.calibration import calibration_error, wrong_label_auroc
from lpc_lightning.latent import (
    ExpectedSpace,
    GaussianSpace,
    GumbelSpace,
    LatentSpace,
    MarginalSpace,
    MLPSpace,
    PosteriorOnlySpace,
    PriorOnlySpace,
    VectorSpace,
)
from lpc_lightning.robust import ConservativeLoss
from lpc_lightning.types import PreferenceBatch, TokenizedPair

LENGTHS = [(5, 3, 7), (11, 9, 1), (1, 1, 4), (3, 13, 5), (2, 2, 2)]
CODES: dict[str, Any] = {"num_codes": 3, "init_logit_std": 3.0, "hidden": 8}
ALGORITHMS: dict[str, Callable[..., PreferenceModule]] = {
    "dpo": lambda **module: DPO(beta=0.3, reference="live", **module),
    "cdpo": lambda **module: DPO(beta=0.3, robust_loss=ConservativeLoss(0.2), reference="live", **module),
    "ipo": lambda **module: IPO(beta=0.2, reference="live", **module),
    "simpo": lambda **module: SimPO(beta=2.5, gamma_beta_ratio=0.4, **module),
}
SPACES: dict[str, Callable[[], LatentSpace]] = {
    "gumbel": lambda: GumbelSpace(**CODES),
    "posterior only": lambda: PosteriorOnlySpace(**CODES),
    "expected": lambda: ExpectedSpace(**CODES),
    "marginal": lambda: MarginalSpace(**CODES),
    "prior only": lambda: PriorOnlySpace(**CODES),
    "gaussian": lambda: GaussianSpace(**CODES),
    "vector": lambda: VectorSpace(init_logit_std=3.0),
    "mlp": lambda: MLPSpace(hidden=8),
}
DETERMINISTIC = {"prior", "no_latent", "shuffled"}
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
Build = Callable[..., PreferenceModule]


@pytest.fixture
def build(tiny_spec: Callable[..., Any], perturb: Callable[..., None], exact: Callable[..., Any]) -> Build:
    """Function that builds a float64 module. Its policy differs from its reference, and its latent is random."""

    def build_module(algorithm: str, space: LatentSpace | None) -> PreferenceModule:
        module = ALGORITHMS[algorithm](policy=tiny_spec(), latent=space)
        module.configure_model()
        exact(module.policy)
        if module.reference is not None:
            exact(module.reference.policy)
        perturb(module.policy, deviation=0.1)
        if space is not None:
            space.double()
            perturb(space, deviation=0.5, seed=3)
        return module.requires_grad_(False)

    return build_module


def evaluated(module: PreferenceModule, batch: PreferenceBatch) -> EvaluationOutput:
    return module.validation_step(batch, 0)


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

    def loss(self, z: Tensor, swapped: bool) -> Tensor:
        chosen, rejected = self.rewards(z)
        d = rejected - chosen if swapped else chosen - rejected

        def nll(x: Tensor) -> Tensor:
            return (-x).clamp(min=0) + torch.log(1 + torch.exp(-x.abs()))

        return {
            "dpo": lambda: nll(0.3 * d),
            "cdpo": lambda: 0.8 * nll(0.3 * d) + 0.2 * nll(-0.3 * d),
            "ipo": lambda: (d - 2.5) ** 2,
            "simpo": lambda: nll(2.5 * (d - 0.4)),
        }[self.algorithm]()

    def likelihoods(self, swapped: bool) -> list[Decimal]:
        """Compute p_k exp(-l_k) by code, with many digits. IPO's loss is divided by its value at a margin of 0."""
        space: Any = self.module.latent
        prior = network(space.prior, self.h_x).exp()
        nats = 1 / 2.5**2 if self.algorithm == "ipo" else 1.0
        losses = [nats * self.loss(code, swapped) for code in space.codebook.weight]
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
            likelihoods = self.likelihoods(swapped)
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


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_scaled_margins_match_single_sequences(
    algorithm: str, build: Build, make_pairs: Callable[..., list[TokenizedPair]]
) -> None:
    """Without and with length normalisation. The posterior's z is that of the algorithm's own loss."""
    pairs = make_pairs(LENGTHS[:3])
    module = build(algorithm, SPACES["marginal"]())
    batch = SharedPrefixLayout(0, row_tokens=40)(pairs)
    actual = mode_margins(evaluated(module, batch), module.latent, LENGTH_SCALES)
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


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
@pytest.mark.parametrize("space", list(SPACES))
def test_mode_margins_match_single_sequences(
    algorithm: str, space: str, build: Build, make_pairs: Callable[..., list[TokenizedPair]]
) -> None:
    pairs = make_pairs(LENGTHS)
    module = build(algorithm, SPACES[space]())
    actual = mode_margins(evaluated(module, SharedPrefixLayout(0, row_tokens=40)(pairs)), module.latent)
    assert set(actual) == MODES[space]
    naive = [Naive(algorithm, module, pair) for pair in pairs]
    for number, one in enumerate(naive):
        for mode, margin in one.margins(naive[(number - 2) % 5].prior_z(), MODES[space]).items():
            assert float(actual[mode][number]) == pytest.approx(float(margin), rel=1e-9, abs=1e-9), mode
    different = {mode for mode in actual if (actual[mode] - actual["prior"]).abs().max() > 1e-3}
    assert different == MODES[space] - {"prior"} - ({"shuffled"} if space == "vector" else set()), (
        "all modes must differ"
    )


def test_mode_margins_without_latent(build: Build, make_pairs: Callable[..., list[TokenizedPair]]) -> None:
    pairs, module = make_pairs(LENGTHS), build("dpo", None)
    actual = mode_margins(evaluated(module, PaddedLayout(0)(pairs)), None)
    assert set(actual) == {"prior"}
    for number, pair in enumerate(pairs):
        assert float(actual["prior"][number]) == pytest.approx(float(Naive("dpo", module, pair).margin(0.0)), abs=1e-9)


def test_marginal_margin_of_dpo_is_label_log_odds(build: Build, make_pairs: Callable[..., list[TokenizedPair]]) -> None:
    """Compare with the log-odds of sum_k p_k sigmoid(beta D_k)."""
    pairs, module = make_pairs(LENGTHS), build("dpo", MarginalSpace(**CODES))
    actual = mode_margins(evaluated(module, PaddedLayout(0)(pairs)), module.latent)["marginal"]
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
    mode_margins(evaluated(module, PaddedLayout(0)(make_pairs(LENGTHS))), module.latent)
    assert calls == {"states": 2, "logps_per_code": 1}, "one pass of the policy and one of the reference"


# Label leaks made by hand

A, B = 7, 11
"""Tokens of the two answers."""


def leak_module(build: Build, make_pairs: Callable[..., Any], leaking: bool) -> tuple[PreferenceModule, Any]:
    """Make a module whose posterior depends on the order of the answers, or not.

    The answers are A or B. Code 0 makes A likelier, and code 1 makes B likelier. Let s be the projection that separates
    the two tokens. The hidden layer of the leaking posterior has u = s(first) - s(second) and -u. Since
    gelu(u) - gelu(-u) = u, its logits are u and -u. The other posterior has u = s(first) + s(second).
    """
    pairs = make_pairs([(3 + number, 1, 1) for number in range(8)])
    pairs = [replace(pair, chosen_ids=[A], rejected_ids=[B]) for pair in pairs]
    pairs[::3] = [replace(pair, chosen_ids=[B], rejected_ids=[A]) for pair in pairs[::3]]
    module = build("dpo", GumbelSpace(num_codes=2, hidden=2, init_logit_std=1.0))
    space: Any = module.latent
    forward = module.policy(PaddedLayout(0)(pairs))
    first_is_a = torch.tensor([pair.chosen_ids == [A] for pair in pairs])
    states = torch.nn.functional.rms_norm(forward.states.chosen, (16,))
    others = torch.nn.functional.rms_norm(forward.states.rejected, (16,))
    a, b = (torch.where(first_is_a[:, None], *choices) for choices in ((states, others), (others, states)))
    direction = (a - b).mean(0)
    assert ((a - b) @ direction > 0).all(), "the projection must separate the tokens"
    sign = -1.0 if leaking else 1.0
    row = torch.cat([direction, sign * direction])
    space.posterior.first.weight.copy_(20 * torch.stack([row, -row]))
    space.posterior.first.bias.zero_()
    space.posterior.second.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    space.posterior.second.bias.zero_()
    head = module.policy.head.weight
    lift = 30 * (head[A] - head[B]) / (head[A] - head[B]).norm() ** 2
    space.codebook.weight.copy_(torch.stack([lift, -lift]))
    return module, pairs


def report_of(module: PreferenceModule, batches: list[PreferenceBatch], **options: Any) -> AccuracyReport:
    modes = AccuracyModes(**options)
    for batch in batches:
        modes.update(evaluated(module, batch), batch, module.latent)
    return modes.collect()


def test_swap_turnover_of_leaking_posterior(build: Build, make_pairs: Callable[..., Any]) -> None:
    module, pairs = leak_module(build, make_pairs, leaking=True)
    actual = report_of(module, [PaddedLayout(0)(pairs)]).metrics
    assert actual["swap_turnover"] == 1.0
    assert actual["accuracy/posterior"] == 1.0, "it only repeats the label"


def test_swap_turnover_of_symmetric_posterior(build: Build, make_pairs: Callable[..., Any]) -> None:
    module, pairs = leak_module(build, make_pairs, leaking=False)
    actual = report_of(module, [PaddedLayout(0)(pairs)])
    assert actual.metrics["swap_turnover"] == 0.0
    margins = [item["margins"] for item in actual.items]
    assert max(abs(margin["posterior"]) for margin in margins) > 1, "the posterior must have an effect"
    assert 0 < actual.metrics["accuracy/posterior"] < 1


def test_turnover_with_ties() -> None:
    one, other = torch.tensor([[2.0, 3.0, 1.0, 0.0, 0.0, -1.0], [-0.5, 4.0, 0.0, -2.0, 0.0, -9.0]])
    assert turnover(one, other).tolist() == [1, 0, 0.5, 0.5, 0, 0]
    assert torch.equal(turnover(one, other), turnover(other, one))


# Groups, counts, means


def labelled(pairs: list[TokenizedPair]) -> list[TokenizedPair]:
    sources = ["wide", "wide", "high/er", "", "ünï"]
    return [
        replace(pair, source=source, factor="terse" if number % 2 else "", flipped=number in (1, 4))
        for number, (pair, source) in enumerate(zip(pairs, sources, strict=True))
    ]


def test_group_metrics_are_means_over_pairs(build: Build, make_pairs: Callable[..., list[TokenizedPair]]) -> None:
    pairs, layout = labelled(make_pairs(LENGTHS)), PaddedLayout(0)
    module = build("ipo", GumbelSpace(**CODES))
    report = report_of(module, [layout(pairs[:3]), layout(pairs[3:])])
    assert [item["id"] for item in report.items] == [pair.id for pair in pairs]
    groups: dict[str, list[int]] = {
        "": [0, 1, 2, 3, 4], "/clean": [0, 2, 3], "/flipped": [1, 4], "/factor/terse": [1, 3],
        "/source/wide": [0, 1], "/source/high/er": [2], "/source/ünï": [4], "/length_matched": [4],
    }  # fmt: skip
    expected: dict[str, float] = {}
    errors: dict[str, float] = {}
    for name, members in groups.items():
        expected[f"pairs{name}"] = len(members)
        columns: dict[str, list[float]] = {}
        for member in members:
            margins, sign = report.items[member]["margins"], -1 if member in (1, 4) else 1
            chosen, rejected = report.items[member]["tokens"]
            if name in ("", "/length_matched"):
                longer = (chosen > rejected) + (chosen == rejected) / 2
                columns.setdefault("longer_is_chosen", []).append(longer)
                columns.setdefault("gold_longer_is_chosen", []).append(longer if sign == 1 else 1 - longer)
            for mode in ("prior", "posterior", "marginal", "no_latent", "shuffled"):
                margin = margins[mode]
                columns.setdefault(f"margin/{mode}", []).append(margin)
                columns.setdefault(f"log_loss/{mode}", []).append(math.log1p(math.exp(-margin)))
                columns.setdefault(f"accuracy/{mode}", []).append(1.0 if margin > 0 else 0.0 if margin < 0 else 0.5)
                columns.setdefault(f"gold_log_loss/{mode}", []).append(math.log1p(math.exp(-sign * margin)))
                columns.setdefault(f"gold_accuracy/{mode}", []).append(float(sign * margin > 0))
            columns.setdefault("swap_turnover", []).append(float(margins["posterior"] * margins[SWAPPED] < 0))
        for value, numbers in columns.items():
            mean = sum(numbers) / len(numbers)
            expected[value + name] = mean
            if len(numbers) > 1:
                variance = sum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1)
                errors[value + name] = math.sqrt(variance / len(numbers))
    for mode in ("prior", "posterior", "marginal", "no_latent"):
        margins = torch.tensor([item["margins"][mode] for item in report.items], dtype=torch.float64)
        expected[f"calibration_error/{mode}"] = calibration_error(margins)
        expected[f"gold_calibration_error/{mode}"] = calibration_error(margins * torch.tensor([1, -1, 1, 1, -1]))
        expected[f"wrong_label_auroc/{mode}"] = wrong_label_auroc(margins, torch.tensor([0, 1, 0, 0, 1]).bool())
    assert report.metrics == pytest.approx(expected, rel=1e-12)
    assert report.standard_errors == pytest.approx(errors, rel=1e-9)


def test_standard_errors_over_prompts(build: Build, make_pairs: Callable[..., list[TokenizedPair]]) -> None:
    """The first two pairs share a prompt. With m the mean: S = (v0 + v1 - 2 m, v2 - m, v3 - m, v4 - m)."""
    pairs, layout = make_pairs(LENGTHS), PaddedLayout(0)
    pairs[1] = replace(pairs[1], prompt_ids=pairs[0].prompt_ids)
    report = report_of(build("dpo", None), [layout(pairs[:3]), layout(pairs[3:])])
    values = [item["margins"]["prior"] for item in report.items]
    mean = sum(values) / 5
    sums = [values[0] + values[1] - 2 * mean, *(value - mean for value in values[2:])]
    expected = math.sqrt(4 / 3 * sum(each**2 for each in sums)) / 5
    assert report.standard_errors["margin/prior"] == pytest.approx(expected, rel=1e-9)
    assert report.items[0]["prompt"] == report.items[1]["prompt"] != report.items[2]["prompt"]


def test_metrics_without_flipped_pairs(build: Build, make_pairs: Callable[..., Any]) -> None:
    actual = report_of(build("dpo", None), [PaddedLayout(0)(make_pairs(LENGTHS))])
    means = {"accuracy/prior", "margin/prior", "log_loss/prior", "longer_is_chosen"}
    assert {name for name in actual.metrics if not name.endswith("/length_matched")} == {
        *means, "pairs", "calibration_error/prior",
    }  # fmt: skip
    assert set(actual.standard_errors) == means
    assert set(actual.items[0]) == {
        "id", "source", "factor", "annotator", "prompt", "flipped", "tokens", "margins",
    }  # fmt: skip
    assert [item["tokens"] for item in actual.items] == [[3, 7], [9, 1], [1, 4], [13, 5], [2, 2]]


def test_shuffled_mode_with_single_pair_batches(build: Build, make_pairs: Callable[..., Any]) -> None:
    pairs, layout = labelled(make_pairs(LENGTHS)), PaddedLayout(0)
    module = build("dpo", MLPSpace(hidden=8))
    report = report_of(module, [layout(pairs[:2]), layout(pairs[2:3]), layout(pairs[3:])])
    assert report.metrics["pairs/not_shuffled"] == 1
    assert ["shuffled" in item["margins"] for item in report.items] == [True, True, False, True, True]
    margins = [item["margins"]["shuffled"] for item in report.items if "shuffled" in item["margins"]]
    assert report.metrics["margin/shuffled"] == pytest.approx(sum(margins) / 4)
    assert "accuracy/shuffled/source/high/er" not in report.metrics
    assert report.metrics["accuracy/prior/source/high/er"] in (0.0, 1.0)
    alone = report_of(module, [layout([pair]) for pair in pairs]).metrics
    assert alone["pairs/not_shuffled"] == 5
    assert not any("shuffled" in name for name in alone if name != "pairs/not_shuffled")


def test_collect_resets(build: Build, make_pairs: Callable[..., Any]) -> None:
    module, layout = build("dpo", None), PaddedLayout(0)
    pairs, modes = make_pairs(LENGTHS), AccuracyModes()
    assert modes.collect() == AccuracyReport()
    for part in (pairs, pairs[:2]):
        batch = layout(part)
        modes.update(evaluated(module, batch), batch, None)
        assert modes.collect() == report_of(module, [batch])
    assert modes.collect() == AccuracyReport()


def test_metrics_of_diverged_policy_are_nan(build: Build, make_pairs: Callable[..., Any]) -> None:
    """No mode leaves out pairs whose margin is NaN."""
    module = build("dpo", MLPSpace(hidden=8))
    module.latent.network.second.bias[0] = torch.nan  # type: ignore[union-attr, operator]
    actual = report_of(module, [PaddedLayout(0)(make_pairs(LENGTHS))]).metrics
    assert math.isnan(actual["accuracy/prior"])
    assert math.isnan(actual["margin/shuffled"])
    assert math.isnan(actual["calibration_error/prior"])
    assert not math.isnan(actual["margin/no_latent"])


@pytest.mark.parametrize("layout", [PaddedLayout(0), SharedPrefixLayout(0, row_tokens=40)], ids=["padded", "shared"])
def test_small_groups_are_merged(layout: Layout, build: Build, make_pairs: Callable[..., Any]) -> None:
    pairs = labelled(make_pairs(LENGTHS))
    module = build("dpo", None)
    actual = report_of(module, [layout(pairs)], by=["source"], most=1).metrics
    assert {name for name in actual if name.startswith("pairs")} == {
        "pairs", "pairs/clean", "pairs/flipped", "pairs/source/wide", f"pairs/source/{OTHERS}", "pairs/length_matched",
    }  # fmt: skip
    assert actual[f"pairs/source/{OTHERS}"] == 2


def test_keep_largest_by_size_then_name() -> None:
    assert keep_largest(["b", "a", "", "b", "c", "a", "d"], 2) == ["b", "a", "", "b", OTHERS, "a", OTHERS]
    assert keep_largest(["d", "c", "b", "a"], 2) == [OTHERS, OTHERS, "b", "a"]
    assert keep_largest([], 2) == []


def test_pair_table_round_trip() -> None:
    table = PairTable()
    assert table.read() == ({}, [])
    table.update({"a": torch.tensor([1.5, 2.0]), "b": torch.tensor([1, 2])}, [{"id": "x\n"}, {"id": "\u2028 é"}])
    table.update({"a": torch.tensor([3.25]), "b": torch.tensor([3])}, [{"id": '"', "flag": True}])
    numbers, rows = table.read()
    assert {name: values.tolist() for name, values in numbers.items()} == {"a": [1.5, 2.0, 3.25], "b": [1, 2, 3]}
    assert rows == [{"id": "x\n"}, {"id": "\u2028 é"}, {"id": '"', "flag": True}]


def test_pair_table_of_one_number() -> None:
    table = PairTable()
    table.update({"a": torch.tensor([1.5])}, [{"id": "x"}])
    assert table.read() == ({"a": torch.tensor([1.5])}, [{"id": "x"}])
