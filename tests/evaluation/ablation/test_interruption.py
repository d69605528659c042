"""Tests of interruptions: an ablation that is killed and run again has the same results, to the byte."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lpc_lightning.evaluation.ablation.cells.folder import CellFolder, Record
from lpc_lightning.evaluation.ablation.cells.process import FORKED, CellProcess, Job
from lpc_lightning.evaluation.ablation.command import main

pytestmark = pytest.mark.slow

Read = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def arguments(grid: Path) -> list[str]:
    """Arguments of `ablate` for two cells, one after the other."""
    return [str(grid), "noise=0.5", f"--output={grid.parent / 'out'}", "--threads=1"]


@pytest.fixture
def start(arguments: list[str]) -> Iterator[Callable[[], BaseProcess]]:
    """Function that starts the command in a new process, forked from a server because the imports take seconds.

    The command's own server is forked as well (tests/fixtures/fork_server.py).
    """
    started: list[BaseProcess] = []

    def begin() -> BaseProcess:
        process = FORKED.Process(target=main, args=(["ablate", *arguments],))
        process.start()
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.join()


def children(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except FileNotFoundError:
        return []


def cell_processes(process: int) -> list[int]:
    """Return the running cells of a command: the children of its fork server."""
    return [cell for server in children(process) for cell in children(server)]


def is_alive(process: int) -> bool:
    """Return True if a process runs. A zombie process has no command line."""
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(process: BaseProcess, happened: Callable[[], bool]) -> bool:
    """Wait until `happened` returns True. Return False if the process ends first."""
    deadline = time.monotonic() + 120
    while not happened():
        if not process.is_alive():
            return False
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return True


def end(process: BaseProcess) -> int | None:
    """Wait for the end of the command, and return its exit code."""
    process.join(timeout=300)
    return process.exitcode


def moments(seed: int) -> Iterator[float]:
    """Yield random times of a kill, in seconds after the start of a cell: before, during or after its fit."""
    chance = random.Random(seed)
    return iter([chance.uniform(0, 5) for _ in range(2)])


def expected(uninterrupted: Path, read_results: Read) -> dict[str, bytes]:
    return {name: content for name, content in read_results(uninterrupted).items() if "noise=0.5" in name}


def records(grid: Path) -> dict[Path, Any]:
    return {path.parent: json.loads(path.read_text()) for path in (grid.parent / "out").glob("cells/*/cell.json")}


def test_ablate_after_killed_command(
    start: Callable[[], BaseProcess], arguments: list[str], grid: Path, uninterrupted: Path, read_results: Read
) -> None:
    for seconds in moments(seed=0):
        process = start()
        if until(process, lambda process=process: bool(cell_processes(process.pid))):  # type: ignore[misc]
            time.sleep(seconds)
            cells = cell_processes(process.pid)
            process.kill()
            deadline = time.monotonic() + 10
            while any(map(is_alive, cells)):
                assert time.monotonic() < deadline, "a cell still runs after its command was killed"
                time.sleep(0.01)
    main(["ablate", *arguments])
    assert read_results(grid.parent / "out") == expected(uninterrupted, read_results)


def test_killed_command_ends_its_cells(start: Callable[[], BaseProcess], arguments: list[str], grid: Path) -> None:
    arguments[1:1] = ["trainer.max_steps=1000000", "trainer.max_epochs=-1"]
    arguments.append("--processes=2")
    process = start()
    assert until(process, lambda: len(list((grid.parent / "out").glob("cells/*/run/metrics.csv"))) == 2)
    cells = cell_processes(process.pid)  # type: ignore[arg-type]  # it has started
    assert len(cells) == 2
    process.kill()
    deadline = time.monotonic() + 5
    while (alive := [cell for cell in cells if is_alive(cell)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    for cell in alive:
        os.kill(cell, signal.SIGKILL)
    assert not alive


def test_ablate_after_killed_cell(
    start: Callable[[], BaseProcess], arguments: list[str], grid: Path, uninterrupted: Path, read_results: Read
) -> None:
    output = grid.parent / "out"
    process = start()
    # Wait for a checkpoint to resume from.
    assert until(process, lambda: bool(list(output.glob("cells/*/run/checkpoints/last.ckpt"))))
    (cell,) = cell_processes(process.pid)
    os.kill(cell, signal.SIGKILL)
    assert end(process) == 1
    (stopped,) = [folder for folder, record in records(grid).items() if record["status"] == "stopped"]
    assert records(grid)[stopped]["error"].endswith("killed by SIGKILL")
    assert len(read_results(output)) == 1  # that of the other cell
    main(["ablate", *arguments])
    record = records(grid)[stopped]
    assert (record["status"], record["attempts"], record["error"]) == ("finished", 2, None)
    assert "Restored all states from the checkpoint" in (stopped / "log.txt").read_text()
    assert read_results(output) == expected(uninterrupted, read_results)
    with (stopped / "run" / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == sorted(set(steps))
    # Lightning saves a step's checkpoint before it logs the step. A kill between the two loses this row.
    base = yaml.safe_load(grid.read_text())["base"]
    (every,) = [int(argument.split("=")[1]) for argument in base if "every_n_train_steps" in argument]
    lost = set(range(24)) - set(steps)
    assert len(lost) <= 1
    assert all((step + 1) % every == 0 for step in lost)


def test_cell_killed_after_fit_is_only_evaluated(uninterrupted: Path, tmp_path: Path, read_results: Read) -> None:
    output = shutil.copytree(uninterrupted, tmp_path / "out")
    cell = output / "cells" / "latent=gumbel,noise=0.5,seed=1"
    record = json.loads((cell / "cell.json").read_text())
    (cell / "results.json").unlink()
    (cell / "cell.json").write_text(json.dumps(record | {"status": "running"}))
    main(["ablate", str(uninterrupted.parent / "small.yaml"), f"--output={output}", "--threads=1"])
    assert read_results(output) == read_results(uninterrupted)
    assert (cell / "log.txt").read_text().count("attempt 2") == 1


def test_sigterm_writes_checkpoint(
    start: Callable[[], BaseProcess], arguments: list[str], grid: Path, uninterrupted: Path, read_results: Read
) -> None:
    process = start()
    # Wait until training has begun. Before that, there is nothing to save, and SIGTERM ends a cell at once.
    assert until(process, lambda: bool(list(grid.parent.glob("out/cells/*/run/checkpoints/last.ckpt"))))
    process.terminate()
    assert end(process) == 130
    ((cell, record),) = records(grid).items()
    assert (record["status"], record["error"]) in [("stopped", "stopped by SIGTERM"), ("finished", None)]
    assert record["status"] == "finished" or (cell / "run" / "checkpoints" / "stopped.ckpt").exists()
    main(["ablate", *arguments])
    assert read_results(grid.parent / "out") == expected(uninterrupted, read_results)


def test_two_commands_share_cells(
    start: Callable[[], BaseProcess], arguments: list[str], grid: Path, uninterrupted: Path, read_results: Read
) -> None:
    process = start()
    assert until(process, lambda: bool(cell_processes(process.pid)))  # type: ignore[arg-type]  # it has started
    codes: list[Any] = [0]
    try:
        main(["ablate", *arguments])
    except SystemExit as exit_info:
        codes = [exit_info.code]
    codes.append(end(process))
    # 1: it ended while the other command ran the last cell. The last one to end has found all cells finished.
    assert sorted(codes) in ([0, 0], [0, 1])
    assert read_results(grid.parent / "out") == expected(uninterrupted, read_results)
    assert all(record["attempts"] == 1 for record in records(grid).values())


def test_cell_that_ends_before_it_begins(grid: Path, tmp_path: Path) -> None:
    """Its results of earlier code are no results of this attempt, and stay."""
    folder = CellFolder(tmp_path / "cell")
    old = Record({"seed": 1}, 1, "earlier code", (), (), "last", status="finished")
    folder.path.mkdir()
    folder.write(old)
    job = Job(folder.path, replace(old, fingerprint="code", status="running"), "last", 1, tmp_path / "no such folder")
    record = CellProcess(job).outcome()
    assert record is not None
    assert (record.status, record.error) == ("stopped", "ended with exit code 1 before it began")
    assert folder.record() == old
