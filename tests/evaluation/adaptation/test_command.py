"""Tests of the command `lpc-lightning adapt`, and of its code weights in `generate`."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lpc_lightning.evaluation.adaptation.command
from lpc_lightning.cli import main as run_command
from lpc_lightning.data import DataError
from lpc_lightning.data.sources.columns import Columns
from lpc_lightning.data.synthetic import PreferenceGenerator
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.accuracy.preferences import evaluate_pairs
from lpc_lightning.evaluation.adaptation.command import adapt, main
from lpc_lightning.evaluation.adaptation.output import left_out, panels
from lpc_lightning.evaluation.adaptation.pairs import NO_MAJORITY, AdaptationReport
from lpc_lightning.evaluation.adaptation.scores import mean_score
from tests.fixtures.commands import checkpoint_of
from tests.fixtures.real_data import DATA_DIR

FIT = ["--model.beta=1", "--model.optimizer.lr=0.03", "--data.deciding=hidden", "--data.train_pairs=8"]
FIT += ["--data.validation_pairs=2", "--data.batch_size=4", "--trainer.max_steps=2"]
SPACES = {
    "plain": [],
    "expected": ["--latent=ExpectedSpace", "--latent.num_codes=3", "--latent.init_logit_std=2"],
    "gaussian": ["--latent=GaussianSpace", "--latent.num_codes=3", "--latent.init_logit_std=2"],
}

REAL = DATA_DIR / "preferences"


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture(scope="module")
def checkpoints(tiny_fit: Callable[..., Path]) -> dict[str, str]:
    """Checkpoints of runs of two steps, by latent space."""
    return {name: str(checkpoint_of(tiny_fit(*FIT, *space))) for name, space in SPACES.items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with 24 test pairs and 24 training pairs of three annotators."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with path.open("w") as lines:
        for split in ("train", "test"):
            for pair in PreferenceGenerator("hidden", annotators=3).examples(24, split):
                row: dict[str, Any] = {"id": pair.id, "prompt": list(pair.prompt), "chosen": pair.chosen}
                row |= {"rejected": pair.rejected, "annotator": pair.annotator, "factor": pair.factor, "split": split}
                lines.write(json.dumps(row) + "\n")
    return str(path)


@pytest.mark.slow
def test_adapt_two_models_then_generate(
    checkpoints: dict[str, str], file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [checkpoints["expected"], checkpoints["plain"]]
    flags = ["--names=lpc,dpo", f"--output={tmp_path}", "--shots", "0", "1", "4", "--rounds=3", "--device=cpu"]
    main(["adapt", *models, "--preferences", file, *flags])
    out = capsys.readouterr().out
    lines = (tmp_path / "adaptation.md").read_text().splitlines()
    assert "\n".join(lines) in out
    assert lines[9:] == ["", f"lpc, dpo, {NO_MAJORITY}"], "no sentence on left-out annotators"
    lines = lines[:9]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["model", "codes by", "given 0", "given 1", "given 4"]
    assert [row[:2] for row in cells[2:]] == [
        ["lpc", "exact"],
        ["lpc", "amortized"],
        ["lpc", "exact, under z"],
        ["lpc", "amortized, under z"],
        ["lpc", "prior, any annotator"],
        ["lpc", "no latent (z = 0)"],
        ["dpo", "prior, any annotator"],
    ]
    record = json.loads((tmp_path / "lpc" / "adaptation.json").read_text())
    assert sum(record["annotators"].values()) == 24
    assert set(record["annotators"]) == {f"annotator-{number}" for number in range(3)}
    first = record["scores"]["exact"]["4"]
    assert cells[2][4] == f"{first['accuracy']:.4f} ± {first['standard_error']:.4f}"
    plain = json.loads((tmp_path / "dpo" / "adaptation.json").read_text())
    level = plain["scores"]["exact"]["4"]
    assert cells[8][4] == f"{level['accuracy']:.4f} ± {level['standard_error']:.4f}", "on the pairs of the other rows"
    assert plain["scores"]["exact"]["4"]["by_annotator"] == pytest.approx(plain["baselines"]["prior"]["by_annotator"])
    assert not (tmp_path / "dpo" / "code_weights.json").exists()
    assert (tmp_path / "adaptation.png").stat().st_size > 5000
    assert (tmp_path / "adaptation.svg").is_file()

    weights, output = tmp_path / "lpc" / "code_weights.json", tmp_path / "answers.jsonl"
    flags = ["--model", checkpoints["expected"], "--prompt=Why?", "--max-new-tokens=3", f"--output={output}"]
    run_command(["generate", *flags, "--code-weights", str(weights), "annotator-1"])
    assert [answer["under"] for answer in json.loads(output.read_text())["answers"]] == ["prior", "code weights"]


@pytest.mark.slow
def test_results_of_another_origin_are_kept(checkpoints: dict[str, str], file: str, tmp_path: Path) -> None:
    shared: dict[str, Any] = {"output": str(tmp_path / "out"), "rounds": 1, "shots": [0], "limit": 12, "device": "cpu"}
    models, file = [checkpoints["expected"], checkpoints["plain"]], shutil.copy(file, tmp_path)
    adapt(models, file, names=["lpc", "dpo"], **shared)
    for arguments, message in (
        ({"models": models[:1], "names": ["lpc"]}, r"dpo/adaptation\.json, expected results of the models"),
        ({"models": models[::-1], "names": ["lpc", "dpo"]}, "found results of checkpoint .* expected checkpoint"),
        ({"split": "train"}, "of split null, pairs_.* expected split train, pairs_"),
        ({"limit": 6}, "found results of limit 12, pairs_.* expected limit 6, pairs_"),
        ({"columns": Columns(annotator="factor")}, "found results of pairs_fingerprint .* expected pairs_fingerprint"),
        ({"max_length": 100}, "found results of pairs_fingerprint .* expected pairs_fingerprint"),
        ({"annotator_column": "factor"}, "of annotator_column annotator in .*, expected annotator_column factor"),
        ({"labelled_split": "train"}, "of labelled_split null, labelled_.* expected labelled_split train, labelled_"),
    ):
        with pytest.raises(ConfigError, match=message):
            adapt(**({"models": models, "preferences": file, "names": ["lpc", "dpo"]} | shared | arguments))
    adapt(models, file, names=["lpc", "dpo"], **(shared | {"shots": [0, 1]}))  # the same models and pairs
    assert "given 1" in (tmp_path / "out" / "adaptation.md").read_text()
    with Path(file).open("a") as lines:
        lines.write("\n")
    with pytest.raises(ConfigError, match=r"found results of pairs_fingerprint .* expected pairs_fingerprint"):
        adapt(models, file, names=["lpc", "dpo"], **shared)


@pytest.mark.slow
def test_results_of_earlier_weights_are_kept(checkpoints: dict[str, str], file: str, tmp_path: Path) -> None:
    """A checkpoint with the same path was written anew."""
    checkpoint = shutil.copy(checkpoints["expected"], tmp_path / "best.ckpt")
    shared: dict[str, Any] = {"output": str(tmp_path / "out"), "rounds": 1, "shots": [0], "limit": 12, "device": "cpu"}
    adapt([checkpoint], file, **shared)
    os.utime(checkpoint, (1, 1))
    with pytest.raises(ConfigError, match=r"found results of weights_fingerprint .* expected weights_fingerprint"):
        adapt([checkpoint], file, **shared)


def test_files_of_others_are_kept(checkpoints: dict[str, str], file: str, tmp_path: Path) -> None:
    (tmp_path / "adaptation.md").write_text("Notes")
    with pytest.raises(ConfigError, match=r"found .*adaptation\.md without the results of a model"):
        adapt([checkpoints["expected"]], file, output=str(tmp_path))
    (tmp_path / "lpc").mkdir()
    (tmp_path / "lpc" / "adaptation.json").write_text("[]")
    with pytest.raises(ConfigError, match="which is no result of this command"):
        adapt([checkpoints["expected"]], file, output=str(tmp_path), names=["lpc"])
    (tmp_path / "lpc" / "adaptation.json").write_text('{"scores": {}}')
    with pytest.raises(ConfigError, match=r"found results in .*json without their checkpoint and pairs, as earlier"):
        adapt([checkpoints["expected"]], file, output=str(tmp_path), names=["lpc"])


@pytest.mark.slow
def test_adapt_counts_pairs_of_training(
    checkpoints: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The eight training pairs of the run and twelve others, in a file without splits."""
    generator = PreferenceGenerator("hidden", annotators=8)
    rows = [
        {"prompt": list(pair.prompt), "chosen": pair.chosen, "rejected": pair.rejected, "annotator": pair.annotator}
        for pair in (*generator.examples(8, "train"), *generator.examples(12, "test"))
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapt(
        [checkpoints["expected"]],
        str(tmp_path / "pairs.jsonl"),
        output=str(tmp_path / "adaptation"),
        names=["run"],
        shots=[0],
        rounds=1,
        under_z=False,
        device="cpu",
    )
    sentence = "\nrun: 8 of 20 pairs are training pairs of this run.\n"
    assert sentence in (tmp_path / "adaptation" / "adaptation.md").read_text()
    assert sentence in capsys.readouterr().out


def test_panels_one_or_several_models() -> None:
    """One model: its curves and the level at z = 0. Several: a panel for each inference."""
    score = mean_score(np.tile([0.0, 1.0], 10), np.repeat("anna", 20), np.arange(20))
    levels, curves = {"prior": score, "no_latent": score}, {"exact": {0: score, 2: score}, "exact_z": {0: score}}
    weights = {"anna": np.ones(1)}
    lpc = AdaptationReport({"anna": 20}, curves, levels, weights, mixtures={"exact": {2: {("anna", "1"): np.ones(1)}}})
    dpo = AdaptationReport({"anna": 20}, {"exact": {0: score, 2: score}}, {"prior": score})
    gumbel = replace(lpc, scores={"exact": {0: score}, "amortized": {0: score}})
    (alone,) = panels({"lpc": lpc}).values()
    assert [(line.label, len(line.positions)) for line in alone] == [
        ("exact", 2), ("exact, under z", 1), ("no latent (z = 0)", 0),
    ]  # fmt: skip
    several = panels({"lpc": lpc, "dpo": dpo, "gumbel": gumbel})
    assert {title: [(line.label, len(line.positions)) for line in lines] for title, lines in several.items()} == {
        "exact": [("lpc", 2), ("dpo", 2), ("gumbel", 1)],
        "exact, under z": [("lpc", 1), ("dpo", 2)],
        "amortized": [("dpo", 2), ("gumbel", 1)],
    }


def test_sentence_on_pairs_of_one_prompt() -> None:
    values, names = np.tile([0.0, 1.0], 10), np.repeat("anna", 20)
    scores = [mean_score(values, names, prompts) for prompts in (np.zeros(20), np.repeat([0, 1], 10))]
    one, two = (AdaptationReport({"anna": 20}, {}, {"prior": each}, has_majority=True) for each in scores)
    assert left_out({"a": two}, []) == []
    sentence = "all pairs have one prompt. Standard errors and tests are over prompts, so that there are none."
    assert left_out({"a": one, "b": two, "c": one}, []) == [f"a, c, {sentence}"]


@pytest.mark.slow
def test_adapt_column_split_and_limit(checkpoints: dict[str, str], file: str, tmp_path: Path) -> None:
    adapt(
        [checkpoints["expected"]],
        file,
        annotator_column="factor",
        output=str(tmp_path),
        names=["lpc"],
        split="train",
        limit=10,
        shots=[0, 1],
        device="cpu",
    )
    record = json.loads((tmp_path / "lpc" / "adaptation.json").read_text())
    examples = PreferenceGenerator("hidden", annotators=3).examples(10, "train")
    assert record["annotators"] == {
        factor: sum(example.factor == factor for example in examples) for factor in sorted({e.factor for e in examples})
    }


@pytest.mark.slow
def test_adapt_gaussian_and_labels_of_a_split(checkpoints: dict[str, str], file: str, tmp_path: Path) -> None:
    """A Gaussian latent adapts under z alone. Labels come from the training rows."""
    adapt(
        [checkpoints["gaussian"]],
        file,
        labelled_split="train",
        output=str(tmp_path),
        names=["vpl"],
        shots=[0, 2],
        device="cpu",
    )
    lines = (tmp_path / "adaptation.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[1] for row in cells[2:5]] == ["amortized, under z", "prior, any annotator", "no latent (z = 0)"]
    record = json.loads((tmp_path / "vpl" / "adaptation.json").read_text())
    assert sum(record["annotators"].values()) == sum(record["labelled"].values()) == 24
    assert record["scores"]["amortized_z"]["0"] == record["baselines"]["prior"]
    assert not (tmp_path / "vpl" / "code_weights.json").exists()


@pytest.mark.slow
def test_adapt_takes_labels_without_scores(
    checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy without a latent scores no labelled pairs, and its results are those with scored ones.

    Majorities follow from the labels alone, so that they are the same for both models. Pairs have the id of their
    prompt, so that the choice of labelled pairs depends on the order of the pairs.
    """
    draw, rows = np.random.default_rng(0), []
    for split, name, prompt in product(("train", "test"), ("anna", "ben"), range(9)):
        chosen, rejected = draw.permutation(["I agree.", "I disagree."]).tolist()
        row = {"id": f"{prompt % 3}", "prompt": f"Question {prompt}?", "chosen": chosen, "rejected": rejected}
        rows.append({**row, "annotator": name, "split": split})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(rows[index]) + "\n" for index in draw.permutation(len(rows))))
    scored = []

    def recorded(module: Any, data: Any, *arguments: Any, **settings: Any) -> Any:
        scored.append((module.latent is not None, data.split))
        return evaluate_pairs(module, data, *arguments, **settings)

    monkeypatch.setattr(lpc_lightning.evaluation.adaptation.command, "evaluate_pairs", recorded)
    flags: dict[str, Any] = {"labelled_split": "train", "shots": [0, 1, 4], "rounds": 3, "batch_size": 4}
    flags |= {"names": ["lpc", "dpo"], "under_z": False, "device": "cpu", "output": str(tmp_path / "out")}
    adapt([checkpoints["expected"], checkpoints["plain"]], str(path), **flags)
    assert scored == [(True, "train"), (True, "test"), (False, "test")]
    lpc, dpo = (json.loads((tmp_path / "out" / name / "adaptation.json").read_text()) for name in ("lpc", "dpo"))
    assert dpo["labelled"] == lpc["labelled"] == {"anna": 9, "ben": 9}
    assert dpo["scores"]["own_majority"] == lpc["scores"]["own_majority"]
    assert dpo["scores"]["exact"]["4"] == dpo["baselines"]["prior"]


@pytest.mark.slow
def test_adapt_one_policy_without_codes(checkpoints: dict[str, str], file: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models: found no codes in .*\.ckpt, so that nothing can be inferred"):
        adapt([checkpoints["plain"]], file, output=str(tmp_path), device="cpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_adapt_several_policies_without_codes(checkpoints: dict[str, str], file: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models: found no codes in any of .*, .*\.ckpt; expected"):
        adapt([checkpoints["plain"]] * 2, file, names=["a", "b"], output=str(tmp_path), limit=4, device="cpu")


def test_adapt_uses_the_training_template(checkpoints: dict[str, str], file: str, tmp_path: Path) -> None:
    checkpoint = torch.load(checkpoints["expected"], weights_only=True)
    assert checkpoint["template"] == {"kind": "auto", "arguments": None, "system_turns": "auto"}
    checkpoint["template"]["kind"] = "verse"
    path = tmp_path / "verse.ckpt"
    torch.save(checkpoint, path)
    with pytest.raises(DataError, match="verse"):
        adapt([str(path)], file, output=str(tmp_path), limit=4, device="cpu")


def test_adapt_column_without_values(checkpoints: dict[str, str], file: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"annotator_column: found no value of source in any pair of .*pairs.jsonl"):
        adapt([checkpoints["expected"]], file, annotator_column="source", output=str(tmp_path), device="cpu")


def test_adapt_annotators_with_too_few_pairs(
    checkpoints: dict[str, str], file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two pairs of one annotator and one of another: only the first has a labelled pair for each prediction."""
    subset, selected = tmp_path / "some.jsonl", []
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    for name, count in (("annotator-0", 2), ("annotator-1", 1)):
        selected += [row for row in rows if row["annotator"] == name and row["split"] == "test"][:count]
    subset.write_text("\n".join(map(json.dumps, selected)))
    flags: dict[str, Any] = {"output": str(tmp_path), "names": ["lpc"], "device": "cpu"}
    adapt([checkpoints["expected"]], str(subset), shots=[1, 2], **flags)
    out = capsys.readouterr().out
    assert "lpc, given 1: 2 of 3 pairs, annotators left out for having fewer than 1 other pairs: 1.\n" in out
    assert "lpc, given 2: 0 of 3 pairs, annotators left out for having fewer than 2 other pairs: 2.\n" in out
    scores = json.loads((tmp_path / "lpc" / "adaptation.json").read_text())["scores"]
    assert set(scores) == {"exact", "amortized", "exact_z", "amortized_z"}
    assert all(list(by_n) == ["1"] for by_n in scores.values())
    assert scores["exact"]["1"]["by_annotator"].keys() == {"annotator-0"}
    message = r"shots: found 2 as the smallest number, but no annotator in .*some.jsonl has more than 1 other"
    with pytest.raises(DataError, match=message):
        adapt([checkpoints["expected"]], str(subset), shots=[2, 3], **flags)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason="no $LPC_DATA_DIR/preferences")
@pytest.mark.parametrize(
    ("name", "limit", "annotators"),
    [
        ("dsp_domain_pairs", 40, {"academy", "business", "entertainment", "literature"}),
        ("hh_relabeled_objective", 230, {"harmless", "helpful"}),  # the file is sorted by factor
    ],
)
def test_adapt_real_pairs_by_factor(
    name: str, limit: int, annotators: set[str], checkpoints: dict[str, str], tmp_path: Path
) -> None:
    adapt(
        [checkpoints["expected"]],
        str(REAL / f"{name}.jsonl"),
        annotator_column="factor",
        output=str(tmp_path),
        names=["lpc"],
        limit=limit,
        shots=[0, 2],
        under_z=False,
        device="cpu",
    )
    record = json.loads((tmp_path / "lpc" / "adaptation.json").read_text())
    assert set(record["annotators"]) == annotators
    assert set(record["scores"]["exact"]) == {"0", "2"}
    assert set(json.loads((tmp_path / "lpc" / "code_weights.json").read_text())) == annotators


def test_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["adapt", "--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in list(inspect.signature(adapt).parameters)[1:])


def test_adapt_checks_settings_first(file: str) -> None:
    with pytest.raises(ConfigError, match="rounds: found 0"):
        adapt(["no.ckpt"], file, rounds=0)


@pytest.mark.parametrize(
    ("split", "labelled_split", "rows"),
    [("train", "train", "of the split train"), (None, "test", "of the split test"), (None, "train", "all rows of")],
)
def test_adapt_refuses_labels_of_predicted_pairs(
    split: str | None, labelled_split: str, rows: str, file: str, tmp_path: Path
) -> None:
    """Without `split`, the test rows are predicted, or all rows of a file without splits."""
    if rows == "all rows of":
        plain = tmp_path / "plain.jsonl"
        plain.write_text(Path(file).read_text().replace(', "split": "train"', "").replace(', "split": "test"', ""))
        file = str(plain)
    with pytest.raises(
        ConfigError, match=f"labelled_split: found {labelled_split}, but the pairs to predict are {rows}"
    ):
        adapt(["no.ckpt"], file, split=split, labelled_split=labelled_split, output=str(tmp_path / "out"))
