"""Tests of the report of accuracy: groups of pairs against loops, standard errors, and what is left out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lpc_lightning.data.batching.layouts import Layout, PaddedLayout, SharedPrefixLayout
from lpc_lightning.evaluation.accuracy.accuracy_modes import (
    OTHERS,
    AccuracyModes,
    AccuracyReport,
    keep_largest,
)
from lpc_lightning.evaluation.accuracy.mode_margins import LENGTH_SCALES, SWAPPED
from lpc_lightning.evaluation.statistics.calibration import calibration_error, wrong_label_auroc
from lpc_lightning.latent import GumbelSpace, MLPSpace
from lpc_lightning.types import TokenizedPair
from tests.evaluation.accuracy.conftest import CODES, LENGTHS, Build, evaluated, report_of


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
    """The first two pairs share a prompt. Leave out one of the four prompts after the other."""
    pairs, layout = make_pairs(LENGTHS), PaddedLayout(0)
    pairs[1] = replace(pairs[1], prompt_ids=pairs[0].prompt_ids)
    report = report_of(build("dpo", None), [layout(pairs[:3]), layout(pairs[3:])])
    values = [item["margins"]["prior"] for item in report.items]
    mean = sum(values) / 5
    without = [sum(values[2:]) / 3, *((sum(values) - value) / 4 for value in values[2:])]
    expected = math.sqrt(3 / 4 * sum((mean - each) ** 2 for each in without))
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
        "id", "source", "factor", "annotator", "prompt", "flipped", "has_gold", "tokens", "margins",
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


def test_shuffled_mode_uses_another_prompt(build: Build, make_pairs: Callable[..., Any]) -> None:
    """A pair's margin equals that in a batch of two: the pair and a pair of the other prompt."""
    module, layout = build("dpo", MLPSpace(hidden=8)), PaddedLayout(0)
    pairs = make_pairs(LENGTHS[:2] * 4)
    prompts = [pairs[0].prompt_ids, pairs[1].prompt_ids]
    for counts in ((4, 4), (6, 2), (7, 1)):
        owners = [0] * counts[0] + [1] * counts[1]
        batch = [replace(pair, prompt_ids=prompts[owner]) for pair, owner in zip(pairs, owners, strict=True)]
        report = report_of(module, [layout(batch)])
        assert "pairs/not_shuffled" not in report.metrics
        for pair, owner, item in zip(batch, owners, report.items, strict=True):
            alone = report_of(module, [layout([pair, batch[-1 if owner == 0 else 0]])]).items[0]["margins"]
            assert item["margins"]["shuffled"] == pytest.approx(alone["shuffled"], rel=1e-9)
            assert item["margins"]["shuffled"] != pytest.approx(alone["prior"], rel=1e-3)


def test_shuffled_mode_with_one_prompt_batches(build: Build, make_pairs: Callable[..., Any]) -> None:
    """Pairs of a batch of one prompt are not shuffled. They do not enter the means, also under other scales."""
    module, layout, pairs = build("dpo", MLPSpace(hidden=8)), PaddedLayout(0), make_pairs(LENGTHS)
    same = [replace(pair, prompt_ids=pairs[0].prompt_ids, source="same") for pair in pairs[:3]]
    report = report_of(module, [layout(same), layout(pairs[3:])], scales=LENGTH_SCALES)
    assert report.metrics["pairs/not_shuffled"] == 3
    assert ["shuffled" in item["margins"] for item in report.items] == [False] * 3 + [True] * 2
    assert ["shuffled/summed" in item["scaled"] for item in report.items] == [False] * 3 + [True] * 2
    other = report_of(module, [layout(pairs[3:])], scales=LENGTH_SCALES).metrics
    for name in ("accuracy/shuffled", "margin/shuffled", "accuracy/shuffled/summed", "accuracy/shuffled/per_token"):
        assert report.metrics[name] == other[name]
    assert "accuracy/shuffled/source/same" not in report.metrics


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
