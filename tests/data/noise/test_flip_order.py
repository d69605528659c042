"""Tests of the kinds of label noise, against their definitions."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from jsonargparse import ArgumentParser

from lpc_lightning.callbacks import LabelFlipNoise
from lpc_lightning.data import DataError
from lpc_lightning.data.noise import (
    ByAnnotator,
    FlipOrder,
    LongerWins,
    SmallMarginsFirst,
    Uniform,
    UnreliableAnnotators,
)
from lpc_lightning.errors import ConfigError
from lpc_lightning.types import Message, PreferenceExample

PAIRS = 4000


def examples(number: int = PAIRS) -> list[PreferenceExample]:
    generator = random.Random(3)
    return [
        PreferenceExample(
            id=f"pair {index}",
            prompt=(Message(role="user", content=f"question {index}"),),
            chosen="a" * generator.randint(1, 50),
            rejected="b" * generator.randint(1, 50),
            source=generator.choice(["books", "films"]),
            factor=generator.choice(["short", "kind"]),
            annotator=generator.choice(["ann", "bob", "cleo"]),
            meta={"scores": {"chosen": generator.gauss(0, 1), "rejected": generator.gauss(0, 1)}},
        )
        for index in range(number)
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


@pytest.mark.parametrize("order", [Uniform(), UnreliableAnnotators()])
def test_noise_of_numpy_numbers(order: FlipOrder) -> None:
    """As in a loop over `np.linspace`: the flips and the record are those of numbers of Python."""
    noise = LabelFlipNoise(rate=np.float32(0.5), order=order, seed=np.int64(7))  # type: ignore[arg-type]
    assert noise.flips(PAIRS_TO_FLIP).tolist() == LabelFlipNoise(0.5, order, seed=7).flips(PAIRS_TO_FLIP).tolist()
    assert json.dumps([noise.key(), noise.rate, noise.seed]) == json.dumps([noise.key(), 0.5, 7])


@pytest.mark.parametrize("order", ORDERS.values(), ids=list(ORDERS))
def test_flips_grow_with_the_rate(order: FlipOrder) -> None:
    rising = [flipped(rate=rate, order=order) for rate in (0.0, 0.1, 0.2, 0.5, 1.0)]
    assert rising[0] == set()
    for lower, higher in pairwise(rising):
        assert lower < higher


@pytest.mark.parametrize("order", ORDERS.values(), ids=list(ORDERS))
def test_flips_do_not_depend_on_input_order(order: FlipOrder) -> None:
    shuffled = random.Random(1).sample(PAIRS_TO_FLIP, PAIRS)
    assert flipped(rate=0.3, order=order) == flipped(shuffled, rate=0.3, order=order)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_uniform_reaches_the_rate(rate: float) -> None:
    count = len(flipped(rate=rate))
    assert abs(count - rate * PAIRS) < 4 * math.sqrt(PAIRS * rate * (1 - rate))


def test_uniform_at_rate_one() -> None:
    assert len(flipped(rate=1.0)) == PAIRS


def test_flips_depend_on_the_seed() -> None:
    one, other = (flipped(rate=0.5, seed=seed) for seed in (1, 2))
    assert abs(len(one & other) - PAIRS / 4) < 4 * math.sqrt(PAIRS * 0.25 * 0.75)


def test_default_seed_is_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert flipped(rate=0.3, seed=None) == flipped(rate=0.3, seed=7)


def test_flips_of_pairs_with_the_same_id() -> None:
    same_id = [replace(pair, id="one") for pair in PAIRS_TO_FLIP]
    mask = LabelFlipNoise(rate=0.5, seed=7).flips([*same_id, *same_id])
    assert 0.4 < mask.mean() < 0.6
    assert (mask[:PAIRS] == mask[PAIRS:]).all()


def test_longer_wins() -> None:
    losing = {pair.id for pair in PAIRS_TO_FLIP if len(pair.chosen) < len(pair.rejected)}
    assert flipped(rate=1.0, order=LongerWins()) == losing
    subset = flipped(rate=0.3, order=LongerWins())
    assert subset < losing
    assert abs(len(subset) - 0.3 * len(losing)) < 4 * math.sqrt(len(losing) * 0.3 * 0.7)


def test_small_margins_first() -> None:
    def margin(pair: PreferenceExample) -> float:
        return abs(pair.meta["scores"]["chosen"] - pair.meta["scores"]["rejected"])

    expected = {pair.id for pair in sorted(PAIRS_TO_FLIP, key=margin)[: PAIRS // 4]}
    assert flipped(rate=0.25, order=ORDERS["margin"]) == expected


def test_equal_margins_are_random() -> None:
    pairs = [replace(pair, meta={"margin": "1"}) for pair in PAIRS_TO_FLIP]
    result = flipped(pairs, rate=0.25, order=SmallMarginsFirst("margin", None))
    assert len(result) == PAIRS // 4
    assert result != {pair.id for pair in pairs[: PAIRS // 4]}


def test_by_annotator() -> None:
    result = flipped(rate=0.6, order=ORDERS["annotator"])
    for name, share in (("ann", 0.3), ("bob", 0.6), ("cleo", 0.06)):
        members = {pair.id for pair in PAIRS_TO_FLIP if pair.annotator == name}
        assert abs(len(result & members) - share * len(members)) < 4 * math.sqrt(len(members) * share * (1 - share))


def test_by_annotator_of_numbers() -> None:
    """YAML and the command line read the names of numbered annotators as numbers; cells are texts."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(FlipOrder, "order")
    stated = {"class_path": "lpc_lightning.data.noise.ByAnnotator", "init_args": {"shares": {7: 1.0}}}
    order = parser.instantiate(parser.parse_object({"order": stated})).order
    pairs = [replace(pair, annotator=str(number % 8)) for number, pair in enumerate(PAIRS_TO_FLIP)]
    assert flipped(pairs, rate=1.0, order=order) == {pair.id for pair in pairs if pair.annotator == "7"}


