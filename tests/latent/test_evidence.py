"""Codes given the earlier pairs of an annotator, against loops over codes and pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lpc_lightning.latent import MarginalSpace
from lpc_lightning.latent.discrete import given_earlier_pairs
from lpc_lightning.types import PairStates

SIZE: dict[str, Any] = {"num_codes": 3, "init_logit_std": 1.0, "hidden": 8}
NAMES = [("a", "a", "a", "a"), ("a", "b", "a", "b"), ("", "a", "", "a"), ("b", "a", "a", "")]


def draw(annotators: Sequence[str], codes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw a log-prior and losses for each pair, in float64."""
    generator = torch.Generator().manual_seed(seed)
    prior, losses = torch.randn(2, len(annotators), codes, generator=generator, dtype=torch.float64)
    return prior.log_softmax(-1), losses.square()


def labelled_by(annotators: Sequence[str], contents: Sequence[str] = ()) -> PairStates:
    """Return pairs of these annotators. Their hidden states are not read."""
    return PairStates(*torch.empty(3, len(annotators), 0), tuple(annotators), tuple(contents))


def naive(prior: Tensor, losses: Tensor, annotators: Sequence[str], contents: Sequence[str] = ()) -> Tensor:
    """Compute the updated prior probabilities (B, K) of the codes. `prior` holds probabilities, not logs."""
    rows = []
    for i, name in enumerate(annotators):
        weights = []
        for k in range(prior.shape[1]):
            weight = prior[i, k]
            for j in range(i):
                if name and annotators[j] == name and not (contents and contents[j] == contents[i]):
                    weight = weight * torch.exp(-losses[j, k])
            weights.append(weight)
        rows.append(torch.stack(weights) / sum(weights))
    return torch.stack(rows)


some_names = st.lists(st.sampled_from(["", "a", "b", "c"]), min_size=1, max_size=8)


@given(some_names, st.integers(1, 4), st.none() | st.lists(st.sampled_from("xyz"), min_size=8, max_size=8))
def test_given_earlier_pairs_matches_loop(annotators: list[str], codes: int, texts: list[str] | None) -> None:
    """A pair is no evidence for its copy."""
    prior, losses = draw(annotators, codes)
    contents = [] if texts is None else texts[: len(annotators)]
    actual = given_earlier_pairs(prior, -losses, labelled_by(annotators, contents))
    torch.testing.assert_close(actual.exp(), naive(prior.exp(), losses, annotators, contents), rtol=1e-11, atol=1e-13)
    distinct = list(zip(annotators, contents or range(len(annotators)), strict=True))
    for row, (name, content) in enumerate(distinct):
        if not name or all(other != name or text == content for other, text in distinct[:row]):
            assert torch.equal(actual[row], prior[row])


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not out._is_view():
            self.elements = max(self.elements, out.numel())
        return out


def test_given_earlier_pairs_memory() -> None:
    """The held-out pairs of a warm start are one batch: 1,400 pairs under 16 codes have 31 million terms."""
    annotators = [str(row % 3) for row in range(1400)]
    prior, losses = draw(annotators, codes=16)
    with LargestTensor() as made:
        actual = given_earlier_pairs(prior, -losses, labelled_by(annotators))
    assert made.elements <= 2**24
    for start in range(3):
        own = losses[start::3].numpy()
        weights = prior[start::3].numpy() - (np.cumsum(own, axis=0) - own)
        np.testing.assert_allclose(actual[start::3].numpy(), log_softmax(weights, axis=-1), rtol=1e-9, atol=1e-9)


def test_given_earlier_pairs_gradient() -> None:
    prior, losses = (values.requires_grad_() for values in draw("aabab"))
    assert torch.autograd.gradcheck(
        lambda prior, losses: given_earlier_pairs(prior, -losses, labelled_by("aabab")), (prior, losses)
    )
    given_earlier_pairs(prior, -losses, labelled_by("aabab"))[3, 0].backward()
    assert [row for row in range(5) if losses.grad[row].any()] == [0, 1]
    assert [row for row in range(5) if prior.grad[row].any()] == [3]


@given(some_names, st.randoms())
def test_losses_add_up_to_joint_marginal(annotators: list[str], random: Any) -> None:
    prior, losses = draw(annotators)
    prior = prior[:1].expand_as(prior)
    order = random.sample(range(len(annotators)), len(annotators))
    shuffled, named = losses[order], [annotators[row] for row in order]
    terms = -(given_earlier_pairs(prior, -shuffled, labelled_by(named)) - shuffled).logsumexp(-1)
    for name in {"a", "b", "c"} & set(annotators):
        own = [row for row, other in enumerate(annotators) if other == name]
        expected = -torch.log((prior[0].exp() * torch.exp(-losses[own].sum(0))).sum())
        actual = terms[[row for row, other in enumerate(named) if other == name]].sum()
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def test_repeated_labels_are_no_evidence_of_codes() -> None:
    """Opposite codes make a label and its copy likelier together, although nothing decides the label."""
    losses = -torch.nn.functional.logsigmoid(torch.tensor([[3.0, -3.0]] * 2, dtype=torch.float64))
    prior = torch.full_like(losses, math.log(0.5))

    def mean_loss(contents: Sequence[str]) -> float:
        updated = given_earlier_pairs(prior, -losses, labelled_by("aa", contents))
        return -(updated - losses).logsumexp(-1).mean().item()

    assert mean_loss("xy") < 0.6 * math.log(2)
    assert mean_loss("xx") == pytest.approx(math.log(2), abs=1e-12)


