"""Tests of adaptation: against naive loops, closed forms and invariances."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from lpc_lightning.algorithms.metrics import accuracies
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.adaptation.inference import INFERENCES, CodeTables, code_weights, correct, margins
from lpc_lightning.evaluation.adaptation.scores import (
    PairTables,
    adaptation_mixtures,
    adaptation_scores,
    circular_orders,
    mean_score,
)
from lpc_lightning.losses import dpo_loss, ipo_loss, kto_loss, simpo_loss
from lpc_lightning.robust import ConservativeLoss
from lpc_lightning.types import PairLogps

NAMES = ["anna"] * 7 + ["ben"] * 5 + ["cleo"] * 2 + ["dora"]
IDS = [f"pair {number}" for number in range(40)]


def random_tables(pairs: int, codes: int = 3, seed: int = 0) -> CodeTables:
    """Make DPO losses that differ between codes, and a prior and a posterior for each pair. Labels flip at 0.2."""
    draw = np.random.default_rng(seed)
    margin = draw.normal(0, 2, (pairs, codes))
    logs = [np.log(draw.dirichlet(np.ones(codes), pairs)) for _ in range(2)]
    chance = 1 / (1 + np.exp(-margin))
    return CodeTables(logs[0], -np.log(chance), -np.log(1 - chance), logs[1], np.log(0.8 * chance + 0.2 * (1 - chance)))


def likelihood(tables: CodeTables, pair: int, code: int) -> float:
    """Compute the probability of a label under a code. Labels flip at 0.2 if the tables say so."""
    chance = math.exp(-tables.losses[pair, code])
    return chance if tables.evidence is None else 0.8 * chance + 0.2 * (1 - chance)


def naive_weights(kind: str, tables: CodeTables, given: Sequence[int], new: int) -> list[float]:
    """Compute weights in a loop over codes, in probabilities."""
    prior = [math.exp(value) for value in tables.log_prior[new]]
    if kind == "amortized":
        assert tables.log_posterior is not None
        rows = [[math.exp(value) for value in tables.log_posterior[pair]] for pair in given]
        return [sum(row[code] for row in rows) / len(rows) for code in range(len(prior))] if rows else prior
    joint = []
    for code, start in enumerate(prior):
        for pair in given:
            start *= likelihood(tables, pair, code)
        joint.append(start)
    return [value / sum(joint) for value in joint]


def naive_right(kind: str, tables: CodeTables, given: Sequence[int], new: int) -> float:
    weights = naive_weights(kind, tables, given, new)
    labelled = sum(w * math.exp(-loss) for w, loss in zip(weights, tables.losses[new], strict=True))
    otherwise = sum(w * math.exp(-loss) for w, loss in zip(weights, tables.swapped[new], strict=True))
    return 1.0 if labelled > otherwise else 0.0 if labelled < otherwise else 0.5


def hashed(*parts: object) -> int:
    """Return the leading 63 bits of SHA-256 over the parts, joined by slashes."""
    return int(hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:16], 16) // 2


def naive_scores(kind: str, tables: CodeTables, names: Sequence[str], n: int, rounds: int, seed: int) -> list[float]:
    """Compute each pair's mean over the rounds. Pairs of annotators with n pairs or fewer are left out."""
    values = []
    for name in sorted(set(names)):
        members = [index for index, other in enumerate(names) if other == name]
        if len(members) <= n:
            continue
        right = dict.fromkeys(members, 0.0)
        for number in range(rounds):
            ring = sorted(members, key=lambda pair: hashed("adapt", seed, number, IDS[pair]))
            for position, pair in enumerate(ring):
                given = [ring[(position + step) % len(ring)] for step in range(1, n + 1)]
                assert pair not in given
                assert len(set(given)) == n
                right[pair] += naive_right(kind, tables, given, pair) / rounds
        values += right.values()
    return values


def naive_means(values: Sequence[float], n: int) -> dict[str, float]:
    """Compute the mean of each annotator with more than n pairs."""
    members = [name for name in NAMES if NAMES.count(name) > n]
    return {name: np.mean([value for value, other in zip(values, members, strict=True) if other == name]).item()
            for name in members}  # fmt: skip


