"""Tests of bad input: one clear sentence, which names the file, the row or the setting."""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.accelerators import CUDAAccelerator

from lpc_lightning.policy import TinyPolicy
from tests.fixtures.commands import ALL, CONFIGS, DATA, MODEL, POLICY, TRAINER, Command, assert_one_error, logged

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
        (["--data.max_length=0"], r"data\.max_length: found 0, expected a number of tokens from 1 on"),
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
        (
            ["--model.robust_loss=ConservativeLoss", "--model.robust_loss.rate=0.6"],
            r"robust_loss\.rate: found 0\.6, expected",
        ),
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
        (["--model.optimizer.lr=-1"], r"model\.optimizer: Invalid learning rate: -1\.0\s*$"),
        (
            ["--model.optimizer.fused=true", "--model.optimizer.foreach=true"],
            r"model\.optimizer: `fused` and `foreach` cannot be `True` together\.\s*$",
        ),
        (
            ["--policy.attention=sdpa", "--policy.family=gemma2"],
            r"policy\.attention: found sdpa for gemma2, whose attention",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_setting_out_of_range_is_refused(fit: Command, flags: list[str], pattern: str) -> None:
    assert_one_error(fit(*flags), pattern)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test", "predict"])
def test_no_test_pairs_is_an_error_line(
    name: str, command: Command, places: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    output = command(name, *ALL[: -len(TRAINER)], *TRAINER[:3], *places, "--data.test_pairs=0")
    assert_one_error(output, rf"{name}: found no test pairs, expected at least one\.")
    assert ("callbacks: found none, so the predictions are not written" in caplog.text) == (name == "predict")
    assert "ckpt_path: found none" in caplog.text


@pytest.mark.slow
def test_no_test_split_is_an_error_line(command: Command, places: list[str], tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps({"train": [{"prompt": "Q", "chosen": "yes", "rejected": "no"}], "dev": []}))
    flags = [flag for flag in ALL[: -len(TRAINER)] if not flag.startswith("--data")]
    flags += ["--data=PreferenceData", f"--data.path={path}", *TRAINER[:3], *places]
    assert_one_error(
        command("test", *flags), r"test: found no test pairs, expected .* Set data\.test_split to the split"
    )


@pytest.mark.parametrize("missing", ["policy", "data"])
def test_group_without_a_class_is_refused(command: Command, missing: str, places: list[str]) -> None:
    flags = [flag for flag in ALL if not flag.startswith(f"--{missing}")]
    output = command("fit", *flags, *places)
    assert_one_error(output, rf"{missing}: found no class, expected one, as in `--{missing} ")


@pytest.mark.parametrize(
    ("flag", "pattern"),
    [
        (
            "accelerator=gpu",
            r"trainer\.accelerator: found gpu, which this machine does not have, expected one of auto",
        ),
        ("accelerator=tpu", r"trainer\.accelerator: found tpu, .*cpu.*take `--trainer configs/trainer/cpu\.yaml`"),
        ("accelerator=nothing", r"trainer: .*invalid accelerator name"),
        ("devices=0", r"trainer\.devices: found 0, expected a number of processes from 1 on, or auto"),
        ("strategy=nothing", r"trainer: .*invalid strategy name"),
    ],
)
def test_trainer_that_cannot_run_here(
    fit: Command, flag: str, pattern: str, monkeypatch: pytest.MonkeyPatch, runs: Path
) -> None:
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: False))  # also where there is a GPU
    output = fit(f"--trainer.{flag}")
    assert_one_error(output, pattern)
    assert len(output.err.splitlines()) == 1
    assert not list(runs.glob("*/*"))


def test_split_that_no_row_has(command: Command, places: list[str], tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(GOOD | {"prompt": f"Why {place}?"}) + "\n" for place in range(4)))
    output = command("test", *POLICY, *MODEL, "--data=PreferenceData", f"--data.path={path}", *TRAINER[:3], *places)
    assert_one_error(
        output, r"No row belongs to the split .*4 left to split 'train' .*\(data\.test_split and.*adapt: `--split`"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        (
            ["--trainer.val_check_interval=500"],
            r"trainer\.val_check_interval: .*\(500\) must be less than .* \(3\)\. .*check_val_every_n_epoch=None`",
        ),
        (
            ["--callbacks+=lightning.pytorch.callbacks.EarlyStopping", "--callbacks.monitor=eval_loss"],
            r"callbacks: .* metric `eval_loss` which is not available\. .*`val/loss`",
        ),
        (
            ["--callbacks+=lightning.pytorch.callbacks.LearningRateFinder"],
            r"callbacks: found LearningRateFinder, .*Set model\.optimizer\.lr",
        ),
        (
            ["--callbacks+=BatchSizeFinder"],
            r"callbacks: found BatchSizeFinder, .*Set data\.batch_size",
        ),
        (
            ["--callbacks+=BestAndLast", "--callbacks+=BestAndLast"],
            r"callbacks: found \d of BestAndLast, expected one",
        ),
        (
            2 * ["--callbacks+=EarlyStopping", "--callbacks.monitor=val/loss"],
            r"callbacks: Found more than one stateful callback of type `EarlyStopping`",
        ),
    ],
    ids=["interval", "monitor", "learning rate", "batch size", "own twice", "twice"],
)
def test_refusal_of_lightning_is_one_line(fit: Command, flags: list[str], pattern: str) -> None:
    output = fit("--trainer.max_epochs=1", "--latent=null", *flags)
    assert_one_error(output, pattern)
    assert len(output.errors) == 1


