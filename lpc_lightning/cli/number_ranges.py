"""Check of the numbers of a run that Lightning takes, but cannot use."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from lpc_lightning.errors import ConfigError
from lpc_lightning.seeding import SEED_VARIABLE

LARGEST_SEED = 2**32 - 1
"""Largest seed of NumPy."""
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "accumulate_grad_batches": (lambda number: number >= 1, "an integer from 1 on"),
    "check_val_every_n_epoch": (lambda number: number >= 1, "an integer from 1 on, or null"),
    "val_check_interval": (
        lambda number: number > 0,
        "a share of an epoch above 0 and up to 1, a number of batches from 1 on, or a time. For no validation, set "
        "trainer.limit_val_batches to 0",
    ),
    "num_sanity_val_steps": (lambda number: number >= -1, "a number of batches from 0 on, or -1 for all"),
    "log_every_n_steps": (lambda number: number >= 0, "an integer from 0 on"),
    # A negative norm would turn the gradients round.
    "gradient_clip_val": (lambda number: number >= 0, "a number from 0 on, or null for no clipping"),
    "min_epochs": (lambda number: number >= 0, "an integer from 0 on, or null"),
    "min_steps": (lambda number: number >= 0, "an integer from 0 on, or null"),
}
"""Numbers that a setting of `trainer` may have, as a function and in words. Lightning refuses others by itself."""


def check_numbers(settings: Any) -> None:
    """Check the seed and the trainer's numbers.

    Args:
        settings: Settings of a run.

    Raises:
        ConfigError: A number is out of its range.
    """
    _check_seed(settings.seed_everything)
    for name, (is_usable, expected) in RANGES.items():
        found = settings.trainer[name]
        if isinstance(found, int | float) and not is_usable(found):
            raise ConfigError(f"trainer.{name}: found {found}, expected {expected}.")


def _check_seed(seed: bool | int) -> None:
    name, text = "seed_everything", str(seed)
    if seed is True:
        name, text = SEED_VARIABLE, os.environ.get(SEED_VARIABLE, "")
    if text.lstrip("+-").isdecimal() and not 0 <= int(text) <= LARGEST_SEED:
        raise ConfigError(f"{name}: found {text}, expected an integer from 0 to {LARGEST_SEED}.")
