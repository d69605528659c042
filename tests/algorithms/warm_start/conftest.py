"""Planted pairs: the cluster of each pair, its annotator's preference and the best vector are given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from lpc_lightning.algorithms.warm_start.linearized_policy import LinearizedPairs, MeanToken
from lpc_lightning.losses import dpo_loss
from lpc_lightning.types import LogitHead

WIDTH, VOCABULARY = 12, 40


class Planted:
    """N pairs in K clusters. Each cluster has a direction, and the better answer is further along it.

    All states are the mean of the cluster plus noise. Both answers' z-gradients share a mean of the cluster, and differ
    by noise in all directions. The label is decided by the component along the cluster's direction, with the opposite
    sign for annotator `b`. The policy gives all answers the same probability, so the loss without a latent is log 2.
    """

    def __init__(
        self,
        pairs: int = 400,
        clusters: int = 4,
        opposed: bool = False,
        flipped: float = 0.0,
        seed: int = 0,
    ) -> None:
        draws = np.random.default_rng(seed)

        def draw(*shape: int) -> Tensor:
            return torch.from_numpy(draws.normal(size=shape)).float()

        self.cluster = torch.from_numpy(draws.integers(clusters, size=pairs))
        self.directions = torch.linalg.qr(draw(WIDTH, WIDTH))[0][:clusters]
        self.annotator = torch.from_numpy(draws.integers(2, size=pairs)) if opposed else torch.zeros(pairs)
        state_means, answer_means = 3 * draw(clusters, WIDTH), draw(clusters, WIDTH)
        states = (state_means[self.cluster][:, None] + draw(pairs, 3, WIDTH)).flatten(1)
        answers = answer_means[self.cluster][:, None] + 2 * draw(pairs, 2, WIDTH)
        sign = 1 - 2 * self.annotator
        ahead = ((answers[:, 0] - answers[:, 1]) * self.directions[self.cluster]).sum(-1) * sign
        ahead[torch.from_numpy(draws.random(pairs)) < flipped] *= -1
        self.z_gradients = torch.where(ahead[:, None, None] > 0, answers, answers.flip(1))
        lengths = torch.from_numpy(draws.integers(8, 13, size=(pairs, 2))).float()
        self.plain = torch.full((pairs, 2), -20.0)
        self.rows = torch.cat([states, self.z_gradients.flatten(1), self.plain, lengths], dim=1)
        self.head = LogitHead(0.3 * draw(VOCABULARY, WIDTH))
        self.token = MeanToken(self.head, draw(VOCABULARY).log_softmax(-1))
        self.names = ["ab"[int(number)] for number in self.annotator] if opposed else [""] * pairs
        self.pairs = self.part(0, pairs)

    def part(self, start: int, stop: int) -> LinearizedPairs:
        """Return the pairs from `start` to `stop`."""
        loss, part = partial(dpo_loss, beta=1.0), slice(start, stop)
        return LinearizedPairs(self.rows[part], self.plain[part], self.token, self.names[part], loss)

    @property
    def label_directions(self) -> Tensor:
        """(N, d) direction that decides each label."""
        return self.directions[self.cluster] * (1 - 2 * self.annotator)[:, None]


@pytest.fixture(scope="session")
def planted() -> Callable[..., Planted]:
    """Class of planted pairs."""
    return Planted
