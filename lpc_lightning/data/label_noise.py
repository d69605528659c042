"""Label noise: which training labels are wrong, and how the data module applies it."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lpc_lightning.data.sources.example_source import ExampleSource
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.types import PreferenceExample


class LabelNoise(ABC):
    """Choice of the training pairs that get the wrong label. See `PreferenceDataModule.set_label_noise`."""

    @abstractmethod
    def key(self) -> str:
        """Return all that decides which labels are wrong, in one line for errors and cache keys."""

    @abstractmethod
    def flips(self, examples: Sequence[PreferenceExample]) -> np.ndarray:
        """Choose the examples that get the wrong label.

        Args:
            examples: All training examples, as text, before any is left out for its length.

        Returns:
            (examples,) bool.
        """

    @property
    @abstractmethod
    def marks_prompts(self) -> bool:
        """True if the prompts of flipped pairs carry a marker. Tokens and reference values then differ."""

    @abstractmethod
    def marked(self, example: PreferenceExample) -> PreferenceExample:
        """Return a flipped example with the marker in its prompt."""


@dataclass(frozen=True)
class MarkedSource:
    """Examples of which some are flipped and marked in their prompts (an `ExampleSource`)."""

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
