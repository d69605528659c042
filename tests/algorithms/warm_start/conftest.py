"""Pairs of which everything is known: what each is about, which way its annotator leans, and the best vector for it."""

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
    """N pairs of K prompt_canonical_variates, each with a direction of its own along which the better answer is
    further.

    All states show the subject beside noise, and both answers' z_gradients have something of it in common. Between
    the two
    lies noise in all directions, and the label says which is further along the subject's own direction, or against it
    for annotator `b`.
    The policy finds all answers alike, so that without a latent the loss is log 2.
    """

    def __init__(
        self,
        pairs: int = 400,
        prompt_canonical_variates: int = 4,
        opposed: bool = False,
        flipped: float = 0.0,
        seed: int = 0,
    ) -> None:
        draws = np.random.default_rng(seed)

        def draw(*shape: int) -> Tensor:
            return torch.from_numpy(draws.normal(size=shape)).float()

        self.subject = torch.from_numpy(draws.integers(prompt_canonical_variates, size=pairs))
        self.directions = torch.linalg.qr(draw(WIDTH, WIDTH))[0][:prompt_canonical_variates]
        self.annotator = torch.from_numpy(draws.integers(2, size=pairs)) if opposed else torch.zeros(pairs)
        shown, told = 3 * draw(prompt_canonical_variates, WIDTH), draw(prompt_canonical_variates, WIDTH)
        states = (shown[self.subject][:, None] + draw(pairs, 3, WIDTH)).flatten(1)
        answers = told[self.subject][:, None] + 2 * draw(pairs, 2, WIDTH)
        lean = 1 - 2 * self.annotator
        ahead = ((answers[:, 0] - answers[:, 1]) * self.directions[self.subject]).sum(-1) * lean
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
        """Some of the pairs."""
        loss, part = partial(dpo_loss, beta=1.0), slice(start, stop)
        return LinearizedPairs(self.rows[part], self.plain[part], self.token, self.names[part], loss)

    @property
    def wanted(self) -> Tensor:
        """(N, d) the direction that each label goes by."""
        return self.directions[self.subject] * (1 - 2 * self.annotator)[:, None]


@pytest.fixture(scope="session")
def planted() -> Callable[..., Planted]:
    """Makes them."""
    return Planted
