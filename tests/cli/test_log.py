"""Tests of the warnings and the log of a command."""

from __future__ import annotations

import logging
import warnings

import pytest
from lightning.pytorch.utilities import rank_zero_only

import lpc_lightning  # noqa: F401 - the import itself is tested
from lpc_lightning.cli.log import set_up_logging


def test_command_shows_a_warning_once() -> None:
    """Python forgets which warnings it has shown when the filters change, as `catch_warnings` does."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        set_up_logging()
        for text in ("slow", "slow", "hot", "slow"):
            warnings.warn(text, UserWarning, stacklevel=1)
            with warnings.catch_warnings():
                warnings.simplefilter("default")
    assert [str(each.message) for each in found] == ["slow", "hot"]


@pytest.mark.parametrize(("rank", "level"), [(0, logging.WARNING), (1, logging.ERROR)])
def test_log_warnings_of_the_first_device(rank: int, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    monkeypatch.setattr(logging.root, "handlers", [])
    before = logging.root.level
    try:
        set_up_logging()
        assert logging.root.level == level
    finally:
        logging.root.setLevel(before)


def test_bitsandbytes_warning_is_suppressed(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", ImportError("kernels"))
    logger.warning("Something else: %s", "slow")
    assert caplog.messages == ["Something else: slow"]