@pytest.mark.parametrize(("setting", "label"), [("sources", "source"), ("factors", "factor")])
def test_flips_only_selected_pairs(setting: str, label: str) -> None:
    value = {"source": "books", "factor": "kind"}[label]
    selected = {pair.id for pair in PAIRS_TO_FLIP if getattr(pair, label) == value}
    assert flipped(rate=0.4, **{setting: [value]}) == flipped(rate=0.4) & selected
    share = flipped(rate=0.5, order=ORDERS["margin"], **{setting: [value]})
    assert len(share) == math.ceil(len(selected) / 2)


@pytest.mark.parametrize("column", ["scores.length", "scores", "nothing.there"])
def test_small_margins_missing_score(column: str) -> None:
    with pytest.raises(DataError, match=rf"in column '{column}' of pair 'pair 0', expected a finite number.*scores"):
        flipped(rate=0.5, order=SmallMarginsFirst(column, None))


@pytest.mark.parametrize("score", [math.nan, "nan", math.inf, "-inf", ""])
def test_small_margins_score_is_not_finite(score: float | str) -> None:
    pairs = [replace(PAIRS_TO_FLIP[0], meta={"margin": value}) for value in (1.0, score)]
    with pytest.raises(
        DataError, match=rf"found {score!r} in column 'margin' of pair 'pair 0', expected a finite number"
    ):
        flipped(pairs, rate=0.5, order=SmallMarginsFirst("margin", None))


def test_small_margins_score_is_too_long() -> None:
    pairs = [replace(PAIRS_TO_FLIP[0], meta={"margin": 10**400})]
    with pytest.raises(DataError, match=f"found 1{39 * '0'} in column 'margin' of pair 'pair 0', expected a finite n"):
        flipped(pairs, rate=0.5, order=SmallMarginsFirst("margin", None))


def test_small_margins_of_a_flattened_table() -> None:
    """Columns named `scores.chosen` and `scores.rejected` count like entries of the column `scores`."""
    flat = [
        replace(pair, meta={f"scores.{side}": str(score) for side, score in pair.meta["scores"].items()})
        for pair in PAIRS_TO_FLIP
    ]
    assert flipped(flat, rate=0.25, order=ORDERS["margin"]) == flipped(rate=0.25, order=ORDERS["margin"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LabelFlipNoise(rate=1.5), "LabelFlipNoise.rate: found 1.5, expected a share from 0 to 1"),
        (lambda: LabelFlipNoise(rate=0.1, marker=" "), "LabelFlipNoise.marker: found ' ', expected a text"),
        (lambda: UnreliableAnnotators(1.5), "order.wrong: found 1.5, expected a probability"),
        (lambda: ByAnnotator({"ann": -1.0}), "order.shares: found -1.0 for ann, expected a probability"),
    ],
)
def test_settings_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_unreliable_annotators_are_whole_annotators() -> None:
    """Ten annotators have 40 pairs each. A quarter of the annotators, rounded up, has random or opposite labels."""
    pairs = [
        replace(pair, id=f"{index % 10}-{index}", annotator=f"worker {index % 10}")
        for index, pair in enumerate(PAIRS_TO_FLIP[:400])
    ]
    pairs.append(replace(pairs[0], id="without-annotator", annotator=""))
    wrong = {share: flipped(pairs, rate=0.25, order=UnreliableAnnotators(share)) for share in (0.0, 0.5, 1.0)}
    who = {share: {name.split("-")[0] for name in names} for share, names in wrong.items()}
    assert not wrong[0.0]
    assert len(who[1.0]) == 3
    assert len(wrong[1.0]) == 120
    assert who[0.5] == who[1.0]
    assert 40 < len(wrong[0.5]) < 80
    assert flipped(pairs, rate=0.5, order=UnreliableAnnotators(1.0)) > wrong[1.0]
    assert len(flipped(pairs, rate=1.0, order=UnreliableAnnotators(1.0))) == 400
    others = {frozenset(flipped(pairs, rate=0.25, seed=seed, order=UnreliableAnnotators(1.0))) for seed in range(6)}
    assert len(others) > 1


def test_unreliable_annotators_need_annotators() -> None:
    with pytest.raises(DataError, match=r"found no annotator in 1 training pairs, expected a column `annotator`"):
        flipped([replace(PAIRS_TO_FLIP[0], annotator="")], rate=0.25, order=UnreliableAnnotators())
