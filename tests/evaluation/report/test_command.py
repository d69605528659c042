"""Tests of the command `report`: its files, their numbers, and its errors."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from scipy import stats

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.codebook.code_labels import CodeLabel, ColumnMatch
from lpc_lightning.evaluation.codebook.code_tokens import TokenShift
from lpc_lightning.evaluation.codebook.explanation import CodeExplanation, Explanation
from lpc_lightning.evaluation.codebook.explanation_files import write_explanation
from lpc_lightning.evaluation.report.command import main, report

Write = Callable[..., Path]
Capture = pytest.CaptureFixture[str]
VALUES = {
    "none": [0.70, 0.72, 0.71],
    "gumbel": [0.71, 0.70, 0.75],
    "marginal": [0.78, 0.81, 0.77],
}


ANSWER = {"under": "code 1", "decoding": "greedy", "text": "Turn off <b>both</b> | all", "tokens": 6, "finished": False}
SAMPLE = {"step": 8, "prompt": [{"role": "user", "content": "How?"}], "prior": [0.2, 0.8], "answers": [ANSWER]}


@pytest.fixture(scope="module")
def ablation(write_ablation: Write) -> Path:
    """An ablation, with samples of two validations in one of its runs."""
    folder = write_ablation({"latent": list(VALUES)}, [1, 2, 3], lambda latent, seed: VALUES[latent][seed - 1])
    early = {**SAMPLE, "step": 4, "answers": [{**ANSWER, "text": "Early."}]}
    lines = "".join(json.dumps(record) + "\n" for record in (early, SAMPLE))
    run = folder / "cells" / "latent=gumbel,seed=2" / "run"
    (run / "samples.jsonl").write_text(lines)
    label = CodeLabel("factor", "<i>kind</i>", 3, 4)
    code = CodeExplanation(7, 0.25, 4, label, [TokenShift(5, " dear", 0.5)], [], [], [])
    origin = {"checkpoint": str(run / "checkpoints" / "best.ckpt"), "step": 7}
    write_explanation(run, Explanation(12, [code], [ColumnMatch("factor", "prior", 0.9, 0.1, 0.8)]), origin)
    return folder


@pytest.fixture(scope="module")
def reported(ablation: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a report on the ablation."""
    out = tmp_path_factory.mktemp("report") / "out"
    main(["report", str(ablation), "--out", str(out)])
    return out


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_report_writes_every_file(reported: Path) -> None:
    files = {str(path.relative_to(reported)) for path in reported.rglob("*") if path.is_file()}
    tables = {
        f"{name}.{kind}" for name in ("means", "differences", "cost", "left_out") for kind in ("md", "csv", "tex")
    }
    names = ("means", "differences", "curve", "cost")
    plots = {f"plots/val_rewards_accuracies_{name}.{kind}" for name in names for kind in ("svg", "png")}
    assert files >= tables | plots | {"report.html", "report.md", "runs.csv"}


@pytest.mark.slow
def test_page_has_codes_and_the_last_samples(reported: Path) -> None:
    page = (reported / "report.html").read_text()
    (section,) = re.findall(r'<section id="answers">.*?</section>', page, re.S)
    assert re.findall(r"<summary>(.*?)</summary>", section) == ["latent=gumbel,seed=2"]
    assert "<h3>Step 8: How?</h3>" in section
    assert "Turn off &lt;b&gt;both&lt;/b&gt; | all [...]" in section
    assert "Likeliest codes under the prior: 1 (0.800), 0 (0.200)" in section
    assert "Early." not in section
    assert "<h3>1 codes over 12 pairs</h3>" in section
    assert "factor &lt;i&gt;kind&lt;/i&gt; (3 of 4)" in section
    assert "Weights: best.ckpt, step 7." in section
    assert "&#34; dear&#34; +0.50" in section


@pytest.mark.slow
def test_means_by_hand(reported: Path) -> None:
    """For 0.78, 0.81, 0.77: mean 0.786667; deviation sqrt(0.000866667 / 2); t at 0.975 with 2 degrees is 4.302653."""
    row = {row["latent"]: row for row in rows(reported / "means.csv")}["marginal"]
    half = 4.302652729911275 * (0.0008666666666666667 / 2) ** 0.5 / 3**0.5
    assert row["metric"] == "val/rewards/accuracies"
    assert (row["n"], row["runs"]) == ("3", "3")
    assert float(row["mean"]) == pytest.approx(0.7866666666666667, rel=1e-12)
    assert float(row["low"]) == pytest.approx(0.7866666666666667 - half, rel=1e-9)
    assert float(row["high"]) == pytest.approx(0.7866666666666667 + half, rel=1e-9)
    text = (reported / "means.md").read_text()
    assert re.search(r"\| marginal \| +0\.7867 \| \[0\.7350, 0\.8384\] \| +3 \|", text)


