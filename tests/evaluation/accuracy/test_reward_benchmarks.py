"""Tests of RM-Bench and RewardBench: forms of rows, and scores against the benchmarks' own rules in loops."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lpc_lightning.data import Columns, DataError
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.evaluation.accuracy.reward_benchmarks import (
    PLAIN,
    REWARD_BENCH,
    RM_BENCH,
    SECTIONS,
    find_form,
    reward_bench,
    rm_bench,
)
from lpc_lightning.evaluation.accuracy.scored_pairs import PairsFile, score_pairs
from lpc_lightning.inference.opening import OpenedPolicy
from lpc_lightning.policy import TinyPolicy

SUBSETS = [name for weights in SECTIONS.values() for name in weights]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def styled(number: int, domain: str | None = "chat") -> dict[str, Any]:
    """Return a row of RM-Bench."""
    answers = {
        kind: [f"{kind} {number} " + "word " * (number % 3 + style) for style in range(3)]
        for kind in ("chosen", "rejected")
    }
    return {"id": number, "prompt": f"Say {number}.", **answers} | ({} if domain is None else {"domain": domain})


def graded(number: int, subset: str) -> dict[str, Any]:
    """Return a row of RewardBench."""
    answers = {"chosen": "yes " * (number % 4 + 1), "chosen_model": "a", "rejected": f"no {number}"}
    return {"id": number, "prompt": f"Say {number}.", **answers, "rejected_model": "b", "subset": subset}


# Scores


def random_rewards(count: int, seed: int) -> list[list[float]]:
    """Return rewards of three chosen and three rejected answers for each row. Some are equal."""
    generator = random.Random(seed)
    return [[float(generator.randint(0, 4)) for _ in range(6)] for _ in range(count)]


def matrix_accuracies(rows: list[list[float]]) -> dict[str, float]:
    """Compute RM-Bench's accuracies from a 3 x 3 matrix, as in its README."""
    matrix = np.zeros((3, 3))
    for rewards in rows:
        for i in range(3):
            for j in range(3):
                matrix[i][j] += rewards[i] > rewards[3 + j]
    matrix /= len(rows)
    return {
        "hard": np.triu(matrix, 1).sum() / 3, "normal": matrix.diagonal().mean(), "easy": np.tril(matrix, -1).sum() / 3,
    }  # fmt: skip


def test_rm_bench_scores_against_the_matrix() -> None:
    domains = {"chat": ["chat"], "code": ["code"], "safety": ["safety-refuse", "safety-response"]}
    margins, rows = [], {}
    for seed, (domain, names) in enumerate(domains.items()):
        rows[domain] = random_rewards(7, seed)
        for number, rewards in enumerate(rows[domain]):
            factor = names[number % len(names)]
            margins += [
                ({"id": f"{number} {i} {j}", "factor": factor}, rewards[i] - rewards[3 + j])
                for i in range(3) for j in range(3)
            ]  # fmt: skip
    actual = rm_bench([*margins, ({"id": "incomplete 0 0", "factor": "chat"}, 1.0)])
    expected = {domain: matrix_accuracies(each) for domain, each in rows.items()}
    means = {domain: np.mean(list(levels.values())) for domain, levels in expected.items()}
    assert actual["average"] == pytest.approx(np.mean(list(means.values())))
    for level in ("easy", "normal", "hard"):
        assert actual[level] == pytest.approx(np.mean([expected[domain][level] for domain in domains]))
        for domain in domains:
            assert actual[f"domain/{domain}/{level}"] == pytest.approx(expected[domain][level])
    assert {domain: actual[f"domain/{domain}"] for domain in domains} == pytest.approx(means)


