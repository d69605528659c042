"""`lpc-lightning evaluate` as a user gives it: on checkpoints, plain models, earlier results, and several of them."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Trainer
from lm_eval.models.huggingface import HFLM
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

import lpc_lightning.evaluation.benchmarks.runner
import lpc_lightning.evaluation.comparison.one_model
from lpc_lightning.cli import main
from lpc_lightning.data import PreferenceData
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.benchmarks.results import read_results
from lpc_lightning.evaluation.benchmarks.runner import run_benchmarks
from lpc_lightning.evaluation.comparison.command import name_models
from lpc_lightning.inference.opening import open_module


@pytest.fixture(scope="module", autouse=True)
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lpc-lightning"])
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setenv("PL_SEED_WORKERS", "0")
        yield patch


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a fit of three steps, with three codes that matter."""
    folder = tmp_path_factory.mktemp("fit")
    flags = "--policy=TinyPolicy --policy.width=16 --policy.layers=1 --policy.heads=2 --model=DPO --model.beta=1 "
    flags += (
        "--model.optimizer=torch.optim.AdamW --model.optimizer.lr=0.03 --latent=MarginalSpace --latent.num_codes=3 "
    )
    flags += "--latent.init_logit_std=2 --data=SyntheticPreferences --data.train_pairs=6 --data.validation_pairs=2 "
    flags += "--trainer.accelerator=cpu --trainer.precision=32-true --trainer.enable_progress_bar=false "
    flags += f"--trainer.max_steps=3 --trainer.log_every_n_steps=1 --data.batch_size=2 --data.cache_dir={folder} "
    flags += f"--trainer.default_root_dir={folder / 'runs'} --trainer.enable_model_summary=false"
    main(["fit", *flags.split()])
    (path,) = folder.glob("runs/version_0/checkpoints/*.ckpt")
    return path.rename(path.with_name("last.ckpt"))


@pytest.fixture
def checkpoint(fitted: Path, tmp_path: Path) -> Path:
    """A copy in a run folder of its own."""
    path = tmp_path / "runs" / "lpc" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    return Path(shutil.copy2(fitted, path))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, loud_policy: Any) -> str:
    """A folder of a model without a latent."""
    folder = tmp_path_factory.mktemp("models") / "plain"
    policy, tokenizer = loud_policy
    policy.causal_lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Said(NamedTuple):
    """How the command ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line.removeprefix("error: ") for line in self.err.splitlines() if line.startswith("error: ")]


Run = Callable[..., Said]


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str], data_dir: Path, tmp_path: Path) -> Run:
    """The command with local data, float32, and its results in `results`."""
    fixed = [f"--data-dir={data_dir}", f"--output={tmp_path / 'results'}", "--precision=float32", "--batch-size=4"]

    def run(*arguments: Any) -> Said:
        capsys.readouterr()
        try:
            main(["evaluate", *fixed, *map(str, arguments)])
            code: Any = 0
        except SystemExit as end:
            code = end.code
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture
def results(tmp_path: Path) -> Callable[[str], Any]:
    return lambda name: read_results(tmp_path / "results" / name)


@pytest.fixture
def run_tasks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tasks that are really run, as they are."""
    seen: list[str] = []

    def watched(lm: Any, tasks: Any, **settings: Any) -> Any:
        seen.extend(tasks)
        return run_benchmarks(lm, tasks, **settings)

    monkeypatch.setattr(lpc_lightning.evaluation.benchmarks.runner, "run_benchmarks", watched)
    return seen


@pytest.fixture
def no_model_is_opened(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def forbid() -> None:
        def refuse(*arguments: Any, **settings: Any) -> None:
            raise AssertionError("a model was opened")

        monkeypatch.setattr(lpc_lightning.evaluation.comparison.one_model, "open_policy", refuse)
        monkeypatch.setattr(lpc_lightning.evaluation.comparison.one_model, "open_module", refuse)

    return forbid


# Scores


def test_a_plain_model_gets_the_scores_of_stock_lm_eval(
    evaluate: Run, plain: str, results: Any, data_dir: Path
) -> None:
    tasks = ["arc_easy", "gsm8k", "truthfulqa_mc1", "truthfulqa_mc2"]
    said = evaluate(plain, "--tasks", *tasks, "--limit=5")
    assert said.code == 0, said.err
    found = results("plain")
    stock = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(plain),
        tokenizer=AutoTokenizer.from_pretrained(plain),
        batch_size=1,
    )
    expected = run_benchmarks(stock, tasks, data_dir=str(data_dir), limit=5)
    assert set(found.metrics) == set(tasks)
    for task in tasks:
        assert found.metrics[task] == pytest.approx(expected.metrics[task], abs=1e-5)
    assert found.origin["kind"] == "model"
    assert found.record["settings"]["limit"] == 5
    for task, metrics in expected.metrics.items():
        for metric in metrics:
            if "stderr" not in metric:
                assert f"| {task} " in said.out
                assert f"| {metric} " in said.out
    assert f"{expected.metrics['arc_easy']['acc']:.4f} ± {expected.metrics['arc_easy']['acc_stderr']:.4f}" in said.out


