"""The built-in preferences as a DataModule."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from lpc_lightning.data.datamodule import PreferenceDataModule, Stage
from lpc_lightning.data.sources.example_source import ExamplesInMemory
from lpc_lightning.data.synthetic import PreferenceGenerator, Truth
from lpc_lightning.types import Ceiling


class SyntheticPreferences(PreferenceDataModule):
    """English prompts and answers composed from style attributes, with the deciding factor known for every pair.

    `source` is the prompt's domain, `factor` what decided, `annotator` who (where annotators are hidden).
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
        """Say which pairs to make.

        Args:
            deciding: What decides a pair: its domain, which the prompt shows (`visible`), or an annotator whom no text
                shows (`hidden`).
            train_pairs: Pairs to train on.
            validation_pairs: Pairs to validate on, with other prompts. 0: none.
            test_pairs: Pairs to test on, with other prompts again. 0: none.
            annotators: How many annotators there are, where they are hidden.
            data_seed: Another seed makes other pairs and ties factors to domains and annotators anew.
            data: Settings of `PreferenceDataModule`.
        """
        super().__init__(**data)
        self.generator = PreferenceGenerator(deciding=deciding, annotators=annotators, seed=data_seed)
        self.counts: dict[Stage, int] = {"train": train_pairs, "validation": validation_pairs, "test": test_pairs}

    @property
    def truth(self) -> Truth:
        """What decides, and the best accuracy that can be had from the prompt alone."""
        return self.generator.truth

    @property
    def ceiling(self) -> Ceiling:
        """Exact. Who knows the annotator knows the factor that decides, and so every label."""
        return Ceiling(from_prompt=self.truth.best_accuracy, given_annotator=1.0)

    def source(self, stage: Stage) -> ExamplesInMemory | None:
        """The generated pairs of a stage."""
        if not self.counts[stage]:
            return None
        examples = self.generator.examples(self.counts[stage], stage)
        # Named by their content: a word changed in the generator must not be answered from an old cache.
        return ExamplesInMemory(examples, hashlib.sha256(repr(examples).encode()).hexdigest())
