"""Tests of the command `lpc-lightning evaluate`: checkpoints, plain models, earlier results, several models."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
from tests.fixtures.commands import Outcome, run_command


@pytest.fixture(scope="module", autouse=True)
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lpc-lightning"])
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setenv("PL_SEED_WORKERS", "0")
        yield patch


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a fit of three steps, with three different codes."""
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
    """Copy of the checkpoint in a separate run folder."""
    path = tmp_path / "runs" / "lpc" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    return Path(shutil.copy2(fitted, path))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, loud_policy: Any) -> str:
    """Folder of a model without a latent."""
    folder = tmp_path_factory.mktemp("models") / "plain"
    policy, tokenizer = loud_policy
    policy.causal_lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


Run = Callable[..., Outcome]


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str], data_dir: Path, tmp_path: Path) -> Run:
    """Function that runs the command with local data and float32. Its results are in `results`."""
    fixed = [f"--data-dir={data_dir}", f"--output={tmp_path / 'results'}", "--precision=float32", "--batch-size=4"]

    def run(*arguments: Any) -> Outcome:
        return run_command(capsys, "evaluate", *fixed, *arguments)

    return run


@pytest.fixture
def results(tmp_path: Path) -> Callable[[str], Any]:
    return lambda name: read_results(tmp_path / "results" / name)


