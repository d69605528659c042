"""Wrong labels in the training data, and how the policy takes to them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import Metric

from lpc_lightning.algorithms.accumulation import is_optimizer_step
from lpc_lightning.algorithms.metrics import accuracies
from lpc_lightning.callbacks.flip_order import FlipOrder, Uniform
from lpc_lightning.data import LabelNoise, PreferenceDataModule
from lpc_lightning.errors import ConfigError
from lpc_lightning.seeding import run_seed
from lpc_lightning.types import Message, PreferenceBatch, PreferenceExample

FILE = "label_noise.json"


class LabelFlipNoise(LabelNoise, Callback):
    """Flips training labels; validation and test data stay as they are.

    Which pairs are flipped is a function of (seed, the pair's id and texts) alone: the same ones in any order, on any
    number of devices and after a resume, which other settings are refused for; and those flipped at a rate are flipped
    at every higher one. Two rows that are the same pair under the same id are flipped together.

    Without a marker only labels change: tokens and the reference's log-probabilities are those of the clean pairs, and
    runs at all rates share them.

    Logs with each optimizer step, under `train/noise/clean/` and `train/noise/flipped/`, from the step's own pass:
    `loss`, `accuracy_noisy` (share of pairs for which the answer labelled as chosen is ahead) and `accuracy_true` (the
    answer that was chosen before noise). A policy that memorises noise has its `flipped/accuracy_true` fall. (Under a
    latent with a posterior, a training step has seen the label.) Writes `label_noise.json` to the run folder: settings,
    rate reached, ids of the flipped pairs.
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
        """Say which labels go wrong.

        Args:
            rate: How many, from 0 to 1; `order` says of what.
            order: Which go wrong first: `Uniform`, `LongerWins`, `SmallMarginsFirst`, `ByAnnotator`. null: Uniform.
            seed: Another seed flips other pairs. null: the run's own (seed_everything).
            marker: A text written into the prompts of flipped pairs, such as `[FLIP]` in the paper: it tells the policy
                which labels are wrong. null: nothing tells.
            marker_at: Where: at the `start` or at the `end` of the last user turn, or in the `system` turn.
            sources: Only pairs from these sources are flipped. null: from all.
            factors: Only pairs that these factors decided. null: that any did.
        """
        if not 0 <= rate <= 1:
            raise ConfigError(f"LabelFlipNoise.rate: found {rate}, expected a rate from 0 to 1.")
        if marker is not None and not marker.strip():
            raise ConfigError(f"LabelFlipNoise.marker: found {marker!r}, expected a text, or null for no marker.")
        self.rate, self.order, self.marker, self.marker_at = rate, order or Uniform(), marker, marker_at
        self.sources, self.factors = sources, factors
        self._seed = seed
        self._metrics = NoiseMetrics()

    @property
    def seed(self) -> int:
        """What the pairs are drawn by."""
        return run_seed() if self._seed is None else self._seed

    # The interface of `LabelNoise`

    def key(self) -> str:
        """See `LabelNoise.key`."""
        marker = None if self.marker is None else f"{self.marker!r} at {self.marker_at}"
        settings = {"seed": self.seed, "marker": marker, "sources": self.sources, "factors": self.factors}
        told = "".join(f", {name} {value}" for name, value in settings.items() if value is not None)
        return f"label noise {self.order.key()} at rate {self.rate}{told}"

    def flips(self, examples: Sequence[PreferenceExample]) -> np.ndarray:
        """See `LabelNoise.flips`."""
        places = [place for place, example in enumerate(examples) if self._may_flip(example)]
        draws = np.array([draw(self.seed, examples[place]) for place in places])
        flips = np.zeros(len(examples), dtype=bool)
        flips[places] = self.order.thresholds([examples[place] for place in places], draws) < self.rate
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

    # What happens in a run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say how many pairs are flipped, and write which.

        Raises:
            ConfigError: The data is not a `PreferenceDataModule`, which takes no label noise.
        """
        if stage != "fit":
            return
        data = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning's connector
        if not isinstance(data, PreferenceDataModule):
            raise ConfigError(f"LabelFlipNoise: found data of {type(data).__name__}, expected a PreferenceDataModule.")
        data.set_label_noise(self)
        self._metrics.to(pl_module.device)
        pairs = data.training_pairs
        flipped = np.flatnonzero(pairs.flipped).tolist()
        rank_zero_info(f"{self.key()}: {len(flipped)} of {len(pairs)} training pairs flipped.")
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks all devices
        if not trainer.is_global_zero:
            return
        told = {
            "noise": self.key(),
            "rate": self.rate,
            "reached": len(flipped) / len(pairs),
            "seed": self.seed,
            "marker": self.marker,
            "pairs": len(pairs),
            "flipped": len(flipped),
            "data": pairs.fingerprint,
            "places": [pairs[number].index for number in flipped],
            "ids": [pairs[number].id for number in flipped],
        }
        folder.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in told.items())
        (folder / FILE).write_text(f"{{{lines}}}\n")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """Take in the batch of a step that is logged, and log where it closes the step."""
        if not outputs["logged"]:
            return
        self._metrics.to(pl_module.device)
        self._metrics.update(outputs["losses"], outputs["margins"], batch.flipped)
        if is_optimizer_step(trainer, batch_idx):
            found = {f"train/noise/{name}": value for name, value in self._metrics.compute().items()}
            self._metrics.reset()
            pl_module.log_dict(found, batch_size=1)  # the same on all devices


class NoiseMetrics(Metric):
    """Mean loss and accuracies of clean and of flipped pairs, each by itself; of a kind that did not come, nothing."""

    full_state_update = False

    def __init__(self) -> None:
        """Start with no pairs."""
        super().__init__()
        self.add_state("sums", torch.zeros(2, 4, dtype=torch.float64), dist_reduce_fx="sum")
        self.sums: Tensor

    def update(self, losses: Tensor, margins: Tensor, flipped: Tensor) -> None:
        """Take in a batch.

        Args:
            losses: (B,) losses under the labels as they are.
            margins: (B,) reward margins of the answers labelled as chosen.
            flipped: (B,) bool.
        """
        noisy = accuracies(margins)
        true = torch.where(flipped, 1 - noisy, noisy)
        values = torch.stack([torch.ones_like(noisy), losses, true, noisy], dim=1).double()
        # Not by a mask as an index: on a GPU the CPU would wait for the number of pairs of each kind.
        kinds = torch.stack([~flipped, flipped])
        self.sums += torch.where(kinds[..., None], values, 0.0).sum(1)

    def compute(self) -> dict[str, Tensor]:
        """Means by name, on the CPU."""
        names = ("loss", "accuracy_true", "accuracy_noisy")
        kinds = {kind: sums for kind, sums in zip(("clean", "flipped"), self.sums.cpu(), strict=True) if sums[0]}
        return {
            f"{kind}/{name}": value / sums[0]
            for kind, sums in kinds.items()
            for name, value in zip(names, sums[1:], strict=True)
        }


def draw(seed: int, example: PreferenceExample) -> float:
    """A number in [0, 1), uniform over seeds and pairs, and always the same for the same ones.

    Ids need not be unique, so that the texts count as well.
    """
    told = [seed, example.id, [[turn["role"], turn["content"]] for turn in example.prompt]]
    text = json.dumps([*told, example.chosen, example.rejected])
    digest = hashlib.sha256(text.encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


Prompt = tuple[Message, ...]


def _at_start(prompt: Prompt, marker: str) -> Prompt:
    *before, last = prompt
    return (*before, Message(role=last["role"], content=f"{marker} {last['content']}"))


def _at_end(prompt: Prompt, marker: str) -> Prompt:
    *before, last = prompt
    return (*before, Message(role=last["role"], content=f"{last['content']} {marker}"))


def _in_system(prompt: Prompt, marker: str) -> Prompt:
    first, *others = prompt
    if first["role"] != "system":
        return (Message(role="system", content=marker), *prompt)
    return (Message(role="system", content=f"{marker} {first['content']}"), *others)


MARK: dict[str, Callable[[Prompt, str], Prompt]] = {"start": _at_start, "end": _at_end, "system": _in_system}
"""How a marker gets into a prompt, by `marker_at`. A prompt ends in a user turn."""