SPACES = "ExpectedSpace GaussianSpace GumbelSpace MLPSpace MarginalSpace PosteriorOnlySpace PriorOnlySpace VectorSpace"


@pytest.mark.parametrize(
    ("flags", "found", "names"),
    [
        (["--latent", "marginal"], "latent: found marginal", SPACES),
        (["--latent=MarginlSpace"], "latent: found MarginlSpace", SPACES),
        (["--latent", "configs/latent/x"], "latent: found configs/latent/x", SPACES),
        (["--model=DPOO"], "model: found DPOO", "DPO IPO KTO ORPO SimPO"),
        (["--policy", "Tiny"], "policy: found Tiny", "PretrainedPolicy TinyPolicy TrainedPolicy"),
        (["--data", "x"], "data: found x", "PreferenceData PreferenceMixture SyntheticPreferences"),
        (
            ["--latent=GumbelSpace", "--latent.tau=x"],
            "latent.tau: found x",
            "Constant Cosine Exponential Linear WarmUp",
        ),
        (["--policy.lora=x"], "policy.lora: found x", "LoRA"),
        (["--model.optimizer=x"], "model.optimizer: found x", ""),
        (["--trainer.logger=x"], "trainer.logger: found x", "CSVLogger CometLogger MLFlowLogger WandbLogger"),
        (["--callbacks+=x"], "callbacks: found x", "AnswerSamples BestAndLast LabelFlipNoise RunSummary"),
    ],
    ids=str,
)
def test_unknown_class_is_one_line(fit: Command, flags: list[str], found: str, names: str) -> None:
    """Other imported classes may be named as well, and no base class, which cannot be built."""
    output = fit(*flags)
    assert_one_error(output, rf"{re.escape(found)}, expected a file.*or the import path of a class")
    assert len(output.err.splitlines()) == 1
    listed = set(re.findall(r"\w+", output.err))
    assert set(names.split()) <= listed
    assert not {"LatentSpace", "DiscreteSpace", "PreferenceModule", "PreferenceDataModule", "PolicySpec"} & listed


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
def test_missing_config_file_is_one_line(command: Command, arguments: list[str]) -> None:
    ended = command(*arguments)
    assert_one_error(
        ended, r"(-c|--config|--latent|--callbacks\+): found no file nowhere\.yaml in /.*, expected a YAML f"
    )
    assert len(ended.err.splitlines()) == 1


@pytest.mark.parametrize("name", ["fit", "export"])
@pytest.mark.parametrize(
    ("content", "found"),
    [("3", "the value 3 in"), ("- 1", "a list in"), ("", "nothing in"), (None, "the folder")],
    ids=["value", "list", "empty", "folder"],
)
def test_config_without_settings_is_one_line(
    command: Command, name: str, content: str | None, found: str, tmp_path: Path
) -> None:
    path = tmp_path / "settings.yaml"
    if content is None:
        path.mkdir()
    else:
        path.write_text(content)
    ended = command(name, f"--config={path}")
    assert_one_error(ended, f"--config: found {found} {path}.*, expected (settings by name|a YAML file)")
    assert len(ended.err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["fit", "--config"], ["fit", "-c"], ["export", "--config="]], ids=" ".join)
def test_config_without_a_file_is_one_line(command: Command, arguments: list[str]) -> None:
    ended = command(*arguments)
    assert_one_error(ended, r"(-c|--config): found no file, expected a YAML file after it\. `lpc-lightning configs`")
    assert len(ended.err.splitlines()) == 1


def test_text_of_the_parser_is_one_line(command: Command) -> None:
    """The parser writes three lines."""
    ended = command("fit", *POLICY, *MODEL, "--trainer=")
    assert_one_error(ended, r".*trainer.* `lpc-lightning fit --help` lists the settings\.")
    assert len(ended.err.splitlines()) == 1


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
