"""Tests of the scores of single pairs in a report, by hand and against the statistics over seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from math import log1p
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from lpc_lightning.clustered_means import ClusterScores
from lpc_lightning.data import DataError
from lpc_lightning.evaluation.accuracy.accuracy_modes import group_members
from lpc_lightning.evaluation.accuracy.scored_modes import ScoredPairs
from lpc_lightning.evaluation.report.command import report
from lpc_lightning.evaluation.report.contrasts import contrasts
from lpc_lightning.evaluation.report.runs.folders import load_folders
from lpc_lightning.evaluation.report.runs.pairs import NOT_ON_RECORD, Added, PromptScores, prompt_scores
from lpc_lightning.evaluation.report.runs.records import RunRecord
from lpc_lightning.evaluation.report.study import make_study, shared_by
from lpc_lightning.evaluation.report.tables import contrasts_table, means_table
from lpc_lightning.evaluation.statistics.calibration import calibration_error

METRIC = "test/rewards/accuracies"


def write_pairs(cell: Path, margins: Sequence[float], prompts: Sequence[str], **columns: Sequence[Any]) -> None:
    rows = [
        {
            "prompt": prompt,
            "flipped": columns.get("flipped", [False] * len(margins))[number],
            "has_gold": columns.get("has_gold", [False] * len(margins))[number],
            "tokens": columns.get("tokens", [(3, 3)] * len(margins))[number],
            "margins": {"prior": margin},
            **{name: values[number] for name, values in columns.items() if name in ("source", "factor")},
        }
        for number, (margin, prompt) in enumerate(zip(margins, prompts, strict=True))
    ]
    (cell / "pairs_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def scores(cell: Path, metric: str, value: float) -> PromptScores:
    return prompt_scores(RunRecord("cell", folder=cell / "run", grid="grid", metrics={metric: value}), metric)


def prompt_deviations(cell: Path, metric: str, value: float) -> Mapping[str, float] | None:
    added = scores(cell, metric, value).added
    return None if added is None else added.prompts.deviations


def test_prompt_deviations_by_hand(tmp_path: Path) -> None:
    """Of a: right and wrong; of b: right and a tie, whose score is 1/2. The mean is 0.625."""
    write_pairs(tmp_path, [1.0, -2.0, 3.0, 0.0], ["a", "a", "b", "b"], flipped=[False, True, False, False])
    added = prompt_deviations(tmp_path, METRIC, 0.625)
    assert added == {"a": pytest.approx(-0.25 / 4), "b": pytest.approx(0.25 / 4)}
    assert prompt_deviations(tmp_path, "test/accuracy/prior", 0.625) == added
    assert prompt_deviations(tmp_path, "test/gold_accuracy/prior", 0.875) == {
        "a": pytest.approx(0.25 / 4),
        "b": pytest.approx(-0.25 / 4),
    }
    losses = [log1p(np.exp(-margin)) for margin in (1, -2, 3, 0)]
    assert prompt_deviations(tmp_path, "test/log_loss/prior", float(np.mean(losses))) == {
        "a": pytest.approx((losses[0] + losses[1] - losses[2] - losses[3]) / 8),
        "b": pytest.approx((losses[2] + losses[3] - losses[0] - losses[1]) / 8),
    }


def test_prompt_deviations_of_right_labels(tmp_path: Path) -> None:
    """Pairs with gold labels, all of them right, have metrics against gold. Without gold labels they have none."""
    write_pairs(tmp_path, [1.0, -2.0, 3.0, 4.0], ["a", "a", "b", "b"], has_gold=[True] * 4)
    added = prompt_deviations(tmp_path, "test/gold_accuracy/prior", 0.75)
    assert added == {"a": pytest.approx(-0.125), "b": pytest.approx(0.125)}
    (tmp_path / "other").mkdir()
    write_pairs(tmp_path / "other", [1.0, -2.0, 3.0, 4.0], ["a", "a", "b", "b"])
    assert prompt_deviations(tmp_path / "other", "test/gold_accuracy/prior", 0.75) is None


def test_prompt_scores_of_pairs_with_gold_labels(tmp_path: Path) -> None:
    """One source of a mixture has gold labels. Metrics against gold are over its pairs alone: a and b, not c."""
    labels = {"has_gold": [True] * 4 + [False] * 2, "flipped": [False, True] + [False] * 4, "source": [*"xxxxyy"]}
    write_pairs(tmp_path, [1.0, -2.0, 3.0, -4.0, -5.0, -6.0], [*"aabbcc"], **labels)
    assert prompt_deviations(tmp_path, "test/gold_accuracy/prior", 0.75) == {
        "a": pytest.approx(0.125),
        "b": pytest.approx(-0.125),
    }
    pairs = ScoredPairs.from_items(
        [json.loads(line) for line in (tmp_path / "pairs_test.jsonl").read_text().splitlines()]
    )
    gold = torch.tensor([1.0, 2.0, 3.0, -4.0])
    means, _ = pairs.means(group_members(pairs.rows, ("source",)))
    metrics = means | pairs.calibration()
    assert metrics["gold_calibration_error/prior"] == pytest.approx(calibration_error(gold))
    assert metrics["wrong_label_auroc/prior"] == pytest.approx(2 / 3)
    assert means["gold_accuracy/prior/source/x"] == means["gold_accuracy/prior"] == 0.75
    assert "gold_accuracy/prior/source/y" not in means
    added = scores(tmp_path, "test/gold_calibration_error/prior", calibration_error(gold)).added
    assert added is not None
    assert added.prompts.shares == {"a": 0.5, "b": 0.5}


def test_prompt_deviations_of_similar_length(tmp_path: Path) -> None:
    write_pairs(tmp_path, [1.0, -1.0, 1.0], ["a", "b", "c"], tokens=[(2, 2), (14, 10), (15, 10)])
    assert prompt_deviations(tmp_path, "test/accuracy/prior/length_matched", 0.5) == {"a": 0.25, "b": -0.25}


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        (METRIC, 0.5),  # another mean: other weights have been evaluated since
        ("val/rewards/accuracies", 1.0),  # another stage
        ("test/accuracy/posterior", 1.0),
        ("test/loss", 1.0),
        ("arc_easy/acc", 1.0),
    ],
)
def test_prompt_deviations_not_on_record(tmp_path: Path, metric: str, value: float) -> None:
    write_pairs(tmp_path, [1.0, 2.0, 3.0, 4.0], ["a", "b", "c", "d"])
    assert prompt_deviations(tmp_path, metric, value) is None


@pytest.mark.parametrize("name", ["rewards/margins", "loss"])
def test_prompt_deviations_of_other_names(tmp_path: Path, name: str) -> None:
    write_pairs(tmp_path, margins := [1.0, 2.0, 3.0, 6.0], ["a", "b", "c", "d"])
    values = margins if name == "rewards/margins" else [log1p(np.exp(-margin)) for margin in margins]
    mean = float(np.mean(values))
    expected = {prompt: pytest.approx((value - mean) / 4) for prompt, value in zip("abcd", values, strict=True)}
    assert prompt_deviations(tmp_path, f"test/{name}", mean) == expected


def test_prompt_deviations_of_groups(tmp_path: Path) -> None:
    """Metrics of a source, a factor, clean and flipped labels, and a data set of a mixture, by hand."""
    labels = {"source": ["x", "x", "y", "x"], "factor": ["", "f", "f", ""], "flipped": [False, True, True, False]}
    write_pairs(tmp_path, [1.0, -2.0, 3.0, 0.0], ["a", "a", "b", "b"], **labels)
    expected: dict[str, tuple[float, dict[str, float]]] = {
        "accuracy/prior/source/x": (0.5, {"a": 0.0, "b": 0.0}),
        "accuracy/x": (0.5, {"a": 0.0, "b": 0.0}),
        "margin/prior/factor/f": (0.5, {"a": -1.25, "b": 1.25}),
        "accuracy/prior/clean": (0.75, {"a": 0.125, "b": -0.125}),
        "gold_accuracy/prior/flipped": (0.5, {"a": 0.25, "b": -0.25}),
        "longer_is_chosen": (0.5, {"a": 0.0, "b": 0.0}),
    }
    for name, (mean, added) in expected.items():
        assert prompt_deviations(tmp_path, f"test/{name}", mean) == pytest.approx(added), name


def test_prompt_deviations_of_the_calibration_error(tmp_path: Path) -> None:
    """Each label is sure to one half less than its score, and two prompts have as many pairs: as for a mean."""
    write_pairs(tmp_path, [1e-9, 1e-9, 1e-9, -1e-9], ["a", "a", "b", "b"], flipped=[False, False, True, True])
    added = prompt_deviations(tmp_path, "test/calibration_error/prior", 0.25)
    assert added == {"a": pytest.approx(0.125), "b": pytest.approx(-0.125)}
    gold = prompt_deviations(tmp_path, "test/gold_calibration_error/prior", 0.25)
    assert gold == {"a": pytest.approx(0.125), "b": pytest.approx(-0.125)}


def test_prompt_deviations_of_adaptation(tmp_path: Path) -> None:
    """A cell writes them itself."""
    write_pairs(tmp_path, [1.0, 2.0], ["a", "b"])
    added, shares = {"a": 0.1, "b": -0.1}, {"a": 0.25, "b": 0.75}
    prompts = ClusterScores(added, shares)
    annotators, both = ClusterScores({"ann": 0.0}, {"ann": 1.0}), ClusterScores({"a ann": 0.2}, {"a ann": 1.0})
    clusters = {"prompts": prompts, "annotators": annotators, "both": both}
    row = {"metric": "adaptation/exact/8", "mean": 0.75} | {kind: each._asdict() for kind, each in clusters.items()}
    earlier = {"metric": "adaptation/exact/4", "mean": 0.75, "deviations": added, "shares": shares}
    (tmp_path / "deviations_test.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (row, earlier)))
    assert scores(tmp_path, "test/adaptation/exact/8", 0.75) == PromptScores(
        frozenset("ab"), Added(prompts, annotators, both)
    )
    assert prompt_deviations(tmp_path, "test/adaptation/exact/8", 0.5) is None, "other weights"
    assert scores(tmp_path, "test/adaptation/exact/4", 0.75) == PromptScores(frozenset("ab"), Added(prompts))


@pytest.mark.parametrize(("metric", "folder"), [("lm_eval/own/acc", "run/lm_eval"), ("own/acc", "results")])
def test_prompt_scores_of_items(metric: str, folder: str, tmp_path: Path) -> None:
    """Each document is a prompt of its own, and pairs name theirs. Another task has other items."""
    items = [{"task": "own", "doc_id": n, "doc_hash": "h", "metrics": {"acc": float(n == 1)}} for n in range(3)]
    items.append({"task": "own", "doc_id": 3, "doc_hash": "h", "metrics": {"acc": 1.0}, "prompt": "own 2 h"})
    items.append({"task": "other", "doc_id": 0, "doc_hash": "h", "metrics": {"acc": 0.0}})
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    measured = {metric: tmp_path / folder} if folder == "results" else {}
    record = RunRecord(
        "run", folder=tmp_path / "run", measured=measured, metrics={metric: 0.5, "lm_eval/none/acc": 0.5}
    )
    # Without one of the three, the mean is 2/3, 1/3 or 1/2.
    added = {"own 0 h": -1 / 9, "own 1 h": 1 / 9, "own 2 h": 0.0}
    shares = {"own 0 h": 0.25, "own 1 h": 0.25, "own 2 h": 0.5}
    actual = prompt_scores(record, metric)
    assert actual.prompts == frozenset(added)
    assert actual.added == Added(ClusterScores(pytest.approx(added), shares))  # type: ignore[arg-type]
    assert prompt_scores(record, "lm_eval/none/acc") == NOT_ON_RECORD


def test_prompt_scores_of_evaluated_pairs(tmp_path: Path) -> None:
    """`evaluate` stores margins, of which accuracy is one score and the mean margin another."""
    pair = {"task": "preferences", "doc_hash": "h", "flipped": False, "tokens": [3, 3]}
    margins = {"a": [1.0, -2.0], "b": [4.0]}
    items = [
        {**pair, "doc_id": number, "prompt": prompt, "metrics": {"accuracy/prior": float(margin > 0)}}
        | {"response": {"prior": margin}}
        for prompt, each in margins.items()
        for number, margin in enumerate(each)
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    metrics = {"preferences/accuracy/prior": 2 / 3, "preferences/margin/prior": 1.0, "preferences/swap_turnover": 0.5}
    record = RunRecord("run", measured=dict.fromkeys(metrics, tmp_path), metrics=metrics)
    accuracy, margin, other = (prompt_scores(record, metric).added for metric in metrics)
    assert accuracy is not None
    assert margin is not None
    # Without a, the means are 1 and 4; without b, 1/2 and -1/2.
    assert accuracy.prompts.deviations == {"a": pytest.approx((2 / 3 - 1) / 2), "b": pytest.approx((2 / 3 - 1 / 2) / 2)}
    assert margin.prompts.deviations == {"a": pytest.approx((1 - 4) / 2), "b": pytest.approx((1 + 1 / 2) / 2)}
    assert other is None


def test_prompt_scores_of_no_mean(tmp_path: Path) -> None:
    """The prompts behind the detection of wrong labels are those of the pairs. Those of training pairs are unknown."""
    write_pairs(tmp_path, [1.0, 2.0, 3.0, 4.0], ["a", "a", "b", "b"])
    assert scores(tmp_path, "test/wrong_label_auroc/prior", 0.1) == PromptScores(frozenset("ab"))
    assert scores(tmp_path, "test/training/wrong_label_auroc/prior", 0.1) == NOT_ON_RECORD
    assert scores(tmp_path, "val/wrong_label_auroc/prior", 0.1) == NOT_ON_RECORD


@pytest.mark.parametrize("name", ["pairs_test.jsonl", "deviations_test.jsonl", "run/lm_eval/items.jsonl"])
@pytest.mark.parametrize("content", ['{"prompts": {"a": 0', '{"prompts": {}}\n'])
def test_damaged_scores(content: str, name: str, tmp_path: Path) -> None:
    """The error names the file, the cause and what to do."""
    write_pairs(tmp_path, [1.0, 2.0], ["a", "b"])
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    metric = "lm_eval/own/acc" if name.startswith("run") else "test/adaptation/exact/8"
    with pytest.raises(DataError, match=r"found \w+Error: .+, expected .+ Remove the file") as caught:
        scores(tmp_path, metric, 0.5)
    assert str(caught.value).startswith(f"{path}: ")


def test_report_of_damaged_pairs(write_ablation: Callable[..., Path], tmp_path: Path) -> None:
    """A file that ends in the middle of a row, as after a full disk."""
    folder = write_ablation({"latent": ["none"]}, [1, 2], lambda latent, seed: 0.6)
    path = folder / "cells" / "latent=none,seed=2" / "pairs_test.jsonl"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match=re.escape(str(path))):
        report([str(folder)], out=str(tmp_path / "out"), metric=[METRIC])
    assert not (tmp_path / "out" / "report.html").exists()
    path.unlink()
    report([str(folder)], out=str(tmp_path / "out"), metric=[METRIC])


@pytest.mark.parametrize("metric", [METRIC, "test/wrong_label_auroc/prior"])
def test_report_of_pairs_of_one_prompt(write_ablation: Callable[..., Path], tmp_path: Path, metric: str) -> None:
    """There is no interval, p or star. The table of left-out runs names each group and the reason."""
    values = {"none": 0.4, "marginal": 0.8}
    folder = write_ablation({"latent": list(values)}, [1, 2, 3], lambda latent, seed: values[latent] + 0.1)
    for path in (folder / "cells").iterdir():
        right = 5 * values[path.name.partition(",")[0].removeprefix("latent=")]
        write_pairs(path, [1.0 if number < right else -1.0 for number in range(5)], ["the same"] * 5)
        results = json.loads((path / "results.json").read_text())
        results["metrics"]["test/wrong_label_auroc/prior"] = 0.01
        (path / "results.json").write_text(json.dumps(results))
    loaded = load_folders([str(folder)])
    study = make_study(loaded.records, loaded.axes)
    compared, _ = contrasts(study, [metric], {"latent": "none"})
    means, differences = means_table(study, [metric]), contrasts_table(study, compared, {"latent": "none"})
    assert [(row["mean"], row["low"], row["high"], row["prompts"]) for row in means.records] == [
        (pytest.approx(value), None, None, 1) for value in (values.values() if metric == METRIC else (0.01, 0.01))
    ]
    (row,) = differences.records
    assert (row["low"], row["high"], row["p"], row["p_holm"], row["p_sign_flips"]) == (None,) * 5
    assert not any("*" in cell.text for cell in differences.rows[0])
    left_out = study.left_out([metric])
    assert [(entry.run, entry.status) for entry in left_out] == [
        ("latent none", "no interval"),
        ("marginal", "no interval"),
    ]
    assert {entry.why for entry in left_out} == {f"{metric}: all pairs have one prompt; an interval needs 4"}


def test_report_of_one_large_prompt(write_ablation: Callable[..., Path]) -> None:
    """Of 104 pairs, 100 have the same prompt: five prompts, effectively 1.08."""
    folder = write_ablation({"latent": ["none"]}, [1, 2, 3], lambda latent, seed: 0.6)
    for path in (folder / "cells").iterdir():
        write_pairs(path, [1.0] * 52 + [-1.0] * 52, ["the same"] * 100 + list("abcd"))
        results = json.loads((path / "results.json").read_text())
        results["metrics"][METRIC] = 0.5
        (path / "results.json").write_text(json.dumps(results))
    study = make_study(load_folders([str(folder)]).records)
    (entry,) = study.left_out([METRIC])
    assert entry == (
        "all runs",
        "no interval",
        f"{METRIC}: one of 5 prompts has most of the pairs; an interval needs pairs of more prompts",
    )


@pytest.mark.parametrize("shared", [True, False])
def test_interval_covers_shared_prompts(write_ablation: Callable[..., Path], tmp_path: Path, shared: bool) -> None:
    """Seeds agree in which prompts are right, so that only the choice of prompts matters."""
    draw = np.random.default_rng(0)
    hard = draw.random(40) < 0.3
    scores: dict[tuple[str, int], np.ndarray] = {}
    for latent, rate in (("none", 0.05), ("marginal", 0.02)):
        for seed in range(1, 6):
            wrong = hard if latent == "none" else hard & (np.arange(40) % 3 > 0)
            scores[latent, seed] = np.where(wrong ^ (draw.random(40) < rate), -1.0, 1.0)
    # The fixture's test accuracy is 0.1 below what it is given.
    folder = write_ablation(
        {"latent": ["none", "marginal"]}, [1, 2, 3, 4, 5], lambda *cell: float((scores[cell] > 0).mean()) + 0.1
    )
    for (latent, seed), margins in scores.items():
        names = [f"prompt {number}" + ("" if shared else f" of {seed}") for number in range(40)]
        write_pairs(folder / "cells" / f"latent={latent},seed={seed}", margins.tolist(), names)
    study = make_study(load_folders([str(folder)]).records)
    (contrast,), _ = contrasts(study, [METRIC], {"latent": "none"})
    values = {latent: [(scores[latent, seed] > 0).mean() for seed in range(1, 6)] for latent in ("none", "marginal")}
    expected = stats.ttest_rel(values["marginal"], values["none"])
    interval = expected.confidence_interval(0.95)
    assert contrast.difference is not None
    actual = contrast.difference.estimate
    assert actual.low is not None
    assert actual.high is not None
    assert actual.prompts == (40 if shared else 0)
    if shared:
        assert actual.high - actual.low > 1.2 * (interval.high - interval.low)
        assert contrast.difference.p_value > expected.pvalue
    else:
        assert (actual.low, actual.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
        assert contrast.difference.p_value == pytest.approx(expected.pvalue, rel=1e-9)


@pytest.mark.parametrize(
    ("metric", "prompts", "has_test"),
    [
        ("test/wrong_label_auroc/prior", "shared", False),
        ("test/wrong_label_auroc/prior", "own", True),
        ("test/adaptation/adapted/16", "shared", False),
        ("arc_easy/acc", "own", False),
        (METRIC, "none", False),
    ],
)
def test_no_star_without_scores_on_record(
    metric: str, prompts: str, has_test: bool, write_ablation: Callable[..., Path]
) -> None:
    """A large difference has a p only if each prompt's part of it is on record, or no seeds share prompts."""
    values = {"none": 0.4, "marginal": 0.8}
    folder = write_ablation({"latent": list(values)}, [1, 2, 3, 4, 5], lambda latent, seed: values[latent])
    for path in (folder / "cells").iterdir():
        latent, seed = re.findall("=([^,]+)", path.name)
        results = json.loads((path / "results.json").read_text())
        results["metrics"] = {metric: values[latent] + int(seed) ** (1 + values[latent]) / 100}
        (path / "results.json").write_text(json.dumps(results))
        (path / "pairs_test.jsonl").unlink()
        if prompts != "none":
            write_pairs(path, [1.0] * 5, [f"{number}{seed if prompts == 'own' else ''}" for number in range(5)])
    study = make_study(load_folders([str(folder)]).records)
    (contrast,), _ = contrasts(study, [metric], {"latent": "none"})
    assert contrast.difference is not None
    assert (contrast.difference.p_value is not None, contrast.p_corrected is not None) == (has_test, has_test)
    (row,) = contrasts_table(study, [contrast], {"latent": "none"}).rows
    assert any("*" in cell.text for cell in row) == has_test
    assert {(entry.run, entry.status) for entry in study.left_out([metric])} == (
        set() if has_test else {("latent none", "no test"), ("marginal", "no test")}
    )


