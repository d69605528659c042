"""Tests of the DataModules with a real trainer: splits, limits, bad rows, metrics and batches."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, DatasetDict
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoConfig, AutoModelForCausalLM

from lpc_lightning.algorithms import DPO
from lpc_lightning.data import (
    ByAnnotator,
    ByLength,
    Columns,
    PreferenceData,
    PreferenceDataModule,
    SyntheticPreferences,
)
from lpc_lightning.data.batching.layouts import PaddedLayout, SharedPrefixLayout
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.sources.rows import DataError
from lpc_lightning.latent import MarginalSpace
from lpc_lightning.policy import PretrainedPolicy, TinyPolicy
from tests.fixtures.real_data import DATA_DIR

Row = dict[str, str]


def tiny(**policy: Any) -> TinyPolicy:
    return TinyPolicy(**({"width": 16, "layers": 1, "heads": 2} | policy))


def row(number: int, **columns: str) -> Row:
    return {"prompt": f"Question {number}?", "chosen": f"Good {number}.", "rejected": f"Bad {number}."} | columns


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., PreferenceData]:
    """Return a function that makes a `PreferenceData` with a temporary cache."""

    def make(path: Any, **settings: Any) -> PreferenceData:
        path = {name: str(file) for name, file in path.items()} if isinstance(path, dict) else str(path)
        return PreferenceData(path, cache_dir=str(tmp_path / "cache"), **({"batch_size": 4} | settings))

    return make


def ids(data: PreferenceDataModule, stage: Any) -> list[str]:
    pairs = data.load(stage, tiny().load_tokenizer())
    return [] if pairs is None else [pair.id for pair in pairs]


def prompts(data: PreferenceDataModule, stage: Any) -> list[str]:
    tokenizer = tiny().load_tokenizer()
    pairs = data.load(stage, tokenizer)
    assert pairs is not None
    return [tokenizer.decode(pair.prompt_ids) for pair in pairs]


# Rows of each stage.


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_held_out_prompts_are_not_in_training(share: float, data: Any, write_rows: Any) -> None:
    """Each prompt occurs three times, once as a conversation. Random hold-out of pairs would share prompts."""
    rows: list[Any] = []
    for number in range(200):
        messages = [{"role": "user", "content": f"Question {number}?"}]
        rows += [row(number), row(number, chosen="Other."), row(number) | {"prompt": messages, "rejected": "None."}]
    module = data(write_rows(rows), validation_share=share)
    train, validation = prompts(module, "train"), prompts(module, "validation")
    assert set(train).isdisjoint(validation)
    assert len(set(train) | set(validation)) == 200
    assert len(train) + len(validation) == 600
    assert len(set(validation)) / 200 == pytest.approx(share, abs=0.1)
    assert module.reports["train"].held_apart == len(validation)


@pytest.mark.parametrize("by", ["prompt", "pair"])
def test_held_out_texts_with_white_space(by: str, data: Any, write_rows: Any) -> None:
    """The template trims each turn, so that rows which differ by white space have the same tokens."""
    tokenizer = tiny().load_tokenizer()
    tokenizer.chat_template = (
        "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{{ turn['content'] | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = [row(n) for n in range(60)]
    rows += [{name: f" {text}\n" for name, text in each.items()} for each in rows]
    module = data(write_rows(rows), validation_share=0.3, validation_by=by)
    train, held_out = (
        {(*pair.prompt_ids, *pair.chosen_ids) for pair in module.load(stage, tokenizer)}
        for stage in ("train", "validation")
    )
    assert len(train) + len(held_out) == 60
    assert train.isdisjoint(held_out)


def test_held_out_pairs_of_one_prompt(data: Any, write_rows: Any) -> None:
    """A pair that is labelled twice, with opposite labels, is on one side."""
    votes = [(f"Answer {number}.", "One.") for number in range(100)]
    path = write_rows([row(0, chosen=each[side], rejected=each[1 - side]) for side in (0, 1) for each in votes])
    module = data(path, validation_share=0.3, validation_by="pair")
    train, validation = (
        [frozenset([pair.chosen, pair.rejected]) for pair in module.source(stage).read(DataReport())]
        for stage in ("train", "validation")
    )
    assert set(train).isdisjoint(validation)
    assert len(train) + len(validation) == 200
    assert len(set(validation)) == pytest.approx(30, abs=15)
    with pytest.raises(DataError, match=r"single prompt are held out by pair \(`validation_by: pair`\)"):
        _ = [ids(data(path, validation_share=0.3), stage) for stage in ("train", "validation")]
    with pytest.raises(ValueError, match=r"data\.validation_by: found 'row', expected prompt or pair"):
        data(path, validation_by="row")


@pytest.mark.parametrize("votes", [["chosen"], ["chosen", "rejected"]])
def test_held_out_pairs_of_a_single_pair(votes: list[str], data: Any, write_rows: Any) -> None:
    """The advice of the error helps. The pair may be labelled twice."""
    path, columns = write_rows([row(0, vote=vote) for vote in votes]), Columns(vote="vote")
    with pytest.raises(DataError, match=r"a single pair is not \(`validation_share: 0`\)"):
        _ = [ids(data(path, validation_by="pair", columns=columns), stage) for stage in ("train", "validation")]
    assert len(ids(data(path, validation_share=0.0, columns=columns), "train")) == len(votes)


@pytest.mark.real
@pytest.mark.skipif(not DATA_DIR.exists(), reason="needs the files of $LPC_DATA_DIR")
@pytest.mark.parametrize(("name", "count"), [("ukp_votes", 610), ("humour_votes", 579)])
def test_vote_configs_hold_out_512_pairs(name: str, count: int, data: Any) -> None:
    """The counts are those of docs/noise.md."""
    root = Path(__file__).parents[2]
    settings = yaml.safe_load((root / f"configs/data/{name}.yaml").read_text())["init_args"]
    rows = data(settings.pop("path"), **settings | {"columns": Columns(**settings["columns"])})
    held_out = list(rows.source("validation").read(DataReport()))
    assert len(held_out) == count >= 512
    questions = len({pair.prompt[-1]["content"] for pair in held_out})
    words = {1: "the one prompt", 5: "five prompts"}
    assert f" | {count}, of {words[questions]}" in (root / "docs/noise.md").read_text()


def test_validation_share_0_holds_out_nothing(data: Any, write_rows: Any) -> None:
    module = data(write_rows([row(n) for n in range(20)]), validation_share=0.0)
    assert len(ids(module, "train")) == 20
    assert module.source("validation") is None


def test_split_column_selects_rows(data: Any, write_rows: Any) -> None:
    places = {0: {}, 1: {"split": "train"}, 2: {"split": "test"}, 3: {"split": "held"}, 4: {"split": "test"}}
    path = write_rows([row(n, **column) for n, column in places.items()])
    module = data(path, validation_split="held")
    assert ids(module, "train") == ["pairs.jsonl line 1", "pairs.jsonl line 2"]
    assert ids(module, "validation") == ["pairs.jsonl line 4"]
    assert ids(module, "test") == ["pairs.jsonl line 3", "pairs.jsonl line 5"]
    assert module.reports["train"].other_splits == {"test": 2, "held": 1}


def test_path_one_file_for_each_stage(data: Any, write_rows: Any) -> None:
    files = {name: write_rows([row(n)], f"{name}.jsonl") for n, name in enumerate(("train", "validation", "test"))}
    module = data(files)
    for stage in files:
        assert ids(module, stage) == [f"{stage}.jsonl line 1"]


@pytest.mark.parametrize("form", ["folder", "saved", "json", "column"])
def test_path_with_splits_for_each_stage(form: str, data: Any, write_rows: Any, tmp_path: Path) -> None:
    """Each stage has a path with the splits of all stages, and the test stage also one with a split alone."""

    def path_of(name: str, numbers: dict[str, int]) -> Path:
        rows = {split: [row(number)] for split, number in numbers.items()}
        if form == "column":
            return write_rows([row(number, split=split) for split, number in numbers.items()], f"{name}.jsonl")
        if form == "json":
            (tmp_path / f"{name}.json").write_text(json.dumps(rows))
            return tmp_path / f"{name}.json"
        folder = tmp_path / name
        if form == "saved":
            DatasetDict({split: Dataset.from_list(each) for split, each in rows.items()}).save_to_disk(folder)
            return folder
        folder.mkdir()
        for split, each in rows.items():
            write_rows(each, f"{name}/{split}.jsonl")
        return folder

    def numbers_of(paths: dict[str, Path], **settings: Any) -> dict[str, list[int]]:
        module = data(paths, **settings)
        texts = {stage: [pair.chosen for pair in module.source(stage).read(DataReport())] for stage in paths}
        return {stage: [int(text.strip("God.")) for text in each] for stage, each in texts.items()}

    stages = ("train", "validation", "test")
    paths = {
        stage: path_of(stage, {"train": 10 * n, "validation": 10 * n + 1, "test": 10 * n + 2})
        for n, stage in enumerate(stages)
    }
    assert numbers_of(paths) == {"train": [0], "validation": [11], "test": [22]}
    assert numbers_of(paths, validation_split="test") == {"train": [0], "validation": [12], "test": [22]}
    assert numbers_of(paths | {"test": path_of("one", {"validation": 9})})["test"] == [9]
    with pytest.raises(
        DataError, match=r"data\.test_split: found the splits train, validation, expected test, or a single"
    ):
        numbers_of(paths | {"test": path_of("two", {"train": 1, "validation": 2})})


def test_path_of_train_with_a_few_test_rows(data: Any, write_rows: Any) -> None:
    """Rows without a value belong to training."""
    train = write_rows([row(0), row(1, split="test"), row(2, split="")], "some.jsonl")
    module = data({"train": train, "test": write_rows([row(3), row(4)], "test.jsonl")}, validation_share=0.0)
    assert ids(module, "train") == ["some.jsonl line 1", "some.jsonl line 3"]
    assert ids(module, "test") == ["test.jsonl line 1", "test.jsonl line 2"]
    assert module.reports["train"].other_splits == {"test": 1}


def test_path_without_validation_file_holds_out(data: Any, write_rows: Any) -> None:
    train = write_rows([row(n) for n in range(100)], "train.jsonl")
    module = data({"train": train}, validation_share=0.3)
    held = ids(module, "validation")
    assert 15 < len(held) < 45
    assert sorted(held + ids(module, "train")) == sorted(f"train.jsonl line {n}" for n in range(1, 101))
    assert module.source("test") is None


def test_path_saved_data_set_splits(data: Any, tmp_path: Path) -> None:
    """The data set has the splits and messages of `HuggingFaceH4/ultrafeedback_binarized`."""

    def message(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    def conversation(number: int) -> dict[str, Any]:
        question, answers = message("user", f"Question {number}?"), (f"Good {number}.", f"Bad {number}.")
        chosen, rejected = ([question, message("assistant", answer)] for answer in answers)
        return {"prompt": question["content"], "chosen": chosen, "rejected": rejected, "score": 1.0}

    splits = {"train_prefs": range(6), "test_prefs": range(6, 8), "train_sft": range(8, 20)}
    saved = {name: Dataset.from_list([conversation(n) for n in numbers]) for name, numbers in splits.items()}
    DatasetDict(saved).save_to_disk(tmp_path / "ultra")
    module = data(tmp_path / "ultra", train_split="train_prefs", validation_split="test_prefs", test_split=None)
    assert ids(module, "train") == [f"ultra[train_prefs] row {n}" for n in range(1, 7)]
    assert ids(module, "validation") == ["ultra[test_prefs] row 1", "ultra[test_prefs] row 2"]
    assert module.source("test") is None
    assert "Question 6?" in prompts(module, "validation")[0]


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_split_column_names_validation(name: str, data: Any, write_rows: Any) -> None:
    """The rows of a validation split are used, and no training prompt is held out."""
    splits = ["train"] * 6 + [name] * 2 + ["test"] * 2
    module = data(write_rows([row(n, split=split) for n, split in enumerate(splits)]))
    stages = {stage: ids(module, stage) for stage in ("train", "validation", "test")}
    lines = [f"pairs.jsonl line {n}" for n in range(1, 11)]
    assert stages == {"train": lines[:6], "validation": lines[6:8], "test": lines[8:]}
    assert module.reports["train"].other_splits == {name: 2, "test": 2}


def test_split_in_a_few_rows(data: Any, write_rows: Any) -> None:
    module = data(write_rows([row(n) for n in range(5)] + [row(5, split="validation")]), validation_share=0.0)
    assert len(ids(module, "train")) == 5
    assert ids(module, "validation") == ["pairs.jsonl line 6"]


@pytest.mark.parametrize("number", [2, 3, 10])
def test_small_file_has_one_validation_prompt(number: int, data: Any, write_rows: Any) -> None:
    """The default share of 0.05 selects none of a few prompts."""
    rows = [row(n) for n in range(number)] + [row(n, chosen="Other.") for n in range(number)]
    module = data(write_rows(rows))
    train, validation = ids(module, "train"), ids(module, "validation")
    assert len(validation) == 2
    assert sorted(train + validation) == sorted(f"pairs.jsonl line {n}" for n in range(1, 2 * number + 1))
    assert prompts(module, "validation")[0] == prompts(module, "validation")[1]


def test_path_json_with_splits(data: Any, tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps({"train": [row(n) for n in range(6)], "test": [row(6)], "dev": [row(7)]}, indent=1))
    module = data(path, validation_share=0.2)
    assert ids(module, "train") == [f"pairs.json[train] row {n}" for n in range(1, 7)]
    assert ids(module, "test") == ["pairs.json[test] row 1"]
    assert ids(module, "validation") == ["pairs.json[dev] row 1"]


def test_path_folder_of_shards(data: Any, tmp_path: Path) -> None:
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for number, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")):
        Dataset.from_list([row(10 * number + n) for n in range(9)]).to_parquet(folder / f"{name}.parquet")
    module = data(folder.parent)
    held = ids(module, "validation")
    assert sorted(held + ids(module, "train")) == [
        f"train-0000{k}-of-00002.parquet row {n}" for k in range(2) for n in range(1, 10)
    ]
    assert ids(module, "test") == [f"test-00000-of-00001.parquet row {n}" for n in range(1, 10)]


def test_path_list_of_files(write_rows: Any, tmp_path: Path) -> None:
    files = [str(write_rows([row(n)], f"{n}.jsonl")) for n in range(3)]
    module = PreferenceData(files, validation_share=0.0, cache_dir=str(tmp_path / "cache"))
    assert ids(module, "train") == [f"{n}.jsonl line 1" for n in range(3)]


def test_columns_with_other_names(data: Any, write_rows: Any) -> None:
    rows = [{"question": "Why?", "good": "So.", "bad": "No.", "rater": "anna", "key": "pair 1"}]
    columns = Columns(prompt="question", chosen="good", rejected="bad", annotator="rater", id="key")
    pairs = data(write_rows(rows), columns=columns, validation_share=0.0).load("train", tiny().load_tokenizer())
    assert (pairs[0].id, pairs[0].annotator) == ("pair 1", "anna")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, r"data\.batch_size: found 0, expected at least 1"),
        ({"eval_batch_size": -1}, r"data\.eval_batch_size: found -1, expected at least 1"),
        ({"row_tokens": 0}, r"data\.row_tokens: found 0, expected at least 1"),
        (
            {"batch_order": ByAnnotator(3), "batch_size": 8},
            r"pairs_per_annotator: found 3, expected a divisor of data\.batch_size \(8\)",
        ),
        ({"max_length": 0}, r"data\.max_length: found 0, expected a number of tokens from 1 on"),
        ({"validation_share": 1.0}, r"data\.validation_share: found 1\.0, expected a share from 0 to below 1"),
        ({"path": {"test": "a.jsonl"}}, r"data\.path: found files for \['test'\], expected train"),
        ({"path": {"train": "a.jsonl", "dev": "b.jsonl"}}, r"data\.path: found files for \['dev', 'train'\]"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceData(**({"path": "pairs.jsonl"} | settings))


# Runs of a trainer.


class Fit:
    """A run of one epoch, with the data metrics of its metrics.csv."""

    def __init__(self, folder: Path, data: PreferenceDataModule, **policy: Any) -> None:
        quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        logger = CSVLogger(folder, name="", version="run")
        trainer = Trainer(accelerator="cpu", logger=logger, max_epochs=1, log_every_n_steps=1, **quiet)
        trainer.fit(DPO(policy=tiny(**policy)), datamodule=data)
        with (folder / "run" / "metrics.csv").open() as file:
            cells = [(name, float(value)) for line in csv.DictReader(file) for name, value in line.items() if value]
        self.trainer = trainer
        self.metrics = {name: value for name, value in cells if name.startswith("data/")}


def long_rows() -> list[Row]:
    """Return rows with prompts and answers of different lengths."""
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu"
    sizes = [(1, 1, 2), (8, 2, 1), (2, 9, 1), (2, 1, 9), (9, 9, 1), (12, 1, 2), (1, 12, 11)]
    texts = [[" ".join((words * size).split()[: 6 * size]) for size in triple] for triple in sizes]
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in texts]


def token_counts(rows: list[Row]) -> list[tuple[int, int]]:
    """Count the tokens of each prompt, and of the prompt with its longer answer, from the text of the template."""
    tokenizer = tiny().load_tokenizer()

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    counts = []
    for example in rows:
        prompt = count(f"<|im_start|>user\n{example['prompt']}<|im_end|>\n<|im_start|>assistant\n")
        answers = [count(example[side]) + 1 for side in ("chosen", "rejected")]
        counts.append((prompt, prompt + max(answers)))
    return counts


LIMITS = {"max_length": 90, "max_prompt_length": 60}


def test_too_long_drop_counts_pairs(data: Any, write_rows: Any, tmp_path: Path) -> None:
    counts = token_counts(long_rows())
    prompt = sum(prompt > 60 for prompt, _ in counts)
    pair = sum(prompt <= 60 and whole > 90 for prompt, whole in counts)
    assert prompt
    assert pair
    assert prompt + pair < len(counts)
    run = Fit(tmp_path, data(write_rows(long_rows()), validation_share=0.0, too_long="drop", **LIMITS))
    assert run.metrics == {
        "data/train/read": len(counts),
        "data/train/held_apart": 0,
        "data/train/kept": len(counts) - prompt - pair,
        "data/train/dropped/prompt_longer_than_max_prompt_length": prompt,
        "data/train/dropped/pair_longer_than_max_length": pair,
    }


@pytest.mark.parametrize("too_long", ["truncate_prompt", "truncate_answer"])
def test_too_long_truncate_counts_pairs(too_long: str, data: Any, write_rows: Any, tmp_path: Path) -> None:
    cut = data(write_rows(long_rows()), validation_share=0.0, too_long=too_long, max_length=90)
    metrics = Fit(tmp_path, cut).metrics
    long = [whole > 90 for _, whole in token_counts(long_rows())]
    dropped = sum(value for name, value in metrics.items() if "/dropped/" in name)
    what = too_long.replace("truncate_answer", "truncate_answers").removeprefix("truncate_")
    assert metrics[f"data/train/cut/{what}"] == sum(long) - dropped > 0
    assert metrics["data/train/kept"] == len(long) - dropped == len(cut.pairs["train"])
    for pair in cut.pairs["train"]:
        assert len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) <= 90


def test_too_long_error_names_the_pair(data: Any, write_rows: Any, tmp_path: Path) -> None:
    rows = data(write_rows(long_rows()), validation_share=0.0, too_long="error", **LIMITS)
    prompt, _ = token_counts(long_rows())[1]
    with pytest.raises(DataError, match=rf"Pair 'pairs\.jsonl line 2': .*{prompt} prompt tokens .*max_length=90"):
        Fit(tmp_path, rows)


def faulty_rows() -> list[Any]:
    return [row(0), row(1) | {"chosen": None}, row(2, rejected=" "), row(3, chosen="Bad 3."), "{oops", row(5)]


def test_bad_rows_skip_counts_rows(data: Any, write_rows: Any, tmp_path: Path) -> None:
    run = Fit(tmp_path, data(write_rows(faulty_rows()), validation_share=0.0, bad_rows="skip"))
    kinds = ("missing_answer", "empty_answer", "equal_answers", "invalid_json")
    counts = {"read": 6, "kept": 2, "held_apart": 0} | {f"bad/{kind}": 1 for kind in kinds}
    assert run.metrics == {f"data/train/{name}": count for name, count in counts.items()}
    assert run.trainer.global_step == 1


def test_bad_rows_error_lists_all_rows(data: Any, write_rows: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        Fit(tmp_path, data(write_rows(faulty_rows()), validation_share=0.0))
    text = str(caught.value)
    assert text.startswith("4 rows cannot be used.")
    for number, reason in ((2, "missing answer"), (3, "empty answer"), (4, "equal answers"), (5, "invalid JSON")):
        assert f"{reason}: pairs.jsonl line {number}" in text
    assert "`--data.bad_rows skip`" in text


def test_validation_file_within_training_pattern(data: Any, write_rows: Any, tmp_path: Path) -> None:
    """The pattern of the training files covers the validation file."""
    write_rows([row(n) for n in range(5)], "a.jsonl")
    own = write_rows([row(n) for n in range(5, 8)], "dev.jsonl")
    with pytest.warns(UserWarning, match="found 3 of 3 pairs with the prompt of a training pair"):
        run = Fit(tmp_path, data({"train": tmp_path / "*.jsonl", "validation": own}))
    assert run.metrics["data/validation/prompts_in_training"] == 3


@pytest.mark.parametrize(
    ("settings", "validation", "count"),
    [
        ({"system_turns": "drop"}, "validation", 2),  # the two prompts differ by their system texts
        ({"system_turns": "keep"}, "validation", None),
        ({"system_turns": "drop", "validation_by": "pair", "validation_share": 0.5}, "train", None),
    ],
)
def test_prompts_in_training_as_tokens(
    settings: dict[str, Any], validation: str, count: int | None, data: Any, write_rows: Any
) -> None:
    """Prompts are shared on purpose if pairs are held out."""
    rows = [row(0, system="Be kind.", chosen=f"Good {n}.") for n in range(8)]
    rows += [row(0, system="Be brief.", split=validation), row(0, system="Be glad.", split=validation), row(9)]
    module = data(write_rows(rows), **settings)
    train, held_out = prompts(module, "train"), prompts(module, "validation")
    assert bool(set(train) & set(held_out)) == (settings["system_turns"] == "drop")
    assert module._counts("validation").get("data/prompts_in_training") == count


def test_metrics_have_the_stage_name(tmp_path: Path) -> None:
    made = SyntheticPreferences(train_pairs=6, validation_pairs=3, batch_size=2, cache_dir=str(tmp_path / "cache"))
    metrics = Fit(tmp_path, made).metrics
    assert metrics["data/train/kept"] == 6
    assert metrics["data/validation/kept"] == 3


# Batches and layouts.


class Ids(Callback):
    """Ids of the training pairs of each epoch."""

    def __init__(self) -> None:
        self.epochs: dict[int, list[str]] = defaultdict(list)

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, number: int) -> None:
        self.epochs[trainer.current_epoch] += batch.ids


@pytest.mark.parametrize("limits", [{"max_epochs": 3}, {"max_steps": 6}])
def test_overfit_batches_are_the_same_in_each_epoch(limits: dict[str, int], tmp_path: Path) -> None:
    made = SyntheticPreferences(train_pairs=40, validation_pairs=4, batch_size=4, cache_dir=str(tmp_path))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    seen = Ids()
    trainer = Trainer(overfit_batches=2, callbacks=[seen], enable_model_summary=False, **quiet, **limits)
    with pytest.warns(UserWarning, match="We are turning off the train dataloader shuffling"):
        trainer.fit(DPO(policy=tiny()), datamodule=made)
    first, second, third = seen.epochs.values()
    assert first == second == third
    assert len(set(first)) == 8
    assert {made.pairs["train"][index].id for index in made.reads("train")} == set(first)


def test_order_by_length_groups_similar_lengths(tmp_path: Path) -> None:
    def spread(window: int | None) -> tuple[float, list[str]]:
        sizes: dict[str, Any] = {"train_pairs": 40, "validation_pairs": 0, "batch_size": 4}
        order = None if window is None else ByLength(window)
        made = SyntheticPreferences(**sizes, batch_order=order, cache_dir=str(tmp_path / "cache"))
        Fit(tmp_path / f"window {window}", made)
        pairs = made.pairs["train"]
        of = {pair.id: length for pair, length in zip(pairs, pairs.lengths, strict=True)}
        batches = [[of[name] for name in batch.ids] for batch in made.train_dataloader()]
        names = [name for batch in made.train_dataloader() for name in batch.ids]
        return sum(max(batch) - min(batch) for batch in batches) / len(batches), sorted(names)

    (plain, names), (grouped, same) = spread(None), spread(10)
    assert grouped < plain / 4
    assert names == same


def test_order_by_annotator_groups_pairs(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"train_pairs": 64, "validation_pairs": 0, "batch_size": 4, "batch_order": ByAnnotator(4)}
    made = SyntheticPreferences(deciding="hidden", annotators=8, **sizes, cache_dir=str(tmp_path / "cache"))
    Fit(tmp_path, made)
    batches = list(made.train_dataloader())
    assert sorted(name for batch in batches for name in batch.ids) == sorted(pair.id for pair in made.pairs["train"])
    alone = [batch for batch in batches if len(set(batch.annotators)) == 1]
    assert sum(len(batch.annotators) for batch in alone) >= 64 - 8 * 3


def test_order_by_annotator_without_annotators(tmp_path: Path) -> None:
    made = SyntheticPreferences(
        train_pairs=8, validation_pairs=0, batch_order=ByAnnotator(2), cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(
        DataError,
        match=r"data\.batch_order: found ByAnnotator\(.*=2\) and no annotator in 8 training pairs",
    ):
        Fit(tmp_path, made)


def test_training_order_follows_the_run_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = SyntheticPreferences(train_pairs=30, validation_pairs=0, batch_size=4, cache_dir=str(tmp_path / "cache"))
    Fit(tmp_path, made)

    def order(seed: int) -> list[tuple[str, ...]]:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        return [batch.ids for batch in made.train_dataloader()]

    assert order(3) == order(3) != order(4)
    assert sorted(sum(order(3), ())) == sorted(sum(order(4), ())) == sorted(pair.id for pair in made.pairs["train"])


@pytest.mark.parametrize(
    "latent", [None, lambda: MarginalSpace(num_codes=3, hidden=8, init_logit_std=1.0)], ids=["plain", "marginal"]
)
def test_layouts_give_equal_metrics(latent: Any, tmp_path: Path, perturb: Any) -> None:
    module = DPO(policy=tiny(dtype="float64"), latent=latent and latent())
    output = {}
    for name, layout in {
        "auto": "auto",
        "padded": "padded",
        "wide rows": "shared_prefix",
        "rows": "shared_prefix",
    }.items():
        made = SyntheticPreferences(
            validation_pairs=9,
            batch_size=4,
            layout=layout,
            row_tokens=1000 if name == "wide rows" else 256,
            cache_dir=str(tmp_path),
        )
        trainer = Trainer(accelerator="cpu", precision="64-true", logger=False, enable_progress_bar=False)
        if not output:  # a policy that is not its own reference
            module.configure_model()
            perturb(module.policy, 0.1)
        (output[name],) = trainer.validate(module, datamodule=made, verbose=False)
        kind = PaddedLayout if name == "padded" else SharedPrefixLayout
        assert isinstance(made.val_dataloader().loader.collate_fn, kind)
    assert abs(output["padded"]["val/rewards/margins"]) > 0.01
    for name, metrics in output.items():
        assert metrics == pytest.approx(output["padded"], rel=1e-9, abs=1e-9), name


class TestLayersWithoutMask:
    """In a packed row, the state of a recurrent layer depends on the other answer."""

    @pytest.fixture
    def recurrent(self, tmp_path: Path) -> PretrainedPolicy:
        tokenizer = tiny().load_tokenizer()
        sizes = {"hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
        sizes |= {"lru_width": 16, "attention_window_size": 64, "conv1d_width": 3, "vocab_size": len(tokenizer)}
        # The soft cap is set so high that it has no effect.
        config = AutoConfig.for_model("recurrent_gemma", num_key_value_heads=1, logits_soft_cap=1e8, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "recurrent")
        tokenizer.save_pretrained(tmp_path / "recurrent")
        return PretrainedPolicy(str(tmp_path / "recurrent"))

    def validate(self, policy: PretrainedPolicy, layout: Any, folder: Path) -> PreferenceDataModule:
        made = SyntheticPreferences(validation_pairs=2, batch_size=2, layout=layout, cache_dir=str(folder))
        trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        trainer.validate(DPO(policy=policy), datamodule=made, verbose=False)
        return made

    def test_shared_prefix_is_refused(self, recurrent: PretrainedPolicy, tmp_path: Path) -> None:
        message = r"data\.layout: found shared_prefix with a policy whose attention kernel or layers take no block mask"
        with pytest.raises(DataError, match=message):
            self.validate(recurrent, "shared_prefix", tmp_path)

    def test_auto_layout_is_padded(self, recurrent: PretrainedPolicy, tmp_path: Path) -> None:
        assert isinstance(self.validate(recurrent, "auto", tmp_path).val_dataloader().loader.collate_fn, PaddedLayout)


def test_stage_without_pairs_has_no_batches(tmp_path: Path) -> None:
    made = SyntheticPreferences(train_pairs=2, validation_pairs=0, test_pairs=0, cache_dir=str(tmp_path / "cache"))
    run = Fit(tmp_path, made)
    assert run.trainer.global_step == 1
    assert made.val_dataloader() == []
    assert made.test_dataloader() == []
    assert not any(name.startswith("data/validation") for name in run.metrics)


def test_cache_is_used_by_the_next_run(data: Any, write_rows: Any, tmp_path: Path) -> None:
    path = write_rows([row(n) for n in range(8)])
    first = Fit(tmp_path / "one", data(path, validation_share=0.0))
    entries = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*") if file.is_file()}
    second = Fit(tmp_path / "two", data(path, validation_share=0.0))
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*") if file.is_file()} == entries
    assert second.metrics == first.metrics
