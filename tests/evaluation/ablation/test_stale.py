"""Tests of cells whose files or code have changed: in the summary of `ablate`, and in a report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lpc_lightning.evaluation.ablation import plan as plan_module
from lpc_lightning.evaluation.ablation.cell_runner import CellRunner
from lpc_lightning.evaluation.ablation.command import ablate
from lpc_lightning.evaluation.ablation.plan import PlannedCell
from lpc_lightning.evaluation.report.command import report
from lpc_lightning.evaluation.report.contents import read_contents
from lpc_lightning.evaluation.report.runs.inputs import Inputs, other_inputs
from lpc_lightning.files.json_files import write_json

LATENTS = ("none", "gumbel", "marginal")


class Fits:
    """The stand-in for fits: every cell finishes, except those after the first `limit` cells."""

    limit = 100
    failed: tuple[str, ...] = ()

    def __call__(self, cells: Sequence[PlannedCell], ended: int) -> None:
        for number, cell in enumerate(cells):
            if number >= self.limit:
                raise KeyboardInterrupt
            record = cell.folder.begin(cell.new_record)
            if record.axes["latent"] in self.failed:
                cell.folder.write(replace(record, status="failed", error="ValueError: a reason"))
                continue
            write_json(cell.folder.results, {"metrics": {"val/rewards/accuracies": 0.6}})
            cell.folder.write(replace(record, status="finished"))


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Fits:
    fits = Fits()
    monkeypatch.setattr(CellRunner, "run", lambda runner, cells, ended: fits(cells, ended))
    return fits


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The data file of all cells."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("{}\n")
    return path


@pytest.fixture
def run(fits: Fits, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Function that runs `ablate` on a grid of three cells with changes, and returns what it prints.

    Each cell has a config file of its own.
    """
    for latent in LATENTS:
        (tmp_path / f"{latent}.yaml").write_text(f"name: {latent}\n")
    axes = {"latent": {latent: [f"--latent={tmp_path / latent}.yaml"] for latent in LATENTS}}
    grid = tmp_path / "trial.yaml"
    grid.write_text(yaml.safe_dump({"base": [f"--data.path={data}"], "axes": axes}, sort_keys=False))

    def run(*changes: str, **settings: bool) -> str:
        capsys.readouterr()
        with suppress(KeyboardInterrupt):
            ablate([str(grid), *changes], output=str(tmp_path / "out"), **settings)  # type: ignore[arg-type]
        return capsys.readouterr().out

    return run


def notes(folder: Path, *others: Path) -> dict[str, tuple[str, str]]:
    """Return the lines of left-out runs and notes in a report, by run."""
    left_out = read_contents([str(folder), *map(str, others)], None, None, None).left_out
    return {entry.run: (entry.status, entry.why) for entry in left_out}


def test_summary_counts_stale_cells(run: Callable[..., str], fits: Fits, data: Path) -> None:
    assert "3 finished: " in run()
    data.write_text("{}\n{}\n")
    fits.limit = 0
    output = run()
    assert "3 stale (run again): " in output
    assert "finished" not in output
    assert "lpc-lightning report" not in output
    assert "3 finished: " in run(keep_stale=True)
    fits.limit = 1
    assert "1 finished, 2 stale (run again): " in run()


def test_summary_lists_no_stale_failure(run: Callable[..., str], fits: Fits, data: Path) -> None:
    """A failure with other files is no failure of these. The cell runs again without --retry_failed."""
    fits.failed = ("gumbel",)
    assert "latent=gumbel: ValueError: a reason" in run()
    data.write_text("{}\n{}\n")
    fits.limit = 0
    output = run()
    assert "3 stale (run again): " in output
    assert "a reason" not in output


def test_summary_of_removed_results(run: Callable[..., str], fits: Fits, tmp_path: Path) -> None:
    run()
    (tmp_path / "out" / "cells" / "latent=gumbel" / "results.json").unlink()
    fits.limit = 0
    assert "2 finished, 1 stale (run again): " in run()