def test_given_earlier_pairs_under_autocast() -> None:
    prior, losses = (values.float() for values in draw("aaaa"))
    with torch.autocast("cpu", torch.bfloat16):
        actual = given_earlier_pairs(prior, -losses, labelled_by("aaaa"))
    assert torch.equal(actual, given_earlier_pairs(prior, -losses, labelled_by("aaaa")))


@pytest.mark.parametrize("names", NAMES, ids="-".join)
def test_marginal_with_annotators_matches_loop(
    names: tuple[str, ...], toy: Any, build: Callable[..., Any], naive_network: Callable[..., Tensor]
) -> None:
    space = build(MarginalSpace(**SIZE, annotators=True), toy)
    terms = space.training_terms(replace(toy.states, annotators=names), toy.score, 0.3)
    prior = naive_network(space.prior, toy.states.prompt).softmax(-1)
    losses = toy.naive_nats * torch.stack(
        [toy.naive_losses(code.expand(4, -1)) for code in space.codebook.weight], dim=1
    )
    weights = naive(prior, losses, names)
    joint = weights * torch.exp(-losses)
    expected = -torch.log(joint.sum(-1)) / toy.naive_nats
    torch.testing.assert_close(terms.pairs.losses, expected, rtol=1e-10, atol=1e-11)
    leaves = [toy.hidden, toy.weight, *space.parameters()]
    gradients = [torch.autograd.grad(loss.sum(), leaves, retain_graph=True) for loss in (terms.pairs.losses, expected)]
    for one, other in zip(*gradients, strict=True):
        assert other.abs().max() > 1e-6
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    # Reported are the plain prior, the posterior, and the KL of the posterior from the updated prior.
    posterior = joint / joint.sum(-1, keepdim=True)
    torch.testing.assert_close(terms.prior.exp(), prior, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(terms.posterior.exp(), posterior.detach(), rtol=1e-10, atol=1e-12)
    kl = (posterior * (posterior / weights).log()).sum(-1)
    torch.testing.assert_close(terms.kl, kl.detach(), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    "names", [(), ("", "", "", ""), ("a", "b", "", "c")], ids=["no annotators", "empty names", "no repeats"]
)
def test_marginal_without_earlier_pairs_is_plain(names: tuple[str, ...], toy: Any, build: Callable[..., Any]) -> None:
    actual = []
    for space in (MarginalSpace(**SIZE), MarginalSpace(**SIZE, annotators=True)):
        built = build(space, toy)
        terms = built.training_terms(replace(toy.states, annotators=names), toy.score, 0.3)
        leaves = [toy.hidden, *built.parameters()]
        gradients = torch.autograd.grad(terms.pairs.losses.sum(), leaves, retain_graph=True)
        actual.append([terms.pairs.losses, terms.kl, terms.posterior, terms.z, *gradients])
    assert all(torch.equal(one, other) for one, other in zip(*actual, strict=True))


def test_marginal_ignores_annotators_when_off(toy: Any, build: Callable[..., Any]) -> None:
    space = build(MarginalSpace(**SIZE), toy)
    named, unnamed = (
        space.training_terms(replace(toy.states, annotators=names), toy.score, 0.3) for names in ("aaaa", ())
    )
    assert torch.equal(named.pairs.losses, unnamed.pairs.losses)


ANNOTATORS = [("a", 1), ("a", 1), ("b", -1), ("b", -1)]
"""Annotator of each pair, and 1 if the chosen answer has the attribute, -1 if the rejected one has it."""


def opposite_losses(codes: Tensor, names: Sequence[str]) -> Tensor:
    """Compute losses (4,) under two equally likely codes. Code k adds D_k = `codes`[k] to the attribute's answers."""
    signs = torch.tensor([sign for _, sign in ANNOTATORS], dtype=codes.dtype)
    losses = -torch.nn.functional.logsigmoid(signs[:, None] * codes)
    prior = torch.full_like(losses, math.log(0.5))
    return -(given_earlier_pairs(prior, -losses, labelled_by(names)) - losses).logsumexp(-1)


@given(st.floats(-8, 8), st.floats(-8, 8))
def test_opposite_annotators_single_pairs(one: float, other: float) -> None:
    def loss(*codes: float) -> float:
        return opposite_losses(torch.tensor(codes, dtype=torch.float64), ()).mean().item()

    assert loss(one, other) >= math.log(2) - 1e-12, "no pair of codes is better than zero codes"
    assert loss(one, -one) == pytest.approx(math.log(2), abs=1e-12), "opposite codes are equally good at any distance"


def train(codes: list[float], names: Sequence[str]) -> tuple[float, Tensor]:
    """Train two codes. Return their distance, and the probability of each annotator's (first, second) label."""
    values = torch.tensor(codes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([values], lr=2.0)
    for _ in range(200):
        optimizer.zero_grad()
        opposite_losses(values, names).mean().backward()
        optimizer.step()
    trained = values.detach()
    return (trained[0] - trained[1]).item(), torch.exp(-opposite_losses(trained, names)).unflatten(0, (2, 2))


def test_opposite_annotators_are_learned_jointly() -> None:
    distance, labels = train([0.2, -0.1], [name for name, _ in ANNOTATORS])
    # Before the first label, the annotator is unknown.
    torch.testing.assert_close(labels[:, 0], torch.full_like(labels[:, 0], 0.5), rtol=0, atol=1e-6)
    assert distance > 6
    assert labels[:, 1].min() > 0.95

    distance, labels = train([0.2, -0.1], ())
    assert distance == pytest.approx(0.3, abs=0.01), "the initial distance"
    torch.testing.assert_close(labels, torch.full_like(labels, 0.5), rtol=0, atol=1e-6)
