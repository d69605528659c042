"""Tests that a run that is stopped several times, by SIGTERM and SIGKILL, ends like an uninterrupted run.

Each setting has a few chains. With `LPC_STOP_CHAINS=all` (`make test-resume`), every chain of up to three stops is
tested, at every step. With a number (`make test-resume CHAINS=20`), so many of them are drawn.
"""

from __future__ import annotations

import csv
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lpc_lightning.evaluation.ablation.cells.process import FORKED
from tests.callbacks.stopped_run import SIGTERM_EXIT_CODE, STEPS, Stop, run_in_child

pytestmark = pytest.mark.slow

TERM, KILL = signal.SIGTERM, signal.SIGKILL
NUMBER = os.environ.get("LPC_STOP_CHAINS", "")
ALL = NUMBER == "all"
# Epochs end after steps 4, 8 and 12. Validations follow steps 2, 4, 6 ...; with an interval of 3 micro-batches, every
# other one is within a step, and none is at the end of an epoch.
SETTINGS: dict[str, dict[str, Any]] = {
    "epochs": {},
    "steps": {"max_epochs": -1, "max_steps": STEPS},
    "within steps": {"val_check_interval": 3},
}
CHAINS: dict[str, list[list[Stop]]] = {
    "epochs": [
        [Stop(4, TERM), Stop(6, TERM)],
        [Stop(1, KILL), Stop(3, TERM), Stop(5, KILL)],
        [Stop(7, TERM), Stop(8, KILL), Stop(12, TERM)],
    ],
    "steps": [[Stop(4, TERM), Stop(9, KILL), Stop(12, TERM)]],
    "within steps": [[Stop(5, KILL), Stop(8, TERM), Stop(9, TERM)]],
}


def cases() -> Iterator[tuple[str, list[Stop]]]:
    """Yield settings with chains: every first stop, drawn chains, or those of `CHAINS`."""
    if NUMBER.isdecimal():
        generator = random.Random(os.environ.get("LPC_STOP_SEED", "0"))
        for _ in range(int(NUMBER)):
            steps = sorted(generator.sample(range(1, STEPS + 1), generator.randint(1, 3)))
            stops = [Stop(step, generator.choice((TERM, KILL))) for step in steps]
            yield generator.choice(list(SETTINGS)), stops
        return
    for name in SETTINGS:
        first = [[Stop(step, kind)] for step in range(1, STEPS + 1) for kind in (TERM, KILL)]
        yield from ((name, chain) for chain in (first if ALL else CHAINS[name]))


def run(folder: Path, cache: Path, setting: str, stop: Stop | None) -> None:
    """Start or resume the run in a new process, and check how it ends."""
    process = FORKED.Process(target=run_in_child, args=(folder, cache, stop, SETTINGS[setting]))
    process.start()
    process.join()
    log = (folder.parent / f"{folder.name}.log").read_text()
    if stop is None or (stop.step == STEPS and stop.signal == TERM):
        assert process.exitcode == 0, log
    else:
        assert process.exitcode == (SIGTERM_EXIT_CODE if stop.signal == TERM else -KILL), log


def outcome(folder: Path) -> dict[str, Any]:
    """Return what a finished run has left, without the paths of its folder."""
    files = {name: folder / "run" / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")}
    return {name: without(torch.load(path, weights_only=True), str(folder)) for name, path in files.items()}


def without(value: Any, text: str) -> Any:
    if isinstance(value, str):
        return value.replace(text, "")
    if isinstance(value, dict):
        return {without(key, text): without(item, text) for key, item in value.items()}
    return [without(item, text) for item in value] if isinstance(value, list | tuple) else value


def differences(one: Any, other: Any, place: str = "") -> Iterator[str]:
    """Yield the places where two nested values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            if key in one and key in other:
                yield from differences(one[key], other[key], f"{place}/{key}")
            else:
                yield f"{place}/{key}: only in one"
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{place}/{index}")
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if not torch.equal(one, other):
            yield place
    elif one != other:
        yield f"{place}: {one} != {other}"


def assert_equal(folder: Path, expected: Path, chain: list[Stop]) -> None:
    assert list(differences(outcome(folder), outcome(expected))) == [], chain
    metrics, before = ((path / "run" / "metrics.csv").read_bytes() for path in (folder, expected))
    assert metrics == before, chain


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Function that returns the folder of an uninterrupted run, and the folder of caches beside it."""
    made: dict[str, Path] = {}

    def whole(setting: str) -> Path:
        if setting not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            run(folder, folder.parent, setting, None)
            made[setting] = folder
        return made[setting]

    return whole


@pytest.mark.parametrize(("setting", "chain"), list(cases()))
def test_stopped_run_equals_uninterrupted(
    setting: str, chain: list[Stop], uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    expected, folder = uninterrupted(setting), tmp_path / "run"
    cache = expected.parent
    for stop in chain:
        run(folder, cache, setting, stop)
    chains = [chain]
    while chains:
        before = chains.pop()
        stopped = tmp_path / "-".join(f"{step}.{kind}" for step, kind in before)
        if folder.exists():
            folder.rename(stopped)
        shutil.copytree(stopped, folder)
        run(folder, cache, setting, None)
        assert_equal(folder, expected, before)
        shutil.rmtree(folder)
        if ALL and len(before) < 3:
            for step in range(before[-1].step + 1, STEPS + 1):
                for kind in (TERM, KILL):
                    longer = [*before, Stop(step, kind)]
                    shutil.copytree(stopped, folder)
                    run(folder, cache, setting, longer[-1])
                    folder.rename(tmp_path / "-".join(f"{step}.{kind}" for step, kind in longer))
                    chains.append(longer)
        shutil.rmtree(stopped)


def test_stopped_run_logs_its_last_step(tmp_path: Path) -> None:
    """A signal after a resume in mid-epoch is handled like any other."""
    folder = tmp_path / "run"
    for step in (1, 3):
        run(folder, tmp_path, "epochs", Stop(step, TERM))
        stopped = torch.load(folder / "run" / "checkpoints" / "stopped.ckpt", weights_only=True)
        assert stopped["global_step"] == step
        with (folder / "run" / "metrics.csv").open() as file:
            steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
        assert steps[-1] == step - 1
