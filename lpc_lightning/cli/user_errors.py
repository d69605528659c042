"""Errors that a user can solve."""

from __future__ import annotations

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lpc_lightning.data import DataError
from lpc_lightning.distributed.checkpoint_io import CheckpointWriteError
from lpc_lightning.errors import CheckpointError, ConfigError, UnsupportedPolicyError

USER_ERRORS = (
    ConfigError,
    DataError,
    UnsupportedPolicyError,
    CheckpointError,
    CheckpointWriteError,
    FloatingPointError,
    MisconfigurationException,
)
"""Errors whose text explains what to do. They are printed without a traceback."""