@pytest.mark.parametrize("kind", list(INFERENCES))
@pytest.mark.parametrize("seed", [0, 5])
def test_adaptation_scores_against_a_loop(kind: str, seed: int) -> None:
    tables, shots = random_tables(len(NAMES), seed=seed), (0, 1, 2, 4, 8)
    scores = adaptation_scores(PairTables(tables, IDS, NAMES), shots, rounds=3, seed=seed)[kind]
    assert list(scores) == [0, 1, 2, 4], "no annotator has more than 8 pairs"
    for n, score in scores.items():
        values = naive_scores(kind, tables, NAMES, n, 3, seed)
        assert score.pairs == len(values) == {0: 15, 1: 14, 2: 12, 4: 12}[n]
        assert score.accuracy == pytest.approx(np.mean(values), abs=1e-12)
        assert score.standard_error == pytest.approx(np.std(values, ddof=1) / len(values) ** 0.5, abs=1e-12)
        assert score.by_annotator == pytest.approx(naive_means(values, n), abs=1e-12)


@pytest.mark.parametrize("kind", list(INFERENCES))
def test_adaptation_scores_zero_shots_is_the_prior(kind: str) -> None:
    tables = random_tables(len(NAMES), seed=3)
    for rounds in (1, 7, 20):
        score = adaptation_scores(PairTables(tables, IDS, NAMES), (0, 3), rounds)[kind][0]
        assert score == mean_score(correct(margins(tables.log_prior, tables)), np.array(NAMES), np.arange(len(NAMES)))


def even_tables(right: Sequence[Sequence[float]], wrong: Sequence[Sequence[float]]) -> CodeTables:
    """Make pairs whose labels have these probabilities under each code, with a uniform prior."""
    shares = np.array(right)
    return CodeTables(np.full(shares.shape, -math.log(shares.shape[1])), -np.log(shares), -np.log(np.array(wrong)))


def test_code_weights_closed_form() -> None:
    """Two codes give every label the probabilities 0.8 and 0.2: the weights after n pairs are 4^n to 1."""
    tables = even_tables([[0.8, 0.2]] * 6, [[0.2, 0.8]] * 6)
    (weights,) = code_weights(tables, ["anna"] * 6).values()
    assert weights == pytest.approx([4**6 / (4**6 + 1), 1 / (4**6 + 1)], rel=1e-12)
    scores = adaptation_scores(PairTables(tables, IDS, ["anna"] * 6), (0, 1, 5))["exact"]
    # Equal weights give a tie. One label is enough for all others.
    assert [scores[n].accuracy for n in (0, 1, 5)] == pytest.approx([0.5, 1, 1])
    assert scores[1].standard_error == pytest.approx(0)


def test_code_weights_against_a_loop() -> None:
    tables = random_tables(len(NAMES), seed=6)
    for name, weights in code_weights(tables, NAMES).items():
        rows = [row for row, other in enumerate(NAMES) if other == name]
        joint = [
            sum(math.exp(tables.log_prior[row, code]) for row in rows)
            * math.prod(likelihood(tables, row, code) for row in rows)
            for code in range(3)
        ]
        assert weights == pytest.approx([value / sum(joint) for value in joint], rel=1e-9)


def test_adaptation_scores_opposite_annotators() -> None:
    """Code 0 fits one half of the labels, code 1 the other half, and code 2 both equally. The prior is at chance."""
    anna, ben = [0.9, 0.1, 0.5], [0.1, 0.9, 0.5]
    tables = even_tables([anna] * 20 + [ben] * 20, [ben] * 20 + [anna] * 20)
    names = ["anna"] * 20 + ["ben"] * 20
    scores = adaptation_scores(PairTables(tables, IDS, names), (0, 1, 16))
    assert [scores["exact"][n].accuracy for n in (0, 1, 16)] == pytest.approx([0.5, 1, 1])
    assert list(scores) == ["exact"], "without a learned posterior"
    weights = code_weights(tables, names)
    assert [int(weights[name].argmax()) for name in ("anna", "ben")] == [0, 1]
    # For one common annotator the two halves cancel out: code 2 has the highest likelihood.
    assert int(code_weights(tables, ["both"] * 40)["both"].argmax()) == 2