@pytest.mark.parametrize("mode", [None, 2])
def test_a_checkpoint_is_scored_under_its_latent(
    evaluate: Run, checkpoint: Path, results: Any, documents: Any, mode: int | None
) -> None:
    """Every choice against the model's own logits, read anew for each, with z from the space that was trained."""
    said = evaluate(checkpoint, "--tasks=arc_easy", *([] if mode is None else [f"--prior-mode={mode}"]))
    assert said.code == 0, said.err
    module = open_module(str(checkpoint))
    lm, tokenizer = module.policy.causal_lm, module.tokenizer
    rows = documents["arc/ARC-Easy"]["test"]
    items = results("lpc-last").items
    assert len(items) == len(rows)
    for row, item in zip(rows, items, strict=True):
        context = tokenizer.encode(f"Question: {row['question']}\nAnswer:", add_special_tokens=False)
        for text, response in zip(row["choices"]["text"], item["response"], strict=True):
            answer = tokenizer.encode(f" {text}", add_special_tokens=False)
            with torch.no_grad():
                hidden = lm.get_decoder()(input_ids=torch.tensor([context + answer])).last_hidden_state[0]
                z = module.latent.infer(hidden[len(context) - 1][None], mode)[0]
                logps = lm.get_output_embeddings()(hidden + z).log_softmax(-1)
            expected = sum(float(logps[len(context) - 1 + place, token]) for place, token in enumerate(answer))
            assert response == pytest.approx(expected, abs=1e-3)


def test_preference_accuracy_is_that_of_the_test_command(
    evaluate: Run, checkpoint: Path, plain: str, results: Any, tmp_path: Path, make_trainer: Callable[..., Trainer]
) -> None:
    rows = [
        {
            "prompt": f"Why {n}?",
            "chosen": f"Because {n * n}.",
            "rejected": f"No {n % 3}!",
            "split": "test",
            "id": f"p{n}",
        }
        for n in range(9)
    ]
    rows.append({"prompt": "Why?", "chosen": "So.", "rejected": "No.", "split": "train", "id": "left out"})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = evaluate(checkpoint, plain, "--tasks=none", f"--preferences={path}")
    assert said.code == 0, said.err
    found = results("lpc-last")
    trainer = make_trainer()
    trainer.test(
        open_module(str(checkpoint)), PreferenceData(str(path), cache_dir=str(tmp_path / "cache")), verbose=False
    )
    metrics = found.metrics["preferences"]
    assert next(iter(metrics)) == "accuracy/prior"
    assert metrics["accuracy/prior"] == pytest.approx(float(trainer.callback_metrics["test/rewards/accuracies"]))
    assert metrics["margin/prior"] == pytest.approx(float(trainer.callback_metrics["test/rewards/margins"]), abs=1e-6)
    others = {"accuracy/posterior", "accuracy/marginal", "accuracy/no_latent", "accuracy/shuffled", "swap_turnover"}
    assert others <= set(metrics)
    assert not any("/source/" in name for name in metrics)
    assert [item["doc_id"] for item in found.items] == [f"p{n}" for n in range(9)]
    right = [item["metrics"]["accuracy/prior"] for item in found.items]
    assert sum(right) / 9 == pytest.approx(metrics["accuracy/prior"])
    other = results("plain").metrics["preferences"]
    assert set(other) == {"accuracy/prior", "accuracy/prior_stderr", "margin/prior", "margin/prior_stderr"}
    assert "not comparable: reward is likelihood, but implicit for lpc-last" in said.out


