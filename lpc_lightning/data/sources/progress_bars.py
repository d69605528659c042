"""Progress bars of `datasets`, which it shows for each split and each step of its preparation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hidden_progress_bars() -> Iterator[None]:
    """Hide the progress bars of `datasets`. Reading local files takes almost no time."""
    import datasets

    were_hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_hidden:
            datasets.enable_progress_bars()
