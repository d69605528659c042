"""Groups against their baselines, on numbers chosen by hand, and against scipy."""

from __future__ import annotations

from typing import Any

import pytest
from scipy import stats

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.report.contrasts import contrasts, read_baseline
from lpc_lightning.evaluation.report.runs.records import RunRecord
from lpc_lightning.evaluation.report.study import Group, Study, make_study

METRIC = "val/rewards/accuracies"


def run(seed: int | None, value: float | None = None, status: str = "finished", **axes: Any) -> RunRecord:
    name = ",".join(f"{axis}={each}" for axis, each in axes.items()) + f",seed={seed}"
    return RunRecord(name, axes, seed, status, metrics={} if value is None else {METRIC: value})


def group_of(study: Study, **axes: Any) -> Group:
    (found,) = (group for group in study.groups if dict(group.axes) == axes)
    return found


NOISY = {
    ("none", 0.0): {1: 0.70, 2: 0.72, 3: 0.71},
    ("none", 0.3): {1: 0.60, 2: 0.61, 3: 0.65},
    ("gumbel", 0.0): {1: 0.71, 2: 0.70, 3: 0.72},
    ("gumbel", 0.3): {1: 0.62, 2: 0.66, 4: 0.99},
    ("marginal", 0.0): {1: 0.74, 2: 0.77, 3: 0.75},
    ("marginal", 0.3): {1: 0.70, 2: 0.71, 3: 0.74},
}


@pytest.fixture
def noisy() -> Study:
    return make_study(
        [
            run(seed, value, latent=latent, noise=noise)
            for (latent, noise), values in NOISY.items()
            for seed, value in values.items()
        ]
    )