def test_exact_uses_the_prior_of_the_new_pair() -> None:
    """The labelled pairs exclude one code. The prior of the new pair decides between the other two."""
    right = np.array([[0.9, 0.9, 0.01], [0.2, 0.9, 0.01], [0.9, 0.2, 0.01]])
    prior = np.array([[1 / 3, 1 / 3, 1 / 3], [0.01, 0.9, 0.09], [0.9, 0.01, 0.09]])
    tables = CodeTables(np.log(prior), -np.log(right), -np.log(1 - right))
    likelihood = -tables.losses[[0, 0]]
    new_pairs, infer = tables.take(np.array([1, 2])), INFERENCES["exact"].log_weights
    assert (margins(infer(tables.log_prior[1:], likelihood), new_pairs) > 0).all()
    assert (margins(infer(tables.log_prior[[2, 1]], likelihood), new_pairs) < 0).all()


@pytest.mark.parametrize("kind", list(INFERENCES))
def test_inference_ignores_the_order_of_pairs(kind: str) -> None:
    tables, inference = random_tables(6, seed=2), INFERENCES[kind]
    contributions = inference.contributions(tables)
    assert contributions is not None
    weights = [
        inference.log_weights(tables.log_prior[:1], inference.combine.reduce(contributions[order])[None])
        for order in ([1, 2, 3, 4], [4, 2, 1, 3])
    ]
    np.testing.assert_allclose(*weights, rtol=1e-12)


@pytest.mark.parametrize("seed", [0, 5])
def test_mixtures_against_a_loop(seed: int) -> None:
    tables = random_tables(len(NAMES), seed=seed)
    both = adaptation_mixtures(PairTables(tables, IDS, NAMES), (0, 2, 4), seed)
    assert list(both) == list(INFERENCES)
    ring = sorted(range(7), key=lambda pair: hashed("adapt", seed, 0, IDS[pair]))  # anna's
    for kind, mixtures in both.items():
        assert {n: len(weights) for n, weights in mixtures.items()} == {0: 15, 2: 12, 4: 12}
        for position, pair in enumerate(ring):
            for n in (0, 2, 4):
                given = [ring[(position + step) % 7] for step in range(1, n + 1)]
                assert mixtures[n][NAMES[pair], IDS[pair]] == pytest.approx(
                    naive_weights(kind, tables, given, pair), abs=1e-12
                )


def test_circular_orders_of_a_subset() -> None:
    """The order of a subset, in any input order, is the order of all pairs without the missing ones."""
    complete = [[IDS[index] for index in order] for order in circular_orders(np.arange(40), IDS, 3)]
    shuffled = np.random.default_rng(0).permutation(40)
    for order, ids in zip(circular_orders(shuffled[:15], IDS, 3), complete, strict=True):
        subset = {IDS[index] for index in shuffled[:15]}
        assert [IDS[index] for index in order] == [name for name in ids if name in subset]
    assert complete[0] != complete[1] != complete[2]


def test_mean_score_errors_closed_form() -> None:
    """Over prompts of one pair: the error of a binomial. Over annotators of four pairs: the error of their means."""
    values, names = np.array([1.0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1]), np.repeat(["anna", "ben", "cleo"], 4)
    prompts = np.arange(len(values))
    score = mean_score(values, names, prompts)
    assert score.accuracy == pytest.approx(8 / 12)
    assert score.standard_error == pytest.approx(math.sqrt(8 / 12 * 4 / 12 / 11))
    by_prompt = {name: (values - values.mean())[prompts == name].sum() / 12 for name in np.unique(prompts)}
    assert score.of_prompts.deviations == pytest.approx({str(name): added for name, added in by_prompt.items()})
    assert score.of_prompts.shares == pytest.approx(dict.fromkeys(map(str, range(12)), 1 / 12))
    assert score.of_annotators.deviations == pytest.approx({"anna": 1 / 36, "ben": -5 / 36, "cleo": 4 / 36})
    of_both = {f"{prompt} {names[prompt]}": added for prompt, added in by_prompt.items()}
    assert score.of_both.deviations == pytest.approx(of_both)
    assert score.annotators_error == pytest.approx(np.std([0.75, 0.25, 1.0], ddof=1) / math.sqrt(3))
    assert score.by_annotator == {"anna": 0.75, "ben": 0.25, "cleo": 1.0}
    assert mean_score(values[:1], names[:1], prompts[:1]).standard_error is None
    assert mean_score(values[:4], names[:4], prompts[:4]).annotators_error is None