def test_differences_against_scipy(reported: Path) -> None:
    differences = {row["latent"]: row for row in rows(reported / "differences.csv")}
    assert set(differences) == {"gumbel", "marginal"}
    raw = {name: stats.ttest_rel(VALUES[name], VALUES["none"]).pvalue for name in differences}
    for name, row in differences.items():
        assert float(row["p"]) == pytest.approx(raw[name], rel=1e-6)
        assert row["baseline"] == "latent=none"
    # Holm for two tests: the smaller p-value is doubled, the larger one is unchanged.
    assert float(differences["marginal"]["p_holm"]) == pytest.approx(2 * raw["marginal"], rel=1e-6)
    assert float(differences["gumbel"]["p_holm"]) == pytest.approx(raw["gumbel"], rel=1e-6)
    assert float(differences["marginal"]["p_sign_flips"]) == 0.25


def test_cost_table_by_method(reported: Path) -> None:
    costs = {row["latent"]: row for row in rows(reported / "cost.csv")}
    assert (costs["none"]["policy_parameters"], costs["none"]["latent_parameters"]) == ("1000", "0")
    assert costs["marginal"]["latent_parameters"] == "24"
    assert (float(costs["none"]["seconds"]), float(costs["marginal"]["peak_gib"])) == (12, 2)
    assert "| 1,000 |" in re.sub(" +", " ", (reported / "cost.md").read_text())


def test_runs_csv_has_all_metrics(reported: Path) -> None:
    runs = rows(reported / "runs.csv")
    assert len(runs) == 9
    assert float(runs[-1]["test/rewards/accuracies"]) == pytest.approx(VALUES["marginal"][2] - 0.1)
    assert runs[-1]["run"] == "latent=marginal,seed=3"


def record_versions(ablation: Path, cell: str, revision: str) -> None:
    path = ablation / "cells" / cell / "run" / "summary.json"
    versions = {"date": f"2026-11-0{len(revision)}", "packages": {"torch": "2.13.0"}, "git": {"revision": revision}}
    path.write_text(json.dumps({"steps": 1, "versions": versions}))


def test_report_names_differing_versions(write_ablation: Write, tmp_path: Path, capsys: Capture) -> None:
    folder = write_ablation({"latent": ["none", "gumbel"]}, [1, 2], lambda latent, seed: VALUES[latent][seed - 1])
    cells = [path.name for path in sorted((folder / "cells").iterdir())]
    for cell in cells:
        record_versions(folder, cell, "abc")
    report([str(folder)], out=str(tmp_path / "same"))
    assert "versions" not in capsys.readouterr().out, "a date is no version"

    record_versions(folder, cells[0], "de")
    (folder / "cells" / cells[1] / "run" / "summary.json").unlink()
    report([str(folder)], out=str(tmp_path / "other"))
    sentence = (
        "The runs differ in versions: git.revision: abc (2 runs), de (1 run), not recorded (1 run); "
        "packages.torch: 2.13.0 (3 runs), not recorded (1 run)."
    )
    assert sentence in capsys.readouterr().out
    assert sentence in (tmp_path / "other" / "report.html").read_text()


