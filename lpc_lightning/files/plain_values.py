"""NumPy's numbers and paths as values of Python, which checkpoints and JSON can hold."""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """Convert NumPy's numbers and paths to Python's, in dictionaries, lists and tuples too.

    `torch.load` refuses a file with them, so that a checkpoint of a run with `latent_lr=np.float64(1e-3)` could not be
    opened, and JSON cannot hold them. Other values are returned unchanged.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value) in (dict, OrderedDict):
        return {plain(name): plain(each) for name, each in value.items()}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value
