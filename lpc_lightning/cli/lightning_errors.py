"""Errors of Lightning on settings, which it raises after the start of a run and as any class."""

from __future__ import annotations

from lpc_lightning.errors import one_line

EXPLANATIONS = {
    "`val_check_interval`": "trainer.val_check_interval: {error}",
    "Found more than one stateful callback": "callbacks: {error}",
    "Early stopping conditioned on metric": "callbacks: {error}",
}
"""Line for each error, by the start of its text."""


def explain_lightning_error(error: BaseException) -> str | None:
    """Return one line with the setting and what to do. None if the error is another one."""
    text = one_line(error)
    line = next((line for start, line in EXPLANATIONS.items() if text.startswith(start)), None)
    return None if line is None else line.format(error=text)
