"""Tests of `PreferenceMixture`: choice, order, caches, label noise, and metrics of each data set."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from lpc_lightning.algorithms import DPO, SimPO
from lpc_lightning.callbacks import LabelFlipNoise
from lpc_lightning.data import (
    Columns,
    DataError,
    MixtureSource,
    PreferenceData,
    PreferenceDataModule,
    PreferenceMixture,
)
from lpc_lightning.data.batching.layouts import PaddedLayout
from lpc_lightning.data.batching.loading import TrainingLoader
from lpc_lightning.data.noise import SmallMarginsFirst, UnreliableAnnotators
from lpc_lightning.policy import TinyPolicy

SIZES = {"a": 6, "b": 10}
"""Training pairs of the two files. Each file has two test pairs and three validation pairs, too."""


def tiny() -> TinyPolicy:
    return TinyPolicy(width=16, layers=1, heads=2)


@pytest.fixture
def files(write_rows: Any) -> dict[str, str]:
    """Write two files of pairs, with ids, annotators and scores, and return their paths."""
    paths = {}
    for name, size in SIZES.items():
        splits = ["train"] * size + ["validation"] * 3 + ["test"] * 2
        rows = [
            {
                "id": f"{name}{n}",
                "prompt": f"Question {n} of {name}?",
                "chosen": f"Good {n}.",
                "rejected": "Bad " * (n + 1),
                "annotator": f"rater {n % 2}",
                "score_chosen": n,
                "score_rejected": 2,
                "split": split,
            }
            for n, split in enumerate(splits)
        ]
        paths[name] = str(write_rows(rows, f"{name}.jsonl"))
    return paths


@pytest.fixture
def mixture(files: dict[str, str], tmp_path: Path) -> Callable[..., PreferenceMixture]:
    """Return a function that makes a mixture of the two files, from the settings of each."""

    def make(a: dict[str, Any] | None = None, b: dict[str, Any] | None = None, **data: Any) -> PreferenceMixture:
        sources = [MixtureSource(path=files["a"], **(a or {})), MixtureSource(path=files["b"], **(b or {}))]
        return PreferenceMixture(sources, **({"cache_dir": str(tmp_path / "cache"), "batch_size": 4} | data))

    return make


@pytest.fixture
def alone(files: dict[str, str], tmp_path: Path) -> Callable[[str], PreferenceData]:
    """Return a function that makes the data of one file, with the cache of the mixture."""
    return lambda name: PreferenceData(path=files[name], cache_dir=str(tmp_path / "cache"), batch_size=4)


def loaded(data: PreferenceDataModule, stage: Any = "train") -> Any:
    pairs = data.load(stage, tiny().load_tokenizer())
    assert pairs is not None
    return pairs


def counts(data: PreferenceDataModule) -> Counter[str]:
    return Counter(pair.id for pair in loaded(data))


# The choice of pairs.


def test_weights_repeat_and_leave_out_pairs(mixture: Any) -> None:
    used = counts(mixture({"weight": 2.5}, {"weight": 0.3}))
    of_a, of_b = ({k: v for k, v in used.items() if k[0] == name} for name in "ab")
    assert len(of_a) == 6
    assert Counter(of_a.values()) == {2: 3, 3: 3}
    assert Counter(of_b.values()) == {1: 3}


def test_count_is_the_number_of_pairs(mixture: Any) -> None:
    used = counts(mixture({"count": 6}, {"count": 4}))
    assert set(used.values()) == {1}
    assert Counter(name[0] for name in used) == {"a": 6, "b": 4}


def test_choice_depends_on_its_data_set_only(mixture: Any, files: dict[str, str], tmp_path: Path) -> None:
    single = PreferenceMixture([MixtureSource(path=files["b"], count=4)], cache_dir=str(tmp_path / "cache"))
    both = counts(mixture({"weight": 3}, {"count": 4}))
    assert {name: n for name, n in both.items() if name[0] == "b"} == counts(single)


def test_count_above_the_pairs_is_refused(mixture: Any) -> None:
    message = r"data\.sources: found count 9 for 'a', which has 6 training pairs, expected at most 6.*weight 1\.5"
    with pytest.raises(DataError, match=message):
        counts(mixture({"count": 9}))


def test_bad_rows_name_the_data_set(mixture: Any, files: dict[str, str]) -> None:
    with Path(files["b"]).open("a") as file:
        file.write("{oops\n")
    with pytest.raises(DataError, match=r"data\.sources, 'b', train: 1 rows cannot be used"):
        counts(mixture())


# Pairs, order and caches.


def test_pairs_are_those_of_each_file(mixture: Any, alone: Any, tmp_path: Path) -> None:
    """The tokens come from the cache of runs that used a file alone. Only the source differs."""
    expected = {pair.id: (name, pair) for name in SIZES for pair in loaded(alone(name))}
    entries = sorted((tmp_path / "cache" / "tokens").iterdir())
    pairs = loaded(mixture({"weight": 2}))
    assert sorted((tmp_path / "cache" / "tokens").iterdir()) == entries
    for number, pair in enumerate(pairs):
        source, single = expected[pair.id]
        assert (pair.source, pair.prompt_ids, pair.chosen_ids) == (source, single.prompt_ids, single.chosen_ids)
        assert (pair.index, pair.annotator) == (single.index, single.annotator)
        assert pairs.annotators[number] == pair.annotator
        assert pairs.piece_lengths[number].tolist() == [
            len(pair.prompt_ids),
            len(pair.chosen_ids),
            len(pair.rejected_ids),
        ]


def test_evaluation_stages_use_each_pair_once(mixture: Any) -> None:
    data = mixture({"weight": 2.5}, {"count": 1})
    for stage, expected in {"validation": 6, "test": 4}.items():
        pairs = loaded(data, stage)
        assert len({pair.id for pair in pairs}) == len(pairs) == expected


def epoch(loader: TrainingLoader, number: int) -> list[tuple[str, ...]]:
    loader.sampler.set_epoch(number)
    return [batch.ids for batch in loader]


def loader_of(data: PreferenceMixture) -> TrainingLoader:
    pairs = loaded(data)
    return TrainingLoader(pairs, data.training_batches(pairs, seed=3), PaddedLayout(pad_id=0))


def test_resume_continues_the_order(mixture: Any) -> None:
    settings = ({"weight": 1.5}, {"count": 7})
    whole = loader_of(mixture(*settings))
    expected = [epoch(whole, number) for number in range(2)]
    assert Counter(name for batch in expected[1] for name in batch) == counts(mixture(*settings))
    first = loader_of(mixture(*settings))
    stopped = iter(first)
    taken = [next(stopped).ids for _ in range(2)]
    resumed = loader_of(mixture(*settings))
    resumed.load_state_dict(first.state_dict())
    assert taken + epoch(resumed, 0) == expected[0]
    assert epoch(resumed, 1) == expected[1]
    other = loader_of(mixture({"weight": 1.5}, {"count": 6}))
    with pytest.raises(DataError, match="resume: found data order"):
        other.load_state_dict(first.state_dict())


@pytest.mark.parametrize("order", [None, SmallMarginsFirst()])
def test_label_noise_is_that_of_each_file(order: Any, mixture: Any, alone: Any) -> None:
    def flipped(data: PreferenceDataModule) -> list[tuple[str, bool]]:
        loaded(data)
        data.set_label_noise(LabelFlipNoise(rate=0.5, order=order, seed=1))
        return [(pair.id, pair.flipped) for pair in data.training_pairs]

    expected = {pair for name in SIZES for pair in flipped(alone(name))}
    assert {flip for _, flip in expected} == {False, True}
    assert set(flipped(mixture({"weight": 2}))) == expected


def test_label_noise_of_the_annotators_of_one_file(mixture: Any) -> None:
    data = mixture()
    loaded(data)
    data.set_label_noise(LabelFlipNoise(rate=1.0, order=UnreliableAnnotators(wrong=1.0), sources=["a"]))
    assert {(pair.source, pair.flipped) for pair in data.training_pairs} == {("a", True), ("b", False)}


def test_gold_labels_of_one_file(mixture: Any) -> None:
    data = mixture({"columns": Columns(gold="chosen"), "weight": 2})
    loaded(data)
    pairs = data.training_pairs
    assert pairs.has_gold.tolist() == [pair.has_gold for pair in pairs] == [pair.source == "a" for pair in pairs]
    assert set(pairs.has_gold) == {True, False}


def test_label_noise_by_name_and_with_marker(mixture: Any, make_trainer: Any, tmp_path: Path) -> None:
    data = mixture({"weight": 2}, {"name": "second"})
    noise = LabelFlipNoise(rate=1.0, seed=1, marker="[FLIP]", sources=["second"])
    trainer = make_trainer(max_steps=1, limit_val_batches=0, callbacks=[noise], default_root_dir=tmp_path)
    trainer.fit(DPO(policy=tiny(), reference="live"), datamodule=data)
    assert {(pair.source, pair.flipped) for pair in data.training_pairs} == {("a", False), ("second", True)}


# Runs of a trainer.


@pytest.mark.slow
def test_reference_values_are_shared(mixture: Any, alone: Any, make_trainer: Any) -> None:
    """A run on one file stores its values. The mixture computes those of the other file, and no value twice."""

    def fit(data: PreferenceDataModule) -> tuple[Any, dict[str, Any]]:
        module = DPO(policy=tiny(), reference="cached")
        make_trainer(max_epochs=1, limit_val_batches=0).fit(module, datamodule=data)
        return module.reference.passes["train"].pairs, {pair.id: pair.reference_logps for pair in data.training_pairs}

    first, of_a = fit(alone("a"))
    second, of_both = fit(mixture({"weight": 2}))
    third, of_b = fit(alone("b"))
    assert (first, second, third) == (6, 10, 0)
    assert of_both == of_a | of_b


@pytest.mark.slow
def test_metrics_are_those_of_each_file(mixture: Any, alone: Any, make_trainer: Any) -> None:
    """The oracle is a validation of each file alone."""

    def validate(data: PreferenceDataModule) -> dict[str, float]:
        metrics: dict[str, float] = make_trainer().validate(SimPO(policy=tiny()), datamodule=data, verbose=False)[0]
        return metrics

    together = validate(mixture({"weight": 3}))
    for name in SIZES:
        single = validate(alone(name))
        assert together[f"val/loss/{name}"] == pytest.approx(single["val/loss"], rel=1e-6)
        assert together[f"val/accuracy/{name}"] == single["val/rewards/accuracies"]
        assert together[f"val/pairs/{name}"] == 3
        assert f"val/loss/{name}" not in single
    assert together["val/loss/a"] != together["val/loss/b"]


def test_other_loaders_have_no_metrics_by_source(mixture: Any, make_trainer: Any) -> None:
    module, data = SimPO(policy=tiny()), mixture()
    make_trainer().validate(module, datamodule=data, verbose=False)
    loader = data.val_dataloader()
    (metrics,) = make_trainer().validate(module, dataloaders=loader, verbose=False)
    assert "val/loss" in metrics
    assert "val/loss/a" not in metrics


def test_report_says_how_often_pairs_are_used(mixture: Any) -> None:
    data = mixture({"weight": 1.5}, {"weight": 0.5})
    loaded(data)
    text, numbers = data._describe("train"), data._counts("train")
    assert "an epoch uses 9 pairs, so that it repeats pairs: 3 pairs once, 3 pairs twice" in text
    assert "an epoch uses 5 pairs: 5 pairs left out, 5 pairs once" in text
    assert (numbers["data/a/kept"], numbers["data/a/pairs"], numbers["data/b/pairs"]) == (6, 9, 5)
    assert numbers["data/kept"] == 16


def test_report_counts_prompts_in_training(write_rows: Any, tmp_path: Path) -> None:
    """Two prompts of the second file's validation split are in training: one in its own, one in the first file's."""

    def row(prompt: str, split: str) -> dict[str, str]:
        return {"prompt": prompt, "chosen": f"Good {split}.", "rejected": "Bad.", "split": split}

    first = write_rows([row("One?", "train"), row("Two?", "validation")], "a.jsonl")
    second = write_rows([row("Three?", "train"), *(row(p, "valid") for p in ("One?", "Three?", "Four?"))], "b.jsonl")
    sources = [MixtureSource(path=str(path)) for path in (first, second)]
    data = PreferenceMixture(sources, cache_dir=str(tmp_path / "cache"))
    for stage in ("train", "validation"):
        pairs = loaded(data, stage)
        assert pairs.prompts.tolist() == [pair.prompt for pair in pairs]
    assert "2 pairs have a prompt that is in training" in data._describe("validation")
    counts = data._counts("validation")
    assert (counts["data/b/prompts_in_training"], "data/a/prompts_in_training" in counts) == (2, False)
    assert counts["data/prompts_in_training"] == 2


@pytest.mark.parametrize(
    ("second", "prompts", "shared"),
    [
        ({}, range(40), 0),
        ({}, range(20, 60), 0),
        ({"validation_share": 0.4}, range(40), 5),
        ({"validation_by": "pair"}, range(40), 5),
        ({}, (2, 3), 1),  # the share selects neither of the two
    ],
)
def test_held_out_prompts_of_two_data_sets(
    second: dict[str, Any], prompts: Sequence[int], shared: int, write_rows: Any, tmp_path: Path
) -> None:
    """As docs/data.md says, a prompt is on one side under three conditions."""
    files = {"a": range(40), "b": prompts}
    paths = {
        name: write_rows(
            [{"prompt": f"{n}?", "chosen": f"{name}{k}.", "rejected": "Bad."} for n in each for k in range(3)],
            f"{name}.jsonl",
        )
        for name, each in files.items()
    }
    settings = {"a": {}, "b": second}
    sources = [MixtureSource(path=str(paths[name]), **({"validation_share": 0.2} | settings[name])) for name in files]
    data = PreferenceMixture(sources, cache_dir=str(tmp_path / "cache"))
    train, validation = ({pair.prompt for pair in loaded(data, stage)} for stage in ("train", "validation"))
    both = train & validation
    assert len(both) >= shared
    assert bool(both) == bool(shared)


def test_kept_examples_are_those_of_the_pairs(mixture: Any) -> None:
    """The longest pair is dropped: the last validation pair of the second file, which has the longest answers."""
    longest = int(loaded(mixture(), "validation").piece_lengths[:, [0, 2]].sum(1).max())
    data = mixture({"weight": 2}, max_length=longest - 1)
    for stage, count in (("train", 16), ("validation", 5)):
        pairs = loaded(data, stage)
        kept = [(example.source, example.id) for example in data.kept_examples(stage)]
        assert kept == list(dict.fromkeys((pair.source, pair.id) for pair in pairs))
        assert len(kept) == count


def test_mixture_errors_name_the_settings(write_rows: Any, tmp_path: Path) -> None:
    """The advice of the error helps."""
    path = str(
        write_rows([{"prompt": "Which?", "chosen": f"Good {n}.", "rejected": "Bad."} for n in range(20)], "votes.jsonl")
    )
    message = (
        r"'votes', validation: No pair is left.*by pair \(`validation_by: pair`\).*those of 'votes' in data\.sources"
    )
    with pytest.raises(DataError, match=f"(?s){message}"):
        loaded(PreferenceMixture([MixtureSource(path=path)], cache_dir=str(tmp_path)), "validation")
    data = PreferenceMixture([MixtureSource(path=path, validation_by="pair")], cache_dir=str(tmp_path))
    assert sum(len(loaded(data, stage)) for stage in ("train", "validation")) == 20


# Settings.


def test_sources_from_the_command_line(files: dict[str, str]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PreferenceDataModule, "data")
    sources = [
        {"path": files["a"], "weight": 2, "columns": {"prompt": "question"}},
        {"name": "second", "path": files["b"], "count": 3, "validation_share": 0.1},
    ]
    parsed = parser.parse_args(
        [
            f"--data={PreferenceMixture.__module__}.PreferenceMixture",
            f"--data.sources={json.dumps(sources)}",
            "--data.batch_size=2",
        ]
    )
    data = parser.instantiate(parsed).data
    assert list(data.sources) == ["a", "second"]
    assert (data.sources["a"].weight, data.sources["a"].columns.prompt) == (2, "question")
    assert (data.sources["second"].count, data.sources["second"].validation_share) == (3, 0.1)
    assert data.batch_size == 2


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], r"data\.sources: found no data set"),
        ([{"path": "x/a.jsonl"}, {"path": "y/a.jsonl"}], r"found 2 data sets named 'a', expected one\. Set name"),
        ([{"path": "org/prior"}], r"found a data set named 'prior', expected another name"),
        ([{"path": "a.jsonl", "weight": 0.0}], r"data\.sources\.weight: found 0\.0, expected a number above 0"),
        ([{"path": "a.jsonl", "count": 0}], r"data\.sources\.count: found 0, expected at least 1"),
        ([{"path": "a.jsonl", "count": 2, "weight": 2.0}], r"found weight 2\.0 together with count 2"),
        ([{"path": {"test": "a.jsonl"}}], r"data\.sources\.path: found files for \['test'\]"),
    ],
)
def test_settings_out_of_range(sources: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceMixture([MixtureSource(**source) for source in sources])
