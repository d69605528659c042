"""Tests of LMEvaluation in fits of a tiny policy: unchanged training, and correct scores."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lm_eval.models.huggingface import HFLM
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lpc_lightning.algorithms import DPO
from lpc_lightning.callbacks import GracefulStop, LMEvaluation
from lpc_lightning.cli import PreferenceCLI
from lpc_lightning.data import SyntheticPreferences
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.benchmarks.latent_lm import LatentLM
from lpc_lightning.evaluation.benchmarks.results import read_results
from lpc_lightning.evaluation.benchmarks.runner import run_benchmarks
from lpc_lightning.inference.opening import inference_prior
from lpc_lightning.latent import GumbelSpace
from lpc_lightning.policy import LoRA, TinyPolicy
from tests.fixtures.processes import ForkedProcess

CONFIGS = Path(__file__).parents[2] / "configs" / "callbacks"
QUESTIONS = [
    {"question": f"Which number follows {number}?", "choices": [str(number + step) for step in (1, 7, 2)]}
    for number in range(9)
]


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def write_task(folder: Path, name: str, code: str | None = None) -> str:
    """Write a task file with nine questions of three choices. `code` is the body of `process_results(doc, results)`."""
    folder = folder / name
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    files = {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")}
    task = {
        "task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": 0, "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }  # fmt: skip
    text = yaml.safe_dump(task)
    if code is not None:
        (folder / "own.py").write_text(f"def process_results(doc, results):\n    {code}\n")
        text += "process_results: !function own.process_results\n"
    (folder / f"{name}.yaml").write_text(text)
    return str(folder / f"{name}.yaml")


@pytest.fixture
def task(tmp_path: Path) -> str:
    return write_task(tmp_path, "numbers")


class Losses(Callback):
    """Callback that stores the loss of every batch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"]))


def gumbel() -> GumbelSpace:
    return GumbelSpace(num_codes=4, hidden=8, init_logit_std=1.0)


@pytest.fixture
def fit(tmp_path: Path, cache_dir: Path) -> Callable[..., Trainer]:
    """Function that runs a fit: 20 pairs, 2 in a micro-batch, 2 micro-batches in a step, 5 steps in an epoch."""

    def run(name: str, *callbacks: Callback, module: DPO | None = None, **trainer: Any) -> Trainer:
        data = SyntheticPreferences(train_pairs=20, validation_pairs=6, batch_size=2, cache_dir=str(cache_dir))
        policy = TinyPolicy(width=16, layers=1, heads=2)
        module = module or DPO(policy=policy, latent=gumbel(), optimizer=adam, latent_lr=1e-2)
        ckpt_path = trainer.pop("ckpt_path", None)
        settings: dict[str, Any] = {
            "logger": CSVLogger(tmp_path, name="", version=name),
            "accumulate_grad_batches": 2,
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "accelerator": "cpu",
        }
        finished = Trainer(callbacks=list(callbacks), **(settings | trainer))
        finished.fit(module, data, ckpt_path=ckpt_path)
        return finished

    return run


def rows(folder: Path) -> list[dict[str, str]]:
    """Read the rows of the CSV logger, without empty cells."""
    with (folder / "metrics.csv").open() as file:
        return [{name: cell for name, cell in row.items() if cell} for row in csv.DictReader(file)]


def without_benchmarks(logged: list[dict[str, str]]) -> list[dict[str, str]]:
    kept = [{name: cell for name, cell in row.items() if not name.startswith("lm_eval/")} for row in logged]
    return [row for row in kept if set(row) > {"step"}]


def assert_same(actual: Any, expected: Any) -> None:
    """Check that nested values are equal, bit by bit."""
    assert type(actual) is type(expected)
    if isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        for name in actual:
            assert_same(actual[name], expected[name])
    elif isinstance(actual, list | tuple):
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    else:
        assert torch.equal(actual, expected) if isinstance(actual, torch.Tensor) else actual == expected


