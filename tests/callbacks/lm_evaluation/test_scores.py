"""Tests of the scores: when they are computed, where they are stored, and their values."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lm_eval.models.huggingface import HFLM
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lpc_lightning.algorithms import DPO
from lpc_lightning.callbacks import LMEvaluation
from lpc_lightning.evaluation.benchmarks.latent_lm import LatentLM
from lpc_lightning.evaluation.benchmarks.results import read_results
from lpc_lightning.evaluation.benchmarks.runner import run_benchmarks
from lpc_lightning.inference.opening import inference_prior
from lpc_lightning.policy import TinyPolicy
from tests.callbacks.lm_evaluation.conftest import adam, gumbel, rows


def test_scores_in_loggers_and_files(fit, task, tmp_path, capsys) -> None:
    loggers = [CSVLogger(tmp_path, name="", version="run"), TensorBoardLogger(tmp_path, name="", version="run")]
    trainer = fit("run", LMEvaluation([task], limit=6, every_n_steps=2, step_limit=3), logger=loggers)
    results = read_results(tmp_path / "run" / "lm_eval")
    record = dict(results.record["tasks"]["numbers"])
    assert re.fullmatch("[0-9a-f]{16}", record.pop("task_file"))
    assert record | {"seconds": 0} == {
        "version": 1, "num_fewshot": 0, "limit": 6, "items": 6, "documents": 9, "higher_is_better": {"acc": True},
        "seconds": 0,
    }  # fmt: skip
    assert results.origin["algorithm"] == "DPO"
    assert results.origin["latent"] == "GumbelSpace"
    assert results.origin["settings"]["beta"] == 0.1
    assert (results.origin["step"], results.origin["precision"]) == (5, "32-true")
    assert results.record["model"]["prior_mode"] == "mean"
    assert len(results.items) == 6

    metrics = results.metrics["numbers"]
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    final = next(row for row in rows(tmp_path / "run") if "lm_eval/numbers/acc" in row)
    assert final["step"] == "5"
    for name in ("acc", "acc_stderr"):
        assert float(final[f"lm_eval/numbers/{name}"]) == pytest.approx(metrics[name])
        (event,) = events.Scalars(f"lm_eval/numbers/{name}")
        assert (event.step, event.value) == (5, pytest.approx(metrics[name]))
    for step in (2, 4):
        part = read_results(tmp_path / "run" / "lm_eval" / f"step_{step}")
        assert (part.origin["step"], part.record["tasks"]["numbers"]["items"]) == (step, 3)
        (row,) = [
            row for row in rows(tmp_path / "run") if "lm_eval/first_3/numbers/acc" in row and row["step"] == f"{step}"
        ]
        assert float(row["lm_eval/first_3/numbers/acc"]) == pytest.approx(part.metrics["numbers"]["acc"])

    table = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if "numbers" in line]
    ((name, metric, text),) = ([cell.strip() for cell in line] for line in table)
    assert (name, metric) == ("numbers", "acc")
    assert text == f"{metrics['acc']:.4f} ± {metrics['acc_stderr']:.4f}"
    assert trainer.global_step == 5


def test_same_limit_during_training_is_one_curve(fit, task, tmp_path) -> None:
    fit("run", LMEvaluation([task], limit=3, every_n_steps=2, step_limit=3))
    steps = [int(row["step"]) for row in rows(tmp_path / "run") if "lm_eval/numbers/acc" in row]
    assert steps == [2, 4, 5]


@pytest.mark.slow
@pytest.mark.parametrize("latent", [False, True])
def test_scores_against_a_separate_evaluation(latent, fit, task, tmp_path) -> None:
    """Without a latent: against HFLM. With a latent: against LatentLM outside of a training."""
    policy = TinyPolicy(width=16, layers=1, heads=2)
    module = DPO(policy=policy, latent=gumbel() if latent else None, optimizer=adam, latent_lr=1e-1)
    fit("run", LMEvaluation([task], prior_mode=1 if latent else None), module=module)
    results = read_results(tmp_path / "run" / "lm_eval")
    plain = run_benchmarks(HFLM(pretrained=module.policy.causal_lm, tokenizer=module.tokenizer), [task])
    prior = inference_prior(module.latent) if latent else None
    under_z = run_benchmarks(LatentLM(module.policy, module.tokenizer, prior, prior_mode=1), [task])
    fresh = run_benchmarks(HFLM(pretrained=policy.build().causal_lm, tokenizer=module.tokenizer), [task])

    def answers(results: Any) -> torch.Tensor:
        return torch.tensor([item["response"] for item in results.items])

    torch.testing.assert_close(answers(results), answers(under_z if latent else plain), rtol=0, atol=1e-4)
    assert (answers(results) - answers(fresh)).abs().max() > 0.1, "training has changed the answers"
    assert latent == bool((answers(results) - answers(plain)).abs().max() > 0.1), "z changes the answers"


def test_precision_of_the_trainer(fit, task, tmp_path) -> None:
    fit("run", LMEvaluation([task], limit=2), precision="bf16-mixed")
    model = read_results(tmp_path / "run" / "lm_eval").record["model"]
    assert (model["mixed_precision_dtype"], model["dtype"]) == ("torch.bfloat16", "torch.float32")


def test_resumed_run_skips_its_first_step(fit, task, tmp_path) -> None:
    def evaluation() -> LMEvaluation:
        return LMEvaluation([task], limit=2, every_n_steps=2, step_limit=2)

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "two.ckpt")

    fit("first", evaluation(), Save(), enable_checkpointing=False)
    fit("second", evaluation(), enable_checkpointing=False, ckpt_path=tmp_path / "two.ckpt")
    for run, expected in (("first", {"step_2", "step_4"}), ("second", {"step_4"})):
        folders = {path.name for path in (tmp_path / run / "lm_eval").iterdir() if path.is_dir()}
        assert folders == expected


def test_last_step_is_evaluated_once(fit, task, tmp_path) -> None:
    for run, length in (("steps", {"max_steps": 2, "max_epochs": -1}), ("epochs", {"limit_train_batches": 4})):
        fit(run, LMEvaluation([task], limit=2, every_n_steps=1, step_limit=2), **length)
        assert {path.name for path in (tmp_path / run / "lm_eval").iterdir()} == {
            "results.json", "items.jsonl", "step_1",
        }  # fmt: skip
