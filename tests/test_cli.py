"""The commands as a user gives them: what they print and write, and one clear sentence where the input is bad."""

from __future__ import annotations

import csv
import inspect
import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lpc_lightning.cli import commands, main
from lpc_lightning.evaluation.adaptation.command import adapt
from lpc_lightning.evaluation.comparison.command import evaluate
from lpc_lightning.inference.alpaca import alpaca
from lpc_lightning.inference.export import export
from lpc_lightning.inference.generate import generate
from lpc_lightning.policy import TinyPolicy
from lpc_lightning.prepare import prepare
from lpc_lightning.ship_configs import configs
from tests.fixtures.commands import Outcome, run_command

POLICY = ["--policy=TinyPolicy", "--policy.width=16", "--policy.layers=1", "--policy.heads=2"]
MODEL = ["--model=DPO", "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=0.01"]
LATENT = ["--latent=MarginalSpace", "--latent.num_codes=3", "--latent.hidden=8"]
DATA = ["--data=SyntheticPreferences", "--data.train_pairs=6", "--data.validation_pairs=3", "--data.test_pairs=3"]
TRAINER = ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.enable_progress_bar=false"]
TRAINER += ["--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", "--seed_everything=4"]
ALL = [*POLICY, *MODEL, *LATENT, *DATA, "--data.batch_size=2", *TRAINER]


CONFIGS = Path(__file__).parents[1] / "configs"


Command = Callable[..., Outcome]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `lpc-lightning` in this process. An exception that gets out of it would be a traceback."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr("sys.argv", ["lpc-lightning", *arguments])
        return run_command(capsys, *arguments)

    return run


def places_in(folder: Path) -> list[str]:
    return [f"--data.cache_dir={folder / 'cache'}", f"--trainer.default_root_dir={folder / 'runs'}"]


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    return places_in(tmp_path)


@pytest.fixture
def fit(command: Command, places: list[str]) -> Command:
    """`lpc-lightning fit` of something tiny, with more flags."""
    return lambda *flags: command("fit", *ALL, *places, *flags)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def logged(run: Path) -> dict[str, list[float]]:
    """The columns of a metrics.csv without their empty cells."""
    found: dict[str, list[float]] = {}
    with (run / "metrics.csv").open() as file:
        for line in csv.DictReader(file):
            for name, value in line.items():
                found.setdefault(name, []).extend([float(value)] if value else [])
    return found


# Help.


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_command(command: Command, flag: str) -> None:
    output = command(flag)
    assert output.code == 0
    assert output.err == ""
    for name, (_, text) in commands().items():
        assert re.search(rf"^ +{name} +{re.escape(text)}$", output.out, re.M)


