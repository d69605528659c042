"""Errors of a full disk, missing permission, too little memory and too many open files end in one line."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from lpc_lightning.cli.commands import COMMANDS, Command
from lpc_lightning.cli.system_errors import FILES, MEMORY, PERMISSION, PLACE, SPACE, THREADS, explain_system_error
from tests.fixtures.commands import run_command


def raised(action: Callable[[], object]) -> BaseException:
    try:
        action()
    except BaseException as error:
        return error
    raise AssertionError("found no error")


def write_bytes() -> None:
    with Path("/dev/full").open("wb", buffering=0) as file:
        file.write(b"x")


def write_table() -> None:
    path = Path("/dev/full")
    with pa.OSFile(str(path), "wb") as file:
        file.write(b"x")


@pytest.mark.parametrize("write", [write_bytes, write_table, lambda: Path("/dev/full").write_text("x")])
def test_full_disk_names_file_and_remedy(write: Callable[[], object]) -> None:
    assert explain_system_error(raised(write)) == f"/dev/full: No space left on device. {SPACE}"


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EROFS, PERMISSION),
        (errno.EACCES, PERMISSION),
        (errno.EDQUOT, SPACE),
        (errno.ENOTDIR, PLACE),
        (errno.EMFILE, FILES),
    ],
)
def test_system_error_has_file_and_remedy(number: int, advice: str) -> None:
    text = os.strerror(number)
    assert explain_system_error(OSError(number, text, "some/file")) == f"some/file: {text}. {advice}"
    # A data loader raises the error of its process with the traceback as text, and without a number.
    from_worker = type(OSError(number, text))(
        f"Caught OSError in DataLoader worker process 0.\n[Errno {number}] {text}"
    )
    assert advice in (explain_system_error(from_worker) or "")


@pytest.mark.parametrize(
    "allocate",
    [lambda: torch.empty(2**55), lambda: np.ones(2**55), lambda: bytearray(2**60)],
    ids=["torch", "numpy", "python"],
)
def test_too_little_memory_is_recognized(allocate: Callable[[], object]) -> None:
    line = explain_system_error(raised(allocate))
    assert line is not None
    assert line.endswith(MEMORY)
    assert "\n" not in line


def test_safetensors_and_threads_are_recognized(tmp_path: Path) -> None:
    error = raised(lambda: save_file({"x": torch.ones(1)}, "/proc/no/such"))
    assert explain_system_error(error) is None  # a path that does not exist is not in the table
    assert (explain_system_error(RuntimeError("can't start new thread")) or "").endswith(THREADS)


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), OSError("x"), FileNotFoundError(2, "no", "x")])
def test_other_errors_are_not_explained(error: Exception) -> None:
    assert explain_system_error(error) is None


@pytest.fixture
def lowered(request: pytest.FixtureRequest) -> object:
    """Set a limit of this process for the test."""
    kind, value = request.param
    limits = resource.getrlimit(kind)

    def lower() -> None:
        free = os.dup(0)
        os.close(free)  # the lowest free descriptor
        resource.setrlimit(kind, (free if value is None else value, limits[1]))

    yield lower
    resource.setrlimit(kind, limits)


@pytest.mark.parametrize(
    "lowered", [(resource.RLIMIT_FSIZE, 1000), (resource.RLIMIT_NOFILE, None)], ids=["space", "files"], indirect=True
)
@pytest.mark.parametrize("arguments", ["configs --output {}", "prepare --pairs {}/pairs.jsonl", "report {} --out {}/r"])
def test_command_under_limits_ends_in_one_line(
    arguments: str, lowered: Callable[[], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "version_0"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("seed_everything: 1\n")
    (run / "metrics.csv").write_text("step,val/rewards/accuracies\n1,0.5\n")
    words = arguments.format(tmp_path / "runs", tmp_path).split()
    lowered()
    outcome = run_command(capsys, *words)
    assert outcome.code == 1
    assert len(outcome.err.splitlines()) == 1
    assert outcome.errors[0].endswith((SPACE, FILES))
    assert str(tmp_path) in outcome.errors[0] or outcome.errors[0].endswith(FILES)


def test_interrupted_command_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "interrupt", Command(interrupt, "a command that is stopped by Ctrl-C"))
    assert run_command(capsys, "interrupt") == (130, "", "Stopped.\n")
