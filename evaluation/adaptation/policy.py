"""Accuracy of the policy under z = sum_k w_k e_k, with weights that were inferred for an annotator."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from lpc_lightning.algorithms.outputs import EvaluationOutput
from lpc_lightning.evaluation.accuracy.accuracy_modes import Group
from lpc_lightning.evaluation.accuracy.pair_table import PairTable, Row
from lpc_lightning.evaluation.adaptation.annotated_pairs import answer_rows
from lpc_lightning.evaluation.adaptation.inference import Table, correct
from lpc_lightning.evaluation.adaptation.scores import PairKey, Score, mean_score
from lpc_lightning.latent import LatentSpace
from lpc_lightning.types import PreferenceBatch

UNDER_Z = "_z"
"""Suffix of the scores of an inference whose weights give a z, such as `exact_z`."""


class PolicyUnderMixtures(nn.Module):
    """Collector of evaluated batches that scores every pair under its own inferred mixture of codes, over all devices.

    `generate --code_weights` uses such a z. The cost is one pass through the LM head for each inference and number of
    shots.
    """

    def __init__(self, mixtures: Mapping[str, Mapping[int, Mapping[PairKey, Table]]], column: Group) -> None:
        """Start without pairs.

        Args:
            mixtures: (K,) weights for each pair, by inference and number of labelled pairs; see `adaptation_mixtures`.
            column: Label that identifies a pair's annotator.
        """
        super().__init__()
        self.mixtures, self.column, self.table = mixtures, column, PairTable()

    def reset(self) -> None:
        """Remove all pairs."""
        self.table.reset()

    def update(self, evaluated: EvaluationOutput, batch: PreferenceBatch, space: LatentSpace | None) -> None:
        """Add a batch.

        Args:
            evaluated: The result of `test_step` or `scoring_step`.
            batch: The same batch.
            space: The module's latent space, which has a codebook.
        """
        assert space is not None
        labels, parameter = answer_rows(batch), next(space.parameters())
        keys = [self._key(row) for row in labels]
        zeros = np.zeros(space.num_codes)
        margins: dict[str, Tensor] = {}
        for inference, by_shots in self.mixtures.items():
            for n, mixtures in by_shots.items():
                weights = np.stack([mixtures.get(key, zeros) for key in keys])
                z = space.mix(torch.as_tensor(weights, dtype=parameter.dtype, device=parameter.device))
                pairs, _ = evaluated["score"].under(z)
                margins[f"{inference}/{n}"] = pairs.margins
        self.table.update(margins, labels)

    def scores(self) -> dict[str, dict[int, Score]]:
        """Return scores by inference, with the suffix `UNDER_Z`, and number of labelled pairs. Remove the pairs."""
        columns, rows = self.table.read()
        self.reset()
        order = sorted(range(len(rows)), key=lambda index: str(rows[index]["id"]))
        keys = [self._key(row) for row in rows]
        scores: dict[str, dict[int, Score]] = {}
        for inference, by_shots in self.mixtures.items():
            for n, mixtures in by_shots.items():
                scored = [index for index in order if keys[index] in mixtures]
                annotators, prompts = (
                    np.array([str(rows[index][name]) for index in scored]) for name in (self.column, "prompt")
                )
                right = correct(columns[f"{inference}/{n}"].numpy()[scored])
                scores.setdefault(inference + UNDER_Z, {})[n] = mean_score(right, annotators, prompts)
        return scores

    def _key(self, row: Row) -> PairKey:
        return str(row[self.column]), row["content"]
