"""Tests of the reference's cache with several processes: devices of a run, concurrent runs, and a killed run."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lpc_lightning.reference import pair_pass
from tests.fixtures.processes import ForkedProcess, forked_ranks

pytestmark = pytest.mark.distributed

PROGRAM = Path(__file__).with_name("reference_processes.py")
TRAIN, VALIDATION = 22, 5


@pytest.fixture(scope="module")
def fit() -> Iterator[Callable[..., dict[str, Any]]]:
    """Return a function that runs in this process."""
    spec = importlib.util.spec_from_file_location("reference_processes", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as sizes:
        for name in ("BATCH_TOKENS", "ROUNDS"):  # the program sets its own values
            sizes.setattr(pair_pass, name, getattr(pair_pass, name))
        spec.loader.exec_module(program)
        yield program.fit


@pytest.fixture(scope="module")
def alone(fit: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Result of a run on one device with an empty cache."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PL_GLOBAL_SEED", "0")
        return fit(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """Results of both devices, and the folder of their caches."""
    folder = tmp_path_factory.mktemp("together")
    for process in forked_ranks(run_program, "two_devices", folder, folder=folder):
        assert process.wait(timeout=300) == 0, process.errors[-3000:]
    return [torch.load(folder / f"rank {rank}.pt", weights_only=True) for rank in range(2)], folder


def values_in(root: Path) -> dict[str, dict[int, list[list[float]]]]:
    """Return all values in the parts, by entry and index."""
    values: dict[str, dict[int, list[list[float]]]] = {}
    for path in sorted((root / "reference").glob("*/*.npz")):
        with np.load(path) as part:
            for index, logps in zip(part["indices"].tolist(), part["values"].tolist(), strict=True):
                values.setdefault(path.parent.name, {}).setdefault(index, []).append(logps)
    return values


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_devices_compute_the_same_values(
    strategy: str, together: tuple[list[dict[str, Any]], Path], alone: dict[str, Any]
) -> None:
    ranks, folder = together
    for rank in ranks:
        values = rank[f"{strategy} cached"]
        for ours, theirs in zip(values["logps"], alone["logps"], strict=True):
            assert np.allclose(ours, theirs, rtol=1e-6, atol=0)
        assert values["logps"] == rank[f"{strategy} again"]["logps"]
        assert values["losses"] == rank[f"{strategy} again"]["losses"]
    assert ranks[0][f"{strategy} cached"]["logps"] == ranks[1][f"{strategy} cached"]["logps"]
    assert ranks[0][f"{strategy} again"]["passes"] == ranks[1][f"{strategy} again"]["passes"] == 0
    stored = values_in(folder / f"{strategy} kept")
    assert sorted(map(len, stored.values())) == [VALIDATION, TRAIN]
    assert all(len(values) == 1 for entry in stored.values() for values in entry.values()), (
        "every pair is computed once"
    )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_devices_run_equally_many_batches(
    strategy: str, together: tuple[list[dict[str, Any]], Path], alone: dict[str, Any]
) -> None:
    """FSDP2 gathers weights for every batch. With one batch less on a device, the others would wait."""
    first, second = (rank[f"{strategy} cached"]["passes"] for rank in together[0])
    assert first == second > alone["passes"] / 2, "with an odd number, one device repeats the last batch"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_devices_train_as_with_live_reference(
    strategy: str, together: tuple[list[dict[str, Any]], Path], alone: dict[str, Any]
) -> None:
    ranks, _ = together
    for rank in ranks:
        live, cached = rank[f"{strategy} live"], rank[f"{strategy} cached"]
        assert len(cached["losses"]) == 6
        assert cached["losses"] == pytest.approx(live["losses"], rel=1e-5)
        assert cached["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert cached["validation"] == pytest.approx(live["validation"], rel=1e-5)
        assert live["held"] == pytest.approx(2 * cached["held"], rel=0.01)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_later_weights_replace_gathered_ones(strategy: str, together: tuple[list[dict[str, Any]], Path]) -> None:
    """Weights that FSDP2 gathers for a step without gradient must not be used after they change."""
    for rank in together[0]:
        cached, live, plain = (rank[f"{strategy} {run}"] for run in ("moved", "moved live", "cached"))
        assert cached["losses"] == pytest.approx(live["losses"], rel=1e-5)
        assert np.allclose(cached["logps"][0], plain["logps"][0], rtol=1e-6, atol=0)
        assert abs(cached["losses"][0] - plain["losses"][0]) > 1e-3


def test_two_devices_resume_without_cache(together: tuple[list[dict[str, Any]], Path]) -> None:
    """The values are computed with the published weights, before the checkpoint is loaded."""
    for rank in together[0]:
        whole, resumed = rank["ddp cached"], rank["ddp resumed"]
        assert abs(whole["losses"][-1] - whole["losses"][0]) > 1e-3
        assert resumed["logps"] == whole["logps"]
        assert resumed["losses"] == whole["losses"][3:]
        assert resumed["validation"] == whole["validation"]


def run_program(function: str, folder: Path) -> None:
    """Run a function of the program, in a process of its own: the program changes settings of its process."""
    from tests.reference import reference_processes

    getattr(reference_processes, function)(folder)


def test_two_concurrent_runs_share_values(
    fit: Callable[..., dict[str, Any]], alone: dict[str, Any], tmp_path: Path
) -> None:
    runs = [ForkedProcess(run_program, "fit", tmp_path, log=tmp_path / f"{number}.log") for number in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    stored = values_in(tmp_path)
    assert sorted(map(len, stored.values())) == [VALIDATION, TRAIN]
    assert not list((tmp_path / "reference").glob("*/*.unfinished"))
    later = fit(tmp_path)
    assert later["losses"] == pytest.approx(alone["losses"], rel=1e-6)


def test_killed_run_leaves_valid_values(
    fit: Callable[..., dict[str, Any]], alone: dict[str, Any], tmp_path: Path
) -> None:
    run = ForkedProcess(run_program, "fit_slowly", tmp_path, log=tmp_path / "log")
    while len(list((tmp_path / "reference").glob("*/*.npz"))) < 3:
        assert run.is_running, run.errors
        time.sleep(0.02)
    run.kill()
    (before,) = values_in(tmp_path).values()
    assert 3 <= len(before) < TRAIN, "the run was killed before its end"

    later = fit(tmp_path)
    assert later["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    for ours, theirs in zip(later["logps"], alone["logps"], strict=True):
        assert np.allclose(ours, theirs, rtol=1e-6, atol=0)
    after = max(values_in(tmp_path).values(), key=len)
    assert all(after[index] == values for index, values in before.items()), "no value was computed twice"
    assert len(after) == TRAIN
