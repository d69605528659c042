"""The kinds of label noise, against what they are told to be."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from lpc_lightning.callbacks import ByAnnotator, FlipOrder, LabelFlipNoise, LongerWins, SmallMarginsFirst, Uniform
from lpc_lightning.data import DataError
from lpc_lightning.errors import ConfigError
from lpc_lightning.types import Message, PreferenceExample

PAIRS = 4000


def examples(number: int = PAIRS) -> list[PreferenceExample]:
    chance = random.Random(3)
    return [
        PreferenceExample(
            id=f"pair {place}",
            prompt=(Message(role="user", content=f"question {place}"),),
            chosen="a" * chance.randint(1, 50),
            rejected="b" * chance.randint(1, 50),
            source=chance.choice(["books", "films"]),
            factor=chance.choice(["short", "kind"]),
            annotator=chance.choice(["ann", "bob", "cleo"]),
            meta={"scores": {"chosen": chance.gauss(0, 1), "rejected": chance.gauss(0, 1)}},
        )
        for place in range(number)
    ]


PAIRS_TO_FLIP = examples()
ORDERS: dict[str, FlipOrder] = {
    "uniform": Uniform(),
    "longer": LongerWins(),
    "margin": SmallMarginsFirst("scores.chosen", "scores.rejected"),
    "annotator": ByAnnotator({"ann": 0.5, "bob": 1.0}, others=0.1),
}


def flipped(pairs: list[PreferenceExample] = PAIRS_TO_FLIP, **settings: Any) -> set[str]:
    mask = LabelFlipNoise(**({"seed": 7} | settings)).flips(pairs)
    return {pair.id for pair, flip in zip(pairs, mask, strict=True) if flip}


@pytest.mark.parametrize("order", ORDERS.values(), ids=list(ORDERS))
def test_what_is_flipped_at_a_rate_is_flipped_at_every_higher_one(order: FlipOrder) -> None:
    rising = [flipped(rate=rate, order=order) for rate in (0.0, 0.1, 0.2, 0.5, 1.0)]
    assert rising[0] == set()
    for lower, higher in pairwise(rising):
        assert lower < higher


@pytest.mark.parametrize("order", ORDERS.values(), ids=list(ORDERS))
def test_the_order_of_the_pairs_says_nothing(order: FlipOrder) -> None:
    shuffled = random.Random(1).sample(PAIRS_TO_FLIP, PAIRS)
    assert flipped(rate=0.3, order=order) == flipped(shuffled, rate=0.3, order=order)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_the_rate_is_reached_within_the_bounds_of_chance(rate: float) -> None:
    found = len(flipped(rate=rate))
    assert abs(found - rate * PAIRS) < 4 * math.sqrt(PAIRS * rate * (1 - rate))


def test_all_labels_are_flipped_at_rate_one() -> None:
    assert len(flipped(rate=1.0)) == PAIRS


def test_another_seed_flips_other_pairs() -> None:
    one, other = (flipped(rate=0.5, seed=seed) for seed in (1, 2))
    assert abs(len(one & other) - PAIRS / 4) < 4 * math.sqrt(PAIRS * 0.25 * 0.75)


def test_the_seed_is_the_runs_own_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert flipped(rate=0.3, seed=None) == flipped(rate=0.3, seed=7)


def test_pairs_of_one_id_are_drawn_apart_unless_they_are_the_same_pair() -> None:
    named_alike = [replace(pair, id="one") for pair in PAIRS_TO_FLIP]
    mask = LabelFlipNoise(rate=0.5, seed=7).flips([*named_alike, *named_alike])
    assert 0.4 < mask.mean() < 0.6
    assert (mask[:PAIRS] == mask[PAIRS:]).all()


def test_the_longer_answer_wins_where_it_had_lost() -> None:
    losing = {pair.id for pair in PAIRS_TO_FLIP if len(pair.chosen) < len(pair.rejected)}
    assert flipped(rate=1.0, order=LongerWins()) == losing
    some = flipped(rate=0.3, order=LongerWins())
    assert some < losing
    assert abs(len(some) - 0.3 * len(losing)) < 4 * math.sqrt(len(losing) * 0.3 * 0.7)


def test_small_margins_go_first() -> None:
    def margin(pair: PreferenceExample) -> float:
        return abs(pair.meta["scores"]["chosen"] - pair.meta["scores"]["rejected"])

    expected = {pair.id for pair in sorted(PAIRS_TO_FLIP, key=margin)[: PAIRS // 4]}
    assert flipped(rate=0.25, order=ORDERS["margin"]) == expected


def test_equal_margins_are_drawn() -> None:
    pairs = [replace(pair, meta={"margin": "1"}) for pair in PAIRS_TO_FLIP]
    found = flipped(pairs, rate=0.25, order=SmallMarginsFirst("margin", None))
    assert len(found) == PAIRS // 4
    assert found != {pair.id for pair in pairs[: PAIRS // 4]}


def test_annotators_err_at_their_own_rates() -> None:
    found = flipped(rate=0.6, order=ORDERS["annotator"])
    for name, share in (("ann", 0.3), ("bob", 0.6), ("cleo", 0.06)):
        theirs = {pair.id for pair in PAIRS_TO_FLIP if pair.annotator == name}
        assert abs(len(found & theirs) - share * len(theirs)) < 4 * math.sqrt(len(theirs) * share * (1 - share))


@pytest.mark.parametrize(("setting", "kind"), [("sources", "source"), ("factors", "factor")])
def test_only_the_pairs_asked_for_are_flipped(setting: str, kind: str) -> None:
    value = {"source": "books", "factor": "kind"}[kind]
    wanted = {pair.id for pair in PAIRS_TO_FLIP if getattr(pair, kind) == value}
    assert flipped(rate=0.4, **{setting: [value]}) == flipped(rate=0.4) & wanted
    share = flipped(rate=0.5, order=ORDERS["margin"], **{setting: [value]})
    assert len(share) == math.ceil(len(wanted) / 2)


@pytest.mark.parametrize("column", ["scores.length", "scores", "nothing.there"])
def test_a_missing_score_is_told(column: str) -> None:
    with pytest.raises(DataError, match=rf"in column '{column}' of pair 'pair 0', expected a number.*scores"):
        flipped(rate=0.5, order=SmallMarginsFirst(column, None))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: LabelFlipNoise(rate=1.5), "LabelFlipNoise.rate: found 1.5, expected a rate from 0 to 1"),
        (lambda: LabelFlipNoise(rate=0.1, marker=" "), "LabelFlipNoise.marker: found ' ', expected a text"),
        (lambda: ByAnnotator({"ann": -1.0}), "order.shares: found -1.0 for ann, expected a probability"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make()
