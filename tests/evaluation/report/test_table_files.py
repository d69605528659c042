"""Tests of table files, character by character."""

from __future__ import annotations

import csv
from pathlib import Path

import pandas
import pytest

from lpc_lightning.evaluation.report.contrasts import contrasts
from lpc_lightning.evaluation.report.runs.records import RunRecord
from lpc_lightning.evaluation.report.study import LeftOut, make_study
from lpc_lightning.evaluation.report.table_files import (
    Cell,
    Column,
    Table,
    number_cell,
    text_cell,
    to_latex,
    to_markdown,
    write_table,
)
from lpc_lightning.evaluation.report.tables import contrasts_table, left_out_table

TABLE = Table(
    "means",
    "Means over seeds",
    [Column("latent_space"), Column("accuracy", True), Column("95 % interval", True)],
    [
        [text_cell("none"), number_cell(0.12345678901234567), Cell("[0.1, 0.2]", 0.1)],
        [text_cell("a & b <c>"), number_cell(None), Cell("-")],
    ],
    [{"latent": "none", "mean": 0.12345678901234567}, {"latent": "a & b", "mean": None, "n": 0}],
    ["How to read it."],
)


def test_to_markdown() -> None:
    assert to_markdown(TABLE) == (
        "## Means over seeds\n\n"
        "| latent_space | accuracy | 95 % interval |\n"
        "| ------------ | -------: | ------------: |\n"
        "| none         |   0.1235 |    [0.1, 0.2] |\n"
        "| a & b &lt;c> |        - |             - |\n\n"
        "How to read it.\n"
    )


def test_to_latex() -> None:
    assert to_latex(TABLE) == (
        "% Means over seeds\n"
        "% How to read it.\n"
        "\\begin{tabular}{lrr}\n"
        "\\toprule\n"
        "latent\\_space & accuracy & 95 \\% interval \\\\\n"
        "\\midrule\n"
        "none & 0.1235 & [0.1, 0.2] \\\\\n"
        "a \\& b $<$c$>$ & - & - \\\\\n"
        "\\bottomrule\n"
        "\\end{tabular}\n"
    )


def test_to_latex_protects_row_starts() -> None:
    table = Table("t", "T", [Column("x")], [[Cell("[0, 1]")], [Cell("* 3")], [Cell("\\x{y}^~$#")]], [])
    assert to_latex(table).splitlines()[5:8] == [
        "{}[0, 1] \\\\",
        "{}* 3 \\\\",
        "\\textbackslash{}x\\{y\\}\\textasciicircum{}\\textasciitilde{}\\$\\# \\\\",
    ]


def test_write_table_keeps_every_digit(tmp_path: Path) -> None:
    write_table(tmp_path, TABLE)
    with (tmp_path / "means.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert float(first["mean"]) == 0.12345678901234567
    assert first["n"] == ""
    assert second == {"latent": "a & b", "mean": "", "n": "0"}
    assert (tmp_path / "means.md").read_text() == to_markdown(TABLE)
    assert (tmp_path / "means.tex").read_text() == to_latex(TABLE)


@pytest.mark.parametrize("name", ["differences", "left_out"])
def test_write_table_without_records(name: str, tmp_path: Path) -> None:
    """pandas finds the same columns whether the table has rows or not."""
    study = make_study([RunRecord(n, {"latent": n, "n": 1}, 1, metrics={"val/a": 0.5}) for n in ("none", "marginal")])
    compared, _ = contrasts(study, ["val/a"], {"latent": "none"})
    left_out = [LeftOut("latent=none,seed=1", "failed", "OSError: disk full")]
    frames = []
    for count in (1, 0):
        tables = [contrasts_table(study, compared[:count], {"latent": "none"}), left_out_table(left_out[:count])]
        write_table(tmp_path, next(table for table in tables if table.name == name))
        frames.append(pandas.read_csv(tmp_path / f"{name}.csv"))
    assert [len(frame) for frame in frames] == [1, 0]
    assert list(frames[0].columns) == list(frames[1].columns)