def test_each_group_meets_the_group_that_is_like_it_seed_by_seed(noisy: Study) -> None:
    found, alone = contrasts(noisy, [METRIC], {"latent": "none"})
    assert alone == []
    assert [tuple(each.group.axes.values()) for each in found] == [
        ("gumbel", 0.0),
        ("gumbel", 0.3),
        ("marginal", 0.0),
        ("marginal", 0.3),
    ]
    for each in found:
        latent, noise = each.group.axes.values()
        assert each.baseline.axes == {"latent": "none", "noise": noise}
        ours, theirs = NOISY[str(latent), float(noise)], NOISY["none", float(noise)]
        seeds = sorted(ours.keys() & theirs.keys())
        expected = stats.ttest_rel([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
        assert each.difference is not None
        assert each.difference.p_value == pytest.approx(expected.pvalue, rel=1e-9)
        assert each.difference.estimate.n == len(seeds)
        assert each.unpaired == (("3", "4") if (latent, noise) == ("gumbel", 0.3) else ())


def test_holm_corrects_for_all_tests_that_are_shown(noisy: Study) -> None:
    """The k-th smallest of four times 5 - k, and never below the one before."""
    found, _ = contrasts(noisy, [METRIC], {"latent": "none"})
    raw = [each.difference.p_value or 0.0 for each in found if each.difference]
    highest, expected = 0.0, {}
    for rank, value in enumerate(sorted(raw)):
        highest = max(highest, min(1.0, (4 - rank) * value))
        expected[value] = highest
    assert [each.p_corrected for each in found] == pytest.approx([expected[value] for value in raw])


def test_one_seed_in_common_has_a_difference_and_no_test() -> None:
    study = make_study([run(1, 0.5, latent="none"), run(1, 0.6, latent="x"), run(2, 0.7, latent="x")])
    (found,), _ = contrasts(study, [METRIC], {"latent": "none"})
    assert found.difference is not None
    assert found.difference.estimate.mean == pytest.approx(0.1)
    assert (found.difference.p_value, found.p_corrected, found.unpaired) == (None, None, ("2",))


def test_no_seed_in_common_has_no_difference() -> None:
    study = make_study([run(1, 0.5, latent="none"), run(2, 0.6, latent="x")])
    (found,), _ = contrasts(study, [METRIC], {"latent": "none"})
    assert (found.difference, found.unpaired) == (None, ("1", "2"))


def test_runs_without_seeds_pair_only_where_there_is_one_of_each() -> None:
    study = make_study([run(None, 0.5, latent="none"), run(None, 0.6, latent="x")])
    (found,), _ = contrasts(study, [METRIC], {"latent": "none"})
    assert found.difference is not None
    assert found.difference.estimate.n == 1
    several = make_study(
        [RunRecord(f"{latent}{n}", {"latent": latent}, None, metrics={METRIC: 0.5}) for latent in "ab" for n in (1, 2)]
    )
    (found,), _ = contrasts(several, [METRIC], {"latent": "a"})
    assert found.difference is None
    assert len(found.unpaired) == 4


def test_what_does_not_apply_to_the_baseline_does_not_count() -> None:
    records = [run(1, 0.5, latent="none"), *(run(1, 0.6, latent="marginal", codes=codes) for codes in (8, 16))]
    study = make_study(records)
    found, alone = contrasts(study, [METRIC], {"latent": "none"})
    assert [each.baseline.axes for each in found] == [{"latent": "none"}] * 2
    assert alone == []


def test_what_no_run_of_the_baseline_has_logged_is_not_compared() -> None:
    plain = [run(seed, 0.5 + 0.1 * seed, latent="none") for seed in (1, 2)]
    coded = [RunRecord(f"x {seed}", {"latent": "x"}, seed, metrics={METRIC: 0.7, "num_codes": 1.0}) for seed in (1, 2)]
    records = [*plain, *coded]
    found, alone = contrasts(make_study(records), ["codes", METRIC], {"latent": "none"})
    assert [each.metric for each in found] == [METRIC]
    assert alone == []


def test_a_group_without_a_baseline_is_told() -> None:
    study = make_study([run(1, 0.5, latent="none", noise=0), run(1, 0.6, latent="x", noise=0.3)])
    found, ((name, status, why),) = contrasts(study, [METRIC], {"latent": "none"})
    assert found == []
    assert (name, status, why) == ("x, noise 0.3", "no baseline", "no runs of latent=none, noise=0.3")


def test_a_baseline_may_be_several_values(noisy: Study) -> None:
    baseline = read_baseline(noisy, ["latent=none", "noise=0"])
    assert baseline == {"latent": "none", "noise": 0}
    found, _ = contrasts(noisy, [METRIC], baseline)
    assert len(found) == 5
    assert {id(each.baseline) for each in found} == {id(group_of(noisy, latent="none", noise=0.0))}


def test_the_plain_runs_are_the_baseline_where_there_are_any(noisy: Study) -> None:
    assert read_baseline(noisy, None) == {"latent": "none"}
    other = make_study([run(1, 0.5, latent="a"), run(1, 0.5, latent="b")])
    assert read_baseline(other, None) == {}
    assert contrasts(other, [METRIC], {}) == ([], [])


@pytest.mark.parametrize("asked", ["latent=nothing", "latent", "codes=4", "noise=0.31"])
def test_an_unknown_baseline_is_told_with_those_there_are(noisy: Study, asked: str) -> None:
    expected = rf"baseline: found '{asked}', expected AXIS=VALUE of latent = none, gumbel, marginal; noise = 0.0, 0.3"
    with pytest.raises(ConfigError, match=expected):
        read_baseline(noisy, [asked])


def test_a_baseline_that_no_run_has_is_told() -> None:
    study = make_study([run(1, 0.5, latent="none", noise=0), run(1, 0.6, latent="x", noise=0.3)])
    with pytest.raises(ConfigError, match=r"no run has latent=none and noise=0\.3"):
        read_baseline(study, ["latent=none", "noise=0.3"])
    with pytest.raises(ConfigError, match="the runs differ in nothing but the seed"):
        read_baseline(make_study([run(1, 0.5)]), ["latent=none"])
