"""The seam for label noise: what says which training labels are wrong, and how the data takes it up."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lpc_lightning.data.sources.example_source import ExampleSource
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.errors import ConfigError
from lpc_lightning.types import PreferenceExample


class LabelNoise(ABC):
    """Says which training pairs get the wrong label. The data module takes the one among the trainer's callbacks."""

    @abstractmethod
    def key(self) -> str:
        """All that decides which labels are wrong, in one line: errors and cache entries tell it."""

    @abstractmethod
    def flips(self, examples: Sequence[PreferenceExample]) -> np.ndarray:
        """Which examples get the wrong label.

        Args:
            examples: All training examples, as text, before any is left out for its length.

        Returns:
            (examples,) bool.
        """

    @property
    @abstractmethod
    def marks_prompts(self) -> bool:
        """Whether the prompts of flipped pairs tell that they are: other tokens, and other values of the reference."""

    @abstractmethod
    def marked(self, example: PreferenceExample) -> PreferenceExample:
        """A flipped example, its prompt telling so."""


@dataclass(frozen=True)
class MarkedSource:
    """Examples of which some are flipped and say so in their prompts (an `ExampleSource`).

    Where nothing is marked, tokens and reference stay those of the clean pairs, and labels change behind them.
    """

    source: ExampleSource
    """The clean examples."""
    noise: LabelNoise
    """What flips and marks them."""

    def key(self) -> str:
        """See `ExampleSource.key`."""
        return json.dumps([self.source.key(), self.noise.key()])

    def read(self, report: DataReport) -> Iterator[PreferenceExample]:
        """See `ExampleSource.read`."""
        examples = list(self.source.read(report))
        for example, flip in zip(examples, self.noise.flips(examples), strict=True):
            yield self.noise.marked(example.swapped()) if flip else example


def noise_among(callbacks: Sequence[object]) -> LabelNoise | None:
    """The label noise among a trainer's callbacks.

    Raises:
        ConfigError: There is more than one.
    """
    found = [each for each in callbacks if isinstance(each, LabelNoise)]
    if len(found) > 1:
        told = "; ".join(each.key() for each in found)
        raise ConfigError(f"callbacks: found {len(found)} kinds of label noise ({told}), expected one at most.")
    return found[0] if found else None