def test_rm_bench_without_domains_has_levels_only() -> None:
    rows = random_rewards(5, seed=3)
    margins = [
        ({"id": f"{number} {i} {j}", "factor": ""}, rewards[i] - rewards[3 + j])
        for number, rewards in enumerate(rows) for i in range(3) for j in range(3)
    ]  # fmt: skip
    expected = matrix_accuracies(rows)
    assert rm_bench(margins) == pytest.approx(expected | {"average": np.mean(list(expected.values()))})


@pytest.mark.parametrize("absent", [None, "math-prm"])
def test_reward_bench_scores_against_the_counts(absent: str | None) -> None:
    generator = random.Random(0)
    names = [name for name in [*SUBSETS, "my-own"] if name != absent]
    margins = [({"id": str(n), "factor": name}, float(generator.randint(-2, 2))) for n in range(9) for name in names]
    right = {name: [margin > 0 for labels, margin in margins if labels["factor"] == name] for name in names}
    accuracies = {name: sum(values) / len(values) for name, values in right.items()}
    sections = {}
    for section, counts in SECTIONS.items():
        score = examples = 0.0
        for name, count in counts.items():
            if name in accuracies:
                score, examples = score + accuracies[name] * count, examples + count
        sections[section] = score / examples
    actual = reward_bench(margins)
    assert {name: actual[f"subset/{name}"] for name in names} == pytest.approx(accuracies)
    assert {name: actual[f"section/{name}"] for name in SECTIONS} == pytest.approx(sections)
    assert actual["average"] == pytest.approx(sum(sections.values()) / 4)


def test_reward_bench_weights_are_published() -> None:
    """`EXAMPLE_COUNTS` of `rewardbench/constants.py`, in its order of sections; an average needs every section."""
    assert [list(weights.values()) for weights in SECTIONS.values()] == [
        [100, 95, 95, 28, 40],
        [37, 100, 134, 92, 47, 46],
        [100, 100, 250, 154, 136],
        [984, *[164] * 6],
    ]
    assert SUBSETS[11:16] == [
        *("refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond", "donotanswer")
    ]
    assert "average" not in reward_bench([({"id": "0", "factor": "hep-go"}, 1.0)])


# Rows


def test_form_is_found_by_the_first_row(tmp_path: Path) -> None:
    plain = {"prompt": "p", "chosen": "a", "rejected": "b"}
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]
    rows = {RM_BENCH: [styled(0)], REWARD_BENCH: [graded(0, "hep-go")]}
    assert {form: find_form(write(tmp_path / f"{form.name}.jsonl", each)) for form, each in rows.items()} == {
        form: form for form in rows
    }
    for number, row in enumerate((plain, {**plain, "chosen": turns, "rejected": [*turns[:1], turns[1]]})):
        assert find_form(write(tmp_path / f"{number}.jsonl", [row])) is PLAIN


@pytest.mark.parametrize(("limit", "rows"), [(None, 4), (2, 2), (0.3, 2)])
def test_styles_become_nine_pairs(limit: float | None, rows: int, tmp_path: Path) -> None:
    pairs = PairsFile(write(tmp_path / "rm.jsonl", [styled(n, "math") for n in range(4)]), limit=limit)
    source, report = pairs.source("test"), DataReport()
    assert source is not None
    examples = list(source.read(report))
    assert report.read == len(examples) == 9 * rows
    assert [(each.id, each.chosen, each.rejected) for each in examples] == [
        (f"{n} {i} {j}", styled(n)["chosen"][i], styled(n)["rejected"][j])
        for n in range(rows) for i in range(3) for j in range(3)
    ]  # fmt: skip
    assert {each.factor for each in examples} == {"math"}


def test_row_of_another_form_is_refused(tmp_path: Path) -> None:
    rows = [styled(0), {**styled(1), "chosen": ["only", "two"]}]
    pairs = PairsFile(write(tmp_path / "rm.jsonl", rows), columns=Columns(), cache_dir=str(tmp_path))
    report = DataReport()
    source = pairs.source("test")
    assert source is not None
    assert len(list(source.read(report))) == 9
    assert sum(report.bad.values()) == 1
    with pytest.raises(DataError, match=r"1 rows cannot be used"):
        score_pairs(opened(), pairs, None)


