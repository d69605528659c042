"""A batch of random hidden states with a random head, and the loss of each pair computed token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lpc_lightning.algorithms.latent_mixin import BatchScorer
from lpc_lightning.data.batching.layouts import PaddedLayout
from lpc_lightning.latent import LatentSpace
from lpc_lightning.latent.networks import StateNetwork
from lpc_lightning.losses import dpo_loss, ipo_loss, kto_loss, orpo_loss, simpo_loss
from lpc_lightning.policy.causal import BatchForward
from lpc_lightning.types import LogitHead, PairLogps, PairLosses, PairStates, TokenizedPair

WIDTH, VOCABULARY = 6, 13
LOSSES: dict[str, Callable[[PairLogps], PairLosses]] = {
    "dpo": lambda logps: dpo_loss(logps, beta=0.7),
    "ipo": lambda logps: ipo_loss(logps, beta=0.4),
    "simpo": lambda logps: simpo_loss(logps, beta=1.5, gamma_beta_ratio=0.3),
}
OTHERS: dict[str, Callable[[PairLogps], PairLosses]] = {
    "kto": lambda logps: kto_loss(logps, beta=0.7, undesirable_weight=1.5, reference_point=0.4),
    "orpo": lambda logps: orpo_loss(logps, beta=0.3),
}
"""Losses whose marginal over codes is not that of exp(-loss)."""


class Toy:
    """Batch of B = 4 pairs in float64. `hidden` and `weight` are leaves of the autograd graph."""

    def __init__(self, algorithm: str, pairs: list[TokenizedPair], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.algorithm, self.pairs = algorithm, pairs
        self.batch = PaddedLayout(pad_id=0)(pairs)
        self.hidden = draw(self.batch.input_ids.numel(), WIDTH).requires_grad_()
        self.weight = draw(VOCABULARY, WIDTH).requires_grad_()
        self.bias = draw(VOCABULARY)
        self.head = LogitHead(self.weight, self.bias, scale=0.8)
        self.reading = BatchForward(self.hidden, self.batch, self.head)
        # Within a nat or two of the policy, so that no sigmoid saturates.
        self.reference = self.reading.logps().detach() + draw(2 * len(pairs))
        reference = None if algorithm in ("simpo", "orpo") else self.reference
        self.score = BatchScorer(self.reading, self.batch.lengths, reference, (LOSSES | OTHERS)[algorithm])

    @property
    def states(self) -> PairStates:
        return self.reading.states

    def separate_states(self) -> PairStates:
        """Return copies of the states that are leaves: inputs of the networks, separate from the inputs of the head."""
        states = (self.states.prompt, self.states.chosen, self.states.rejected)
        return PairStates(*(state.detach().clone().requires_grad_() for state in states))

    def naive_logps(self, z: Tensor) -> Tensor:
        """Compute log-probabilities (2B,) under each pair's z (B, d)."""
        width, count = self.batch.input_ids.shape[1], len(self.pairs)
        sums = []
        for row in range(2 * count):
            pair = self.pairs[row % count]
            answer = pair.chosen_ids if row < count else pair.rejected_ids
            total = torch.zeros((), dtype=torch.float64)
            for index, token in enumerate(answer):
                state = self.hidden[row * width + len(pair.prompt_ids) - 1 + index] + z[row % count]
                scores = torch.exp(0.8 * (self.weight @ state + self.bias))
                total = total + torch.log(scores[token] / scores.sum())
            sums.append(total)
        return torch.stack(sums)

    def naive_losses(self, z: Tensor) -> Tensor:
        """Compute losses (B,) under each pair's z (B, d)."""
        logps, count = self.naive_logps(z), len(self.pairs)
        losses = []
        for number, pair in enumerate(self.pairs):
            win, lose = logps[number], logps[number + count]
            ref_win, ref_lose = self.reference[number], self.reference[number + count]
            if self.algorithm == "simpo":
                margin = 1.5 * (win / len(pair.chosen_ids) - lose / len(pair.rejected_ids) - 0.3)
            else:
                margin = (win - ref_win) - (lose - ref_lose)
            if self.algorithm == "ipo":
                losses.append((margin - 1.25) ** 2)
            else:
                losses.append(torch.log(1 + torch.exp(-margin * (0.7 if self.algorithm == "dpo" else 1.0))))
        return torch.stack(losses)

    @property
    def naive_nats(self) -> float:
        """Nats of log-likelihood per unit of loss. IPO's loss is divided by its value at a margin of 0."""
        return 1 / 1.25**2 if self.algorithm == "ipo" else 1.0


@pytest.fixture
def toy_of(make_pairs: Callable[..., list[TokenizedPair]]) -> Callable[[str], Toy]:
    """Return a function that makes the toy batch of an algorithm."""
    pairs = make_pairs([(3, 2, 4), (1, 1, 3), (2, 5, 1), (4, 3, 3)], vocabulary=VOCABULARY)
    return lambda algorithm: Toy(algorithm, pairs, seed=0)


@pytest.fixture(params=list(LOSSES))
def toy(request: pytest.FixtureRequest, toy_of: Callable[[str], Toy]) -> Toy:
    """Toy batch for each algorithm."""
    return toy_of(request.param)


@pytest.fixture
def dpo_toy(toy_of: Callable[[str], Toy]) -> Toy:
    return toy_of("dpo")


def earlier_states(inputs: int) -> list[Tensor]:
    """Return `inputs` tensors (7, d): the states of seven pairs, with a large common part."""
    generator = torch.Generator().manual_seed(9)
    draws = torch.randn(inputs, 7, WIDTH, generator=generator, dtype=torch.float64)
    return list(draws + 3 * torch.randn(WIDTH, generator=generator, dtype=torch.float64))


@pytest.fixture
def meet() -> Callable[[nn.Module], None]:
    """Function that lets all networks in a module read seven pairs and updates their moments."""

    def update(module: nn.Module) -> None:
        for network in module.modules():
            if isinstance(network, StateNetwork) and network.moments is not None:
                network(*earlier_states(network.first.in_features // WIDTH))
                network.moments.update()

    return update


@pytest.fixture
def build(perturb: Callable[..., None], meet: Callable[[nn.Module], None]) -> Callable[..., Any]:
    """Function that builds a float64 space for a toy's head, with noise on all parameters and updated moments."""

    def build_space(space: LatentSpace, toy: Toy, seed: int = 3) -> LatentSpace:
        torch.manual_seed(seed)
        space.build(WIDTH, toy.head)
        space.double()
        perturb(space, deviation=0.4, seed=seed)
        meet(space)
        return space

    return build_space


@pytest.fixture
def naive_network() -> Callable[..., Tensor]:
    """Naive network: two layers on states of unit root mean square, one pair at a time.

    A network with standardization has read the seven earlier pairs. Its deviation counts one more pair at distance 1.
    """

    def rows_of(states: Sequence[Tensor]) -> list[Tensor]:
        rows = range(states[0].shape[0])
        return [torch.cat([state[row] / torch.sqrt((state[row] ** 2).mean()) for state in states]) for row in rows]

    def forward(network: nn.Module, *states: Tensor) -> Tensor:
        rows = rows_of(states)
        if network.moments is not None:
            earlier = rows_of(earlier_states(len(states)))
            mean = sum(earlier) / 7
            deviation = torch.sqrt((1 + sum((row - mean) ** 2 for row in earlier)) / 8)
            rows = [(row - mean) / deviation for row in rows]
        outputs = []
        for row in rows:
            hidden = network.first.weight @ row + network.first.bias
            hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
            outputs.append(network.second.weight @ hidden + network.second.bias)
        return torch.stack(outputs)

    return forward