@pytest.fixture
def run_tasks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tasks that were run. New names are appended during the test."""
    names: list[str] = []

    def recording_run(lm: Any, tasks: Any, **settings: Any) -> Any:
        names.extend(tasks)
        return run_benchmarks(lm, tasks, **settings)

    monkeypatch.setattr(lpc_lightning.evaluation.benchmarks.runner, "run_benchmarks", recording_run)
    return names


@pytest.fixture
def no_model_is_opened(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def forbid() -> None:
        def refuse(*arguments: Any, **settings: Any) -> None:
            raise AssertionError("a model was opened")

        monkeypatch.setattr(lpc_lightning.evaluation.comparison.one_model, "open_policy", refuse)
        monkeypatch.setattr(lpc_lightning.evaluation.comparison.one_model, "open_module", refuse)

    return forbid


# Scores


@pytest.mark.slow
def test_plain_model_scores_equal_stock(evaluate: Run, plain: str, results: Any, data_dir: Path) -> None:
    tasks = ["arc_easy", "gsm8k", "truthfulqa_mc1", "truthfulqa_mc2"]
    outcome = evaluate(plain, "--tasks", *tasks, "--limit=5")
    assert outcome.code == 0, outcome.err
    actual = results("plain")
    stock = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(plain),
        tokenizer=AutoTokenizer.from_pretrained(plain),
        batch_size=1,
    )
    expected = run_benchmarks(stock, tasks, data_dir=str(data_dir), limit=5)
    assert set(actual.metrics) == set(tasks)
    for task in tasks:
        assert actual.metrics[task] == pytest.approx(expected.metrics[task], abs=1e-5)
    assert actual.origin["kind"] == "model"
    assert actual.record["settings"]["limit"] == 5
    for task, metrics in expected.metrics.items():
        for metric in metrics:
            if "stderr" not in metric:
                assert f"| {task} " in outcome.out
                assert f"| {metric} " in outcome.out
    assert (
        f"{expected.metrics['arc_easy']['acc']:.4f} ± {expected.metrics['arc_easy']['acc_stderr']:.4f}" in outcome.out
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, 2])
def test_checkpoint_scored_under_its_latent(
    evaluate: Run, checkpoint: Path, results: Any, documents: Any, mode: int | None
) -> None:
    """Compute each choice with a separate pass of the model, and z from the trained latent space."""
    outcome = evaluate(checkpoint, "--tasks=arc_easy", *([] if mode is None else [f"--prior-mode={mode}"]))
    assert outcome.code == 0, outcome.err
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
            expected = sum(float(logps[len(context) - 1 + index, token]) for index, token in enumerate(answer))
            assert response == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_preference_accuracy_equals_trainer_test(
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
    outcome = evaluate(checkpoint, plain, "--tasks=none", f"--preferences={path}")
    assert outcome.code == 0, outcome.err
    actual = results("lpc-last")
    trainer = make_trainer()
    trainer.test(
        open_module(str(checkpoint)), PreferenceData(str(path), cache_dir=str(tmp_path / "cache")), verbose=False
    )
    metrics = actual.metrics["preferences"]
    assert next(iter(metrics)) == "accuracy/prior"
    assert metrics["accuracy/prior"] == pytest.approx(float(trainer.callback_metrics["test/rewards/accuracies"]))
    assert metrics["margin/prior"] == pytest.approx(float(trainer.callback_metrics["test/rewards/margins"]), abs=1e-6)
    others = {"accuracy/posterior", "accuracy/marginal", "accuracy/no_latent", "accuracy/shuffled", "swap_turnover"}
    assert others <= set(metrics)
    assert not any("/source/" in name for name in metrics)
    assert [item["doc_id"] for item in actual.items] == [f"p{n}" for n in range(9)]
    correct = [item["metrics"]["accuracy/prior"] for item in actual.items]
    assert sum(correct) / 9 == pytest.approx(metrics["accuracy/prior"])
    other = results("plain").metrics["preferences"]
    means = ("accuracy/prior", "margin/prior", "log_loss/prior")
    means += ("accuracy/prior/summed", "accuracy/prior/per_token", "longer_is_chosen")
    assert set(other) == {*means, *(f"{name}_stderr" for name in means), "calibration_error/prior"}
    assert "not comparable: reward is likelihood, but implicit for lpc-last" in outcome.out


def test_preferences_take_columns_and_skip_bad_rows(evaluate: Run, plain: str, results: Any, tmp_path: Path) -> None:
    rows = [{"question": f"Why {n}?", "better": "So.", "rejected": "No."} for n in range(4)] + [{"question": "Why?"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [plain, "--tasks=none", f"--preferences={path}", "--columns.chosen=better"]
    outcome = evaluate(*flags)
    assert outcome.code == 1
    assert "1 bad: missing answer: pairs.jsonl line 5" in outcome.err
    assert "evaluate and adapt: `--bad_rows skip`" in outcome.err
    assert evaluate(*flags, "--bad_rows=skip").code == 0
    record = results("plain").record["tasks"]["preferences"]
    assert (record["items"], record["bad"]) == (4, {"missing answer": 1})


def test_benchmarks_get_the_template_of_training(evaluate: Run, plain: str, results: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "quiet"))
    template = folder / "chat_template.jinja"
    template.write_text("{% if quiet %}Be quiet. {% endif %}" + template.read_text())
    settings = {"kind": "auto", "arguments": {"quiet": True}, "system_turns": "auto"}
    (folder / "training.json").write_text(json.dumps({"template": settings}))
    outcome = evaluate(folder, "--tasks", "arc_easy", "--limit=1", "--apply_chat_template=true")
    assert outcome.code == 0, outcome.err
    assert results("quiet").record["model"]["chat_template_args"] == {"quiet": True}


@pytest.mark.slow
def test_reward_benchmarks_are_tasks_of_their_own(
    evaluate: Run, checkpoint: Path, results: Any, tmp_path: Path
) -> None:
    """One file of each benchmark. The scores follow from the rewards of a test of the same pairs, read as pairs."""
    subsets = ["hep-go", "hep-js", "donotanswer"]
    graded = [
        {"prompt": f"Why {n}?", "chosen": f"So {n * n}.", "rejected": "No!", "subset": subsets[n % 3], "id": n}
        for n in range(6)
    ]
    styles = {kind: [f"{kind} {'word ' * style}" for style in range(3)] for kind in ("chosen", "rejected")}
    files = {"graded": graded, "styled": [{"prompt": "Why?", **styles, "id": 0, "domain": "code"}]}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = [str(tmp_path / f"{name}.jsonl") for name in files]
    outcome = evaluate(checkpoint, "--tasks=none", "--preferences", *paths)
    assert outcome.code == 0, outcome.err
    tasks = results("lpc-last").record["tasks"]
    assert set(tasks) == {"preferences-graded", "preferences-styled"}
    items = [item for item in results("lpc-last").items if item["task"] == "preferences-graded"]
    for mode in ("prior", "marginal", "posterior", "no_latent"):
        right = {
            subset: [item["response"][mode] > 0 for item in items if item["factor"] == subset] for subset in subsets
        }
        scores = tasks["preferences-graded"]["scores"][f"{mode}/summed"]  # DPO's own reward
        expected = {subset: sum(each) / 2 for subset, each in right.items()}
        assert {subset: scores[f"subset/{subset}"] for subset in subsets} == expected
        assert scores["section/Reasoning"] == pytest.approx(sum(right["hep-go"] + right["hep-js"]) / 4)
    assert tasks["preferences-styled"]["items"] == 9
    assert {"average", "easy", "domain/code/hard"} <= set(tasks["preferences-styled"]["scores"]["prior/per_token"])
    table = (tmp_path / "results" / "lpc-last" / "reward_benchmarks.md").read_text()
    assert "| subset/donotanswer " in table
    assert "preferences-styled, rm_bench: 9 pairs, 0 dropped" in outcome.out
    assert "Read from" in evaluate(checkpoint, "--tasks=none", "--preferences", *paths).out
    shorter = evaluate(checkpoint, "--tasks=none", "--max_length=1", "--preferences", *paths)
    assert shorter.code == 1
    assert "9 dropped: pair longer than max_length" in shorter.err


def test_limit_of_pairs_without_split_column(evaluate: Run, plain: str, results: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"Why {n}?", "chosen": "So.", "rejected": "No."} for n in range(6)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(plain, "--tasks=none", f"--preferences={path}").code == 0
    assert results("plain").record["tasks"]["preferences"]["items"] == 6
    assert evaluate(plain, "--tasks=none", f"--preferences={path}", "--limit=0.6").code == 0
    assert results("plain-2").record["tasks"]["preferences"]["items"] == 4


# Existing results


def test_existing_results_are_read(
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", ["--limit=3", "--prior-mode=1", "--seed=5", "--apply-chat-template", "--num-fewshot=2"]
)
def test_other_settings_use_another_folder(
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


@pytest.mark.parametrize("changed", ["weights", "data"])
def test_changed_files_use_another_folder(
    evaluate: Run, checkpoint: Path, data_dir: Path, results: Any, changed: str
) -> None:
    flags = [checkpoint, "--tasks=arc_easy", "--limit=4"]
    assert evaluate(*flags).code == 0
    os.utime(checkpoint if changed == "weights" else data_dir / "arc/ARC-Easy/test.jsonl", (1, 1))
    assert "Read from" not in evaluate(*flags).out
    assert results("lpc-last-2").metrics == results("lpc-last").metrics


@pytest.mark.slow
def test_new_tasks_are_added_to_results(
    evaluate: Run, plain: str, results: Any, run_tasks: list[str], tmp_path: Path
) -> None:
    evaluate(plain, "--tasks", "arc_easy", "truthfulqa_mc1", "--limit=4")
    run_tasks.clear()
    outcome = evaluate(plain, "--tasks", "truthfulqa_mc1", "gsm8k", "--limit=4")
    assert outcome.code == 0
    assert "Continuing with the results in" in outcome.out
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


# Failures

ROWS = [
    {"question": f"Which {n}?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "AB"[n % 2]}
    for n in range(4)
]
RAISING = "def process_results(doc, results):\n    raise RuntimeError('no such luck')\n"


def test_failing_benchmark_sets_exit_code(
    evaluate: Run, plain: str, results: Any, task_file: Callable[..., str], run_tasks: list[str], tmp_path: Path
) -> None:
    broken = task_file("own", ROWS, RAISING)
    outcome = evaluate(plain, "--tasks", "arc_easy", broken, "--limit=4")
    assert outcome.code == 1
    assert len(outcome.errors) == 1
    assert outcome.errors[0].startswith("plain, own: RuntimeError: no such luck")
    actual = results("plain")
    assert set(actual.metrics) == {"arc_easy"}
    assert set(actual.failures) == {"own"}
    assert "| own " in outcome.out
    assert "failed" in outcome.out
    run_tasks.clear()
    assert evaluate(plain, "--tasks", "arc_easy", "--limit=4").code == 0
    assert run_tasks == []


def test_changed_task_file_is_run_again(
    evaluate: Run, plain: str, results: Any, task_file: Callable[..., str], run_tasks: list[str]
) -> None:
    runs = []
    for score in (1.0, 0.25):  # texts of other lengths: of two files of one second, Python sees a change by the size
        own = task_file("own", ROWS, f"def process_results(doc, results):\n    return {{'acc': {score}}}\n")
        for _ in range(2):
            run_tasks.clear()
            assert evaluate(plain, "--tasks", "truthfulqa_mc1", own, "--limit=4").code == 0
            runs.append(list(run_tasks))
        assert results("plain").metrics["own"]["acc"] == score
    assert runs == [["truthfulqa_mc1", own], [], [own], []]


def test_rerun_repeats_failed_tasks_only(
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


def test_interrupted_command_keeps_results(
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


@pytest.mark.slow
def test_invalid_model_does_not_stop_others(
    evaluate: Run, plain: str, checkpoint: Path, tmp_path: Path, results: Any
) -> None:
    checkpoint.write_text("not a checkpoint")
    outcome = evaluate(checkpoint, plain, tmp_path / "nowhere", "--tasks=arc_easy", "--limit=4")
    assert outcome.code == 1
    assert [error.partition(":")[0] for error in outcome.errors] == ["lpc-last", "nowhere"]
    assert "is no checkpoint" in outcome.errors[0]
    assert "found no file or folder" in outcome.errors[1]
    assert set(results("plain").metrics) == {"arc_easy"}


def test_invalid_pairs_do_not_stop_benchmarks(evaluate: Run, plain: str, results: Any, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "Why?", "chosen": "So.", "rejected": "So."}) + "\n")
    outcome = evaluate(plain, "--tasks=arc_easy", "--limit=4", f"--preferences={path}")
    assert outcome.code == 1
    assert outcome.errors[0].startswith("plain, preferences: 1 rows cannot be used.")
    assert "equal answers" in outcome.err
    assert set(results("plain").metrics) == {"arc_easy"}
    assert evaluate(plain, "--tasks=arc_easy", "--limit=0.6").code == 0


def test_damaged_results_are_an_error(evaluate: Run, plain: str, tmp_path: Path) -> None:
    folder = tmp_path / "results" / "plain"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("{")
    outcome = evaluate(plain, "--tasks=arc_easy")
    assert outcome.code == 1
    assert f"{folder}: found incomplete results (JSONDecodeError" in outcome.errors[0]
    assert (folder / "results.json").read_text() == "{"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit=0"], "limit: found 0, expected a number of documents, at least 1, or a share"),
        (["--num-fewshot=-1"], "num_fewshot: found -1, expected 0 or more"),
        (["--tasks=none"], "tasks: found none, expected a task, or a file of preference pairs"),
        (["--tasks=arc_esay"], "tasks: found 'arc_esay' with data_dir, expected arc_easy"),
        (["--names", "a", "b"], "names: found 2 for 1 models, expected one for each"),
        (["--preferences=nowhere.jsonl"], "preferences: found no file nowhere.jsonl, expected preference pairs"),
        (["--data-dir=nowhere"], "data_dir: found no file arc/ARC-Easy/train.jsonl for task arc_easy in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_evaluate_rejects_settings_early(
    plain: str, flags: list[str], message: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [] if "--data-dir=nowhere" in flags else [f"--data-dir={data_dir}"]
    with pytest.raises(SystemExit) as exit_info:
        main(["evaluate", plain, f"--output={tmp_path / 'results'}", *flags, *data])
    outcome = capsys.readouterr()
    assert exit_info.value.code == 1
    assert outcome.out == ""
    assert outcome.err.startswith(f"error: {message}")
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_prior_mode_with_pairs_is_rejected(evaluate: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "Why?", "chosen": "So.", "rejected": "No."}) + "\n")
    outcome = evaluate(checkpoint, "--prior-mode=1", f"--preferences={tmp_path / 'pairs.jsonl'}")
    assert outcome.code == 1
    assert outcome.errors[0].startswith("prior_mode: found 1 with a file of preference pairs")


# Several models


@pytest.mark.slow
def test_models_are_compared_by_item(
    evaluate: Run, plain: str, checkpoint: Path, tmp_path: Path, no_model_is_opened: Callable[[], None]
) -> None:
    outcome = evaluate(plain, checkpoint, "--tasks", "arc_easy", "truthfulqa_mc2", "--names", "base", "ours")
    assert outcome.code == 0, outcome.err
    correct = {}
    for name in ("base", "ours"):
        lines = (tmp_path / "results" / name / "items.jsonl").read_text().splitlines()
        items = [json.loads(line) for line in lines]
        correct[name] = [item["metrics"]["acc"] for item in items if item["task"] == "arc_easy"]
    won = sum(b > a for a, b in zip(correct["base"], correct["ours"], strict=True))
    lost = sum(b < a for a, b in zip(correct["base"], correct["ours"], strict=True))
    assert won + lost > 1
    with (tmp_path / "results" / "comparison.csv").open(newline="") as file:
        rows = {(row["task"], row["metric"], row["model"]): row for row in csv.DictReader(file)}
    row = rows["arc_easy", "acc", "ours"]
    assert float(row["p_value"]) == pytest.approx(stats.binomtest(won, won + lost).pvalue)
    assert float(row["difference"]) == pytest.approx((won - lost) / 12)
    assert (row["items"], row["method"], row["baseline"]) == ("12", "McNemar", "base")
    assert rows["truthfulqa_mc2", "acc", "ours"]["method"] == "bootstrap"
    text = (tmp_path / "results" / "comparison.md").read_text()
    assert text.strip() in outcome.out
    assert len(json.loads((tmp_path / "results" / "comparison.json").read_text())) == len(rows)
    # Folders of results can be used in place of models.
    no_model_is_opened()
    folders = [tmp_path / "results" / name for name in ("base", "ours")]
    assert evaluate(*folders).code == 0
    assert (tmp_path / "results" / "comparison.md").read_text() == text


@pytest.mark.slow
def test_models_on_other_items_are_not_tested(evaluate: Run, plain: str, checkpoint: Path, tmp_path: Path) -> None:
    evaluate(plain, "--tasks=arc_easy", "--limit=4")
    outcome = evaluate(tmp_path / "results" / "plain", checkpoint, "--tasks=arc_easy", "--limit=5")
    assert outcome.code == 0
    assert "not comparable: limit is 5, but 4 for plain" in outcome.out
    assert "Below: differences to" not in outcome.out


@pytest.mark.slow
def test_models_in_other_precision_get_note(evaluate: Run, plain: str, tmp_path: Path) -> None:
    evaluate(plain, "--tasks=arc_easy", "--limit=4")
    outcome = evaluate(tmp_path / "results" / "plain", plain, "--tasks=arc_easy", "--limit=4", "--precision=bfloat16")
    assert outcome.code == 0, outcome.err
    assert (
        "plain-2 was evaluated in bfloat16, and plain in float32: its differences include rounding errors."
        in outcome.out
    )
    assert "Below: differences to plain" in outcome.out


def test_name_models_gives_distinct_names() -> None:
    models = ["a/run/checkpoints/best.ckpt", "b/run/checkpoints/best.ckpt", "some/hub-name"]
    assert name_models(models, None) == [
        ("run-best", models[0]),
        ("run-best-2", models[1]),
        ("hub-name", models[2]),
    ]
    assert name_models(models, ["x", "y", "z"])[2] == ("z", models[2])
    with pytest.raises(ConfigError, match="names: found x, y, x, expected no two equal names"):
        name_models(models, ["x", "y", "x"])