def test_shared_prompts_of_unequal_sizes() -> None:
    """Half of the pairs have one prompt, an eighth each of four others: 1 / (1/4 + 4/64) prompts by Kish."""
    sizes = dict(zip("abcde", [0.5, *[0.125] * 4], strict=True))
    seed = PromptScores(frozenset(sizes), Added(ClusterScores(dict.fromkeys(sizes, 0.1), sizes)))
    assert shared_by([seed, seed]).freedom == pytest.approx(3.2 - 1)


def test_difference_over_prompts_of_unequal_sizes(write_ablation: Callable[..., Path]) -> None:
    """Prompt a has four of eight pairs, and two seeds agree in all pairs. Only the choice of prompts then varies.

    The marginal is right in two more pairs of a and one more of b: 3/8. Without one of a to e, the difference is 1/4,
    2/7, and three times 3/7. Sizes of a half and four eighths count as 3.2 prompts.
    """
    prompts = [*"aaaabcde"]
    right = {"none": [1, 1, 0, 0, 0, 0, 1, 1], "marginal": [1, 1, 1, 1, 1, 0, 1, 1]}
    folder = write_ablation({"latent": list(right)}, [1, 2], lambda latent, seed: sum(right[latent]) / 8 + 0.1)
    for path in (folder / "cells").iterdir():
        latent = path.name.partition(",")[0].removeprefix("latent=")
        write_pairs(path, [1.0 if score else -1.0 for score in right[latent]], prompts)
    (contrast,), _ = contrasts(make_study(load_folders([str(folder)]).records), [METRIC], {"latent": "none"})
    without = [1 / 4, 2 / 7, 3 / 7, 3 / 7, 3 / 7]
    error = (4 / 5 * sum((3 / 8 - each) ** 2 for each in without)) ** 0.5
    assert contrast.difference is not None
    actual = contrast.difference.estimate
    assert contrast.difference.p_value == pytest.approx(2 * stats.t.sf(3 / 8 / error, 3.2 - 1), rel=1e-9)
    half = stats.t.ppf(0.975, 3.2 - 1) * error
    assert (actual.low, actual.high) == (pytest.approx(3 / 8 - half), pytest.approx(3 / 8 + half))
