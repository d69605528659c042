"""What importing the package prints: nothing."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

import lpc_lightning  # noqa: F401 - what importing it does is tested


def test_import_of_commands_prints_nothing() -> None:
    """On a processor with AVX512-BF16 and with bitsandbytes, that would warn of a kernel."""
    done = subprocess.run(
        [sys.executable, "-c", "import lpc_lightning.cli"], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_bitsandbytes_warning_is_suppressed(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please", ImportError("kernels"))
    logger.warning("Something else: %s", "slow")
    assert caplog.messages == ["Something else: slow"]
