"""Tests of spaces fitted to planted pairs with given labels and directions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
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
from lpc_lightning.losses import dpo_loss
from lpc_lightning.robust import REPO

SIZES: dict[str, dict[str, Any]] = {"VectorSpace": {}, "MLPSpace": {"hidden": 16}}
SPACES = [
    name
    for name, space in vars(latent).items()
    if isinstance(space, type) and issubclass(space, LatentSpace) and not space.__abstractmethods__
]


def make(planted: Any, name: str = "MarginalSpace", **settings: Any) -> Any:
    """Build a space for planted pairs."""
    torch.manual_seed(0)
    space = getattr(latent, name)(**(SIZES.get(name, {"hidden": 16, "num_codes": 4}) | settings))
    space.build(planted.head.weight.shape[1], planted.head)
    return space


def held_out_count(pairs: LinearizedPairs) -> int:
    """Return a tenth of the number of pairs, at least 2."""
    return max(2, round(len(pairs) / 10))


def held_out(pairs: LinearizedPairs) -> Tensor:
    """Return the indices of the held-out pairs, which are the last ones."""
    return torch.arange(len(pairs))[-held_out_count(pairs) :]


def test_fit_recovers_planted_clusters(planted: Callable[..., Any]) -> None:
    data = planted(pairs=800)
    space = make(data)
    plain, loss = fit(space, data.part(0, 400), held_out_count(data.part(0, 400)), 1e-2)
    assert plain == pytest.approx(math.log(2), abs=1e-5)
    assert loss < 0.35
    states, score = data.pairs.select(torch.arange(800))
    codes = space.log_prior(states.prompt).argmax(-1)
    assert normalized_mutual_info_score(data.cluster, codes) > 0.95
    # z has the direction that decides the labels, not the opposite one.
    assert cosine_similarity(space.infer(states.prompt), data.label_directions).mean() > 0.8
    # This holds for the pairs that were not fitted, too.
    rewards = space.eval().inference_terms(states, score).pairs
    assert (rewards.chosen_rewards > rewards.rejected_rewards)[400:].float().mean() > 0.85


def test_fit_returns_held_out_losses(planted: Callable[..., Any]) -> None:
    data = planted()
    space = make(data)
    plain, loss = fit(space, data.pairs, held_out_count(data.pairs), 1e-2)
    states, score = data.pairs.select(held_out(data.pairs))
    evidence = space.eval().log_evidence(states.prompt, score).detach()
    assert loss == pytest.approx(-float(evidence.mean()), abs=1e-5)
    assert plain == pytest.approx(float(score.under(None)[0].losses.mean()), abs=1e-6)


def test_fit_compares_likelihoods_of_re_po(planted: Callable[..., Any]) -> None:
    """The published loss of RE-PO is near 0 if the policy is sure that labels are wrong, and cannot select an epoch."""
    data = planted(pairs=60)
    loss = partial(REPO(0.8).pair_losses, partial(dpo_loss, beta=1.0))
    pairs = LinearizedPairs(data.rows, data.plain, data.token, data.names, loss)
    space = make(data, "MLPSpace")
    plain, fitted = fit(space, pairs, 6, 1e-2)
    assert plain == pytest.approx(math.log(2), abs=1e-6)
    states, score = pairs.select(torch.arange(54, 60))
    terms = space.eval().inference_terms(states, score).pairs
    right = (terms.chosen_rewards - terms.rejected_rewards).double().sigmoid()
    assert fitted == pytest.approx(-float((0.8 * right + 0.2 * (1 - right)).log().mean()), abs=1e-5)


@pytest.mark.parametrize("pairs", [60, 200])
def test_fit_to_random_labels_learns_nothing(pairs: int, planted: Callable[..., Any]) -> None:
    """Held-out labels must not be used before scale and epoch are selected on them, or noise would look learned."""
    reported, unseen = [], []
    for seed in range(6):
        data = planted(pairs=pairs + 500, flipped=0.5, seed=seed)
        space = make(data)
        reported.append(fit(space, data.part(0, pairs), held_out_count(data.part(0, pairs)), 1e-2)[1])
        states, score = data.pairs.select(torch.arange(pairs, pairs + 500))
        unseen.append(-float(space.eval().log_evidence(states.prompt, score).detach().mean()))
    assert sum(reported) / 6 > math.log(2) - 0.08
    assert sum(unseen) / 6 < math.log(2) + 0.08


@pytest.mark.slow
@pytest.mark.parametrize("name", SPACES)
def test_fit_of_every_space(name: str, planted: Callable[..., Any]) -> None:
    data = planted(pairs=1200)
    space = make(data, name)
    before = {key: value.clone() for key, value in space.state_dict().items()}
    torch.manual_seed(1)
    plain, loss = fit(space, data.pairs, held_out_count(data.pairs), 1e-2)
    assert all(value.isfinite().all() for value in space.state_dict().values())
    assert loss <= plain
    assert any(not torch.equal(value, before[key]) for key, value in space.state_dict().items())
    moments = [part for part in space.modules() if isinstance(part, latent.networks.RunningMoments)]
    assert all(part.pairs == 1200 - 120 for part in moments)
    if name != "VectorSpace":
        assert moments
        assert loss < plain - 0.2
        states, score = data.pairs.select(held_out(data.pairs))
        terms = space.eval().inference_terms(states, score)
        assert float(terms.pairs.losses.detach().mean()) < plain - 0.2


def test_minimize_keeps_the_best_state(planted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a learning rate that makes every epoch worse, the start is kept."""
    losses: list[tuple[float, float]] = []
    minimize = module._minimize

    def watched(space: Any, groups: Any, loss_of: Any, fitted: Tensor, held_out_batches: Any, batches: Any) -> float:
        before = module._mean_loss(loss_of, held_out_batches)
        for group in groups:
            group["lr"] = 1e4
        best = minimize(space, groups, loss_of, fitted, held_out_batches, batches)
        assert module._mean_loss(loss_of, held_out_batches) == pytest.approx(best, rel=1e-6)
        losses.append((before, best))
        return best

    monkeypatch.setattr(module, "_minimize", watched)
    data = planted(pairs=120)
    _, loss = fit(make(data), data.pairs, held_out_count(data.pairs), 1e-2)
    assert len(losses) == 2
    assert all(best <= before for before, best in losses)
    assert loss == losses[1][1] == losses[1][0]


