"""Wrong labels in the training data, and their effect on the policy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lpc_lightning.algorithms.base import is_optimizer_step
from lpc_lightning.callbacks.noise_metrics import KINDS, NAMES, NoiseMetrics
from lpc_lightning.data.noise.flip_order import FlipOrder, Uniform, draw
from lpc_lightning.data.noise.label_noise import LabelNoise
from lpc_lightning.data.noise.markers import MARK
from lpc_lightning.data.tokenization.tokens import TokenStore
from lpc_lightning.data.trainer_data import required_data
from lpc_lightning.errors import ConfigError
from lpc_lightning.files.json_files import write_text
from lpc_lightning.files.plain_values import plain
from lpc_lightning.loggers import run_folder
from lpc_lightning.seeding import run_seed
from lpc_lightning.types import PreferenceBatch, PreferenceExample

FILE = "label_noise.json"
SETTINGS: dict[Literal["source", "factor", "annotator"], str] = {
    "source": "sources",
    "factor": "factors",
    "annotator": "order.shares",
}
"""Settings that name values of a column of the pairs."""
MOST_NAMES = 10
"""Number of known names in an error."""


class LabelFlipNoise(LabelNoise, Callback):
    """Callback that flips training labels. Validation and test data are unchanged.

    The flipped pairs depend only on the seed and on each pair's id and texts. They are the same in any order, on any
    number of devices and after a resume. A resume with other settings is refused. Pairs that are flipped at a rate are
    also flipped at every higher rate. Two rows with the same pair and the same id are flipped together.

    Without a marker, only labels change. Tokens and reference log-probabilities are those of the clean pairs, and runs
    at all rates share their caches.

    Metrics of each logged optimizer step are under `train/noise/clean/` and `train/noise/flipped/`, from the step's own
    pass: `loss`; `accuracy_noisy`, the share of pairs whose answer labelled as chosen has the higher reward; and
    `accuracy_true`, the same for the answer that was chosen before the noise. They are NaN if the step has no pairs of
    that kind. If a policy memorizes noise, its `flipped/accuracy_true` falls. Under a latent with a posterior, z of a
    training step depends on the label.

    The run folder gets `label_noise.json`: settings, reached rate, ids of the flipped pairs, and the names of
    unreliable annotators (`UnreliableAnnotators`).
    """

    def __init__(
        self,
        rate: float,
        order: FlipOrder | None = None,
        seed: int | None = None,
        marker: str | None = None,
        marker_at: Literal["start", "end", "system"] = "start",
        sources: list[str] | None = None,
        factors: list[str] | None = None,
    ) -> None:
        """Set which labels are flipped.

        Args:
            rate: Noise rate from 0 to 1. Its meaning depends on `order`.
            order: Kind of noise: `Uniform`, `LongerWins`, `SmallMarginsFirst`, `ByAnnotator` or `UnreliableAnnotators`.
                null: `Uniform`.
            seed: Seed of the random numbers. null: the seed of the run (seed_everything).
            marker: Text that is added to the prompts of flipped pairs, such as `[FLIP]` in the paper, so that the
                policy can recognize wrong labels. `data.too_long: truncate_prompt` could remove it: a longer prompt
                with a marker is refused. null: no text.
            marker_at: Position of the marker: `start` or `end` of the last user turn, or `system` turn.
            sources: Flip only pairs from these sources. In a mixture they are the names of its data sets. null: from
                all sources.
            factors: Flip only pairs that one of these factors decided. null: all pairs.
        """
        if not 0 <= rate <= 1:
            raise ConfigError(f"LabelFlipNoise.rate: found {rate}, expected a share from 0 to 1: 0.3 for 30 %.")
        if marker is not None and not marker.strip():
            raise ConfigError(f"LabelFlipNoise.marker: found {marker!r}, expected a text, or null for no marker.")
        self.rate, self.order, self.marker, self.marker_at = plain(rate), order or Uniform(), marker, marker_at
        self.sources, self.factors = sources, factors
        self._seed = plain(seed)
        self._metrics = NoiseMetrics()
        self._kinds: list[str] = []
        self._annotators: set[str] = set()
        """Annotators of the pairs that may be flipped, of all data sets, if the order chooses annotators."""
        self._unreliable: set[str] = set()
        """Those whose pairs may be flipped."""

    @property
    def seed(self) -> int:
        """Seed of the random numbers."""
        return run_seed() if self._seed is None else self._seed

    def key(self) -> str:
        """See `LabelNoise.key`."""
        marker = None if self.marker is None else f"{self.marker!r} at {self.marker_at}"
        settings = {"seed": self.seed, "marker": marker, "sources": self.sources, "factors": self.factors}
        texts = "".join(f", {name} {value}" for name, value in settings.items() if value is not None)
        return f"label noise {self.order.key()} at rate {self.rate}{texts}"

    def flips(self, examples: Sequence[PreferenceExample]) -> np.ndarray:
        """See `LabelNoise.flips`."""
        indices = [index for index, example in enumerate(examples) if self._may_flip(example)]
        draws = np.array([draw(self.seed, examples[index]) for index in indices])
        flips = np.zeros(len(examples), dtype=bool)
        if indices:  # a data set of a mixture may have none
            eligible = [examples[index] for index in indices]
            flips[indices] = self.order.thresholds(eligible, draws, self.seed) < self.rate
            if (unreliable := self.order.unreliable(eligible, self.rate, self.seed)) is not None:
                self._unreliable |= unreliable
                self._annotators |= {each.annotator for each in eligible if each.annotator}
        return flips

    def _may_flip(self, example: PreferenceExample) -> bool:
        in_source = self.sources is None or example.source in self.sources
        return in_source and (self.factors is None or example.factor in self.factors)

    @property
    def marks_prompts(self) -> bool:
        """See `LabelNoise.marks_prompts`."""
        return self.marker is not None

    def marked(self, example: PreferenceExample) -> PreferenceExample:
        """See `LabelNoise.marked`."""
        assert self.marker is not None
        return replace(example, prompt=MARK[self.marker_at](example.prompt, self.marker))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Flip the labels, log the number of flipped pairs, and write their ids.

        Raises:
            ConfigError: The data is not a `PreferenceDataModule`, which takes no label noise, or a setting names a
                source, a factor or an annotator that no training pair has.
        """
        if stage != "fit":
            return
        data = required_data(trainer, "callbacks: found LabelFlipNoise", "Other data takes no label noise.")
        self._refuse_unknown(data.pairs["train"])
        self._annotators, self._unreliable = set(), set()
        data.set_label_noise(self)
        self._metrics.to(pl_module.device)
        self._metrics.reset()  # a run that was interrupted leaves a part of a step
        pairs = data.training_pairs
        # Labels may be wrong before the noise (data.columns.gold). Marked pairs are tokenized with their new label.
        flips = data.flips_of(self) if self.marks_prompts else pairs.flipped != data.pairs["train"].flipped
        flipped = np.flatnonzero(flips).tolist()
        self._kinds = [
            kind for kind, members in zip(KINDS, (~pairs.flipped, pairs.flipped), strict=True) if members.any()
        ]
        chosen: dict[str, Any] = {}
        of_annotators = ""
        if self._annotators:
            chosen = {"annotators": len(self._annotators), "unreliable_annotators": sorted(self._unreliable)}
            of_annotators = (
                f", of {len(self._unreliable)} unreliable annotators among {len(self._annotators)} (the share "
                f"{self.rate}, rounded up)"
            )
        rank_zero_info(f"{self.key()}: {len(flipped)} of {len(pairs)} training pairs flipped{of_annotators}.")
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        rows = [pairs[number] for number in flipped]
        record = {
            "noise": self.key(),
            "rate": self.rate,
            "reached": len(flipped) / len(pairs),
            "seed": self.seed,
            "marker": self.marker,
            "pairs": len(pairs),
            "flipped": len(flipped),
            **chosen,
            "data": pairs.fingerprint,
            "indices": [row.index for row in rows],
            "ids": [row.id for row in rows],
            "sources": [row.source for row in rows],
        }
        folder.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in record.items())
        write_text(folder / FILE, f"{{{lines}}}\n")

    def _refuse_unknown(self, pairs: TokenStore) -> None:
        named = {"source": self.sources or (), "factor": self.factors or (), "annotator": self.order.annotators}
        for column, setting in SETTINGS.items():
            known = pairs.names(column)
            if unknown := sorted(set(named[column]) - known):
                shown = ", ".join(map(repr, sorted(known)[:MOST_NAMES])) + (", ..." if len(known) > MOST_NAMES else "")
                raise ConfigError(
                    f"LabelFlipNoise.{setting}: found {', '.join(map(repr, unknown))}, expected each {column} to have "
                    f"a training pair. The pairs have: {shown}. Correct the name, or remove it."
                )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """Add the batch of a step that is logged, and log the metrics if the batch ends the step."""
        if not outputs["logged"]:
            return
        self._metrics.to(pl_module.device)
        self._metrics.update(outputs["losses"], outputs["margins"], batch.flipped)
        if is_optimizer_step(trainer, batch_idx):
            # Lightning would log the last value again for a kind that a step has no pairs of.
            unknown = {f"{kind}/{name}": torch.tensor(torch.nan) for kind in self._kinds for name in NAMES}
            metrics = {f"train/noise/{name}": value for name, value in (unknown | self._metrics.compute()).items()}
            self._metrics.reset()
            pl_module.log_dict(metrics, batch_size=1)  # the same on all devices