MODULES: dict[str, Callable[[], DPO]] = {
    "gumbel": lambda: DPO(policy=TinyPolicy(width=16, layers=1, heads=2), optimizer=adam, latent=gumbel()),
    "gumbel, lora with dropout": lambda: DPO(
        policy=TinyPolicy(width=16, layers=1, heads=2, lora=LoRA(rank=4, alpha=8, dropout=0.3)),
        optimizer=adam,
        latent=gumbel(),
        latent_lr=1e-2,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", list(MODULES.values()), ids=list(MODULES))
def test_training_is_unchanged(make, fit, task, tmp_path) -> None:
    def save() -> ModelCheckpoint:
        return ModelCheckpoint(filename="{step}", save_top_k=-1, every_n_train_steps=1)

    evaluation = LMEvaluation([task], limit=4, every_n_steps=2, step_limit=2, prior_mode="sample")
    losses = Losses(), Losses()
    epochs = {"max_epochs": 2, "val_check_interval": 4}
    fit("without", losses[0], save(), module=make(), **epochs)
    fit("with", losses[1], evaluation, save(), module=make(), **epochs)
    assert losses[0].values == losses[1].values
    assert len(set(losses[0].values)) == 20
    saved = sorted(path.name for path in (tmp_path / "without" / "checkpoints").iterdir())
    assert len(saved) == 10
    for name in saved:
        expected, actual = (
            torch.load(tmp_path / run / "checkpoints" / name, weights_only=True) for run in ("without", "with")
        )
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
            assert_same(actual[part], expected[part])
    expected, actual = (rows(tmp_path / run) for run in ("without", "with"))
    assert without_benchmarks(actual) == expected
    assert {path.name for path in (tmp_path / "with" / "lm_eval").iterdir()} == {
        "results.json", "items.jsonl", "step_2", "step_4", "step_6", "step_8",
    }  # fmt: skip


def test_random_states_are_restored(fit, task) -> None:
    """Each step sets the seed, so that the previous test does not detect a changed state."""

    class States(Callback):
        def __init__(self) -> None:
            self.values: list[list[int]] = []

        def on_train_batch_end(self, *_: Any) -> None:
            self.values.append(torch.get_rng_state().tolist())

    before, after = States(), States()
    fit("run", before, LMEvaluation([task], limit=2, every_n_steps=1, step_limit=2), after)
    assert before.values == after.values


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


def test_failed_task(fit, task, tmp_path) -> None:
    broken = write_task(tmp_path, "broken", "raise LookupError('no')")
    evaluation = LMEvaluation([broken, task], limit=2, every_n_steps=2, step_limit=2)
    saving = ModelCheckpoint(filename="last")
    with pytest.warns(UserWarning, match="broken has no scores: LookupError: no"):
        trainer = fit("run", evaluation, saving)
    assert trainer.global_step == 5
    assert torch.load(saving.best_model_path, weights_only=True)["global_step"] == 5
    for folder in (Path(), Path("step_2"), Path("step_4")):
        results = read_results(tmp_path / "run" / "lm_eval" / folder)
        assert set(results.metrics) == {"numbers"}
        assert results.failures == {"broken": "LookupError: no (own.py, line 2)"}


def test_failed_evaluation(fit, tmp_path, capsys) -> None:
    """A data file is removed after the start of the training."""
    folder = tmp_path / "data" / "arc" / "ARC-Easy"
    folder.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").touch()

    class Remove(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            (folder / "test.jsonl").unlink()

    with pytest.warns(UserWarning, match="arc_easy has no scores: data_dir: found no file arc/ARC-Easy/test.jsonl"):
        trainer = fit("run", Remove(), LMEvaluation(["arc_easy"], str(tmp_path / "data"), every_n_steps=2))
    assert trainer.global_step == 5
    assert "test.jsonl" in read_results(tmp_path / "run" / "lm_eval").failures["arc_easy"]
    assert "failed" in capsys.readouterr().out
    assert all(part.training for part in trainer.lightning_module.policy.modules())


def test_failed_writing_of_results(fit, task, tmp_path) -> None:
    class Block(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            (tmp_path / "run" / "lm_eval").write_text("a file in place of the folder")

    with pytest.warns(UserWarning, match="could not write the results"):
        trainer = fit("run", Block(), LMEvaluation([task], limit=2))
    assert trainer.global_step == 5


@pytest.mark.slow
@pytest.mark.parametrize("error", ["KeyboardInterrupt", "SystemExit"])
def test_interrupt_keeps_all_checkpoints(error, fit, tmp_path) -> None:
    """`save_last` writes at the end of training, after all other callbacks. The benchmarks run after that."""
    task = write_task(tmp_path, "interrupted", f"raise {error}")
    saving = ModelCheckpoint(every_n_train_steps=1000, save_last=True)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            fit("run", LMEvaluation([task]), saving)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores Ctrl-C after the first one
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 5
    assert not (tmp_path / "run" / "lm_eval").exists()


def test_sigterm_during_the_evaluation(fit, task, tmp_path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGTERM); return {'acc': 1.0}"
    task_with_sigterm = write_task(tmp_path, "sigterm", code)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SIGTERMException):
        fit("run", GracefulStop(), LMEvaluation([task_with_sigterm], every_n_steps=2, step_limit=2))
    stopped = torch.load(tmp_path / "run" / "checkpoints" / "stopped.ckpt", weights_only=True)
    assert stopped["global_step"] == 2
    assert (tmp_path / "run" / "lm_eval" / "step_2" / "results.json").is_file()

    class AtTheEnd(Callback):
        def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
            self.handler = signal.getsignal(signal.SIGTERM)

    end = AtTheEnd()
    fit("other", GracefulStop(), end, LMEvaluation([task], limit=2))
    assert end.handler == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["arc_eazy"], "data_dir": "."}, "found 'arc_eazy'"),
        ({"data_dir": "/nowhere", "tasks": ["arc_easy"]}, "found no file arc/ARC-Easy/train.jsonl"),
        ({"limit": 0}, "limit: found 0"),
        ({"num_fewshot": -2}, "num_fewshot: found -2"),
        ({"step_limit": 0}, "LMEvaluation.step_limit: found 0"),
        ({"every_n_steps": 0}, "LMEvaluation.every_n_steps: found 0"),
        ({"batch_size": "many"}, "batch_size: found 'many'"),
        ({"prior_mode": 4}, "4"),
    ],
)
def test_settings_are_checked_before_training(settings, message, fit, task) -> None:
    losses = Losses()
    with pytest.raises(ConfigError, match=message):
        fit("run", losses, LMEvaluation(**({"tasks": [task]} | settings)))
    assert losses.values == []