@pytest.mark.slow
def test_usage_lists_plugins_without_importing_them() -> None:
    """lpc_lightning imports nothing from evaluation, whose lm-eval takes seconds."""
    code = (
        "import sys, lpc_lightning.__main__; from lpc_lightning.cli import commands\n"
        "summary = commands()['evaluate'][1]\n"
        "assert not {'lpc_lightning.evaluation.comparison.command', 'lm_eval'} & set(sys.modules); print(summary)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "benchmarks and preference accuracy of any models, side by side\n"


FUNCTIONS = {
    "prepare": prepare,
    "configs": configs,
    "export": export,
    "generate": generate,
    "alpaca": alpaca,
    "evaluate": evaluate,
    "adapt": adapt,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_command_help_explains_every_setting(command: Command, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    output = command(name, "--help")
    assert output.code == 0
    message = dict(
        re.findall(r"^  (?:--)?(\w+)[ ,].*?(?: {2,}|\n {24})(\S.*?) \((?:required, )?type: ", output.out, re.M)
    )
    assert set(inspect.signature(FUNCTIONS[name]).parameters) <= set(message)
    assert all(len(meaning.split()) > 1 for meaning in message.values())


@pytest.mark.slow
def test_the_installed_program_is_this_one() -> None:
    program = Path(sys.executable).with_name("lpc-lightning")
    done = subprocess.run([program, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: lpc-lightning COMMAND")


@pytest.mark.parametrize("name", ["fit", "generate", "evaluate", "report", "adapt", "export"])
def test_missing_arguments_are_an_error_line(command: Command, name: str) -> None:
    output = command(name)
    assert output.code in (1, 2)
    assert "error: " in output.err


@pytest.mark.parametrize(
    ("arguments", "error"), [([], ""), (["fot"], "error: found command 'fot', expected one of fit, ")]
)
def test_unknown_command_lists_the_known_ones(command: Command, arguments: list[str], error: str) -> None:
    output = command(*arguments)
    assert output.code == 2
    assert output.out == ""
    assert "usage: lpc-lightning COMMAND" in output.err
    assert error in output.err


def test_fit_help_lists_every_group(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    output = command("fit", "--help")
    assert output.code == 0
    for group in (
        "policy",
        "model",
        "latent",
        "data",
        "callbacks",
        "trainer.max_epochs",
        "ckpt_path",
        "seed_everything",
    ):
        assert re.search(rf"^  (-c CONFIG, )?--{group}( |$)", output.out, re.M), group
    assert "The latent space of Latent Preference Coding. null is the plain algorithm." in output.out


SETTINGS = {
    ("model", "DPO"): ["beta", "label_smoothing", "robust", "latent_lr", "lr_schedule", "warmup_ratio", "optimizer"],
    ("model", "IPO"): ["beta", "length_average"],
    ("model", "SimPO"): ["beta", "gamma_beta_ratio"],
    ("model", "KTO"): ["beta", "desirable_weight", "undesirable_weight", "reference_point", "reference"],
    ("model", "ORPO"): ["beta", "latent_lr"],
    ("latent", "GumbelSpace"): [
        "tau",
        "hard",
        "g",
        "kl_weight",
        "free_bits",
        "num_codes",
        "init_logit_std",
        "prior_mode",
    ],
    ("latent", "MarginalSpace"): ["num_codes", "init_logit_std", "prior_mode", "detach", "hidden"],
    ("latent", "GaussianSpace"): ["num_codes", "g", "kl_weight"],
    ("latent", "VectorSpace"): ["init_logit_std"],
    ("policy", "TinyPolicy"): ["family", "width", "dtype", "attention", "lora", "gradient_checkpointing"],
    ("policy", "PretrainedPolicy"): ["path", "revision", "tokenizer", "adapter", "merge_adapter", "lora"],
    ("policy", "TrainedPolicy"): ["path", "keep_latent", "lora", "dtype"],
    ("data", "PreferenceData"): ["path", "validation_share", "columns", "batch_size", "layout", "too_long", "bad_rows"],
    ("data", "SyntheticPreferences"): ["deciding", "train_pairs", "num_workers", "cache_dir"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("group", "name"), list(SETTINGS), ids=lambda value: value)
def test_class_help_explains_every_setting(
    command: Command, monkeypatch: pytest.MonkeyPatch, group: str, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    output = command("fit", f"--{group}.help", name)
    assert output.code == 0
    line = rf"^  --{group}\.(\w+)[ ,].*?(?: {{2,}}|\n {{24}})(\S.*?) \((?:required, )?type: "
    message = dict(re.findall(line, output.out, re.M))
    assert set(SETTINGS[group, name]) <= set(message)
    silent = {setting for setting, meaning in message.items() if len(meaning.split()) < 2}
    assert not silent


# A run.


@pytest.mark.slow
def test_each_run_writes_its_own_folder(fit: Command, runs: Path) -> None:
    assert fit().code == 0
    assert fit("--seed_everything=5").code == 0
    assert sorted(path.name for path in runs.iterdir()) == ["version_0", "version_1"]
    for run in runs.iterdir():
        assert (run / "config.yaml").is_file()
        assert len(list(run.glob("checkpoints/*.ckpt"))) == 1
        columns = logged(run)
        assert len(columns["train/loss"]) == 6
        assert len(columns["val/loss"]) == 2
        assert columns["data/train/read"] == columns["data/train/kept"] == [6]
        assert columns["data/validation/kept"] == [3]
        board = EventAccumulator(str(run)).Reload()
        scalars = [event.value for event in board.Scalars("train/loss")]
        assert scalars == pytest.approx(columns["train/loss"], rel=1e-6)
    assert logged(runs / "version_0")["train/loss"] != logged(runs / "version_1")["train/loss"]


@pytest.mark.slow
def test_run_without_logger_has_its_own_folder(fit: Command, runs: Path) -> None:
    for _ in range(2):
        output = fit("--trainer.logger=false", f"--callbacks={CONFIGS / 'callbacks' / 'default.yaml'}")
        assert output.code == 0, output.err
    assert f"Run folder: {runs / 'version_1'}\n" in output.out
    for number in range(2):
        names = {path.name for path in (runs / f"version_{number}").iterdir()}
        assert names >= {"config.yaml", "summary.json", "checkpoints"}
        assert "metrics.csv" not in names
        assert not [name for name in names if name.startswith("events")]
    assert {path.name for path in runs.iterdir()} == {"version_0", "version_1"}


def test_loggers_receive_the_settings(fit: Command, runs: Path) -> None:
    """With the loggers of a file: rows and hyperparameters, and no events."""
    output = fit(f"--trainer.logger={CONFIGS / 'logger' / 'csv.yaml'}", "--trainer.max_epochs=1")
    assert output.code == 0, output.err
    run = runs / "version_0"
    assert {path.name for path in run.iterdir()} == {
        "checkpoints", "config.yaml", "hparams.yaml", "metrics.csv", "rendered_pair.txt",
    }  # fmt: skip
    stated, saved = (yaml.safe_load((run / name).read_text()) for name in ("hparams.yaml", "config.yaml"))
    assert stated["run_folder"] == str(run)
    assert stated["data"] == saved["data"]
    assert stated["trainer"]["max_epochs"] == 1
    assert stated["seed_everything"] == 4
    assert stated["latent"]["init_args"]["num_codes"] == 3


@pytest.mark.slow
def test_fast_dev_run_leaves_nothing(fit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: Path) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    callbacks = [f"--callbacks={CONFIGS / 'callbacks' / 'default.yaml'}", "--callbacks+=LabelFlipNoise"]
    assert fit("--trainer.fast_dev_run=2", *callbacks, "--callbacks.rate=0.5").code == 0
    assert list(Path().iterdir()) == []
    assert not runs.exists()


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize(("width", "set_by_user", "threads"), [(64, False, 1), (64, True, 2), (68, False, 2)])
def test_a_narrow_policy_takes_one_thread(
    width: int, set_by_user: bool, threads: int, fit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2") if set_by_user else monkeypatch.delenv("OMP_NUM_THREADS")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert fit("--trainer.fast_dev_run=1", f"--policy.width={width}").code == 0
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_failed_run_leaves_no_empty_folder(fit: Command, runs: Path) -> None:
    assert fit("--data.layout=PaddedLayout", "--data.batch_size=0").code != 0
    assert not runs.exists() or list(runs.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "callbacks", [[], [f"--callbacks={CONFIGS / 'callbacks' / 'default.yaml'}"]], ids=["", "callbacks"]
)
def test_run_repeats_from_its_saved_config(callbacks: list[str], command: Command, fit: Command, runs: Path) -> None:
    assert fit(*callbacks).code == 0
    first = logged(runs / "version_0")
    output = command("fit", f"--config={runs / 'version_0' / 'config.yaml'}")
    assert output.code == 0, output.err
    assert logged(runs / "version_0") == first
    again = logged(runs / "version_1")
    assert {
        "train/loss",
        "val/loss",
        *(["lr-AdamW/backbone", "resources/pairs_per_second"] if callbacks else []),
    } <= set(first)
    assert set(again) == set(first)
    for name in [name for name in first if not name.startswith("resources/")]:
        assert again[name] == first[name], name
    one, other = ((runs / f"version_{number}" / "config.yaml").read_text() for number in (0, 1))
    assert one == other


def test_a_config_file_and_flags_make_one_run(command: Command, places: list[str], runs: Path, tmp_path: Path) -> None:
    """Groups from files of their own, relative to the file that names them, and a flag that wins over both."""
    group = {"class_path": "lpc_lightning.latent.MarginalSpace", "init_args": {"num_codes": 5, "hidden": 8}}
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "latent.yaml").write_text(yaml.safe_dump(group))
    (tmp_path / "run.yaml").write_text("latent: parts/latent.yaml\n")
    flags = [*POLICY, *MODEL, *DATA, *TRAINER, *places, "--trainer.max_steps=1", "--latent.num_codes=4"]
    assert command("fit", f"--config={tmp_path / 'run.yaml'}", *flags).code == 0
    (path,) = (runs / "version_0").glob("checkpoints/*.ckpt")
    assert torch.load(path, weights_only=True)["state_dict"]["latent.codebook.weight"].shape == (4, 16)


# From a checkpoint.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of runs with one run of one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = ["fit", *ALL, *places_in(folder), "--trainer.max_epochs=1"]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            patch.setenv(name, "0")
        patch.setattr("sys.argv", ["lpc-lightning", *arguments])
        main(arguments)
    return folder / "runs"


@pytest.fixture
def checkpoint(trained: Path, runs: Path) -> Path:
    """Of a copy of that run, in version_0."""
    shutil.copytree(trained, runs)
    (path,) = (runs / "version_0").glob("checkpoints/*.ckpt")
    return path


# Lightning warns that the best score of the old folder does not count in the new one.
@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
class TestFromACheckpoint:
    @pytest.mark.slow
    def test_resume_keeps_the_model_settings(self, checkpoint: Path, fit: Command, runs: Path) -> None:
        with pytest.warns(UserWarning, match=r"resume: found trainer\.max_epochs 2 \(before: 1\)"):
            output = fit(f"--ckpt_path={checkpoint}", "--model.beta=9", "--policy.width=32", "--latent=null")
        assert output.code == 0, output.err
        message = f"Model, policy and latent are set as in {checkpoint}; flags and config files do not change them."
        assert message in output.out
        resumed = logged(runs / "version_1")
        assert len(resumed["train/loss"]) == 3
        assert resumed["train/latent/prior_entropy"]
        module = LightningModule.load_from_checkpoint(next((runs / "version_1").glob("checkpoints/*.ckpt")))
        assert (module.beta, module.policy_spec.width, module.latent.num_codes) == (0.1, 16, 3)

    @pytest.mark.slow
    @pytest.mark.parametrize(("name", "prefix"), [("validate", "val"), ("test", "test")])
    def test_it_is_measured(
        self, name: str, prefix: str, checkpoint: Path, command: Command, places: list[str], runs: Path
    ) -> None:
        output = command(name, *ALL[: -len(TRAINER)], *TRAINER[:3], *places, f"--ckpt_path={checkpoint}")
        assert output.code == 0, output.err
        found = logged(runs / "version_1")
        assert 0 <= found[f"{prefix}/rewards/accuracies"][0] <= 1
        assert f"{prefix}/rewards/accuracies" in output.out
        if name == "validate":
            fitted = logged(runs / "version_0")
            names = [column for column in fitted if column.startswith("val/")]
            assert len(names) > 8
            for column in names:
                assert found[column] == fitted[column]

    @pytest.mark.slow
    def test_its_pairs_are_predicted(self, checkpoint: Path, command: Command, places: list[str], runs: Path) -> None:
        options = [*ALL[: -len(TRAINER)], *TRAINER[:3], *places, f"--ckpt_path={checkpoint}"]
        output = command("predict", *options, "--callbacks+=lpc_lightning.callbacks.WritePredictions")
        assert output.code == 0, output.err
        (file,) = runs.glob("*/predictions_0.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert len({row["id"] for row in rows}) == len(rows) > 0
        for row in rows:
            assert row["rewards/chosen"] - row["rewards/rejected"] == pytest.approx(row["rewards/margins"], abs=1e-5)
            assert sum(row["prior"]) == pytest.approx(1, abs=1e-5)

    @pytest.mark.parametrize(
        ("content", "message"),
        [(None, "found no file"), ("not a checkpoint", "is no checkpoint")],
        ids=["missing", "something else"],
    )
    def test_file_that_is_no_checkpoint_is_refused(
        self, content: str | None, message: str, fit: Command, tmp_path: Path
    ) -> None:
        path = tmp_path / "last.ckpt"
        if content is not None:
            path.write_text(content)
        output = fit(f"--ckpt_path={path}")
        assert_one_error(output, r"ckpt_path: .*last\.ckpt.*expected (a checkpoint|one such as)")
        assert message in output.err

    def test_truncated_checkpoint_is_refused(self, checkpoint: Path, fit: Command, tmp_path: Path) -> None:
        half = tmp_path / "half.ckpt"
        half.write_bytes(checkpoint.read_bytes()[:50_000])
        assert_one_error(
            fit(f"--ckpt_path={half}"),
            r"ckpt_path: .*half\.ckpt is no checkpoint, or one that was cut short, expected one",
        )

    def test_other_architecture_is_refused(self, checkpoint: Path, fit: Command) -> None:
        """Made in code, it holds no settings, so that the flags' model is to take it."""
        kept = torch.load(checkpoint, weights_only=True)
        kept["hyper_parameters"] = {}
        torch.save(kept, checkpoint)
        output = fit(f"--ckpt_path={checkpoint}", "--policy.width=32", "--trainer.max_epochs=2")
        assert_one_error(
            output, r"checkpoint: its weights are of another architecture: .*found \(3, 16\), expected \(3, 32\)"
        )

    @pytest.mark.slow
    def test_damaged_entries_are_refused(
        self, checkpoint: Path, fit: Command, command: Command, tmp_path: Path
    ) -> None:
        kept = torch.load(checkpoint, weights_only=True)
        name = next(iter(kept["callbacks"]))
        settings = kept["hyper_parameters"]
        changes: dict[str, tuple[dict[str, Any], str]] = {
            "loops": ({"loops": {"fit_loop": 3}}, "found no counts in loops"),
            "count": ({"loops": kept["loops"] | {"fit_loop": {"state_dict": {}}}}, "found no counts in loops"),
            "callbacks": ({"callbacks": {name: 3}}, "cannot be restored"),
            "optimizer": ({"optimizer_states": [{"state": 3}]}, "cannot be restored"),
            "schedule": ({"lr_schedulers": [None]}, "cannot be restored"),
            "policy": ({"hyper_parameters": settings | {"policy": {"class_path": "os.system"}}}, "cannot import code"),
            "beta": ({"hyper_parameters": settings | {"beta": []}}, "holds settings that cannot be used"),
        }
        for change, message in changes.values():
            torch.save(kept | change, tmp_path / "other.ckpt")
            output = fit(f"--ckpt_path={tmp_path / 'other.ckpt'}", "--trainer.max_epochs=2")
            assert_one_error(output, rf"ckpt_path: .*other\.ckpt.*{message}")
        del kept["loops"]
        torch.save(kept, tmp_path / "other.ckpt")
        output = fit(f"--ckpt_path={tmp_path / 'other.ckpt'}", "--trainer.max_epochs=2")
        assert_one_error(output, r"ckpt_path: .*other\.ckpt: found no entry loops, expected the full state of a run")

    @pytest.mark.slow
    def test_steps_of_another_size_are_refused(self, checkpoint: Path, fit: Command) -> None:
        output = fit(f"--ckpt_path={checkpoint}", "--trainer.accumulate_grad_batches=2")
        assert_one_error(
            output, r"trainer\.accumulate_grad_batches: found 2, expected 1 as in the checkpoint\. Resume with"
        )

    @pytest.mark.slow
    @pytest.mark.parametrize("change", ["--seed_everything=5", "--data.train_pairs=8", "--data.batch_size=3"])
    def test_other_data_is_refused(self, change: str, checkpoint: Path, fit: Command) -> None:
        output = fit(f"--ckpt_path={checkpoint}", change)
        assert_one_error(output, r"resume: found data order .*expected .* as in the checkpoint\. Resume with the same")


# Bad input.


def assert_one_error(output: Outcome, pattern: str) -> None:
    assert output.code == 1, output
    assert "Traceback" not in output.out + output.err
    errors = re.findall(r"^error: (.*)", output.err, re.M | re.S)
    assert len(errors) == 1
    assert re.match(pattern, errors[0].replace("\n", " ")), errors[0]


GOOD = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}


def line(number: int, content: Any, rows: int = 20) -> list[Any]:
    """Good rows but for one."""
    return [content if place == number else GOOD | {"prompt": f"Why {place}?"} for place in range(1, rows + 1)]


ROWS: dict[str, tuple[list[Any], str]] = {
    "no rows": ([], r".*pairs\.jsonl holds no rows\. Expected at least one preference pair"),
    "missing answer": (
        line(3, {"prompt": "a", "chosen": "b"}),
        r"1 rows cannot be used.*missing answer: pairs\.jsonl line 3 \(no 'rejected'; the row has \['chosen', 'prompt'",
    ),
    "empty answer": (
        line(4, GOOD | {"rejected": ""}),
        r".*empty answer: pairs\.jsonl line 4 \(the rejected answer is ''",
    ),
    "equal answers": (line(5, GOOD | {"rejected": "So."}), r".*equal answers: pairs\.jsonl line 5 \(both are 'So\.'"),
    "a number for an answer": (
        line(6, GOOD | {"chosen": 7}),
        r".*wrong type: pairs\.jsonl line 6 \(an answer is int; expected",
    ),
    "a list of lists": (
        line(7, GOOD | {"chosen": [[1]]}),
        r".*wrong type: pairs\.jsonl line 7 \(an answer is a list of 1",
    ),
    "an unknown form": (
        line(8, GOOD | {"prompt": 3}),
        r".*unknown form: pairs\.jsonl line 8 \(prompt: int, chosen: str",
    ),
    "other columns": (
        line(9, {"question": "a", "answer": "b"}),
        r".*missing answer: pairs\.jsonl line 9 \(no 'chosen'; the",
    ),
    "not an object": (
        line(10, "[1, 2]"),
        r".*not an object: pairs\.jsonl line 10 \(found a JSON list, expected an object",
    ),
    "invalid JSON": (line(17, '{"prompt": "a", '), r".*invalid JSON: pairs\.jsonl line 17 \(.*the line begins with"),
    "invalid UTF-8": (
        line(12, b'{"prompt": "\xff"}'),
        r".*invalid UTF-8: pairs\.jsonl line 12 \(invalid start byte at byte 12",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROWS)
def test_a_bad_row_is_named(kind: str, command: Command, places: list[str], tmp_path: Path, runs: Path) -> None:
    rows, pattern = ROWS[kind]
    path = tmp_path / "pairs.jsonl"
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"".join(content + b"\n" for content in lines))
    flags = ["--data=PreferenceData", f"--data.path={path}", "--data.validation_share=0"]
    output = command("fit", *POLICY, *MODEL, *flags, *TRAINER, *places)
    assert_one_error(output, pattern)
    if not rows:
        return
    assert "Correct or remove them, or leave them out: `--data.bad_rows skip` (evaluate" in output.err
    went_on = command(
        "fit", *POLICY, *MODEL, *flags, *TRAINER, *places, "--data.bad_rows=skip", "--trainer.max_steps=1"
    )
    assert went_on.code == 0, went_on.err
    counts = logged(max(runs.iterdir()))
    assert counts["data/train/kept"] == [19]
    (reason,) = [name for name in counts if name.startswith("data/train/bad/")]
    assert counts[reason] == [1]


@pytest.fixture
def no_end(tmp_path: Path) -> Path:
    """A policy's folder whose tokenizer has no end token."""
    spec = TinyPolicy(width=16, layers=1, heads=2)
    spec.build().causal_lm.save_pretrained(tmp_path / "no_end")
    tokenizer = spec.load_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = None, None
    tokenizer.save_pretrained(tmp_path / "no_end")
    return tmp_path / "no_end"


@pytest.fixture
def small_vocabulary(tmp_path: Path) -> Path:
    """A policy's folder whose embedding has fewer rows than its tokenizer has tokens."""
    spec = TinyPolicy(width=16, layers=1, heads=2)
    model = spec.build().causal_lm
    model.resize_token_embeddings(1000)
    model.save_pretrained(tmp_path / "small")
    spec.load_tokenizer().save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def test_tokenizer_without_end_token_is_refused(command: Command, places: list[str], no_end: Path) -> None:
    policy = ["--policy=PretrainedPolicy", f"--policy.path={no_end}"]
    output = command("fit", *policy, *MODEL, *DATA, *TRAINER, *places)
    assert_one_error(output, r".*end")


def test_vocabulary_that_does_not_fit_is_refused(command: Command, places: list[str], small_vocabulary: Path) -> None:
    policy = ["--policy=PretrainedPolicy", f"--policy.path={small_vocabulary}"]
    output = command("fit", *policy, *MODEL, *DATA, *TRAINER, *places)
    message = r"policy: the vocabulary does not fit: the tokenizer makes ids up to \d+, the embedding has 1000 rows"
    assert_one_error(output, message)


def test_unknown_policy_is_refused(command: Command, places: list[str], tmp_path: Path) -> None:
    policy = ["--policy=PretrainedPolicy", f"--policy.path={tmp_path / 'nowhere'}"]
    output = command("fit", *policy, *MODEL, *DATA, *TRAINER, *places)
    assert_one_error(output, r"policy\.path: found no file or folder .*nowhere\. Expected .*`lpc-lightning prepare`")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        (["--data.batch_size=0"], r"data\.batch_size: found 0, expected at least 1"),
        (["--data.max_length=0"], r"max_length=0: expected a number of tokens from 1 on"),
        (["--latent.num_codes=0"], r"latent\.num_codes: found 0, expected at least 1"),
        (
            ["--latent.prior_mode=3"],
            r"latent\.prior_mode: found 3, expected one of mean, sample, argmax, or the number",
        ),
        (
            ["--latent=GumbelSpace", "--latent.tau=Exponential", "--latent.tau.end=0"],
            r"Exponential: found start 1\.0 and end 0",
        ),
        (["--model.beta=0"], r"beta: found 0\.0, expected a number above 0\."),
        (["--model.label_smoothing=0.6"], r"label_smoothing: found 0\.6, expected a share from 0 and at most 0\.5"),
        (["--trainer.max_epochs=-1"], r"trainer: found no end of training, expected max_steps or max_epochs"),
        (
            [f"--callbacks={CONFIGS / 'callbacks' / 'label_flip.yaml'}", "--callbacks.rate=30"],
            r"LabelFlipNoise\.rate: found 30\.0, expected a share from 0 to 1: 0\.3 for 30 %\.\s*$",
        ),
        (["--data.max_length=20"], r"No pair is left\..*6 dropped: pair longer than max_length.*the length limits"),
        (
            ["--data.too_long=error", "--data.max_length=90"],
            r"Pair 'visible-train-\d+': pair longer than max_length\. It has",
        ),
        (
            ["--model.optimizer.lr=1e30", "--model.warmup_ratio=0"],
            r"train/loss: found nan at step \d \(epoch 0, .*pairs visible-train",
        ),
        (
            ["--policy.attention=sdpa", "--policy.family=gemma2"],
            r"policy\.attention: found sdpa for gemma2, which soft-caps",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_setting_out_of_range_is_refused(fit: Command, flags: list[str], pattern: str) -> None:
    assert_one_error(fit(*flags), pattern)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test", "predict"])
def test_no_test_pairs_is_an_error_line(name: str, command: Command, places: list[str]) -> None:
    output = command(name, *ALL[: -len(TRAINER)], *TRAINER[:3], *places, "--data.test_pairs=0")
    assert_one_error(output, rf"{name}: found no test pairs, expected at least one\.")


@pytest.mark.parametrize("missing", ["policy", "data"])
def test_group_without_a_class_is_refused(command: Command, missing: str, places: list[str]) -> None:
    flags = [flag for flag in ALL if not flag.startswith(f"--{missing}")]
    output = command("fit", *flags, *places)
    assert_one_error(output, rf"{missing}: found no class, expected one, as in `--{missing} ")


@pytest.mark.parametrize("flag", ["--data.batchsize=3", "--latent=NoSuchSpace", "--data.batch_size=many"])
def test_an_unknown_setting_is_the_parsers_to_tell(fit: Command, flag: str) -> None:
    output = fit(flag)
    assert output.code == 2
    assert "Traceback" not in output.err
    assert flag.partition("=")[2].partition(".")[0] in output.err or "batchsize" in output.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "--config", "nowhere.yaml"],
        ["fit", "--config=nowhere.yaml", "--model=DPO"],
        ["fit", "-c", "nowhere.yaml"],
        ["fit", "--latent=nowhere.yaml"],
        ["fit", "--callbacks+=nowhere.yaml"],
        ["export", "--config=nowhere.yaml"],
    ],
    ids=" ".join,
)
def test_missing_config_file_is_two_lines(command: Command, arguments: list[str]) -> None:
    ended = command(*arguments)
    assert_one_error(ended, r"(-c|--config|--latent|--callbacks\+): found no file nowhere\.yaml in /")
    assert len(ended.err.splitlines()) == 2


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond 100 kB: a write is stopped in its middle, with an error of the system."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_leaves_no_partial_checkpoint(full_disk: None, fit: Command, runs: Path) -> None:
    output = fit()
    assert_one_error(output, r"checkpoint: could not write .*version_0/checkpoints/.*\.ckpt .*Earlier checkpoints are")
    assert not [path for path in runs.rglob("*") if "ckpt" in path.name]
    assert len(logged(runs / "version_0")["train/loss"]) == 3
