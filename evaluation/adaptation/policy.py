"""Accuracy of the policy under z = sum_k w_k e_k, with weights that were inferred for an annotator."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from lpc_lightning.algorithms.latent_mixin import EvaluationOutput
from lpc_lightning.evaluation.accuracy.accuracy_modes import Group
from lpc_lightning.evaluation.accuracy.pair_table import pair_labels
from lpc_lightning.evaluation.adaptation.inference import Table, correct
from lpc_lightning.evaluation.adaptation.scores import PairKey, Score, mean_score
from lpc_lightning.latent import DiscreteSpace, LatentSpace
from lpc_lightning.types import PreferenceBatch


class PolicyUnderMixtures:
    """Collector of evaluated batches that scores every pair under its own inferred mixture of codes.

    `generate --code-weights` uses such a z. The cost is one pass through the LM head for each number of shots.
    """

    def __init__(self, mixtures: Mapping[int, Mapping[PairKey, Table]], column: Group) -> None:
        """Start without pairs.

        Args:
            mixtures: (K,) weights for each pair, by number of labelled pairs; see `adaptation_mixtures`.
            column: Label that identifies a pair's annotator.
        """
        self.mixtures, self.column = mixtures, column
        self.reset()

    def reset(self) -> None:
        """Remove all pairs."""
        self._correct: dict[int, list[float]] = {n: [] for n in self.mixtures}
        self._annotators: dict[int, list[str]] = {n: [] for n in self.mixtures}
        self._prompts: dict[int, list[str]] = {n: [] for n in self.mixtures}

    def to(self, device: torch.device) -> None:
        """Do nothing: no state is on a device."""

    def update(self, evaluated: EvaluationOutput, batch: PreferenceBatch, space: LatentSpace | None) -> None:
        """Add a batch.

        Args:
            evaluated: The result of `test_step`.
            batch: The same batch.
            space: The module's latent space, which has codes.
        """
        assert isinstance(space, DiscreteSpace)
        codes, labels = space.codebook.weight, pair_labels(batch)
        keys = [(str(row[self.column]), str(row["id"])) for row in labels]
        zeros = np.zeros(len(codes))
        for n, mixtures in self.mixtures.items():
            weights = np.stack([mixtures.get(key, zeros) for key in keys])
            z = space.codebook(torch.as_tensor(weights, dtype=codes.dtype, device=codes.device))
            pairs, _ = evaluated["score"].under(z)
            right = correct((pairs.chosen_rewards - pairs.rejected_rewards).double().cpu().numpy())
            scored = [index for index, key in enumerate(keys) if key in mixtures]
            self._correct[n] += right[scored].tolist()
            self._annotators[n] += [keys[index][0] for index in scored]
            self._prompts[n] += [batch.prompts[index] for index in scored]

    def scores(self) -> dict[int, Score]:
        """Return scores by number of labelled pairs."""
        return {
            n: mean_score(np.array(right), np.array(self._annotators[n]), np.array(self._prompts[n]))
            for n, right in self._correct.items()
        }
