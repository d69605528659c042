"""Tests of the exact accuracies against brute force, manual derivations and simulated pairs."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import product
from random import Random

import pytest

from lpc_lightning.data.synthetic import PreferenceGenerator
from lpc_lightning.data.synthetic.attributes import ATTRIBUTES, attribute_of, opposite
from lpc_lightning.data.synthetic.truth import bayes_accuracy

NAMES = list(ATTRIBUTES)
MIXED = ["short", "long", "formal", "list"]


def simulate(factor: str, rng: Random) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Draw the chosen and the rejected style by rejection sampling: random values until the pair is valid."""
    while True:
        chosen = tuple(rng.choice(values) for values in ATTRIBUTES.values())
        rejected = tuple(rng.choice(values) for values in ATTRIBUTES.values())
        differs = sum(a != b for a, b in zip(chosen, rejected, strict=True))
        if factor in chosen and factor not in rejected and differs >= 2:
            return chosen, rejected


def brute_force(factors: list[str]) -> Fraction:
    """Compute the Bayes accuracy by its definition, over all 2^14 ordered pairs of styles."""
    everything = list(product(*ATTRIBUTES.values()))
    weights: dict[tuple[tuple[str, ...], tuple[str, ...]], Fraction] = {}
    for factor in factors:
        legal = [
            (a, b)
            for a in everything
            if factor in a
            for b in everything
            if factor not in b and sum(x != y for x, y in zip(a, b, strict=True)) >= 2
        ]
        for pair in legal:
            weights[pair] = weights.get(pair, Fraction(0)) + Fraction(1, len(legal) * len(factors))
    # The predictor gets the two answers in random order and predicts the more probable one.
    total = Fraction(0)
    for (a, b), weight in weights.items():
        other = weights.get((b, a), Fraction(0))
        if weight > other or (weight == other and a < b):
            total += weight
    return total


def test_bayes_accuracy_one_or_two_opposed_factors() -> None:
    assert bayes_accuracy(["casual"]) == 1
    assert bayes_accuracy(["casual", "formal"]) == Fraction(1, 2)


def test_two_attributes_by_hand() -> None:
    # Whichever decides, the other one differs in 32 of the 63 sets. Then the two agree half of the time, and the best
    # guess is right always; else half of the time. In the other 31 sets the pair itself shows which one decided.
    assert bayes_accuracy(["short", "formal"]) == Fraction(31, 63) + Fraction(32, 63) * Fraction(3, 4)


def test_default_mixture_by_hand() -> None:
    # Both directions of A, one of B, one of C; four free attributes, so 16 sets D for each choice among A, B and C
    # and 15 where one of them is alone, as a lone difference is no pair. Expected votes of the majority:
    # A 1, B 1, C 1, AB 2 (A is split), AC 2, BC (2 + 1) / 2, ABC (3 + 2) / 2. Over 4 votes in 63 sets.
    majority = 15 * (1 + 1 + 1) + 16 * (2 + 2) + 16 * Fraction(3, 2) + 16 * Fraction(5, 2)
    assert bayes_accuracy(MIXED) == majority / (4 * 63) == Fraction(173, 252)


@pytest.mark.parametrize(
    "factors", [MIXED, ["short", "short", "formal"], ["warm", "neutral", "hedged"], ["short", "formal", "list", "warm"]]
)
def test_equals_brute_force(factors: list[str]) -> None:
    assert bayes_accuracy(factors) == brute_force(factors)


def test_bayes_accuracy_bounds_fitted_predictor() -> None:
    rng = Random(11)
    counts: Counter[tuple[tuple[str, ...], tuple[str, ...]]] = Counter()
    n = 20_000
    # Only attributes with a factor are used. The others are noise in the table.
    wanted = sorted({NAMES.index(attribute_of(factor)) for factor in MIXED})
    for _ in range(n):
        chosen, rejected = simulate(rng.choice(MIXED), rng)
        counts[tuple(chosen[i] for i in wanted), tuple(rejected[i] for i in wanted)] += 1
    seen = {frozenset(pair) for pair in counts}
    hits = sum(max(counts[tuple(pair)], counts[tuple(pair)[::-1]]) for pair in map(tuple, seen))  # type: ignore[index]
    exact = float(bayes_accuracy(MIXED))
    sigma = (exact * (1 - exact) / n) ** 0.5
    # A table that is fitted to the same pairs is slightly optimistic, so the upper tolerance is larger.
    assert -4 * sigma < hits / n - exact < 4 * sigma + 0.01


@pytest.mark.parametrize("annotators", [2, 3, 5, 8])
def test_generated_pairs_match_stated_accuracy(annotators: int) -> None:
    generator = PreferenceGenerator("hidden", annotators=annotators, seed=4)
    votes = Counter(generator.truth.annotator_factors.values())
    rng = Random(0)
    n = 5000
    right = 0
    for pair in generator.examples(n, split="validation"):
        answers = [pair.meta["chosen_style"], pair.meta["rejected_style"]]
        first = rng.randrange(2)
        ours, theirs = answers[first], answers[1 - first]
        margin = sum(
            count * ((ours[attribute_of(factor)] == factor) - (theirs[attribute_of(factor)] == factor))
            for factor, count in votes.items()
        )
        guess = first if margin > 0 or (margin == 0 and rng.random() < 0.5) else 1 - first
        right += guess == 0
    best = generator.truth.best_accuracy
    assert abs(right / n - best) < 4 * (best * (1 - best) / n) ** 0.5
    if annotators == 8:
        assert best == pytest.approx(173 / 252)


def test_bad_factors() -> None:
    with pytest.raises(ValueError, match="factors: found none"):
        bayes_accuracy([])
    with pytest.raises(ValueError, match=r"factor: found 'loud', expected one of short"):
        bayes_accuracy(["loud"])
    assert opposite("hedged") == "direct"
    assert opposite("direct") == "hedged"