def test_pairs_have_a_limit_too_and_files_without_splits_are_taken_whole(
    evaluate: Run, plain: str, results: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Why {n}?", "chosen": "So.", "rejected": "No."} for n in range(6)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(plain, "--tasks=none", f"--preferences={path}").code == 0
    assert results("plain").record["tasks"]["preferences"]["items"] == 6
    assert evaluate(plain, "--tasks=none", f"--preferences={path}", "--limit=4").code == 0
    assert results("plain-2").record["tasks"]["preferences"]["items"] == 4


# What is there already


def test_what_is_there_is_read_and_not_run_again(
    evaluate: Run, checkpoint: Path, no_model_is_opened: Callable[[], None], results: Any
) -> None:
    flags = [checkpoint, "--tasks", "arc_easy", "--limit=4"]
    first = evaluate(*flags)
    before = results("lpc-last")
    no_model_is_opened()
    again = evaluate(*flags)
    assert (first.code, again.code) == (0, 0)
    assert "Read from" in again.out
    assert [line for line in again.out.splitlines() if line.startswith("|")] == [
        line for line in first.out.splitlines() if line.startswith("|")
    ]
    assert results("lpc-last") == before
    forced = evaluate(*flags, "--again")
    assert forced.code == 1
    assert "a model was opened" in forced.errors[0]


@pytest.mark.parametrize(
    "change", ["--limit=3", "--prior-mode=1", "--seed=5", "--apply-chat-template", "--num-fewshot=2"]
)
def test_other_settings_go_into_another_folder_and_both_are_found_again(
    evaluate: Run, checkpoint: Path, change: str, no_model_is_opened: Callable[[], None], results: Any
) -> None:
    flags = [checkpoint, "--tasks=arc_easy", *([] if "limit" in change else ["--limit=4"])]
    assert evaluate(*flags).code == 0
    assert evaluate(*flags, change).code == 0
    one, other = results("lpc-last"), results("lpc-last-2")
    assert one.origin["request"] != other.origin["request"]
    no_model_is_opened()
    assert evaluate(*flags).code == 0
    assert evaluate(*flags, change).code == 0


@pytest.mark.parametrize("what", ["weights", "data"])
def test_changed_files_are_not_taken_for_the_same(
    evaluate: Run, checkpoint: Path, data_dir: Path, results: Any, what: str
) -> None:
    flags = [checkpoint, "--tasks=arc_easy", "--limit=4"]
    assert evaluate(*flags).code == 0
    os.utime(checkpoint if what == "weights" else data_dir / "arc/ARC-Easy/test.jsonl", (1, 1))
    assert "Read from" not in evaluate(*flags).out
    assert results("lpc-last-2").metrics == results("lpc-last").metrics


def test_more_tasks_are_added_to_what_is_there(
    evaluate: Run, plain: str, results: Any, run_tasks: list[str], tmp_path: Path
) -> None:
    evaluate(plain, "--tasks", "arc_easy", "truthfulqa_mc1", "--limit=4")
    run_tasks.clear()
    said = evaluate(plain, "--tasks", "truthfulqa_mc1", "gsm8k", "--limit=4")
    assert said.code == 0
    assert "Continuing with the results in" in said.out
    assert run_tasks == ["gsm8k"]
    added = results("plain")
    shutil.rmtree(tmp_path / "results")
    evaluate(plain, "--tasks", "arc_easy", "truthfulqa_mc1", "gsm8k", "--limit=4")
    at_once = results("plain")
    assert added.metrics == at_once.metrics
    assert added.items == at_once.items
    assert added.record["settings"] == at_once.record["settings"]
    assert set(added.record["tasks"]) == set(at_once.record["tasks"])
    (earlier,) = added.record["earlier"]
    assert earlier["tasks"] == ["arc_easy", "truthfulqa_mc1"]
    assert earlier["packages"] == at_once.record["packages"]


# What fails

ROWS = [
    {"question": f"Which {n}?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "AB"[n % 2]}
    for n in range(4)
]
RAISING = "def process_results(doc, results):\n    raise RuntimeError('no such luck')\n"


def test_a_benchmark_that_raises_costs_its_own_scores_and_the_exit_code(
    evaluate: Run, plain: str, results: Any, task_file: Callable[..., str], run_tasks: list[str], tmp_path: Path
) -> None:
    broken = task_file("own", ROWS, RAISING)
    said = evaluate(plain, "--tasks", "arc_easy", broken, "--limit=4")
    assert said.code == 1
    assert len(said.errors) == 1
    assert said.errors[0].startswith("plain, own: RuntimeError: no such luck")
    found = results("plain")
    assert set(found.metrics) == {"arc_easy"}
    assert set(found.failures) == {"own"}
    assert "| own " in said.out
    assert "failed" in said.out
    run_tasks.clear()
    assert evaluate(plain, "--tasks", "arc_easy", "--limit=4").code == 0
    assert run_tasks == []


def test_what_failed_is_run_again_and_nothing_else(
    evaluate: Run, plain: str, results: Any, data_dir: Path, run_tasks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise MemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(HFLM, "generate_until", fail)
        assert evaluate(plain, "--tasks", "arc_easy", "gsm8k", "--limit=3").code == 1
    assert set(results("plain").failures) == {"gsm8k"}
    run_tasks.clear()
    assert evaluate(plain, "--tasks", "arc_easy", "gsm8k", "--limit=3").code == 0
    assert run_tasks == ["gsm8k"]
    assert results("plain").failures == {}
    assert set(results("plain").metrics) == {"arc_easy", "gsm8k"}


def test_an_interrupted_command_keeps_what_was_done(
    evaluate: Run, plain: str, results: Any, run_tasks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    tasks = ["--tasks", "truthfulqa_mc1", "arc_easy", "truthfulqa_mc2", "gsm8k", "--limit=3"]
    with monkeypatch.context() as patch:
        patch.setattr(HFLM, "generate_until", interrupt)
        with pytest.raises(KeyboardInterrupt):
            evaluate(plain, *tasks)
    assert list(results("plain").metrics) == ["truthfulqa_mc1", "truthfulqa_mc2", "arc_easy"]
    run_tasks.clear()
    assert evaluate(plain, *tasks).code == 0
    assert run_tasks == ["gsm8k"]


def test_a_model_that_cannot_be_opened_does_not_cost_the_others(
    evaluate: Run, plain: str, checkpoint: Path, tmp_path: Path, results: Any
) -> None:
    checkpoint.write_text("not a checkpoint")
    said = evaluate(checkpoint, plain, tmp_path / "nowhere", "--tasks=arc_easy", "--limit=4")
    assert said.code == 1
    assert [error.partition(":")[0] for error in said.errors] == ["lpc-last", "nowhere"]
    assert "is no checkpoint" in said.errors[0]
    assert "found no file or folder" in said.errors[1]
    assert set(results("plain").metrics) == {"arc_easy"}


def test_pairs_that_cannot_be_scored_do_not_cost_the_benchmarks(
    evaluate: Run, plain: str, results: Any, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "Why?", "chosen": "So.", "rejected": "So."}) + "\n")
    said = evaluate(plain, "--tasks=arc_easy", "--limit=4", f"--preferences={path}")
    assert said.code == 1
    assert said.errors[0].startswith("plain, preferences: 1 rows cannot be used.")
    assert "equal answers" in said.err
    assert set(results("plain").metrics) == {"arc_easy"}
    assert evaluate(plain, "--tasks=arc_easy", "--limit=4").code == 0


def test_results_that_were_damaged_are_told(evaluate: Run, plain: str, tmp_path: Path) -> None:
    folder = tmp_path / "results" / "plain"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("{")
    said = evaluate(plain, "--tasks=arc_easy")
    assert said.code == 1
    assert f"{folder}: found incomplete results (JSONDecodeError" in said.errors[0]
    assert (folder / "results.json").read_text() == "{"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--limit=0"], "limit: found 0, expected at least one document"),
        (["--num-fewshot=-1"], "num_fewshot: found -1, expected 0 or more"),
        (["--tasks=none"], "tasks: found none, expected a task, or a file of preference pairs"),
        (["--tasks=arc_esay"], "tasks: found 'arc_esay' with data_dir, expected arc_easy"),
        (["--names", "a", "b"], "names: found 2 for 1 models, expected one for each"),
        (["--preferences=nowhere.jsonl"], "preferences: found no file nowhere.jsonl, expected preference pairs"),
        (["--data-dir=nowhere"], "data_dir: found no file arc/ARC-Easy/train.jsonl for task arc_easy in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings_that_cannot_be_are_told_before_anything_runs(
    plain: str, flags: list[str], told: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [] if "--data-dir=nowhere" in flags else [f"--data-dir={data_dir}"]
    with pytest.raises(SystemExit) as end:
        main(["evaluate", plain, f"--output={tmp_path / 'results'}", *flags, *data])
    said = capsys.readouterr()
    assert end.value.code == 1
    assert said.out == ""
    assert said.err.startswith(f"error: {told}")
    assert said.err.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_a_mode_and_preference_pairs_do_not_go_together(evaluate: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "Why?", "chosen": "So.", "rejected": "No."}) + "\n")
    said = evaluate(checkpoint, "--prior-mode=1", f"--preferences={tmp_path / 'pairs.jsonl'}")
    assert said.code == 1
    assert said.errors[0].startswith("prior_mode: found 1 with a file of preference pairs")


# Several models


def test_models_are_compared_item_by_item(
    evaluate: Run, plain: str, checkpoint: Path, tmp_path: Path, no_model_is_opened: Callable[[], None]
) -> None:
    said = evaluate(plain, checkpoint, "--tasks", "arc_easy", "truthfulqa_mc2", "--names", "base", "ours")
    assert said.code == 0, said.err
    right = {}
    for name in ("base", "ours"):
        lines = (tmp_path / "results" / name / "items.jsonl").read_text().splitlines()
        items = [json.loads(line) for line in lines]
        right[name] = [item["metrics"]["acc"] for item in items if item["task"] == "arc_easy"]
    won = sum(b > a for a, b in zip(right["base"], right["ours"], strict=True))
    lost = sum(b < a for a, b in zip(right["base"], right["ours"], strict=True))
    assert won + lost > 1
    with (tmp_path / "results" / "comparison.csv").open(newline="") as file:
        rows = {(row["task"], row["metric"], row["model"]): row for row in csv.DictReader(file)}
    row = rows["arc_easy", "acc", "ours"]
    assert float(row["p_value"]) == pytest.approx(stats.binomtest(won, won + lost).pvalue)
    assert float(row["difference"]) == pytest.approx((won - lost) / 12)
    assert (row["items"], row["method"], row["baseline"]) == ("12", "McNemar", "base")
    assert rows["truthfulqa_mc2", "acc", "ours"]["method"] == "bootstrap"
    text = (tmp_path / "results" / "comparison.md").read_text()
    assert text.strip() in said.out
    assert len(json.loads((tmp_path / "results" / "comparison.json").read_text())) == len(rows)
    # Folders of results stand for their models.
    no_model_is_opened()
    folders = [tmp_path / "results" / name for name in ("base", "ours")]
    assert evaluate(*folders).code == 0
    assert (tmp_path / "results" / "comparison.md").read_text() == text


def test_models_on_other_items_are_not_tested_against_each_other(
    evaluate: Run, plain: str, checkpoint: Path, tmp_path: Path
) -> None:
    evaluate(plain, "--tasks=arc_easy", "--limit=4")
    said = evaluate(tmp_path / "results" / "plain", checkpoint, "--tasks=arc_easy", "--limit=5")
    assert said.code == 0
    assert "not comparable: limit is 5, but 4 for plain" in said.out
    assert "Below: differences to" not in said.out


def test_models_in_another_precision_are_compared_with_a_note(evaluate: Run, plain: str, tmp_path: Path) -> None:
    evaluate(plain, "--tasks=arc_easy", "--limit=4")
    said = evaluate(tmp_path / "results" / "plain", plain, "--tasks=arc_easy", "--limit=4", "--precision=bfloat16")
    assert said.code == 0, said.err
    assert (
        "plain-2 was evaluated in bfloat16, and plain in float32: its differences include rounding errors." in said.out
    )
    assert "Below: differences to plain" in said.out


def test_names_are_short_and_no_two_alike() -> None:
    models = ["a/run/checkpoints/best.ckpt", "b/run/checkpoints/best.ckpt", "some/hub-name"]
    assert name_models(models, None) == [
        ("run-best", models[0]),
        ("run-best-2", models[1]),
        ("hub-name", models[2]),
    ]
    assert name_models(models, ["x", "y", "z"])[2] == ("z", models[2])
    with pytest.raises(ConfigError, match="names: found x, y, x, expected no two equal names"):
        name_models(models, ["x", "y", "x"])