class Texts(HTMLParser):
    """Parser of the texts, addresses and tags of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts, self.addresses, self.tags = list[str](), list[str](), list[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


NASTY = "<script>alert(1)</script> & \"quotes\" 'too'"


def test_page_is_self_contained_and_escaped(write_ablation: Write, tmp_path: Path) -> None:
    error = f'Traceback (most recent call last):\n  File "x.py"\nValueError: {NASTY}'
    folder = write_ablation({"latent": ["none", "<b>x&y"]}, [1, 2], lambda name, seed: error if seed == 2 else 0.5)
    about = json.loads((folder / "ablation.json").read_text()) | {"name": NASTY, "command": f"run {NASTY}"}
    (folder / "ablation.json").write_text(json.dumps(about))
    report([str(folder)], out=str(tmp_path / "out"))
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    parsed = Texts(page)
    assert all(address.startswith(("#", "data:image/svg+xml;base64,")) for address in parsed.addresses)
    assert "url(" not in page
    assert "@import" not in page
    assert parsed.tags.count("script") == 1
    assert "b" not in parsed.tags[: parsed.tags.index("figure")]
    assert NASTY in parsed.texts
    assert error in parsed.texts
    assert "<b>x&y" in parsed.texts
    assert f"run {NASTY}" in parsed.texts


def test_report_is_reproducible(ablation: Path, reported: Path, tmp_path: Path) -> None:
    report([str(ablation)], out=str(tmp_path))
    for path in (path for path in reported.rglob("*.*") if path.name != "report.html" and path.is_file()):
        assert path.read_bytes() == (tmp_path / path.relative_to(reported)).read_bytes(), path.name


def test_report_lists_failed_and_missing_runs(write_ablation: Write, tmp_path: Path) -> None:
    cells = {("none", 2): "OSError: disk full", ("marginal", 3): None}
    folder = write_ablation({"latent": ["none", "marginal"]}, [1, 2, 3], lambda *cell: cells.get(cell, 0.1 * cell[1]))
    report([str(folder)], out=str(tmp_path))
    left_out = {row["run"]: (row["status"], row["why"]) for row in rows(tmp_path / "left_out.csv")}
    assert left_out == {
        "latent=none,seed=2": ("failed", "OSError: disk full"),
        "latent=marginal,seed=3": ("missing", "This cell of the grid was never started."),
    }
    (difference,) = rows(tmp_path / "differences.csv")
    assert (difference["n"], difference["unpaired_seeds"], difference["p"]) == ("1", "2 3", "")
    assert re.search(r"\| +2 of 3 \|", (tmp_path / "means.md").read_text())


def test_report_of_an_ablation_without_finished_run(write_ablation: Write, tmp_path: Path) -> None:
    folder = write_ablation({"noise": [0, 0.5]}, [1], lambda noise, seed: f"ValueError: {noise}")
    report([str(folder)], out=str(tmp_path))
    assert [row["why"] for row in rows(tmp_path / "left_out.csv")] == ["ValueError: 0", "ValueError: 0.5"]
    assert "2 runs in 2 groups: 2 failed." in (tmp_path / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("latents", "seeds"), [(["marginal"], [None]), (["marginal"], [1, 2]), (["none", "marginal"], [1])]
)
def test_report_of_few_runs(write_ablation: Write, seeds: list[int | None], latents: list[str], tmp_path: Path) -> None:
    folder = write_ablation({"latent": latents}, seeds, lambda latent, seed: 0.5 + 0.1 * (seed or 0))
    report([str(folder)], out=str(tmp_path / "out"))
    means = rows(tmp_path / "out" / "means.csv")
    assert [row["n"] for row in means] == [str(len(seeds))] * len(latents)
    assert all(bool(row["low"]) == (len(seeds) > 1) for row in means)


@pytest.mark.slow
def test_report_of_similar_names(write_ablation: Write, tmp_path: Path) -> None:
    """An axis has the name of a column, and two metrics differ in letters that a file name does not have."""
    folder = write_ablation({"n": [4, 8], "p": [1, 2]}, [1, 2], lambda n, p, seed: 0.5 + (n + p + seed) / 100)
    metrics = ["val/accuracy/prior/factor/学术", "val/accuracy/prior/factor/商业"]
    for path in folder.glob("cells/*/results.json"):
        results = json.loads(path.read_text())
        results["metrics"] |= {name: 0.4 + 0.1 * number for number, name in enumerate(metrics)}
        path.write_text(json.dumps(results))
    report([str(folder)], out=str(tmp_path / "out"), metric=metrics, x=["n"], baseline=["n=4"])
    means, differences = (rows(tmp_path / "out" / f"{name}.csv") for name in ("means", "differences"))
    assert [(row["axis.n"], row["p"], row["n"]) for row in means[::2]] == [
        ("4", "1", "2"), ("4", "2", "2"), ("8", "1", "2"), ("8", "2", "2")
    ]  # fmt: skip
    assert [(row["n"], row["axis.p"]) for row in differences] == [("2", "1"), ("2", "2")] * 2
    pictures = re.findall(r"\]\((plots/.*)\)", (tmp_path / "out" / "report.md").read_text())
    assert len(set(pictures)) == len(pictures) >= 8
    assert all((tmp_path / "out" / picture).is_file() for picture in pictures)


@pytest.mark.slow
def test_report_selects_metrics_axes_and_baseline(write_ablation: Write, tmp_path: Path) -> None:
    axes = {"latent": ["none", "x"], "noise": [0, 0.5], "codes": [8, 64]}
    folder = write_ablation(axes, [1, 2], lambda latent, noise, codes, seed: 0.5 + noise * seed / 10)
    metrics = ["--metric", "test/rewards/accuracies", "val/rewards/accuracies"]
    main(["report", str(folder), "--out", str(tmp_path), *metrics, "--x=noise", "--baseline", "noise=0", "--title=T"])
    assert [row["metric"] for row in rows(tmp_path / "differences.csv")] == [
        *["test/rewards/accuracies"] * 4,
        *["val/rewards/accuracies"] * 4,
    ]
    plots = {path.stem for path in (tmp_path / "plots").iterdir()}
    assert {"test_rewards_accuracies_by_noise", "val_rewards_accuracies_by_noise"} <= plots
    assert not any(name.endswith("by_codes") for name in plots)
    assert "<title>T</title>" in (tmp_path / "report.html").read_text()
    assert "--x noise" in (tmp_path / "report.html").read_text()


def test_default_metric_is_none_that_chose_the_weights(write_ablation: Write, tmp_path: Path) -> None:
    folder = write_ablation({"rate": [0.6]}, [1], lambda rate, seed: rate)
    for weights, metric in (("last", "val/rewards/accuracies"), ("best", "test/rewards/accuracies")):
        (cell,) = folder.glob("cells/*/cell.json")
        cell.write_text(json.dumps(json.loads(cell.read_text()) | {"weights": weights}))
        report([str(folder)], out=str(tmp_path / weights))
        assert {row["metric"] for row in rows(tmp_path / weights / "means.csv")} == {metric}


VALIDATION, TEST = "val/rewards/accuracies", "test/rewards/accuracies"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("logged", "measured", "expected"),
    [
        (VALIDATION, {TEST: [1]}, VALIDATION),
        (VALIDATION, {TEST: [1, 2, 3]}, VALIDATION),
        (TEST, {VALIDATION: [1, 2, 3]}, TEST),
        ("val/loss", {VALIDATION: [1, 2, 3], TEST: [1]}, VALIDATION),  # the only one of all runs
    ],
)
def test_default_metric_of_best_checkpoints(
    logged: str, measured: dict[str, list[int]], expected: str, tmp_path: Path
) -> None:
    """Validation has chosen the best weights, so that their accuracy in validation is too high. That in test is not."""
    for seed in (1, 2, 3):
        write_run(tmp_path / "runs" / f"fit_{seed}", seed, f"step,train/loss,{logged}\n1,0.7,0.5\n")
        (tmp_path / "runs" / f"fit_{seed}" / "checkpoints").mkdir()
    for metric, seeds in measured.items():
        for seed in seeds:
            best = tmp_path / "runs" / f"fit_{seed}" / "checkpoints" / "best.ckpt"
            write_run(tmp_path / "runs" / f"{metric[:3]}_{seed}", seed, f"step,{metric}\n1,0.9\n", str(best))
    report([str(tmp_path / "runs")], out=str(tmp_path / "out"))
    (row,) = rows(tmp_path / "out" / "means.csv")
    assert (row["metric"], row["n"]) == (expected, "3")


def write_run(folder: Path, seed: int, metrics: str, checkpoint: str | None = None) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps({"seed_everything": seed, "ckpt_path": checkpoint}))
    (folder / "metrics.csv").write_text(metrics)


@pytest.mark.slow
def test_report_replaces_an_earlier_one(write_ablation: Write, tmp_path: Path) -> None:
    """Nothing of the earlier report stays. Files that no report has written do, also in plots/."""
    values = {"none": 0.5, "marginal": 0.6}
    two = write_ablation({"latent": list(values)}, [1, 2], lambda latent, seed: values[latent] + seed / 100)
    one = write_ablation({"latent": ["none"]}, [1, 2], lambda latent, seed: 0.5 + seed / 100)
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    report([str(two)], out=str(out))
    first = files_in(out)
    own = {"tuning.csv", "notes.md", "plots/mine.svg"}
    for name in own:
        (out / name).write_text("mine")
    with pytest.raises(ConfigError, match="no finished run has val/none"):
        report([str(one)], out=str(out), metric=["val/none"])
    assert files_in(out) == first | own
    report([str(one)], out=str(out))
    report([str(one)], out=str(fresh))
    assert {"differences.csv", "plots/val_rewards_accuracies_differences.svg"} <= first - files_in(fresh)
    assert files_in(out) == files_in(fresh) | own
    assert all((out / name).read_text() == "mine" for name in own)


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_report_removes_no_file_elsewhere(ablation: Path, tmp_path: Path) -> None:
    """A page that was changed lists files outside the folder."""
    out, other = tmp_path / "out", tmp_path / "other.csv"
    (out / "sub").mkdir(parents=True)
    for path in (other, out / "sub" / "a.csv"):
        path.write_text("mine")
    names = json.dumps(["../other.csv", str(other), "sub/a.csv", "plots/../../other.csv", "..", "gone.csv"])
    (out / "report.html").write_text(
        f"""<meta name="generator" content="lpc-lightning report">\n<meta name="files" content='{names}'>\n"""
    )
    report([str(ablation)], out=str(out))
    assert other.exists()
    assert (out / "sub" / "a.csv").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": ["val/acc"]}, r"metric: no finished run has val/acc, expected some of .*val/rewards/accuracies"),
        ({"x": ["latent"]}, r"x: found latent, expected axes with two numbers or more: none in these runs"),
        ({"baseline": ["latent=no"]}, r"expected AXIS=VALUE of latent = none, gumbel, marginal"),
    ],
)
def test_report_of_unknown_names(ablation: Path, settings: dict[str, list[str]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        report([str(ablation)], out=str(tmp_path / "out"), **settings)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
