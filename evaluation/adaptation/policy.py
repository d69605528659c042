"""What the policy itself says once an annotator's codes are known: its margins under z = sum_k w_k e_k."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from lpc_lightning.algorithms.scoring import Evaluated
from lpc_lightning.evaluation.accuracy.accuracy_modes import Group
from lpc_lightning.evaluation.accuracy.pair_table import pair_labels
from lpc_lightning.evaluation.adaptation.inference import Table, correct
from lpc_lightning.evaluation.adaptation.scores import Score, mean_score
from lpc_lightning.latent import DiscreteSpace, LatentSpace
from lpc_lightning.types import PreferenceBatch


class PolicyUnderMixtures:
    """Takes in batches, and scores every pair under the mixtures of codes that were inferred for it.

    `generate --code-weights` answers under such a z. It costs a pass through the LM head for each number of shots.
    """

    def __init__(self, mixtures: Mapping[int, Mapping[str, Table]], column: Group) -> None:
        """Start with no pairs.

        Args:
            mixtures: (K,) weights by labelled pairs given and the pair's id: see `adaptation_mixtures`.
            column: The label that says whose pair it is.
        """
        self.mixtures, self.column = mixtures, column
        self.reset()

    def reset(self) -> None:
        """Forget all pairs."""
        self._right: dict[int, list[float]] = {n: [] for n in self.mixtures}
        self._annotators: dict[int, list[str]] = {n: [] for n in self.mixtures}

    def to(self, device: torch.device) -> None:
        """Nothing is kept on a device."""

    def update(self, evaluated: Evaluated, batch: PreferenceBatch, space: LatentSpace | None) -> None:
        """Take in a batch: what `test_step` returned for it, and the module's latent space."""
        assert isinstance(space, DiscreteSpace)
        codes, labels = space.codebook.weight, pair_labels(batch)
        nothing = np.zeros(len(codes))
        for n, mixtures in self.mixtures.items():
            weights = np.stack([mixtures.get(name, nothing) for name in batch.ids])
            z = space.codebook(torch.as_tensor(weights, dtype=codes.dtype, device=codes.device))
            pairs, _ = evaluated["score"].under(z)
            right = correct((pairs.chosen_rewards - pairs.rejected_rewards).double().cpu().numpy())
            known = [place for place, name in enumerate(batch.ids) if name in mixtures]
            self._right[n] += right[known].tolist()
            self._annotators[n] += [str(labels[place][self.column]) for place in known]

    def scores(self) -> dict[int, Score]:
        """By labelled pairs given."""
        return {n: mean_score(np.array(right), np.array(self._annotators[n])) for n, right in self._right.items()}