def test_fit_is_determined_by_seed(planted: Callable[..., Any]) -> None:
    data, states = planted(pairs=120), []
    for seed in (1, 1, 2):
        space = make(data, "GumbelSpace")
        torch.manual_seed(seed)
        fit(space, data.pairs, held_out_count(data.pairs), 1e-2)
        states.append(space.state_dict())
    first, same, other = states
    assert all(torch.equal(value, same[name]) for name, value in first.items())
    assert not torch.equal(first["codebook.weight"], other["codebook.weight"])


@pytest.mark.parametrize("codes", [1, 2])
def test_fit_with_four_pairs(codes: int, planted: Callable[..., Any]) -> None:
    data = planted(pairs=4, clusters=1)
    space = make(data, num_codes=codes)
    _, loss = fit(space, data.pairs, held_out_count(data.pairs), 1e-2)
    assert math.isfinite(loss)
    assert space.codebook.weight.isfinite().all()


def test_fit_separates_opposed_annotators(planted: Callable[..., Any]) -> None:
    data = planted(pairs=600, clusters=1, opposed=True)
    alone, together = make(data, num_codes=2), make(data, num_codes=2, annotators=True)
    fit(alone, data.pairs, held_out_count(data.pairs), 1e-2)
    plain, loss = fit(together, data.pairs, held_out_count(data.pairs), 1e-2)
    assert loss < plain - 0.2
    first, second = together.codebook.weight
    assert cosine_similarity(first, second, dim=0) < -0.8
    states, score = data.pairs.select(torch.arange(len(data.pairs)))
    joint = together.eval().log_joint(states.prompt, score)
    by_annotator = torch.stack([joint[data.annotator == who].sum(0) for who in range(2)])
    assert set(by_annotator.argmax(-1).tolist()) == {0, 1}
    # Single pairs do not identify the annotator. Without names, codes for the two annotators do not lower the loss.
    assert _accuracy_given_annotator(together, data) > _accuracy_given_annotator(alone, data) + 0.2


def _accuracy_given_annotator(space: Any, data: Any) -> float:
    """Return the accuracy under the code that fits each annotator's pairs best."""
    _, score = data.pairs.select(torch.arange(len(data.pairs)))
    losses = score.under_codes(space.codebook.weight)[0].losses
    right = 0
    for who in range(2):
        losses_of_annotator = losses[data.annotator == who]
        right += int((losses_of_annotator[:, losses_of_annotator.sum(0).argmin()] < math.log(2)).sum())
    return right / len(data.pairs)


def test_fit_with_unknown_annotators_uses_prompts(planted: Callable[..., Any]) -> None:
    data = planted()
    space = make(data, annotators=True)
    _, loss = fit(space, data.pairs, held_out_count(data.pairs), 1e-2)
    assert loss < 0.35


def test_fit_batches_group_annotators(planted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fit 270 pairs of two annotators in batches of 32, in runs of 8 pairs per annotator or ungrouped."""
    data, shares = planted(pairs=300, clusters=1, opposed=True), []
    for run in (8, None):
        annotators_seen: list[tuple[str, ...]] = []
        space = make(data, num_codes=2, annotators=True)
        terms = space.training_terms

        def watched(states: Any, *rest: Any, terms: Any = terms, annotators_seen: Any = annotators_seen) -> Any:
            annotators_seen.append(states.annotators)
            return terms(states, *rest)

        monkeypatch.setattr(space, "training_terms", watched)
        fit(space, data.pairs, 30, 1e-2, run)
        batches = [names for names in annotators_seen if len(names) == 32]
        assert batches
        alike = [len(set(names[start : start + 8])) == 1 for names in batches for start in range(0, 32, 8)]
        shares.append(sum(alike) / len(alike))
    assert shares[0] > 0.9
    assert shares[1] < 0.1


def test_fit_of_a_codebook_of_zeros_moves_it(planted: Callable[..., Any]) -> None:
    """Its rate is no share of its size, which is 0."""
    data = planted(pairs=200)
    space = make(data, "GaussianSpace", init_logit_std=0.0)
    plain, loss = fit(space, data.part(0, 200), 20, 1e-2)
    assert loss < plain - 0.01
    assert space.codebook.weight.abs().max() > 0