# Results


def opened() -> OpenedPolicy:
    torch.manual_seed(0)
    spec = TinyPolicy(width=16, layers=1, heads=2)
    return OpenedPolicy("plain", "model", spec.build().requires_grad_(False), spec.load_tokenizer())


def test_scores_of_a_policy_against_single_answers(tmp_path: Path) -> None:
    """Rewards of each answer on its own: the sum and the mean of its tokens' log-probabilities."""
    policy = opened()
    path = write(tmp_path / "rm.jsonl", [styled(n, None) for n in range(3)])
    pairs = PairsFile(path, cache_dir=str(tmp_path / "cache"), task="preferences-rm")
    results = score_pairs(policy, pairs, None)
    store = pairs.load("test", policy.tokenizer)
    assert store is not None
    rewards: dict[str, list[list[float]]] = {"summed": [], "per_token": []}
    by_id = {pair.id: pair for pair in store}
    for number in range(3):
        answers = [by_id[f"{number} {style} {style}"].chosen_ids for style in range(3)]
        answers += [by_id[f"{number} {style} {style}"].rejected_ids for style in range(3)]
        sums = [logp(policy, by_id[f"{number} 0 0"].prompt_ids, answer) for answer in answers]
        rewards["summed"].append(sums)
        rewards["per_token"].append([total / len(answer) for total, answer in zip(sums, answers, strict=True)])
    scores = results.record["tasks"]["preferences-rm"]["scores"]
    for scale, rows in rewards.items():
        expected = matrix_accuracies(rows)
        assert {level: scores[f"prior/{scale}"][level] for level in expected} == pytest.approx(expected)
        assert results.metrics["preferences-rm"][f"rm_bench/hard/prior/{scale}"] == pytest.approx(expected["hard"])
    assert scores["prior/summed"] != scores["prior/per_token"], "the lengths must matter"


@pytest.mark.parametrize("ids", [["7", "7"], [None, None], ["7 0", "7"]])
def test_every_row_counts_whatever_its_id(ids: list[str | None], tmp_path: Path) -> None:
    """The answers of the second row are those of the first, exchanged, so that one of them is right."""
    first = styled(0) | {"id": ids[0]}
    second = first | {"id": ids[1], "chosen": first["rejected"], "rejected": first["chosen"]}
    other = styled(1) | {"id": "8"}
    path = write(tmp_path / "rm.jsonl", [first, second, other])
    scores = score_pairs(opened(), PairsFile(path, cache_dir=str(tmp_path)), None).record["tasks"]["preferences"]
    alone = write(tmp_path / "one.jsonl", [other])
    rest = score_pairs(opened(), PairsFile(alone, cache_dir=str(tmp_path)), None).record["tasks"]["preferences"]
    for scale in ("prior/summed", "prior/per_token"):
        expected = (1 + rest["scores"][scale]["average"]) / 3
        assert scores["scores"][scale]["average"] == pytest.approx(expected)


def test_id_column_of_style_pairs(tmp_path: Path) -> None:
    rows = [{"uid": 5, **{name: cell for name, cell in styled(n).items() if name != "id"}} for n in range(2)]
    pairs = PairsFile(write(tmp_path / "rm.jsonl", rows), columns=Columns(id="uid"))
    source = pairs.source("test")
    assert source is not None
    ids = [each.id for each in source.read(DataReport())]
    assert ids == [f"{name} {i} {j}" for name in ("5", "5-2") for i in range(3) for j in range(3)]


@torch.no_grad()
def logp(policy: OpenedPolicy, prompt: list[int], answer: list[int]) -> float:
    model: Any = policy.policy.causal_lm
    logps = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(float(logps[len(prompt) - 1 + index, token]) for index, token in enumerate(answer))
