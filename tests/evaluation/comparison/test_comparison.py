"""Tests of comparisons: which scores are tested, which are not, and the tables."""

from __future__ import annotations

import csv
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest

from lpc_lightning.evaluation.comparison.comparison import (
    Comparison,
    compare,
    holds_no_other_results,
    to_markdown,
    write_comparison,
)
from lpc_lightning.evaluation.comparison.model_scores import Item, Measure, ModelScores
from lpc_lightning.evaluation.statistics.significance import holm, paired_test

ARC = Measure("arc_easy", "acc")
MC2 = Measure("truthfulqa_mc2", "acc")


def model(name: str, items: int = 40, better: float = 0.0, **conditions: Any) -> ModelScores:
    """Make a model with a binary and a continuous measure. All models have the same items."""
    draw = random.Random(name)
    arc = {Item(number, f"hash {number}"): float(draw.random() < 0.4 + better) for number in range(items)}
    mc2 = {Item(number, f"hash {number}"): draw.random() * (0.5 + better) for number in range(items)}
    same = {"version": 1.0, "num_fewshot": 0, "limit": items} | conditions
    return ModelScores(
        name=name,
        scores={ARC: sum(arc.values()) / items, MC2: sum(mc2.values()) / items},
        stderrs={ARC: 0.05},
        items={ARC: arc, MC2: mc2},
        conditions={"arc_easy": same, "truthfulqa_mc2": same},
    )


def differences(comparison: Comparison) -> dict[tuple[Measure, str], Any]:
    return {(cell.measure, cell.model): cell.test for cell in comparison.cells if cell.test}


def test_compare_tests_against_first_model() -> None:
    base, one, two = model("base"), model("one", better=0.3), model("two")
    actual = compare([base, one, two])
    assert actual.models == ("base", "one", "two")
    assert [(cell.measure, cell.model) for cell in actual.cells] == [
        (measure, name) for measure in (ARC, MC2) for name in ("base", "one", "two")
    ]
    expected = {
        (measure, other.name): paired_test(list(base.items[measure].values()), list(other.items[measure].values()))
        for measure in (ARC, MC2)
        for other in (one, two)
    }
    assert differences(actual) == expected
    assert {test.method for test in expected.values()} == {"McNemar", "sign flips"}
    corrected = [cell.p_corrected for cell in actual.cells if cell.test]
    assert corrected == holm([test.p_value for test in expected.values()])
    for cell in actual.cells:
        scores = {"base": base, "one": one, "two": two}[cell.model]
        assert cell.value == scores.scores[cell.measure]
        assert cell.stderr == scores.stderrs.get(cell.measure)
        assert cell.note == ""


