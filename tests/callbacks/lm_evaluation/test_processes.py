"""Tests of LMEvaluation with two processes, and with a sharded policy."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy

from lpc_lightning.algorithms import DPO
from lpc_lightning.callbacks import LMEvaluation
from lpc_lightning.data import SyntheticPreferences
from lpc_lightning.evaluation.benchmarks.latent_lm import LatentLM
from lpc_lightning.evaluation.benchmarks.results import read_results
from lpc_lightning.evaluation.benchmarks.runner import run_benchmarks
from lpc_lightning.inference.opening import inference_prior
from lpc_lightning.policy import TinyPolicy
from tests.callbacks.lm_evaluation.conftest import adam, gumbel
from tests.fixtures.processes import ForkedProcess


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
