"""Few-shot arithmetic against naive loops, closed forms and what must not change."""

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
from lpc_lightning.evaluation.adaptation.scores import adaptation_mixtures, adaptation_scores, circles, mean_score
from lpc_lightning.losses import dpo_loss, ipo_loss, simpo_loss
from lpc_lightning.types import PairLogps

NAMES = ["anna"] * 7 + ["ben"] * 5 + ["cleo"] * 2 + ["dora"]
IDS = [f"pair {number}" for number in range(40)]


def random_tables(pairs: int, codes: int = 3, seed: int = 0) -> CodeTables:
    """Losses of a DPO under codes that differ, and priors and posteriors of each pair's own."""
    draw = np.random.default_rng(seed)
    margin = draw.normal(0, 2, (pairs, codes))
    logs = [np.log(draw.dirichlet(np.ones(codes), pairs)) for _ in range(2)]
    return CodeTables(logs[0], np.log1p(np.exp(-margin)), np.log1p(np.exp(margin)), logs[1])


def naive_weights(kind: str, tables: CodeTables, given: Sequence[int], new: int) -> list[float]:
    """One code after another, in probabilities."""
    prior = [math.exp(value) for value in tables.log_prior[new]]
    if kind == "amortised":
        assert tables.log_posterior is not None
        rows = [[math.exp(value) for value in tables.log_posterior[pair]] for pair in given]
        return [sum(row[code] for row in rows) / len(rows) for code in range(len(prior))] if rows else prior
    joint = []
    for code, start in enumerate(prior):
        for pair in given:
            start *= math.exp(-tables.losses[pair, code])
        joint.append(start)
    return [value / sum(joint) for value in joint]


def naive_right(kind: str, tables: CodeTables, given: Sequence[int], new: int) -> float:
    weights = naive_weights(kind, tables, given, new)
    labelled = sum(w * math.exp(-loss) for w, loss in zip(weights, tables.losses[new], strict=True))
    otherwise = sum(w * math.exp(-loss) for w, loss in zip(weights, tables.swapped[new], strict=True))
    return 1.0 if labelled > otherwise else 0.0 if labelled < otherwise else 0.5


def hashed(*parts: object) -> int:
    """The leading 63 bits of SHA-256 over the parts with strokes between."""
    return int(hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:16], 16) // 2


def naive_scores(kind: str, tables: CodeTables, names: Sequence[str], n: int, rounds: int, seed: int) -> list[float]:
    """Each pair's mean over the rounds; pairs of annotators with too few are left out."""
    found = []
    for name in sorted(set(names)):
        members = [place for place, each in enumerate(names) if each == name]
        if len(members) <= n:
            continue
        right = dict.fromkeys(members, 0.0)
        for turn in range(rounds):
            ring = sorted(members, key=lambda pair: hashed("adapt", seed, turn, IDS[pair]))
            for place, pair in enumerate(ring):
                given = [ring[(place + step) % len(ring)] for step in range(1, n + 1)]
                assert pair not in given
                assert len(set(given)) == n
                right[pair] += naive_right(kind, tables, given, pair) / rounds
        found += right.values()
    return found


def naive_means(values: Sequence[float], n: int) -> dict[str, float]:
    """Of the values of those annotators who have more than n pairs."""
    members = [name for name in NAMES if NAMES.count(name) > n]
    return {name: np.mean([value for value, each in zip(values, members, strict=True) if each == name]).item()
            for name in members}  # fmt: skip


@pytest.mark.parametrize("kind", list(INFERENCES))
@pytest.mark.parametrize("seed", [0, 5])
def test_against_a_loop(kind: str, seed: int) -> None:
    tables, shots = random_tables(len(NAMES), seed=seed), (0, 1, 2, 4, 8)
    found = adaptation_scores(tables, IDS, NAMES, shots, rounds=3, seed=seed)[kind]
    assert list(found) == [0, 1, 2, 4], "nobody has more than 8 pairs"
    for n, score in found.items():
        values = naive_scores(kind, tables, NAMES, n, 3, seed)
        assert score.pairs == len(values) == {0: 15, 1: 14, 2: 12, 4: 12}[n]
        assert score.accuracy == pytest.approx(np.mean(values), abs=1e-12)
        assert score.standard_error == pytest.approx(np.std(values, ddof=1) / len(values) ** 0.5, abs=1e-12)
        assert score.by_annotator == pytest.approx(naive_means(values, n), abs=1e-12)


@pytest.mark.parametrize("kind", list(INFERENCES))
def test_none_given_is_the_prior_to_the_bit(kind: str) -> None:
    tables = random_tables(len(NAMES), seed=3)
    for rounds in (1, 7, 20):
        score = adaptation_scores(tables, IDS, NAMES, (0, 3), rounds)[kind][0]
        assert score == mean_score(correct(margins(tables.log_prior, tables)), np.array(NAMES))


