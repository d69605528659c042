"""Tests of contrasts: on numbers chosen by hand, and against scipy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.report.contrasts import _prompt_differences, contrasts, read_baseline
from lpc_lightning.evaluation.report.runs.folders import load_folders
from lpc_lightning.evaluation.report.runs.pairs import prompt_scores
from lpc_lightning.evaluation.report.runs.records import RunRecord
from lpc_lightning.evaluation.report.study import Group, Study, make_study
from lpc_lightning.evaluation.report.tables import contrasts_table

METRIC = "val/rewards/accuracies"


def run(seed: int | None, value: float | None = None, status: str = "finished", **axes: Any) -> RunRecord:
    name = ",".join(f"{axis}={axis_value}" for axis, axis_value in axes.items()) + f",seed={seed}"
    return RunRecord(name, axes, seed, status, metrics={} if value is None else {METRIC: value})


def group_of(study: Study, **axes: Any) -> Group:
    (group,) = (group for group in study.groups if dict(group.axes) == axes)
    return group


NOISY = {
    ("none", 0.0): {1: 0.70, 2: 0.72, 3: 0.71},
    ("none", 0.3): {1: 0.60, 2: 0.61, 3: 0.65},
    ("gumbel", 0.0): {1: 0.71, 2: 0.70, 3: 0.72},
    ("gumbel", 0.3): {1: 0.62, 2: 0.66, 4: 0.99},
    ("marginal", 0.0): {1: 0.74, 2: 0.77, 3: 0.75},
    ("marginal", 0.3): {1: 0.70, 2: 0.71, 3: 0.74},
}


@pytest.fixture
def noisy(give_own_prompts: Callable[..., list[RunRecord]]) -> Study:
    records = [
        run(seed, value, latent=latent, noise=noise)
        for (latent, noise), values in NOISY.items()
        for seed, value in values.items()
    ]
    return make_study(give_own_prompts(records))


def test_contrasts_against_scipy(noisy: Study) -> None:
    compared, unmatched = contrasts(noisy, [METRIC], {"latent": "none"})
    assert unmatched == []
    assert [tuple(contrast.group.axes.values()) for contrast in compared] == [
        ("gumbel", 0.0),
        ("gumbel", 0.3),
        ("marginal", 0.0),
        ("marginal", 0.3),
    ]
    for contrast in compared:
        latent, noise = contrast.group.axes.values()
        assert contrast.baseline.axes == {"latent": "none", "noise": noise}
        ours, theirs = NOISY[str(latent), float(noise)], NOISY["none", float(noise)]
        seeds = sorted(ours.keys() & theirs.keys())
        expected = stats.ttest_rel([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
        assert contrast.difference is not None
        assert contrast.difference.p_value == pytest.approx(expected.pvalue, rel=1e-9)
        assert contrast.difference.estimate.n == len(seeds)
        assert contrast.unpaired == (("3", "4") if (latent, noise) == ("gumbel", 0.3) else ())


def test_contrasts_are_corrected_by_holm(noisy: Study) -> None:
    """Of four tests, the k-th smallest p-value is multiplied by 5 - k, and is never below the previous one."""
    compared, _ = contrasts(noisy, [METRIC], {"latent": "none"})
    raw = [contrast.difference.p_value or 0.0 for contrast in compared if contrast.difference]
    highest, expected = 0.0, {}
    for rank, value in enumerate(sorted(raw)):
        highest = max(highest, min(1.0, (4 - rank) * value))
        expected[value] = highest
    assert [contrast.p_corrected for contrast in compared] == pytest.approx([expected[value] for value in raw])


@pytest.mark.parametrize("seeds", [4, 5])
def test_significance_needs_five_seeds(seeds: int, give_own_prompts: Callable[..., list[RunRecord]]) -> None:
    values = [("none", 0.5, 0.0), ("marginal", 0.7, 0.001)]
    records = [run(seed, mean + step * seed, latent=name) for name, mean, step in values for seed in range(seeds)]
    study = make_study(give_own_prompts(records))
    compared, _ = contrasts(study, [METRIC], {"latent": "none"})
    (contrast,) = compared
    assert contrast.p_corrected is not None
    assert contrast.p_corrected < 1e-4
    assert contrast.is_significant == (seeds == 5)
    table = contrasts_table(study, compared, {"latent": "none"})
    assert any(cell.text.startswith("* ") for cell in table.rows[0]) == (seeds == 5)


def test_contrast_of_one_shared_seed() -> None:
    study = make_study([run(1, 0.5, latent="none"), run(1, 0.6, latent="x"), run(2, 0.7, latent="x")])
    (contrast,), _ = contrasts(study, [METRIC], {"latent": "none"})
    assert contrast.difference is not None
    assert contrast.difference.estimate.mean == pytest.approx(0.1)
    assert (contrast.difference.p_value, contrast.p_corrected, contrast.unpaired) == (None, None, ("2",))


def test_contrast_without_shared_seed() -> None:
    study = make_study([run(1, 0.5, latent="none"), run(2, 0.6, latent="x")])
    (contrast,), _ = contrasts(study, [METRIC], {"latent": "none"})
    assert (contrast.difference, contrast.unpaired) == (None, ("1", "2"))


def test_contrast_of_runs_without_seeds() -> None:
    study = make_study([run(None, 0.5, latent="none"), run(None, 0.6, latent="x")])
    (contrast,), _ = contrasts(study, [METRIC], {"latent": "none"})
    assert contrast.difference is not None
    assert contrast.difference.estimate.n == 1
    several = make_study(
        [RunRecord(f"{latent}{n}", {"latent": latent}, None, metrics={METRIC: 0.5}) for latent in "ab" for n in (1, 2)]
    )
    (contrast,), _ = contrasts(several, [METRIC], {"latent": "a"})
    assert contrast.difference is None
    assert len(contrast.unpaired) == 4


def test_contrast_axis_that_does_not_apply() -> None:
    records = [run(1, 0.5, latent="none"), *(run(1, 0.6, latent="marginal", codes=codes) for codes in (8, 16))]
    study = make_study(records)
    compared, unmatched = contrasts(study, [METRIC], {"latent": "none"})
    assert [contrast.baseline.axes for contrast in compared] == [{"latent": "none"}] * 2
    assert unmatched == []


def test_contrast_metric_missing_in_the_baseline() -> None:
    plain = [run(seed, 0.5 + 0.1 * seed, latent="none") for seed in (1, 2)]
    coded = [RunRecord(f"x {seed}", {"latent": "x"}, seed, metrics={METRIC: 0.7, "num_codes": 1.0}) for seed in (1, 2)]
    records = [*plain, *coded]
    compared, unmatched = contrasts(make_study(records), ["codes", METRIC], {"latent": "none"})
    assert [contrast.metric for contrast in compared] == [METRIC]
    assert unmatched == []


def test_contrast_group_without_baseline() -> None:
    study = make_study([run(1, 0.5, latent="none", noise=0), run(1, 0.6, latent="x", noise=0.3)])
    compared, ((name, status, why),) = contrasts(study, [METRIC], {"latent": "none"})
    assert compared == []
    assert (name, status, why) == ("x, noise 0.3", "no baseline", "no runs of latent=none, noise=0.3")


def test_read_baseline_several_values(noisy: Study) -> None:
    baseline = read_baseline(noisy, ["latent=none", "noise=0"])
    assert baseline == {"latent": "none", "noise": 0}
    compared, _ = contrasts(noisy, [METRIC], baseline)
    assert len(compared) == 5
    assert {id(contrast.baseline) for contrast in compared} == {id(group_of(noisy, latent="none", noise=0.0))}


def test_read_baseline_default(noisy: Study) -> None:
    assert read_baseline(noisy, None) == {"latent": "none"}
    other = make_study([run(1, 0.5, latent="a"), run(1, 0.5, latent="b")])
    assert read_baseline(other, None) == {}
    assert contrasts(other, [METRIC], {}) == ([], [])


@pytest.mark.parametrize("text", ["latent=nothing", "latent", "codes=4", "noise=0.31"])
def test_read_baseline_unknown_value(noisy: Study, text: str) -> None:
    expected = rf"baseline: found '{text}', expected AXIS=VALUE of latent = none, gumbel, marginal; noise = 0.0, 0.3"
    with pytest.raises(ConfigError, match=expected):
        read_baseline(noisy, [text])


def test_read_baseline_two_values_of_an_axis(noisy: Study) -> None:
    with pytest.raises(
        ConfigError, match="baseline: found latent=none and latent=gumbel, expected one value of latent"
    ):
        read_baseline(noisy, ["latent=none", "noise=0", "latent=gumbel"])


def test_read_baseline_without_runs() -> None:
    study = make_study([run(1, 0.5, latent="none", noise=0), run(1, 0.6, latent="x", noise=0.3)])
    with pytest.raises(ConfigError, match=r"found no run with latent=none and noise=0\.3"):
        read_baseline(study, ["latent=none", "noise=0.3"])
    with pytest.raises(ConfigError, match="the runs differ only in the seed"):
        read_baseline(make_study([run(1, 0.5)]), ["latent=none"])


def test_prompts_of_a_difference_in_order(write_ablation: Callable[..., Path]) -> None:
    """Texts in a set have another order in every process. Sums over them would differ in the last digits."""
    folder = write_ablation({"latent": ["none", "x"]}, [1], lambda latent, seed: 1.0)
    names = [f"prompt {number * 7 % 40}" for number in range(40)]
    line = {"flipped": False, "tokens": [1, 1], "margins": {"prior": 1.0}}
    for path in folder.glob("cells/*/pairs_validation.jsonl"):
        path.write_text("".join(json.dumps({"prompt": name, **line}) + "\n" for name in names))
    run, baseline = load_folders([str(folder)]).records
    known, added = prompt_scores(run, METRIC).added, _prompt_differences(run, baseline, METRIC).added
    assert known is not None
    assert added is not None
    assert list(added.prompts.deviations) == list(known.prompts.deviations)
    assert set(added.prompts.deviations) == set(names)
