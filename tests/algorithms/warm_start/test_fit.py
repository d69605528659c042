"""Spaces fitted to planted pairs, whose labels and directions are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lpc_lightning import latent
from lpc_lightning.algorithms.warm_start import fit as module
from lpc_lightning.algorithms.warm_start.fit import fit
from lpc_lightning.algorithms.warm_start.linearized_policy import LinearizedPairs
from lpc_lightning.latent import LatentSpace

SIZES: dict[str, dict[str, Any]] = {"VectorSpace": {}, "MLPSpace": {"hidden": 16}}
SPACES = [
    name
    for name, kind in vars(latent).items()
    if isinstance(kind, type) and issubclass(kind, LatentSpace) and not kind.__abstractmethods__
]


def make(planted: Any, name: str = "MarginalSpace", **settings: Any) -> Any:
    """A space, built for planted pairs."""
    torch.manual_seed(0)
    space = getattr(latent, name)(**(SIZES.get(name, {"hidden": 16, "num_codes": 4}) | settings))
    space.build(planted.head.weight.shape[1], planted.head)
    return space


def tenth(pairs: LinearizedPairs) -> int:
    """How many of them, two at least."""
    return max(2, round(len(pairs) / 10))


def held_out(pairs: LinearizedPairs) -> Tensor:
    """The last ones."""
    return torch.arange(len(pairs))[-tenth(pairs) :]


def test_a_marginal_space_finds_what_was_planted(planted: Callable[..., Any]) -> None:
    data = planted(pairs=800)
    space = make(data)
    plain, loss = fit(space, data.part(0, 400), tenth(data.part(0, 400)), 1e-2)
    assert plain == pytest.approx(math.log(2), abs=1e-5)
    assert loss < 0.35
    states, score = data.pairs.take(torch.arange(800))
    told = space.log_prior(states.prompt).argmax(-1)
    assert normalized_mutual_info_score(data.subject, told) > 0.95
    # Answers are pulled along the direction that the labels go by, and not against it.
    assert cosine_similarity(space.infer(states.prompt), data.wanted).mean() > 0.8
    # Also of the pairs that it has not seen.
    rewards = space.eval().inference_terms(states, score).pairs
    assert (rewards.chosen_rewards > rewards.rejected_rewards)[400:].float().mean() > 0.85


def test_what_it_says_of_the_held_out_pairs_is_so(planted: Callable[..., Any]) -> None:
    data = planted()
    space = make(data)
    plain, loss = fit(space, data.pairs, tenth(data.pairs), 1e-2)
    states, score = data.pairs.take(held_out(data.pairs))
    evidence = space.eval().log_evidence(states.prompt, score).detach()
    assert loss == pytest.approx(-float(evidence.mean()), abs=1e-5)
    assert plain == pytest.approx(float(score.under(None)[0].losses.mean()), abs=1e-6)


@pytest.mark.parametrize("pairs", [60, 200])
def test_labels_that_mean_nothing_teach_next_to_nothing(pairs: int, planted: Callable[..., Any]) -> None:
    """Held-out labels are not seen before scale and epoch are chosen by them: noise would look like knowledge."""
    told, unseen = [], []
    for seed in range(6):
        data = planted(pairs=pairs + 500, flipped=0.5, seed=seed)
        space = make(data)
        told.append(fit(space, data.part(0, pairs), tenth(data.part(0, pairs)), 1e-2)[1])
        states, score = data.pairs.take(torch.arange(pairs, pairs + 500))
        unseen.append(-float(space.eval().log_evidence(states.prompt, score).detach().mean()))
    assert sum(told) / 6 > math.log(2) - 0.08
    assert sum(unseen) / 6 < math.log(2) + 0.08


@pytest.mark.parametrize("name", SPACES)
def test_every_space_can_be_fitted(name: str, planted: Callable[..., Any]) -> None:
    data = planted(pairs=1200)
    space = make(data, name)
    before = {key: value.clone() for key, value in space.state_dict().items()}
    torch.manual_seed(1)
    plain, loss = fit(space, data.pairs, tenth(data.pairs), 1e-2)
    assert all(value.isfinite().all() for value in space.state_dict().values())
    assert loss <= plain
    assert any(not torch.equal(value, before[key]) for key, value in space.state_dict().items())
    moments = [part for part in space.modules() if isinstance(part, latent.moments.RunningMoments)]
    assert all(part.pairs == 1200 - 120 for part in moments)
    if name != "VectorSpace":
        assert moments
        assert loss < plain - 0.2
        states, score = data.pairs.take(held_out(data.pairs))
        terms = space.eval().inference_terms(states, score)
        assert float(terms.pairs.losses.detach().mean()) < plain - 0.2


def test_the_last_stage_never_makes_it_worse(planted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """At a learning rate that ruins every epoch, the start is kept."""
    found: list[tuple[float, float]] = []
    descend = module._descend

    def watched(space: Any, groups: Any, loss_of: Any, fitted: Tensor, tested: Any, batches: Any) -> float:
        before = module._mean(loss_of, tested)
        for group in groups:
            group["lr"] = 1e4
        kept = descend(space, groups, loss_of, fitted, tested, batches)
        assert module._mean(loss_of, tested) == pytest.approx(kept, rel=1e-6)
        found.append((before, kept))
        return kept

    monkeypatch.setattr(module, "_descend", watched)
    data = planted(pairs=120)
    _, loss = fit(make(data), data.pairs, tenth(data.pairs), 1e-2)
    assert len(found) == 2
    assert all(kept <= before for before, kept in found)
    assert loss == found[1][1] == found[1][0]


def test_it_is_the_same_by_the_same_seed(planted: Callable[..., Any]) -> None:
    data, states = planted(pairs=120), []
    for seed in (1, 1, 2):
        space = make(data, "GumbelSpace")
        torch.manual_seed(seed)
        fit(space, data.pairs, tenth(data.pairs), 1e-2)
        states.append(space.state_dict())
    first, same, other = states
    assert all(torch.equal(value, same[name]) for name, value in first.items())
    assert not torch.equal(first["codebook.weight"], other["codebook.weight"])


@pytest.mark.parametrize("codes", [1, 2])
def test_four_pairs_are_enough(codes: int, planted: Callable[..., Any]) -> None:
    data = planted(pairs=4, prompt_canonical_variates=1)
    space = make(data, num_codes=codes)
    _, loss = fit(space, data.pairs, tenth(data.pairs), 1e-2)
    assert math.isfinite(loss)
    assert space.codebook.weight.isfinite().all()


def test_two_annotators_who_want_the_opposite_are_found(planted: Callable[..., Any]) -> None:
    data = planted(pairs=600, prompt_canonical_variates=1, opposed=True)
    alone, together = make(data, num_codes=2), make(data, num_codes=2, annotators=True)
    fit(alone, data.pairs, tenth(data.pairs), 1e-2)
    plain, loss = fit(together, data.pairs, tenth(data.pairs), 1e-2)
    assert loss < plain - 0.2
    first, second = together.codebook.weight
    assert cosine_similarity(first, second, dim=0) < -0.8
    states, score = data.pairs.take(torch.arange(len(data.pairs)))
    joint = together.eval().log_joint(states.prompt, score)
    by_annotator = torch.stack([joint[data.annotator == who].sum(0) for who in range(2)])
    assert set(by_annotator.argmax(-1).tolist()) == {0, 1}
    # What no single pair tells: without names, codes for either half are not worth having.
    assert _told(together, data) > _told(alone, data) + 0.2


def _told(space: Any, data: Any) -> float:
    """Share of pairs that are answered right under the code that fits the annotator's pairs best."""
    _, score = data.pairs.take(torch.arange(len(data.pairs)))
    losses = score.under_codes(space.codebook.weight)[0].losses
    right = 0
    for who in range(2):
        mine = losses[data.annotator == who]
        right += int((mine[:, mine.sum(0).argmin()] < math.log(2)).sum())
    return right / len(data.pairs)


def test_annotators_whom_nobody_knows_leave_the_prompt(planted: Callable[..., Any]) -> None:
    data = planted()
    space = make(data, annotators=True)
    _, loss = fit(space, data.pairs, tenth(data.pairs), 1e-2)
    assert loss < 0.35


def test_pairs_of_an_annotator_stand_together_as_in_training(
    planted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 270 fitted pairs by two annotators, batches of 32 in runs of 8, or as drawn."""
    data, shares = planted(pairs=300, prompt_canonical_variates=1, opposed=True), []
    for run in (8, None):
        seen: list[tuple[str, ...]] = []
        space = make(data, num_codes=2, annotators=True)
        terms = space.training_terms

        def watched(states: Any, *rest: Any, terms: Any = terms, seen: Any = seen) -> Any:
            seen.append(states.annotators)
            return terms(states, *rest)

        monkeypatch.setattr(space, "training_terms", watched)
        fit(space, data.pairs, 30, 1e-2, run)
        batches = [names for names in seen if len(names) == 32]
        assert batches
        alike = [len(set(names[start : start + 8])) == 1 for names in batches for start in range(0, 32, 8)]
        shares.append(sum(alike) / len(alike))
    assert shares[0] > 0.9
    assert shares[1] < 0.1