def even_tables(right: Sequence[Sequence[float]], wrong: Sequence[Sequence[float]]) -> CodeTables:
    """Pairs whose labels have these probabilities under each code, and an even prior."""
    shares = np.array(right)
    return CodeTables(np.full(shares.shape, -math.log(shares.shape[1])), -np.log(shares), -np.log(np.array(wrong)))


def test_a_posterior_in_closed_form() -> None:
    """Two codes that say 0.8 and 0.2 of every label: n pairs weigh them 4^n to 1."""
    tables = even_tables([[0.8, 0.2]] * 6, [[0.2, 0.8]] * 6)
    (weights,) = code_weights(tables, ["anna"] * 6).values()
    assert weights == pytest.approx([4**6 / (4**6 + 1), 1 / (4**6 + 1)], rel=1e-12)
    scores = adaptation_scores(tables, IDS, ["anna"] * 6, (0, 1, 5))["exact"]
    # Even codes say nothing; one label is enough for all others.
    assert [scores[n].accuracy for n in (0, 1, 5)] == pytest.approx([0.5, 1, 1])
    assert scores[1].standard_error == pytest.approx(0)


def test_weights_are_the_mean_prior_times_the_evidence_of_all_pairs() -> None:
    tables = random_tables(len(NAMES), seed=6)
    for name, weights in code_weights(tables, NAMES).items():
        rows = [row for row, each in enumerate(NAMES) if each == name]
        joint = [
            sum(math.exp(tables.log_prior[row, code]) for row in rows)
            * math.prod(math.exp(-tables.losses[row, code]) for row in rows)
            for code in range(3)
        ]
        assert weights == pytest.approx([value / sum(joint) for value in joint], rel=1e-9)


def test_opposite_annotators_are_told_apart_and_the_prior_cannot() -> None:
    """One half's labels are what code 0 likes, the other half's what code 1 likes; code 2 takes no sides."""
    anna, ben = [0.9, 0.1, 0.5], [0.1, 0.9, 0.5]
    tables = even_tables([anna] * 20 + [ben] * 20, [ben] * 20 + [anna] * 20)
    names = ["anna"] * 20 + ["ben"] * 20
    scores = adaptation_scores(tables, IDS, names, (0, 1, 16))
    assert [scores["exact"][n].accuracy for n in (0, 1, 16)] == pytest.approx([0.5, 1, 1])
    assert list(scores) == ["exact"], "no posterior was learned"
    weights = code_weights(tables, names)
    assert [int(weights[name].argmax()) for name in ("anna", "ben")] == [0, 1]
    # Taken for one annotator, they cancel out: code 2 explains them best.
    assert int(code_weights(tables, ["both"] * 40)["both"].argmax()) == 2


def test_a_prior_that_sees_the_prompt_is_that_of_the_new_pair() -> None:
    """What is given rules out a code; between the other two the new pair's own prior decides."""
    right = np.array([[0.9, 0.9, 0.01], [0.2, 0.9, 0.01], [0.9, 0.2, 0.01]])
    prior = np.array([[1 / 3, 1 / 3, 1 / 3], [0.01, 0.9, 0.09], [0.9, 0.01, 0.09]])
    tables = CodeTables(np.log(prior), -np.log(right), -np.log(1 - right))
    evidence = -tables.losses[[0, 0]]
    found = margins(INFERENCES["exact"].weights(tables.log_prior[1:], evidence), tables.take(np.array([1, 2])))
    assert (found > 0).all()
    swapped = margins(INFERENCES["exact"].weights(tables.log_prior[[2, 1]], evidence), tables.take(np.array([1, 2])))
    assert (swapped < 0).all()


@pytest.mark.parametrize("kind", list(INFERENCES))
def test_the_order_of_what_is_given_does_not_matter(kind: str) -> None:
    tables, inference = random_tables(6, seed=2), INFERENCES[kind]
    said = inference.says(tables)
    assert said is not None
    weights = [
        inference.weights(tables.log_prior[:1], inference.join.reduce(said[order])[None])
        for order in ([1, 2, 3, 4], [4, 2, 1, 3])
    ]
    np.testing.assert_allclose(*weights, rtol=1e-12)


@pytest.mark.parametrize("seed", [0, 5])
def test_mixtures_are_those_of_the_first_round(seed: int) -> None:
    tables = random_tables(len(NAMES), seed=seed)
    found = adaptation_mixtures(tables, IDS, NAMES, (0, 2, 4), seed)
    assert {n: len(each) for n, each in found.items()} == {0: 15, 2: 12, 4: 12}
    ring = sorted(range(7), key=lambda pair: hashed("adapt", seed, 0, IDS[pair]))  # anna's
    for place, pair in enumerate(ring):
        for n in (0, 2, 4):
            given = [ring[(place + step) % 7] for step in range(1, n + 1)]
            assert found[n][IDS[pair]] == pytest.approx(naive_weights("exact", tables, given, pair), abs=1e-12)


