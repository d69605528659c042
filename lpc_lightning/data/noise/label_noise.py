"""Label noise: the choice of wrong training labels, and marked prompts."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lpc_lightning.data.sources.example_source import ExampleSource
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.types import PreferenceExample


class LabelNoise(ABC):
    """Choice of the training pairs that get the wrong label. See `PreferenceDataModule.set_label_noise`."""

    @abstractmethod
    def key(self) -> str:
        """Return everything that determines the wrong labels, in one line, for errors and cache keys."""

    @abstractmethod
    def flips(self, examples: Sequence[PreferenceExample]) -> np.ndarray:
        """Choose the examples that get the wrong label.

        Args:
            examples: All training examples, as text, before the length policy drops any.

        Returns:
            (examples,) bool, True if the label is wrong.
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
    """Source of examples, some of which are flipped and have a marker in their prompts (an `ExampleSource`)."""

    source: ExampleSource
    """The clean examples."""
    noise: LabelNoise
    """Noise that chooses, flips and marks examples."""

    def key(self) -> str:
        """See `ExampleSource.key`. It has a digest of the flipped pairs, which an edit of the noise's code changes."""
        digest = hashlib.sha256()
        for index, (example, flip) in enumerate(self._examples(DataReport())):
            if flip:
                texts = [example.prompt, example.question, example.chosen, example.rejected]
                digest.update(json.dumps([index, example.flipped, texts]).encode())
        return json.dumps([self.source.key(), self.noise.key(), digest.hexdigest()])

    def read(self, report: DataReport) -> Iterator[PreferenceExample]:
        """See `ExampleSource.read`."""
        return (example for example, _ in self._examples(report))

    def _examples(self, report: DataReport) -> Iterator[tuple[PreferenceExample, bool]]:
        """Yield the examples, each with True if it is flipped."""
        examples = list(self.source.read(report))
        for example, flip in zip(examples, self.noise.flips(examples).tolist(), strict=True):
            if flip:
                # All pairs of a question stay together, with and without the marker.
                marked = self.noise.marked(example.swapped())
                yield replace(marked, question=example.question or example.prompt), True
            else:
                yield example, False
