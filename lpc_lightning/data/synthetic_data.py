"""DataModule for the generated preference pairs."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from lpc_lightning.data.datamodule import PreferenceDataModule, Stage
from lpc_lightning.data.sources.example_source import ExamplesInMemory
from lpc_lightning.data.synthetic import PreferenceGenerator, Truth
from lpc_lightning.types import Ceiling


class SyntheticPreferences(PreferenceDataModule):
    """Generated English pairs whose answers have style attributes. The deciding factor of every pair is known.

    In each pair, `source` is the domain of the prompt and `factor` the factor that decides the label. `annotator` is
    the annotator if `deciding` is `hidden`, and empty otherwise.
    """

    def __init__(
        self,
        deciding: Literal["visible", "hidden"] = "visible",
        train_pairs: int = 4096,
        validation_pairs: int = 256,
        test_pairs: int = 512,
        annotators: int = 8,
        data_seed: int = 0,
        **data: Any,
    ) -> None:
        """Store the settings and make the generator.

        Args:
            deciding: Origin of the factor that decides the label. `visible`: the domain of the prompt. `hidden`: the
                annotator, which no text contains.
            train_pairs: Number of training pairs. 0: only validation and test, no fit.
            validation_pairs: Number of validation pairs. No prompt is shared with another split. 0: no validation.
            test_pairs: Number of test pairs. No prompt is shared with another split. 0: no test.
            annotators: Number of annotators, at least 2. Used only if deciding is `hidden`.
            data_seed: Seed of the generator. It determines the pairs and the factor of each domain or annotator.
            data: Settings of `PreferenceDataModule`.

        Raises:
            ValueError: A number is out of range.
        """
        super().__init__(**data)
        self.generator = PreferenceGenerator(deciding=deciding, annotators=annotators, seed=data_seed)
        self.counts: dict[Stage, int] = {"train": train_pairs, "validation": validation_pairs, "test": test_pairs}
        for stage, count in self.counts.items():
            if count < 0:
                raise ValueError(f"data.{stage}_pairs: found {count}, expected 0 or more.")

    @property
    def truth(self) -> Truth:
        """Deciding factors of the data, and the best possible accuracies."""
        return self.generator.truth

    @property
    def ceiling(self) -> Ceiling:
        """Best possible accuracies, exact. The annotator determines the deciding factor, and so every label."""
        return Ceiling(from_prompt=self.truth.best_accuracy, given_annotator=1.0)

    def source(self, stage: Stage) -> ExamplesInMemory | None:
        """Return the generated pairs of a stage, or None if their number is 0."""
        if not self.counts[stage]:
            return None
        examples = self.generator.examples(self.counts[stage], stage)
        # The key is a hash of the content, so that a change of the generator never loads old tokens from the cache.
        return ExamplesInMemory(examples, hashlib.sha256(repr(examples).encode()).hexdigest())