def test_the_circles_of_some_pairs_are_those_of_more() -> None:
    """Leaving pairs out, or reading them in another order, closes gaps and changes nothing else."""
    every = [[IDS[place] for place in circle] for circle in circles(np.arange(40), IDS, 3)]
    shuffled = np.random.default_rng(0).permutation(40)
    for circle, whole in zip(circles(shuffled[:15], IDS, 3), every, strict=True):
        some = {IDS[place] for place in shuffled[:15]}
        assert [IDS[place] for place in circle] == [name for name in whole if name in some]
    assert every[0] != every[1] != every[2]


def test_errors_in_closed_form() -> None:
    """Over pairs that of coins; over annotators with as many pairs each, that of their means."""
    values, names = np.array([1.0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1]), np.repeat(["anna", "ben", "cleo"], 4)
    score = mean_score(values, names)
    assert score.accuracy == pytest.approx(8 / 12)
    assert score.standard_error == pytest.approx(math.sqrt(8 / 12 * 4 / 12 / 11))
    assert score.annotators_error == pytest.approx(np.std([0.75, 0.25, 1.0], ddof=1) / math.sqrt(3))
    assert score.by_annotator == {"anna": 0.75, "ben": 0.25, "cleo": 1.0}
    assert mean_score(values[:1], names[:1]).standard_error is None
    assert mean_score(values[:4], names[:4]).annotators_error is None


def test_each_error_is_what_samples_vary_by() -> None:
    """Coins of annotators who have a coin each: over pairs it is too small, over annotators it is right."""
    draw, names = np.random.default_rng(0), np.repeat(np.arange(20).astype(str), 16)
    biased = [(draw.random((20, 1)) > draw.random((20, 16))).astype(float).ravel() for _ in range(400)]
    found = [mean_score(values, names) for values in biased]
    spread = np.std([each.accuracy for each in found])
    assert np.mean([each.annotators_error or 0 for each in found]) == pytest.approx(spread, rel=0.1)
    assert np.mean([each.standard_error or 0 for each in found]) < 0.5 * spread


def test_an_annotator_is_scored_alike_whoever_else_there_is() -> None:
    tables = random_tables(12, seed=4)
    alone = adaptation_scores(tables.take(np.arange(6)), IDS, ["anna"] * 6, (2,))["exact"][2]
    values = naive_scores("exact", tables, ["anna"] * 6 + ["ben"] * 6, 2, 20, 0)
    assert alone.accuracy == pytest.approx(np.mean(values[:6]), abs=1e-12)


def test_losses_far_from_zero_do_not_overflow() -> None:
    """IPO's losses are squares: their exponentials vanish, and their weights do not."""
    tables = CodeTables(np.log(np.full((8, 2), 0.5)), np.tile([900.0, 2000.0], (8, 1)), np.tile([950.0, 10.0], (8, 1)))
    scores = adaptation_scores(tables, IDS, ["anna"] * 8, (0, 4))["exact"]
    assert [scores[0].accuracy, scores[4].accuracy] == [0, 1]
    assert code_weights(tables, ["anna"] * 8)["anna"].tolist() == [1, 0]


@pytest.mark.parametrize(
    "loss", [dpo_loss, partial(dpo_loss, label_smoothing=0.2), ipo_loss, partial(ipo_loss, beta=0.5), simpo_loss]
)
def test_a_single_code_is_right_where_its_margin_is(loss: Any) -> None:
    """Whatever the loss: exp(-l) of the two labels need not add up to 1 to be compared."""
    logps = [torch.randn(200, generator=torch.Generator().manual_seed(part)).double() for part in range(4)]
    lengths = [torch.ones(200).double()] * 2
    as_labelled = loss(PairLogps(*logps, *lengths))
    swapped = loss(PairLogps(logps[1], logps[0], logps[3], logps[2], *lengths))
    tables = CodeTables(np.zeros((200, 1)), as_labelled.losses[:, None].numpy(), swapped.losses[:, None].numpy())
    rewards = as_labelled.chosen_rewards - as_labelled.rejected_rewards
    assert 0 < rewards.sign().eq(1).sum() < 200
    np.testing.assert_array_equal(correct(margins(tables.log_prior, tables)), accuracies(rewards))


def test_what_is_right_is_what_the_suite_calls_right() -> None:
    values = [-2.0, -1e-300, 0.0, 1e-300, 3.0, math.nan]
    np.testing.assert_array_equal(correct(np.array(values)), accuracies(torch.tensor(values, dtype=torch.float64)))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"shots": (1, -1)}, r"shots: found \[1, -1\], expected numbers of labelled pairs, 0 or more."),
        ({"shots": ()}, r"shots: found \[\], expected"),
        ({"rounds": 0}, "rounds: found 0, expected at least 1."),
    ],
)
def test_settings_that_mean_nothing(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        adaptation_scores(random_tables(3), IDS, ["anna"] * 3, **settings)
