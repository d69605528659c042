"""Fixtures: `lpc-lightning` in this process, with a folder for its runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.commands import ALL, Command, Outcome, places_in, run_command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `lpc-lightning` in this process. An exception that gets out of it would be a traceback."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr("sys.argv", ["lpc-lightning", *arguments])
        return run_command(capsys, *arguments)

    return run


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    return places_in(tmp_path)


@pytest.fixture
def fit(command: Command, places: list[str]) -> Command:
    """`lpc-lightning fit` of something tiny, with more flags."""
    return lambda *flags: command("fit", *ALL, *places, *flags)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"
