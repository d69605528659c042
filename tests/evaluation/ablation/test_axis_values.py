"""Tests of the values of an axis: from YAML and from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.ablation.grids.grid import Grid, read_grid

NO_VALUE = r"found .*, which is a {kind}, expected a number, a text, true, false, null, or lists and mappings of these"


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Grid]:
    """Function that reads a grid with an axis and a seed, whose values are YAML."""

    def read(values: str = "[1]", seeds: str = "[1]", tune: str = "null", axis: str = "key: data.revision") -> Grid:
        path = tmp_path / "grid.yaml"
        seed = f"{{key: seed_everything, values: {seeds}}}"
        rate = "" if tune == "null" else ", lr: {key: model.optimizer.lr}"
        path.write_text(f"base: []\naxes: {{a: {{{axis}, values: {values}}}, seed: {seed}{rate}}}\ntune: {tune}\n")
        return read_grid(path)

    return read


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ("[2024-01-01, 2024-01-02]", ["2024-01-01", "2024-01-02"]),
        ("[2024-01-01 10:30:00]", ["2024-01-01T10:30:00"]),
        ("[2024-01-01T10:30:00Z]", ["2024-01-01T10:30:00+00:00"]),
        ("[[2024-01-01, 2], {day: 2024-01-01}]", ['["2024-01-01", 2]', '{"day": "2024-01-01"}']),
        ("[{2024-01-01: 1}]", ['{"2024-01-01": 1}']),
        ("['2024-01-01']", ["2024-01-01"]),
    ],
)
def test_dates_are_texts(read: Callable[..., Grid], values: str, texts: list[str]) -> None:
    cells = read(values).cells()
    assert [cell.arguments[0] for cell in cells] == [f"--data.revision={text}" for text in texts]


def test_dates_of_other_places(read: Callable[..., Grid]) -> None:
    tune = "{axis: lr, values: [0.1, 0.2], seeds: [2024-01-01], by: val/loss}"
    assert read(tune=tune).tune.seeds == ("2024-01-01",)  # type: ignore[union-attr]  # the grid has a tuned axis
    assert read(tune=tune).with_changes(["tune.seeds=2024-01-02"]).tune.seeds == ("2024-01-02",)  # type: ignore[union-attr]
    changed = read().with_changes(["seed=2024-01-01", "a=2024-01-01"])
    assert changed.cells()[0].name == "a=2024-01-01,seed=2024-01-01"
    named = read("[2024-01-01 10:30:00]", axis="2024-01-01 10:30:00: [--data.revision=x]")
    assert named.cells()[0].arguments[0] == "--data.revision=x"


@pytest.mark.parametrize(
    ("value", "kind"), [("!!set {1}", "set"), ("!!binary aGk=", "bytes"), ("!!omap [a: 1]", "tuple")]
)
def test_values_that_json_has_not_are_refused(read: Callable[..., Grid], value: str, kind: str) -> None:
    message = rf"a: {NO_VALUE.format(kind=kind)}"
    with pytest.raises(ConfigError, match=message):
        read(f"[{value}]")
    with pytest.raises(ConfigError, match=message):
        read(f"[[1, {value}]]")
    with pytest.raises(ConfigError, match=rf"seed: {NO_VALUE.format(kind=kind)}"):
        read().with_changes([f"seed=[{value}]"])


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,2", [1, 2]),
        ("[1,2],[3]", [[1, 2], [3]]),
        ("[[1,2],[3]], 4", [[[1, 2], [3]], 4]),
        ("{a: 1, b: [2, 3]},null", [{"a": 1, "b": [2, 3]}, None]),
        ("'a,b',c", ["a,b", "c"]),
        ('"a,\\"b",c', ['a,"b', "c"]),
        ("'it''s, b',c", ["it's, b", "c"]),
        ('["a]",b],c', [["a]", "b"], "c"]),
        ("['x,]', {y: '}'}],c", [["x,]", {"y": "}"}], "c"]),
        ("it's,b's", ["it's", "b's"]),
        ("a[1,b]2", ["a[1", "b]2"]),
        ("", [None]),
        ("1,,2", [1, None, 2]),
    ],
)
def test_values_of_a_change(read: Callable[..., Grid], text: str, values: list[Any]) -> None:
    (axis, _) = read().with_changes([f"a={text}"]).axes
    assert list(axis.values) == values


@pytest.mark.parametrize("text", ["[1,2", "'a,b", "{a: [1}"])
def test_open_bracket_in_a_change_is_refused(read: Callable[..., Grid], text: str) -> None:
    with pytest.raises(ConfigError, match="a: found text that is no YAML"):
        read().with_changes([f"a={text},3"])
