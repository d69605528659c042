from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpc_lightning.data.synthetic import PreferenceGenerator
from lpc_lightning.data.synthetic.attributes import ATTRIBUTES, attribute_of, opposite
from lpc_lightning.types import PreferenceExample

MODES = ("visible", "hidden")


def text_of(pair: PreferenceExample) -> list[str]:
    return [*(turn["content"] for turn in pair.prompt), pair.chosen, pair.rejected]


def digest(pairs: list[PreferenceExample]) -> str:
    return hashlib.sha256(json.dumps([asdict(pair) for pair in pairs], sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize("deciding", MODES)
def test_pair_depends_on_settings_split_and_index(deciding: str) -> None:
    few = PreferenceGenerator(deciding, seed=3).examples(20, "validation")
    many = PreferenceGenerator(deciding, seed=3).examples(60, "validation")
    assert many[:20] == few
    assert PreferenceGenerator(deciding, seed=4).examples(20, "validation") != few
    assert [pair.prompt for pair in PreferenceGenerator(deciding, seed=3).examples(20, "test")] != [
        pair.prompt for pair in few
    ]


def test_visible_pairs_ignore_annotators() -> None:
    assert PreferenceGenerator(annotators=1).examples(10) == PreferenceGenerator(annotators=9).examples(10)


@pytest.mark.slow
def test_pairs_are_equal_in_another_process() -> None:
    """Under another seed of `hash`, sets have another order. The rest of `lpc_lightning.data` takes long to import."""
    code = (
        "import gc, json, hashlib, sys, types; gc.disable(); from dataclasses import asdict; import lpc_lightning\n"
        "sys.modules['lpc_lightning.data'] = data = types.ModuleType('lpc_lightning.data')\n"
        "data.__path__ = [f'{lpc_lightning.__path__[0]}/data']\n"
        "from lpc_lightning.data.synthetic import PreferenceGenerator\n"
        "pairs = PreferenceGenerator('hidden', 6, 5).examples(40, 'test')\n"
        "print(hashlib.sha256(json.dumps([asdict(p) for p in pairs], sort_keys=True).encode()).hexdigest())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == digest(PreferenceGenerator("hidden", 6, 5).examples(40, "test"))


@pytest.mark.parametrize("deciding", MODES)
def test_rows_are_complete(deciding: str) -> None:
    generator = PreferenceGenerator(deciding, seed=1)
    truth = generator.truth
    for index, pair in enumerate(generator.examples(500)):
        assert pair.id == f"{deciding}-train-{index:06d}"
        assert [turn["role"] for turn in pair.prompt] == ["user"]
        assert pair.source in truth.domains
        assert not pair.flipped
        chosen, rejected = pair.meta["chosen_style"], pair.meta["rejected_style"]
        attribute = pair.meta["attribute"]
        assert attribute == attribute_of(pair.factor)
        assert chosen[attribute] == pair.factor
        assert rejected[attribute] == opposite(pair.factor)
        assert chosen.keys() == rejected.keys() == ATTRIBUTES.keys() == truth.attributes.keys()
        assert sum(chosen[name] != rejected[name] for name in ATTRIBUTES) >= 2
        assert pair.meta["best_accuracy"] == truth.best_accuracy
        if deciding == "visible":
            assert pair.annotator == ""
            assert pair.factor == truth.domain_factors[pair.source]
        else:
            assert pair.factor == truth.annotator_factors[pair.annotator]
    json.dumps(asdict(truth))


def test_visible_domains_have_opposite_factors() -> None:
    for seed in range(20):
        truth = PreferenceGenerator(seed=seed).truth
        factors = list(truth.domain_factors.values())
        assert list(truth.domain_factors) == list(truth.domains)
        assert len({attribute_of(factor) for factor in factors}) == 5
        assert sorted(factors) == sorted(map(opposite, factors)) == list(truth.factors)
        assert truth.best_accuracy == 1.0
        assert truth.blind_accuracy == 0.5
        assert truth.annotator_factors == {}
    assert len({tuple(PreferenceGenerator(seed=s).truth.domain_factors.items()) for s in range(20)}) == 20


@given(annotators=st.integers(2, 30), seed=st.integers(-(2**40), 2**40))
@settings(max_examples=25)
def test_hidden_annotators_have_conflicting_factors(annotators: int, seed: int) -> None:
    truth = PreferenceGenerator("hidden", annotators, seed).truth
    held = Counter(truth.annotator_factors.values())
    assert list(truth.annotator_factors) == [f"annotator-{index}" for index in range(annotators)]
    assert len(held) == min(4, annotators)
    assert max(held.values()) - min(held.values()) <= 1
    assert any(opposite(factor) in held for factor in held)
    assert 0.5 <= truth.best_accuracy < 0.81
    assert truth.domain_factors == {}


def test_hidden_annotators_appear_in_column_only() -> None:
    for pair in PreferenceGenerator("hidden").examples(2000):
        rest = asdict(pair)
        assert rest.pop("annotator").startswith("annotator-")
        assert "annotator" not in json.dumps(rest)


def test_hidden_annotators_ignore_the_prompt() -> None:
    n = 6000
    pairs = PreferenceGenerator("hidden", annotators=4).examples(n)
    cells = Counter((pair.source, pair.annotator) for pair in pairs)
    assert len(cells) == 40
    share = 1 / 40
    assert all(abs(count - n * share) < 5 * (n * share * (1 - share)) ** 0.5 for count in cells.values())
    for word in ("student", "commute", "How", "advice"):
        with_word = [pair for pair in pairs if word in pair.prompt[0]["content"]]
        for _, count in Counter(pair.annotator for pair in with_word).items():
            assert abs(count - len(with_word) / 4) < 5 * (len(with_word) * 3 / 16) ** 0.5


@pytest.mark.parametrize("deciding", MODES)
def test_no_other_attribute_predicts_the_label(deciding: str) -> None:
    conflicts: Counter[tuple[str, str]] = Counter()
    first_value_won: Counter[tuple[str, str]] = Counter()
    shared_first_value: Counter[tuple[str, str]] = Counter()
    pairs: Counter[str] = Counter()
    for pair in PreferenceGenerator(deciding, seed=2).examples(8000):
        pairs[pair.factor] += 1
        for name, values in ATTRIBUTES.items():
            if name == pair.meta["attribute"]:
                continue
            chosen, rejected = pair.meta["chosen_style"][name], pair.meta["rejected_style"][name]
            conflicts[pair.factor, name] += chosen != rejected
            first_value_won[pair.factor, name] += chosen != rejected and chosen == values[0]
            shared_first_value[pair.factor, name] += chosen == rejected == values[0]
    assert len(conflicts) == 6 * len(pairs)
    for (factor, name), differ in conflicts.items():
        n, same = pairs[factor], pairs[factor] - differ
        assert abs(differ - n * 32 / 63) < 5 * (n / 4) ** 0.5
        assert abs(first_value_won[factor, name] - differ / 2) < 5 * (differ / 4) ** 0.5
        assert abs(shared_first_value[factor, name] - same / 2) < 5 * (same / 4) ** 0.5


def test_length_does_not_predict_the_label() -> None:
    # The deciding factor is not the length, so the number of words must not predict the label.
    generator = PreferenceGenerator(seed=0)
    pairs = [pair for pair in generator.examples(8000) if pair.meta["attribute"] != "length"]
    longer = [len(pair.chosen.split()) > len(pair.rejected.split()) for pair in pairs]
    assert abs(sum(longer) - len(longer) / 2) < 0.02 * len(longer)


@pytest.mark.parametrize("deciding", MODES)
def test_splits_are_disjoint_and_diverse(deciding: str) -> None:
    generator = PreferenceGenerator(deciding)
    prompts = {}
    for split, n in (("train", 4000), ("validation", 1000), ("test", 1000)):
        pairs = generator.examples(n, split)
        prompts[split] = {pair.prompt[0]["content"] for pair in pairs}
        assert len(prompts[split]) > 0.98 * n
        assert len({text for pair in pairs for text in (pair.chosen, pair.rejected)}) > 0.995 * 2 * n
        assert all(pair.chosen != pair.rejected for pair in pairs)
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["validation"] & prompts["test"]


def test_generator_is_fast() -> None:
    generator = PreferenceGenerator()
    seconds = []
    for _ in range(3):
        start = time.process_time()
        generator.examples(500)
        seconds.append(time.process_time() - start)
    assert 500 / min(seconds) > 5000


def test_generator_is_picklable() -> None:
    generator = PreferenceGenerator("hidden", seed=7)
    assert pickle.loads(pickle.dumps(generator)).examples(5) == generator.examples(5)


def test_generator_edge_cases() -> None:
    assert PreferenceGenerator().examples(0) == []
    assert PreferenceGenerator("hidden", annotators=2).truth.best_accuracy == 0.5


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match=r"deciding: found 'shown', expected 'visible' or 'hidden'"):
        PreferenceGenerator("shown")
    with pytest.raises(ValueError, match=r"annotators: found 1, expected at least 2"):
        PreferenceGenerator("hidden", annotators=1)
    with pytest.raises(ValueError, match=r"n: found -1, expected 0 or more"):
        PreferenceGenerator().examples(-1)
    with pytest.raises(ValueError, match=r"split: found 'dev', expected one of train, validation, test"):
        PreferenceGenerator().examples(1, split="dev")
