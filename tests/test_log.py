"""Tests that importing the package prints nothing."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

import lpc_lightning  # noqa: F401 - the import itself is tested


@pytest.mark.slow
def test_import_of_commands_prints_nothing() -> None:
    """With bitsandbytes, on a processor with AVX512-BF16, the import would warn of a missing kernel."""
    done = subprocess.run(
        [sys.executable, "-c", "import lpc_lightning.__main__"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_bitsandbytes_warning_is_suppressed(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", ImportError("kernels"))
    logger.warning("Something else: %s", "slow")
    assert caplog.messages == ["Something else: slow"]