def test_remove_checkpoints_of_earlier_commands(
    run: Callable[..., str], fits: Fits, data: Path, tmp_path: Path
) -> None:
    """A command that was killed may have left them. Those of stale cells stay, also with --keep_stale."""
    fits.failed = ("marginal",)
    run()
    for latent in LATENTS:
        checkpoint = tmp_path / "out" / "cells" / f"latent={latent}" / "run" / "checkpoints" / "last.ckpt"
        checkpoint.parent.mkdir(parents=True)
        checkpoint.write_text("")

    def left() -> set[str]:
        return {path.parts[-4].removeprefix("latent=") for path in tmp_path.glob("out/cells/*/run/checkpoints/*.ckpt")}

    run()
    assert left() == set(LATENTS)
    run("latent=gumbel", remove_checkpoints=True)
    assert left() == {"none", "marginal"}
    digest = data.read_text()
    data.write_text("{}\n{}\n")
    run("latent=none", keep_stale=True, remove_checkpoints=True)
    assert left() == {"none", "marginal"}
    data.write_text(digest)
    run(remove_checkpoints=True)
    assert left() == {"marginal"}, "it has failed"


def test_report_names_cells_of_older_data(
    run: Callable[..., str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    assert notes(tmp_path / "out") == {}
    data.write_text("{}\n{}\n")
    run("latent=gumbel")
    why = f"{data}: another version than in out/latent=gumbel, a later run"
    assert notes(tmp_path / "out") == {f"latent={name}": ("other files", why) for name in ("none", "marginal")}
    report([str(tmp_path / "out")], out=str(tmp_path / "report"))
    sentence = "3 runs in 3 groups: 3 finished. 2 runs had other files than a later run."
    assert sentence in capsys.readouterr().out
    assert sentence in (tmp_path / "report" / "report.html").read_text()
    assert why in (tmp_path / "report" / "left_out.csv").read_text()
    run()
    report([str(tmp_path / "out")], out=str(tmp_path / "report"))
    assert "later run" not in capsys.readouterr().out


def test_report_names_cells_of_other_code(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run()
    monkeypatch.setattr(plan_module, "code_version", lambda: "new")
    run("latent=gumbel,marginal")
    status, why = notes(tmp_path / "out")["latent=none"]
    assert len(notes(tmp_path / "out")) == 1
    assert (status, why) == ("other code", "another version of the code than in out/latent=marginal, a later run")


def test_report_compares_files_of_two_grids(run: Callable[..., str], data: Path, tmp_path: Path) -> None:
    run()
    (tmp_path / "out").rename(tmp_path / "first")
    data.write_text("{}\n{}\n")
    run("latent=gumbel")
    found = notes(tmp_path / "first", tmp_path / "out")
    # The earlier cell of gumbel counts as well: the seeds are not known.
    assert {name for name, (status, _) in found.items() if status == "other files"} == {f"latent={x}" for x in LATENTS}


def test_report_of_unrecorded_files(run: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Cells of earlier versions have no digests. Their code was another one than that of cells that have them."""
    run()
    cells = sorted((tmp_path / "out").glob("cells/*/cell.json"))
    for cell in cells:
        content = json.loads(cell.read_text())
        cell.write_text(json.dumps({name: content[name] for name in content if name not in ("files", "code")}))
    assert notes(tmp_path / "out") == {}
    monkeypatch.setattr(plan_module, "code_version", lambda: "new")
    run("latent=gumbel")
    assert {name: status for name, (status, _) in notes(tmp_path / "out").items()} == {
        "latent=none": "other code",
        "latent=marginal": "other code",
    }


def test_note_lists_few_files() -> None:
    files = {f"{number}.jsonl": "old" for number in range(5)}
    old, new = Inputs("out/a", 1.0, files, "code"), Inputs("out/b", 2.0, dict.fromkeys(files, "new"), "code")
    (note,) = other_inputs([new, old])
    why = "0.jsonl, 1.jsonl, 2.jsonl and 2 more: another version than in out/b, a later run"
    assert note == (1, "other files", why)
