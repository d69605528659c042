"""Labelled pairs under a frozen policy, as arrays on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class Pairs:
    """N pairs. Sides are in the order chosen, rejected."""

    part: NDArray[np.str_]
    """(N,) `train` or `test`."""
    prompt: NDArray[np.str_]
    """(N,) the prompt. No prompt is in both parts."""
    annotator: NDArray[np.str_]
    """(N,) the annotator, "" if unknown."""
    factor: NDArray[np.str_]
    """(N,) the reader or group whose wish decided the label, for inspection."""
    answers: NDArray[np.str_]
    """(N, 2) hashes of the answers' tokens."""
    gradient: Floats
    """(N, d) gradient of log pi(y_w|x, z) - log pi(y_l|x, z) with respect to z, at the head."""
    last: Floats
    """(N, 2, d) last hidden states of the last answer tokens: the posterior's input."""
    mean: dict[int, Floats]
    """(N, 2, d) mean states of the answers, by layer."""
    prompt_state: dict[int, Floats]
    """(N, d) states of the last prompt token, by layer."""

    def __len__(self) -> int:
        return len(self.part)

    def mean_difference(self, layer: int) -> Floats:
        """Return (N, d) the chosen answer's mean state minus that of the rejected one."""
        states: Floats = self.mean[layer][:, 0] - self.mean[layer][:, 1]
        return states

    def arrays(self) -> dict[str, NDArray]:
        """Return all arrays by name. Layers are numbers at the end of a name."""
        names = ("part", "prompt", "annotator", "factor", "answers", "gradient", "last")
        named = {name: getattr(self, name) for name in names}
        for name in ("mean", "prompt_state"):
            named |= {f"{name}.{layer}": values for layer, values in getattr(self, name).items()}
        return named

    def save(self, path: Path) -> None:
        """Write the pairs to an npz file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            np.savez(file, **self.arrays())  # type: ignore[arg-type]  # none is named allow_pickle

    @classmethod
    def from_arrays(cls, named: dict[str, NDArray]) -> Pairs:
        """Restore pairs from the arrays of `arrays`."""
        layers: dict[str, dict[int, NDArray]] = {"mean": {}, "prompt_state": {}}
        plain: dict[str, NDArray] = {}
        for name, values in named.items():
            kind, _, layer = name.partition(".")
            if layer:
                layers[kind][int(layer)] = values
            else:
                plain[kind] = values
        return cls(**plain, mean=layers["mean"], prompt_state=layers["prompt_state"])

    @classmethod
    def load(cls, path: Path) -> Pairs:
        """Read an npz file.

        Raises:
            SystemExit: There is no such file.
        """
        if not path.exists():
            raise SystemExit(f"{path}: found no file, expected the output of the command extract. Run it first.")
        with np.load(path, allow_pickle=False) as stored:
            return cls.from_arrays(dict(stored))

    @classmethod
    def concatenate(cls, tables: Sequence[Pairs]) -> Pairs:
        """Join pairs of several tables with the same layers."""
        arrays = [table.arrays() for table in tables]
        return cls.from_arrays({name: np.concatenate([table[name] for table in arrays]) for name in arrays[0]})

    def at(self, indices: NDArray) -> Pairs:
        """Return the pairs at indices (or where a mask is True)."""
        return self.from_arrays({name: values[indices] for name, values in self.arrays().items()})
