"""`lpc-lightning adapt` as a user gives it, and its weights in `generate`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpc_lightning.cli import main as lpc_lightning
from lpc_lightning.data import DataError
from lpc_lightning.data.synthetic import PreferenceGenerator
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.adaptation.command import adapt, main, panels
from lpc_lightning.evaluation.adaptation.pairs import AdaptationReport
from lpc_lightning.evaluation.adaptation.scores import Score
from tests.fixtures.real_data import DATA_DIR

FLAGS = "--policy=TinyPolicy --policy.width=16 --policy.layers=1 --policy.heads=2 --model=DPO --model.beta=1 "
FLAGS += "--model.optimizer=torch.optim.AdamW --model.optimizer.lr=0.03 --data=SyntheticPreferences "
FLAGS += "--data.deciding=hidden --data.train_pairs=8 --data.validation_pairs=2 --data.batch_size=4 "
FLAGS += "--trainer.accelerator=cpu --trainer.precision=32-true --trainer.enable_progress_bar=false "
FLAGS += "--trainer.max_steps=2 --trainer.log_every_n_steps=1 --trainer.enable_model_summary=false"
SPACES = {
    "plain": [],
    "expected": ["--latent=ExpectedSpace", "--latent.num_codes=3", "--latent.init_logit_std=2"],
    "gaussian": ["--latent=GaussianSpace", "--latent.num_codes=3", "--latent.init_logit_std=2"],
}

REAL = DATA_DIR / "preferences"


@pytest.fixture(scope="module", autouse=True)
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lpc-lightning"])
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setenv("PL_SEED_WORKERS", "0")
        patch.setenv("COLUMNS", "100")
        yield patch


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch) -> dict[str, str]:
    """Of fits of two steps, by space."""
    root = tmp_path_factory.mktemp("fits")
    patch.setenv("LPC_LIGHTNING_CACHE", str(root / "cache"))
    for name, space in SPACES.items():
        lpc_lightning(["fit", *FLAGS.split(), *space, f"--trainer.default_root_dir={root / name}"])
    return {name: str(next((root / name).glob("version_0/checkpoints/*.ckpt"))) for name in SPACES}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 pairs of three annotators for the test, and as many for training."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with path.open("w") as lines:
        for split in ("train", "test"):
            for pair in PreferenceGenerator("hidden", annotators=3).examples(24, split):
                row: dict[str, Any] = {"id": pair.id, "prompt": list(pair.prompt), "chosen": pair.chosen}
                row |= {"rejected": pair.rejected, "annotator": pair.annotator, "factor": pair.factor, "split": split}
                lines.write(json.dumps(row) + "\n")
    return str(path)


def test_models_side_by_side_and_their_weights_in_generate(
    checkpoints: dict[str, str], file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [checkpoints["expected"], checkpoints["plain"]]
    flags = ["--names=lpc,dpo", f"--output={tmp_path}", "--shots", "0", "1", "4", "--rounds=3", "--device=cpu"]
    main(["adapt", *models, "--preferences", file, *flags])
    out = capsys.readouterr().out
    lines = (tmp_path / "adaptation.md").read_text().splitlines()
    assert "\n".join(lines) in out
    assert len(lines) == 8, "nobody is left out"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["model", "codes by", "given 0", "given 1", "given 4"]
    assert [row[:2] for row in cells[2:]] == [
        ["lpc", "exact"],
        ["lpc", "amortised"],
        ["lpc", "exact, under z"],
        ["lpc", "prior, for anybody"],
        ["lpc", "no latent (z = 0)"],
        ["dpo", "prior, for anybody"],
    ]
    record = json.loads((tmp_path / "lpc" / "adaptation.json").read_text())
    assert sum(record["annotators"].values()) == 24
    assert set(record["annotators"]) == {f"annotator-{number}" for number in range(3)}
    first = record["scores"]["exact"]["4"]
    assert cells[2][4] == f"{first['accuracy']:.4f} ± {first['standard_error']:.4f}"
    plain = json.loads((tmp_path / "dpo" / "adaptation.json").read_text())
    assert plain["scores"]["exact"]["4"]["by_annotator"] == pytest.approx(plain["baselines"]["prior"]["by_annotator"])
    assert not (tmp_path / "dpo" / "code_weights.json").exists()
    assert (tmp_path / "adaptation.png").stat().st_size > 5000
    assert (tmp_path / "adaptation.svg").is_file()

    weights, output = tmp_path / "lpc" / "code_weights.json", tmp_path / "answers.jsonl"
    asked = ["--model", checkpoints["expected"], "--prompt=Why?", "--max-new-tokens=3", f"--output={output}"]
    lpc_lightning(["generate", *asked, "--code-weights", str(weights), "annotator-1"])
    assert [each["under"] for each in json.loads(output.read_text())["answers"]] == ["prior", "code weights"]


def test_the_plot_of_one_model_and_that_of_several() -> None:
    """One: its curves and the level at z = 0. Several: a panel each way of inference, and levels for plain policies."""
    known = Score(0.5, 0.1, None, 20, {"anna": 0.5})
    levels, curves = {"prior": known, "no_latent": known}, {"exact": {0: known, 2: known}, "exact_z": {0: known}}
    lpc = AdaptationReport({"anna": 20}, curves, levels, {"anna": np.ones(1)})
    dpo = AdaptationReport({"anna": 20}, {"exact": {0: known, 2: known}}, {"prior": known})
    gumbel = replace(lpc, scores={"exact": {0: known}, "amortised": {0: known}})
    (alone,) = panels({"lpc": lpc}).values()
    assert [(line.label, len(line.positions)) for line in alone] == [
        ("exact", 2), ("exact, under z", 1), ("no latent (z = 0)", 0),
    ]  # fmt: skip
    several = panels({"lpc": lpc, "dpo": dpo, "gumbel": gumbel})
    assert {title: [(line.label, line.level is None) for line in lines] for title, lines in several.items()} == {
        "exact": [("lpc", True), ("dpo", False), ("gumbel", True)],
        "exact, under z": [("lpc", True), ("dpo", False)],
        "amortised": [("dpo", False), ("gumbel", True)],
    }


def test_any_column_can_say_whose_pair_it_is_and_splits_and_limits_hold(
    checkpoints: dict[str, str], file: str, tmp_path: Path
) -> None:
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
        factor: sum(each.factor == factor for each in examples) for factor in sorted({e.factor for e in examples})
    }


@pytest.mark.parametrize("space", ["plain", "gaussian"])
def test_a_policy_without_codes_alone_is_refused(
    space: str, checkpoints: dict[str, str], file: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"models: .*\.ckpt has no codes: there is nothing to infer"):
        adapt([checkpoints[space]], file, output=str(tmp_path), device="cpu")
    assert not list(tmp_path.iterdir())


def test_several_policies_without_codes_are_refused(checkpoints: dict[str, str], file: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models: none of .*, .*\.ckpt has codes: there is nothing to infer"):
        adapt([checkpoints["plain"], checkpoints["gaussian"]], file, output=str(tmp_path), limit=4, device="cpu")


def test_prompts_stand_in_the_template_of_the_training(checkpoints: dict[str, str], file: str, tmp_path: Path) -> None:
    config = Path(checkpoints["expected"]).parents[1] / "config.yaml"
    told = config.read_text()
    assert "template: auto" in told
    config.write_text(told.replace("template: auto", "template: verse"))
    try:
        with pytest.raises(DataError, match="verse"):
            adapt([checkpoints["expected"]], file, output=str(tmp_path), limit=4, device="cpu")
    finally:
        config.write_text(told)


def test_pairs_of_nobody_are_told(checkpoints: dict[str, str], file: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"annotator_column: found no source in any pair of .*pairs.jsonl"):
        adapt([checkpoints["expected"]], file, annotator_column="source", output=str(tmp_path), device="cpu")


def test_annotators_with_too_few_pairs_are_left_out_and_told(
    checkpoints: dict[str, str], file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of one and one of another: only the first has one other pair to learn from."""
    some, written = tmp_path / "some.jsonl", []
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    for name, count in (("annotator-0", 2), ("annotator-1", 1)):
        written += [row for row in rows if row["annotator"] == name and row["split"] == "test"][:count]
    some.write_text("\n".join(map(json.dumps, written)))
    flags: dict[str, Any] = {"output": str(tmp_path), "names": ["lpc"], "device": "cpu"}
    adapt([checkpoints["expected"]], str(some), shots=[1, 2], **flags)
    out = capsys.readouterr().out
    assert "lpc, given 1: 2 of 3 pairs, annotators left out for having 1 or fewer: 1.\n" in out
    assert "lpc, given 2: 0 of 3 pairs, annotators left out for having 2 or fewer: 2.\n" in out
    scores = json.loads((tmp_path / "lpc" / "adaptation.json").read_text())["scores"]
    assert {kind: list(each) for kind, each in scores.items()} == {"exact": ["1"], "amortised": ["1"], "exact_z": ["1"]}
    assert scores["exact"]["1"]["by_annotator"].keys() == {"annotator-0"}
    with pytest.raises(DataError, match=r"shots: found 2 at least, and in .*some.jsonl no annotator with more than 2"):
        adapt([checkpoints["expected"]], str(some), shots=[2, 3], **flags)


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason="no $LPC_DATA_DIR/preferences")
@pytest.mark.parametrize(
    ("name", "limit", "annotators"),
    [
        ("dsp_domain_pairs", 40, {"academy", "business", "entertainment", "literature"}),
        ("hh_relabeled_objective", 230, {"harmless", "helpful"}),  # sorted by it
    ],
)
def test_real_pairs_whose_factor_is_the_annotator(
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


def test_help_tells_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["adapt", "--help"])
    said = capsys.readouterr().out
    assert all(f"--{name}" in said for name in list(inspect.signature(adapt).parameters)[1:])


def test_settings_are_refused_before_a_model_is_opened(file: str) -> None:
    with pytest.raises(ConfigError, match="rounds: found 0"):
        adapt(["no.ckpt"], file, rounds=0)