def test_compare_tests_prompts_as_wholes() -> None:
    """Four pairs of one prompt are flipped together. Documents without a prompt are independent."""
    base, other = model("base"), model("other", better=0.3)
    prompts = {item: f"prompt {index // 4}" for index, item in enumerate(base.items[ARC])}
    actual = compare([replace(base, prompts=prompts), other])
    first, second = (list(each.items[ARC].values()) for each in (base, other))
    expected = paired_test(first, second, clusters=[index // 4 for index in range(40)])
    assert differences(actual)[ARC, "other"] == expected
    assert {test.method for test in differences(actual).values()} == {"prompts"}
    assert {test.method for test in differences(compare([base, other])).values()} == {"McNemar", "sign flips"}


def test_compare_matches_items_in_any_order() -> None:
    base, other = model("base"), model("other", better=0.2)
    items = {measure: dict(reversed(item_scores.items())) for measure, item_scores in other.items.items()}
    turned = replace(other, items=items)
    assert compare([base, turned]).cells == compare([base, other]).cells


@pytest.mark.parametrize(
    ("other", "note"),
    [
        (model("other", version=2.0), "not comparable: version is 2.0, but 1.0 for base"),
        (model("other", num_fewshot=5), "not comparable: num_fewshot is 5, but 0 for base"),
        (model("other", items=10), "not comparable: limit is 10, but 40 for base"),
        (model("other", items=10, limit=40), "not comparable: only 10 of 40 items are the same"),
        (model("other", template="chat"), "not comparable: template is chat, but None for base"),
    ],
    ids=["version", "few-shot", "limit", "items", "condition of one model"],
)
def test_compare_skips_different_conditions(other: ModelScores, note: str) -> None:
    actual = compare([model("base"), other])
    assert differences(actual) == {}
    assert [cell.note for cell in actual.cells if cell.model == "other"] == [note, note]
    assert note in to_markdown(actual)
    assert all(cell.value is not None for cell in actual.cells)


@pytest.mark.parametrize("kinds", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_compare_notes_other_precision(kinds: tuple[str, str], tmp_path: Path) -> None:
    base, other = (replace(model(name), precision=kind) for name, kind in zip(("base", "other"), kinds, strict=True))
    actual, plain = compare([base, other]), compare([model("base"), model("other")])
    assert differences(actual) == differences(plain)
    note = f"evaluated in {kinds[1]}, and base in {kinds[0]}"
    assert [cell.note for cell in actual.cells] == ["", note, "", note]
    assert to_markdown(actual) == f"{to_markdown(plain)}\n\nother was {note}: its differences include rounding errors."
    write_comparison(tmp_path, actual)
    assert [row["note"] for row in json.loads((tmp_path / "comparison.json").read_text())] == ["", note, "", note]


@pytest.mark.parametrize("kinds", [("float32", "float32"), ("bfloat16", None), (None, "float32")])
def test_compare_same_or_unknown_precision(kinds: tuple[str | None, str | None]) -> None:
    base, other = (replace(model(name), precision=kind) for name, kind in zip(("base", "other"), kinds, strict=True))
    assert compare([base, other]) == compare([model("base"), model("other")])


def test_compare_notes_other_template() -> None:
    """A task without a template on record, such as a benchmark without one, has no note."""
    base, other = (replace(model(name), templates={"arc_easy": name}) for name in ("base", "other"))
    actual, plain = compare([base, other]), compare([model("base"), model("other")])
    assert differences(actual) == differences(plain)
    note = "evaluated on arc_easy with another template than base"
    assert [cell.note for cell in actual.cells] == ["", note, "", ""]
    assert to_markdown(actual) == f"{to_markdown(plain)}\n\nother was {note}: its differences include the template's."
    base, other = replace(base, precision="float32"), replace(other, precision="bfloat16")
    assert compare([base, other]).cells[1].note == f"evaluated in bfloat16, and base in float32; {note}"
    assert compare([base, replace(base, name="other")]).cells[1].note == ""


def test_compare_skips_differing_task_only() -> None:
    other = model("other")
    other = replace(other, conditions=other.conditions | {"arc_easy": {"version": 9}})
    assert list(differences(compare([model("base"), other]))) == [(MC2, "other")]


def test_compare_distinguishes_items_by_hash() -> None:
    other = model("other")
    changed = {
        Item(item.doc_id, "new" if item.doc_id == 3 else item.doc_hash): v for item, v in other.items[ARC].items()
    }
    actual = compare([model("base"), replace(other, items=other.items | {ARC: changed})])
    assert [cell.note for cell in actual.cells if cell.note] == ["not comparable: only 39 of 41 items are the same"]


def test_compare_scores_without_items() -> None:
    base, other = model("base"), model("other")
    other = replace(other, items={ARC: other.items[ARC]})
    actual = compare([base, other])
    assert actual.cells[3].note == "no test: the score is not a mean of stored item scores"


def test_compare_single_item() -> None:
    actual = compare([model("base", items=1), model("other", items=1)])
    assert {cell.note for cell in actual.cells if cell.model == "other"} == {"no test: there is one prompt"}


def test_compare_missing_task() -> None:
    other = model("other")
    other = replace(other, scores={ARC: 0.5})
    actual = compare([model("base"), other])
    assert (actual.cells[3].value, actual.cells[3].note) == (None, "other was not evaluated")
    turned = compare([replace(other, name="base"), model("other")])
    assert turned.cells[3].note == "base was not evaluated"


@pytest.fixture
def small() -> Comparison:
    """Comparison with six items on which `better` is right, a score without items, and other few-shot examples."""
    items = {name: {Item(n, str(n)): score for n in range(6)} for name, score in (("base", 0.0), ("better", 1.0))}
    perplexity = Measure("wikitext", "word_perplexity")
    models = [
        ModelScores(
            name, {ARC: scores[Item(0, "0")], perplexity: 12.5}, {ARC: 0.1}, {ARC: scores}, {"arc_easy": {"shots": 0}}
        )
        for name, scores in items.items()
    ]
    other = replace(models[0], name="other", scores={ARC: 0.25}, conditions={"arc_easy": {"shots": 3}})
    return compare([*models, other])


def test_to_markdown_text(small: Comparison) -> None:
    assert to_markdown(small) == (
        "| task     | metric          |            base |            better |           other |\n"
        "| -------- | --------------- | --------------: | ----------------: | --------------: |\n"
        "| arc_easy | acc             | 0.0000 ± 0.1000 | 1.0000 ± 0.1000 * | 0.2500 ± 0.1000 |\n"
        "| wikitext | word_perplexity |         12.5000 |           12.5000 |               - |\n"
        "\n"
        "Score ± standard error. Below: differences to base, with 95 % intervals. p: McNemar's exact test if all items "
        "score 0 or 1,\n"
        "else sign flips of items, or of whole prompts where pairs share one. Holm: corrected for all tests "
        "shown. *: Holm below 0.05.\n"
        "\n"
        "| task     | metric | model  | difference |      95 % interval |     p |  Holm | items |\n"
        "| -------- | ------ | ------ | ---------: | -----------------: | ----: | ----: | ----: |\n"
        "| arc_easy | acc    | better |    +1.0000 | [+0.2917, +1.0000] | 0.031 | 0.031 |     6 |\n"
        "\n"
        "| task     | model  | not compared                                           | metrics         |\n"
        "| -------- | ------ | ------------------------------------------------------ | --------------- |\n"
        "| arc_easy | other  | not comparable: shots is 3, but 0 for base             | acc             |\n"
        "| wikitext | better | no test: the score is not a mean of stored item scores | word_perplexity |"
    )


def test_write_comparison_files_agree(small: Comparison, tmp_path: Path) -> None:
    write_comparison(tmp_path, small)
    assert (tmp_path / "comparison.md").read_text() == to_markdown(small) + "\n"
    rows = json.loads((tmp_path / "comparison.json").read_text())
    with (tmp_path / "comparison.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(rows) == len(lines) == 6
    for row, line, cell in zip(rows, lines, small.cells, strict=True):
        assert line == {name: "" if value is None else str(value) for name, value in row.items()}
        assert (row["task"], row["metric"], row["model"]) == (*cell.measure, cell.model)
        assert (row["value"], row["stderr"], row["baseline"]) == (cell.value, cell.stderr, "base")
        assert row["p_corrected"] == cell.p_corrected
        assert row["p_value"] == (cell.test.p_value if cell.test else None)


def test_a_comparison_of_other_results_stays(small: Comparison, tmp_path: Path) -> None:
    path, models = tmp_path / "comparison.json", [ModelScores(name, {}, folder=name) for name in small.models]
    assert holds_no_other_results(path, models[:1])
    write_comparison(tmp_path, replace(small, folders=small.models))
    assert holds_no_other_results(path, [ModelScores("another", {}), *models])
    assert not holds_no_other_results(path, models[:2])
    assert not holds_no_other_results(path, [*models[:-1], replace(models[-1], folder="other-2")])
    path.write_text("notes")
    assert not holds_no_other_results(path, models)


def test_missing_numbers_are_null_in_json(tmp_path: Path) -> None:
    write_comparison(tmp_path, compare([ModelScores("base", {ARC: math.nan}), ModelScores("one", {ARC: 0.5})]))
    rows = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert [row["value"] for row in rows] == [None, 0.5]


def test_to_markdown_of_one_model() -> None:
    text = to_markdown(compare([model("alone")]))
    assert text.count("\n\n") == 0
    assert "alone" in text


def test_comparison_without_a_score(tmp_path: Path) -> None:
    """Every task of both models failed. pandas finds the columns of other comparisons."""
    write_comparison(tmp_path, compare([model("base"), model("one")]), "full")
    write_comparison(tmp_path, compare([ModelScores("base", {}), ModelScores("one", {})]), "empty")
    full, empty = (pandas.read_csv(tmp_path / f"{name}.csv") for name in ("full", "empty"))
    assert empty.empty
    assert list(empty.columns) == list(full.columns)