def test_mean_score_errors_of_biased_coins() -> None:
    """Each annotator has a biased coin. The error over pairs is too small, the error over annotators is right."""
    draw, names = np.random.default_rng(0), np.repeat(np.arange(20).astype(str), 16)
    biased = [(draw.random((20, 1)) > draw.random((20, 16))).astype(float).ravel() for _ in range(400)]
    scores = [mean_score(values, names, np.arange(len(values))) for values in biased]
    deviation = np.std([score.accuracy for score in scores])
    assert np.mean([score.annotators_error or 0 for score in scores]) == pytest.approx(deviation, rel=0.1)
    assert np.mean([score.standard_error or 0 for score in scores]) < 0.5 * deviation


def test_scores_do_not_depend_on_other_annotators() -> None:
    tables = random_tables(12, seed=4)
    alone = adaptation_scores(PairTables(tables.take(np.arange(6)), IDS, ["anna"] * 6), (2,))["exact"][2]
    values = naive_scores("exact", tables, ["anna"] * 6 + ["ben"] * 6, 2, 20, 0)
    assert alone.accuracy == pytest.approx(np.mean(values[:6]), abs=1e-12)


def test_large_losses_do_not_overflow() -> None:
    """The losses of IPO are squares: their exponentials underflow, the weights must not."""
    tables = CodeTables(np.log(np.full((8, 2), 0.5)), np.tile([900.0, 2000.0], (8, 1)), np.tile([950.0, 10.0], (8, 1)))
    scores = adaptation_scores(PairTables(tables, IDS, ["anna"] * 8), (0, 4))["exact"]
    assert [scores[0].accuracy, scores[4].accuracy] == [0, 1]
    assert code_weights(tables, ["anna"] * 8)["anna"].tolist() == [1, 0]


@pytest.mark.parametrize(
    "loss",
    [
        dpo_loss,
        partial(ConservativeLoss(0.2).pair_losses, dpo_loss),
        ipo_loss,
        partial(ipo_loss, beta=0.5),
        simpo_loss,
        kto_loss,
    ],
)
def test_single_code_agrees_with_the_margin(loss: Any) -> None:
    """Holds for any loss: exp(-l) of the two labels need not sum to 1."""
    logps = [torch.randn(200, generator=torch.Generator().manual_seed(part)).double() for part in range(4)]
    lengths = [torch.ones(200).double()] * 2
    as_labelled = loss(PairLogps(*logps, *lengths))
    swapped = loss(PairLogps(logps[1], logps[0], logps[3], logps[2], *lengths))
    tables = CodeTables(np.zeros((200, 1)), as_labelled.losses[:, None].numpy(), swapped.losses[:, None].numpy())
    rewards = as_labelled.chosen_rewards - as_labelled.rejected_rewards
    assert 0 < rewards.sign().eq(1).sum() < 200
    np.testing.assert_array_equal(correct(margins(tables.log_prior, tables)), accuracies(rewards))


def test_correct_agrees_with_the_metric() -> None:
    values = [-2.0, -1e-300, 0.0, 1e-300, 3.0, math.nan]
    np.testing.assert_array_equal(correct(np.array(values)), accuracies(torch.tensor(values, dtype=torch.float64)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shots": (1, -1)}, r"shots: found \[1, -1\], expected numbers of labelled pairs, 0 or more."),
        ({"shots": ()}, r"shots: found \[\], expected"),
        ({"rounds": 0}, "rounds: found 0, expected at least 1."),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adaptation_scores(PairTables(random_tables(3), IDS, ["anna"] * 3), **settings)
