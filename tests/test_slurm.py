"""Test of configs/slurm/fit.sbatch with two programs in place of Slurm: `srun` starts two tasks, `scontrol` logs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Listener
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lpc_lightning.cli import main
from lpc_lightning.distributed.sharded_checkpoint import is_sharded, read_outline, read_sharded
from lpc_lightning.evaluation.comparison.command import evaluate
from tests.fixtures.processes import ForkedProcess

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[1]
SRUN = """#!{python}
import os, sys
from multiprocessing.connection import Client

with Client("{folder}/slurmd") as daemon:
    daemon.send((sys.argv[1:], dict(os.environ), os.getpid()))
    sys.exit(daemon.recv())
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> {folder}/scontrol
"""
FLAGS = [
    "--policy=TinyPolicy --policy.width=16 --policy.layers=1 --policy.heads=2",
    "--data=SyntheticPreferences --data.train_pairs=40 --data.validation_pairs=4 --data.batch_size=1",
    "--model=DPO --latent=GumbelSpace --latent.num_codes=4",
    "--trainer.accelerator=cpu --trainer.devices=2 --trainer.strategy=fsdp2",
    "--trainer.precision=32-true --trainer.accumulate_grad_batches=2 --trainer.enable_progress_bar=false",
    "--callbacks+=lpc_lightning.callbacks.GracefulStop",
    "--callbacks+=lightning.pytorch.callbacks.ModelCheckpoint --callbacks.every_n_train_steps=2",
]


def run_steps(folder: Path) -> None:
    """Start the tasks of each `srun`, like Slurm's daemon. They are forks: the imports take seconds."""
    with Listener(str(folder / "slurmd")) as steps:
        while True:
            with steps.accept() as step:
                step.send(run_tasks(folder, *step.recv()))


def run_tasks(folder: Path, arguments: list[str], environment: dict[str, str], srun: int) -> int:
    """Run two tasks of `lpc-lightning` with the folder and the output of `srun`. Return the larger exit code."""
    tasks = []
    for rank in range(2):
        task = os.fork()
        if not task:
            os.chdir(f"/proc/{srun}/cwd")
            for stream in (sys.stdout, sys.stderr):
                output = os.open(f"/proc/{srun}/fd/{stream.fileno()}", os.O_WRONLY | os.O_APPEND)
                os.dup2(output, stream.fileno())
            os.environ.clear()
            os.environ.update(environment, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_NODEID="0")
            sys.argv[:] = arguments
            main()
            sys.exit()
        tasks.append(task)
    (folder / "tasks").write_text(" ".join(map(str, tasks)))
    return max(os.waitstatus_to_exitcode(os.waitpid(task, 0)[1]) for task in tasks)


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Command of a job with the environment of two tasks on one node. Start it in `tmp_path`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        program = programs / name
        program.write_text(text.format(python=sys.executable, folder=tmp_path))
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tasks = {"NTASKS": "2", "NTASKS_PER_NODE": "2", "NNODES": "1", "NODELIST": "localhost", "JOB_ID": str(os.getpid())}
    for name, value in (tasks | {"JOB_NAME": "lpc"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    flags = " ".join(FLAGS).split()
    daemon = ForkedProcess(run_steps, tmp_path, log=tmp_path / "daemon")
    while not (tmp_path / "slurmd").exists():
        assert daemon.is_running, daemon.errors
        time.sleep(0.01)
    yield ["bash", str(ROOT / "configs/slurm/fit.sbatch"), *flags, f"--data.cache_dir={tmp_path / 'cache'}"]
    daemon.kill()


def test_job_is_requeued_resumed_and_exported(sbatch: list[str], tmp_path: Path) -> None:
    runs = tmp_path / "runs" / f"slurm-{os.getpid()}"
    length = ["--trainer.max_epochs=50"]
    with (tmp_path / "out").open("w") as out:
        job = subprocess.Popen([*sbatch, *length], cwd=tmp_path, stdout=out, stderr=out)
        deadline = time.monotonic() + 120
        while not list(runs.glob("version_*/checkpoints/epoch*.ckpt")):
            assert job.poll() is None, (tmp_path / "out").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        # Slurm signals all tasks. A signal to one task tests that they agree on the step to stop at.
        os.kill(int((tmp_path / "tasks").read_text().split()[1]), signal.SIGTERM)
        assert job.wait(timeout=60) == 143, (tmp_path / "out").read_text()[-3000:]
    assert (tmp_path / "scontrol").read_text() == f"requeue {os.getpid()}\n"
    (stopped,) = runs.glob("version_*/checkpoints/stopped.ckpt")
    assert is_sharded(stopped)
    step = read_outline(stopped)["global_step"]
    assert step > 0

    again = subprocess.run(
        [*sbatch, f"--trainer.max_steps={step + 3}"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"as in {stopped.relative_to(tmp_path)}" in again.stdout
    assert f"`Trainer.fit` stopped: `max_steps={step + 3}` reached." in again.stderr
    assert len((tmp_path / "scontrol").read_text().splitlines()) == 1

    assert_commands_open_it(stopped, tmp_path)


def assert_commands_open_it(stopped: Path, tmp_path: Path) -> None:
    """Check that one process can export, generate from and score the sharded checkpoint of two processes."""
    folder = tmp_path / "exported"
    main(["export", "--checkpoint", str(stopped), "--output", str(folder)])
    weights = read_sharded(stopped)["state_dict"]
    exported = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert exported
    assert all(torch.equal(value, weights[f"policy.model.{name}"]) for name, value in exported.items())
    latent = load_file(folder / "latent.safetensors")
    assert torch.equal(latent["codebook"], weights["latent.codebook.weight"])

    answers = []
    for model in (stopped, folder):
        output = tmp_path / "answers.json"
        options = [
            "--prompt",
            "How do I boil an egg?",
            "--codes",
            "1",
            "--max_new_tokens",
            "8",
            "--output",
            str(output),
        ]
        main(["generate", "--model", str(model), *options])
        answers.append([json.loads(line) | {"model": ""} for line in output.read_text().splitlines()])
    assert answers[0] == answers[1]
    assert answers[0]

    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Say {word}.", "chosen": "Yes.", "rejected": "No."} for word in ("one", "two", "three")]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    results = tmp_path / "results"
    evaluate([str(stopped)], tasks=["none"], preferences=[str(pairs)], output=str(results), names=["sharded"])
    assert json.loads((results / "sharded" / "results.json").read_text())
