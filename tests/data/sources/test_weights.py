"""Tests of weights and margins from the cells of rows, through the tokens, to batches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lpc_lightning.callbacks import LabelFlipNoise
from lpc_lightning.data import Columns, DataError, MixtureSource, PreferenceData, PreferenceMixture
from lpc_lightning.data.batching.layouts import PaddedLayout
from lpc_lightning.data.sources.formats import to_example
from lpc_lightning.data.sources.rows import BadRow
from lpc_lightning.policy import TinyPolicy

SCORES = {"score_chosen": "good", "score_rejected": "bad"}


def row(number: int = 0, **cells: Any) -> dict[str, Any]:
    return {"prompt": f"Question {number}?", "chosen": f"Good {number}.", "rejected": f"Bad {number}."} | cells


def load(path: Path, tmp_path: Path, **settings: Any) -> tuple[PreferenceData, Any]:
    data = PreferenceData(str(path), validation_share=0.0, cache_dir=str(tmp_path / "cache"), **settings)
    return data, data.load("train", TinyPolicy(width=16, layers=1, heads=2).load_tokenizer())


@pytest.mark.parametrize(
    ("cells", "columns", "weight", "margin"),
    [
        ({}, {}, None, None),
        ({"weight": 2, "margin": -0.5}, {}, 2.0, -0.5),
        ({"weight": "0", "margin": "1e-1"}, {}, 0.0, 0.1),  # cells of a CSV file
        ({"weight": None, "margin": ""}, {}, None, None),
        ({"weight": "heavy", "margin": "none"}, {"weight": None, "margin": None}, None, None),
        ({"w": 3.5}, {"weight": "w"}, 3.5, None),
        ({"good": 7, "bad": 4.5}, SCORES, None, math.log(2.5)),
        ({"good": 7, "bad": 6.5}, SCORES | {"margin_alpha": 0.5}, None, 0.5 * math.log(0.5)),
        ({"good": 7, "bad": 9, "margin": 4}, SCORES | {"margin_scale": "difference"}, None, -2.0),
    ],
    ids=str,
)
def test_weight_and_margin_of_a_row(cells: Any, columns: Any, weight: float | None, margin: float | None) -> None:
    example = to_example(row(**cells), "pairs.jsonl line 1", Columns(**columns))
    assert example.weight == weight
    assert example.margin == (None if margin is None else pytest.approx(margin, rel=1e-15))


def test_numbers_stay_in_meta() -> None:
    """Label noise can read them, too."""
    cells = {"weight": 2, "margin": 1, "good": 3, "bad": 1}
    assert to_example(row(**cells), "line", Columns(**SCORES)).meta == cells


@pytest.mark.parametrize(
    ("cells", "columns", "message"),
    [
        ({"weight": -1}, {}, r"invalid weight: found -1 in 'weight', expected at least 0"),
        ({"weight": math.nan}, {}, r"invalid weight: found 'nan' in 'weight', expected a finite number"),
        ({"weight": True}, {}, r"invalid weight: found 'True' in 'weight'"),
        ({"margin": "wide"}, {}, r"invalid margin: found 'wide' in 'margin', expected a finite number"),
        ({"margin": [1]}, {}, r"invalid margin: found '\[1\]' in 'margin'"),
        ({"good": 1}, SCORES, r"invalid score: found none in 'bad', expected a number"),
        ({"good": 1, "bad": math.inf}, SCORES, r"invalid score: found 'inf' in 'bad'"),
        (
            {"chosen": None, "output_1": "a", "output_2": "b", "preference": 2, "good": 3, "bad": 1},
            SCORES | {"margin_scale": "difference"},
            r"ambiguous columns: found answers output_1 and output_2, ordered by preference, and data\.columns\.score",
        ),
        ({"good": 1, "bad": 1}, SCORES, r"invalid score: found 1 in 'good' and 1 in 'bad', expected a higher score"),
    ],
    ids=str,
)
def test_invalid_numbers(cells: Any, columns: Any, message: str) -> None:
    with pytest.raises(BadRow, match=message):
        to_example(row(**cells), "line", Columns(**columns))


def test_invalid_number_names_file_row_and_column(write_rows: Any, tmp_path: Path) -> None:
    path = write_rows([row(0, weight=1), row(1, weight=-2)])
    with pytest.raises(DataError, match=r"invalid weight: pairs\.jsonl line 2 \(found -2 in 'weight'"):
        load(path, tmp_path)


def test_invalid_long_numbers() -> None:
    """A float holds neither 10^400 nor the difference of these scores."""
    for cells, message in (
        ({"weight": 10**400}, f"invalid weight: found '1{39 * '0'}' in 'weight', expected a finite number"),
        ({"margin": -(10**400)}, f"invalid margin: found '-1{38 * '0'}' in 'margin'"),
        ({"good": 10**400, "bad": 1}, f"invalid score: found '1{39 * '0'}' in 'good'"),
        (
            {"good": 1e308, "bad": -1e308},
            r"invalid score: found 1e\+308 in 'good' and -1e\+308 in 'bad', expected scores with a finite margin",
        ),
        ({"good": 1e307, "bad": 0}, "invalid score: .* expected scores with a finite margin"),
    ):
        scaled = SCORES | {"margin_scale": "difference", "margin_alpha": 1e10}
        with pytest.raises(BadRow, match=message):
            to_example(row(**cells), "line", Columns(**(scaled if "good" in cells else {})))  # type: ignore[arg-type]
    with pytest.raises(BadRow, match="expected scores with a finite margin"):
        to_example(row(good=1e308, bad=-1e308), "line", Columns(**SCORES))


def test_long_integers_are_skipped(write_rows: Any, tmp_path: Path) -> None:
    data, pairs = load(write_rows([row(0), row(1, weight=10**400)]), tmp_path, bad_rows="skip")
    assert len(pairs) == 1
    assert data.reports["train"].bad == {"invalid weight": 1}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"score_chosen": "good"}, "found score_chosen='good' and score_rejected=None, expected both or neither"),
        (SCORES | {"vote": "meta.vote"}, "found score_chosen together with a label or a vote"),
        ({"margin_alpha": 0.5}, r"columns: found margin_alpha=0\.5 and .* without columns\.score_chosen, expected"),
        ({"margin_scale": "difference"}, r"and margin_scale='difference' without columns\.score_chosen"),
        (SCORES | {"margin_alpha": 0.0}, r"columns\.margin_alpha: found 0\.0, expected a number above 0"),
        ({"weight": "id"}, r"found \['id'\] for more than one purpose"),
    ],
)
def test_invalid_columns(columns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Columns(**columns)


def test_rows_without_a_number_have_the_default(write_rows: Any, tmp_path: Path) -> None:
    data, pairs = load(write_rows([row(0, weight=2), row(1, margin=0.25), row(2)]), tmp_path)
    batch = PaddedLayout(pad_id=0)(pairs[:])
    assert [(pair.weight, pair.margin) for pair in pairs] == [(2, 0), (1, 0.25), (1, 0)]
    assert batch.weights is not None
    assert batch.margins is not None
    assert batch.weights.tolist() == [2, 1, 1]
    assert batch.margins.tolist() == [0, 0.25, 0]
    assert {"forms/weight": 1, "forms/margin": 1}.items() <= {
        name.removeprefix("data/"): count for name, count in data.reports["train"].metrics().items()
    }.items()


def test_data_without_numbers_has_none(write_rows: Any, tmp_path: Path) -> None:
    _, pairs = load(write_rows([row(0), row(1)]), tmp_path)
    batch = PaddedLayout(pad_id=0)(pairs[:])
    assert (pairs.weights, pairs.margins, batch.weights, batch.margins) == (None, None, None, None)


def test_numbers_are_part_of_the_data(write_rows: Any, tmp_path: Path) -> None:
    """A run cannot resume with other weights, but it shares the reference values, which depend on tokens alone."""
    cells: list[dict[str, Any]] = [{}, {"weight": 1}, {"weight": 2}, {"margin": 2}]
    stores = [load(write_rows([row(0, **each), row(1)], f"{n}.jsonl"), tmp_path)[1] for n, each in enumerate(cells)]
    assert len({store.fingerprint for store in stores}) == 4
    assert len({store.token_digest for store in stores}) == 1


def test_flipped_pair_keeps_its_margin(write_rows: Any, tmp_path: Path) -> None:
    """A wrong label is as strong as the right one: the row of a flipped pair differs in its answers alone."""
    margins = [0.5, -1.0, 2.0]
    data, pairs = load(write_rows([row(n, margin=m, weight=n) for n, m in enumerate(margins)]), tmp_path)
    data.set_label_noise(LabelFlipNoise(rate=1.0, seed=1))
    for number, (pair, clean) in enumerate(zip(data.training_pairs, pairs, strict=True)):
        assert pair.flipped
        assert (pair.chosen_ids, pair.rejected_ids) == (clean.rejected_ids, clean.chosen_ids)
        assert (pair.margin, pair.weight) == (margins[number], number)


def test_mixture_of_weighted_and_plain_rows(write_rows: Any, tmp_path: Path) -> None:
    paths = [write_rows([row(n, weight=2 + n) for n in range(2)], "a.jsonl"), write_rows([row(2)], "b.jsonl")]
    sources = [MixtureSource(path=str(path), validation_share=0.0, weight=2.0) for path in paths]
    mixture = PreferenceMixture(sources, cache_dir=str(tmp_path / "cache"))
    pairs = mixture.load("train", TinyPolicy(width=16, layers=1, heads=2).load_tokenizer())
    assert pairs is not None
    np.testing.assert_array_equal(pairs.weights, [2, 2, 3, 3, 1, 1])
    assert [pair.weight for pair in pairs] == [2, 2, 3, 3, 1, 1]
    assert pairs.margins is None


def test_numbers_survive_a_cast_to_bf16(write_rows: Any, tmp_path: Path) -> None:
    """A trainer with precision bf16-true casts every floating-point tensor of a batch."""
    _, pairs = load(write_rows([row(0, weight=1.2345678901, margin=0.1)]), tmp_path)
    batch = PaddedLayout(pad_id=0)(pairs[:])
    cast = batch._on_tensors(lambda tensor: tensor.bfloat16() if tensor.is_floating_point() else tensor)
    assert cast.weights is not None
    assert cast.margins is not None
    assert (cast.weights.tolist(), cast.margins.tolist()) == ([1.2345678901], [0.1])
    assert cast.weights.dtype == torch.float64