def test_missing_data_is_reported_before_training(fit, tmp_path) -> None:
    task = write_task(tmp_path, "elsewhere")
    path = Path(task)
    path.write_text(path.read_text().replace("dataset_path: json", "dataset_path: missing/data"))
    early: list[str] = []

    class Start(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
            early.extend(str(warning.message) for warning in record)

    with pytest.warns(UserWarning, match="elsewhere.yaml (will have|has) no scores") as record:
        fit("run", Start(), LMEvaluation([task]))
    assert any("elsewhere.yaml will have no scores" in message for message in early)


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


def test_sharded_policy_is_not_evaluated(fit, task, tmp_path, monkeypatch) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, process_group_backend="gloo")
    try:
        with pytest.warns(UserWarning, match="lpc-lightning evaluate") as record:
            fit("run", LMEvaluation([task], every_n_steps=2), strategy=strategy, devices=1, enable_checkpointing=False)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    messages = [str(warning.message) for warning in record if "LMEvaluation" in str(warning.message)]
    assert len(messages) == 2
    assert "no benchmark was run" in messages[1]
    assert not (tmp_path / "run" / "lm_eval").exists()


def one_process_of_two(rank: int, folder: Path, task: str) -> None:
    """Run one process of DDP. The processes connect through a file, where Lightning would use a port."""
    os.environ["LOCAL_RANK"] = str(rank)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    data = SyntheticPreferences(train_pairs=8, validation_pairs=2, batch_size=2, cache_dir=str(folder / "cache"))
    module = DPO(policy=TinyPolicy(width=16, layers=1, heads=2), latent=gumbel(), optimizer=adam)
    trainer = Trainer(
        strategy="ddp",
        devices=2,
        accelerator="cpu",
        max_epochs=1,
        enable_progress_bar=False,
        log_every_n_steps=1,
        logger=CSVLogger(folder, name="", version="run"),
        callbacks=[LMEvaluation([task], every_n_steps=1, step_limit=3)],
    )
    trainer.fit(module, data)
    assert (trainer.global_rank, trainer.world_size) == (rank, 2)
    weights = {name: value.tolist() for name, value in module.policy.state_dict().items()}
    (folder / f"weights_{rank}.json").write_text(json.dumps(weights))
    torch.distributed.destroy_process_group()
    if rank == 0:
        alone = run_benchmarks(LatentLM(module.policy, module.tokenizer, inference_prior(module.latent)), [task])
        (folder / "alone.json").write_text(json.dumps([item["response"] for item in alone.items]))


@pytest.mark.slow
def test_two_processes_share_requests(task, tmp_path) -> None:
    processes = [
        ForkedProcess(one_process_of_two, rank, tmp_path, task, log=tmp_path / f"{rank}.log") for rank in range(2)
    ]
    try:
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
    outputs = [(process.output.read_text(), process.errors) for process in processes]
    assert codes == [0, 0], outputs
    (table, progress), (other_table, other_progress) = outputs
    assert table.count("| numbers ") == 1
    assert progress.count("Benchmark: numbers") == 3, "during training, at the end, and alone"
    assert "numbers" not in other_table + other_progress
    assert {path.name for path in (tmp_path / "run" / "lm_eval").iterdir()} == {"results.json", "items.jsonl", "step_1"}
    results = read_results(tmp_path / "run" / "lm_eval")
    assert [item["doc_id"] for item in results.items] == list(range(9))
    alone = torch.tensor(json.loads((tmp_path / "alone.json").read_text()))
    answers = torch.tensor([item["response"] for item in results.items])
    torch.testing.assert_close(answers, alone, rtol=0, atol=1e-4)
    weights = [(tmp_path / f"weights_{rank}.json").read_text() for rank in range(2)]
    assert weights[0] == weights[1]


def test_config_file() -> None:
    stated = yaml.safe_load((CONFIGS / "lm_eval.yaml").read_text())
    assert len(stated) == 1
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback", required=True)
    parsed = parser.parse_object({"callback": stated[-1]})
    assert set(stated[-1]["init_args"]) == set(parsed.callback.as_dict()["init_args"])
    built = parser.instantiate(parsed).callback
    assert isinstance(built, LMEvaluation)
    assert built.tasks == LMEvaluation().tasks

    class Parsed(PreferenceCLI):
        def _run_subcommand(self, subcommand: str) -> None:
            pass

    flags = ["--model=DPO", "--policy=TinyPolicy", "--data=SyntheticPreferences", "--trainer.accelerator=cpu"]
    cli = Parsed(["fit", *flags, f"--callbacks={CONFIGS / 'lm_eval.yaml'}", "--callbacks.limit=7"])
    (evaluation,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, LMEvaluation)]
    assert evaluation.limit == 7
