"""Tests of the scores of `lpc-lightning evaluate`: checkpoints, plain models, and files of preference pairs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from lpc_lightning.data import PreferenceData
from lpc_lightning.evaluation.benchmarks.runner import run_benchmarks
from lpc_lightning.inference.opening import open_module
from tests.evaluation.conftest import write_rows
from tests.fixtures.commands import Command


@pytest.mark.slow
def test_plain_model_scores_equal_stock(evaluate: Command, plain: str, results: Any, data_dir: Path) -> None:
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
    evaluate: Command, checkpoint: Path, results: Any, documents: Any, mode: int | None
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
    evaluate: Command, checkpoint: Path, plain: str, results: Any, tmp_path: Path, make_trainer: Callable[..., Trainer]
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


def test_preferences_take_columns_and_skip_bad_rows(
    evaluate: Command, plain: str, results: Any, tmp_path: Path
) -> None:
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


def test_benchmarks_get_the_template_of_training(evaluate: Command, plain: str, results: Any, tmp_path: Path) -> None:
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
    evaluate: Command, checkpoint: Path, results: Any, tmp_path: Path
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


def test_limit_of_pairs_without_split_column(evaluate: Command, plain: str, results: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"Why {n}?", "chosen": "So.", "rejected": "No."} for n in range(6)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(plain, "--tasks=none", f"--preferences={path}").code == 0
    assert results("plain").record["tasks"]["preferences"]["items"] == 6
    assert evaluate(plain, "--tasks=none", f"--preferences={path}", "--limit=0.6").code == 0
    assert results("plain-2").record["tasks"]["preferences"]["items"] == 4


def test_files_of_one_name_are_tasks_of_their_own(evaluate: Command, plain: str, results: Any, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("x/a.jsonl", "y/a.jsonl", "a-2.jsonl")]
    for count, path in enumerate(paths, 2):
        write_rows(path, [{"prompt": f"Why {n}?", "chosen": "So.", "rejected": "No."} for n in range(count)])
    outcome = evaluate(plain, "--tasks=none", "--preferences", *paths)
    assert outcome.code == 0, outcome.err
    tasks = results("plain").record["tasks"]
    assert {name: record["items"] for name, record in tasks.items()} == {
        "preferences-a": 2, "preferences-a-3": 3, "preferences-a-2": 4,
    }  # fmt: skip


def test_pairs_of_one_prompt(evaluate: Command, plain: str, results: Any, tmp_path: Path) -> None:
    """There is no standard error and no test. A sentence in the output and in the comparison gives the reason."""
    for name, prompts in (("one", 1), ("two", 2)):
        rows = [{"prompt": f"Why {n % prompts}?", "chosen": "So.", "rejected": f"No {n}."} for n in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [str(tmp_path / f"{name}.jsonl") for name in ("one", "two")]
    outcome = evaluate(plain, plain, "--names=a,b", "--tasks=none", "--preferences", *files)
    assert outcome.code == 0, outcome.err
    assert ["accuracy/prior_stderr" in results("a").metrics[f"preferences-{name}"] for name in ("one", "two")] == [
        False,
        True,
    ]
    sentence = "all pairs have one prompt. Standard errors and tests are over prompts, so that there are none."
    assert outcome.out.count(f"preferences-one: {sentence}") == 4  # for each model, and in the comparison
    assert f"a, preferences-one: {sentence}" in (tmp_path / "results" / "comparison.md").read_text()
    assert outcome.out.count(sentence) == 4
