"""Clusters that were planted, and canonical variates by another solver."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.linalg
import torch
from sklearn.cross_decomposition import CCA
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor
from torch.nn.functional import cosine_similarity, one_hot

from lpc_lightning.algorithms.warm_start import clusters as module
from lpc_lightning.algorithms.warm_start.clusters import FEW, cluster_pairs, prompt_canonical_variates, whitened


@pytest.fixture
def planted_kinds() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is known (300, 7), z_gradients (300, 6), which kind (300,), and the directions of four clusters."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(4, (300,), generator=generator)
    directions = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0][:4]
    noise = torch.randn(300, 6, generator=generator)
    known = torch.cat([one_hot(kind).float(), torch.randn(300, 3, generator=generator)], dim=1)
    return known, directions[kind] + noise, kind, directions


def test_planted_kinds_are_found_in_noise(planted_kinds: Any) -> None:
    known, z_gradients, kind, directions = planted_kinds
    codes, found = cluster_pairs(known, z_gradients, 4)
    assert normalized_mutual_info_score(kind, found) == pytest.approx(1.0)
    assert codes.shape == (4, 6)
    for number in range(4):
        (code,) = found[kind == number].unique().tolist()
        assert cosine_similarity(codes[code], directions[number], dim=0) > 0.8
        # On average the pairs of a kind want their own code most.
        assert (z_gradients[kind == number] @ codes.T).mean(0).argmax() == code


def test_labels_the_other_way_round_are_the_same_kinds_with_codes_turned_round(planted_kinds: Any) -> None:
    known, z_gradients, _, _ = planted_kinds
    (codes, found), (turned, same) = cluster_pairs(known, z_gradients, 4), cluster_pairs(known, -z_gradients, 4)
    assert normalized_mutual_info_score(found, same) == pytest.approx(1.0)
    torch.testing.assert_close(turned[same], -codes[found], rtol=1e-4, atol=1e-5)


def test_pairs_whose_pull_is_not_known_get_the_kind_that_is_expected_of_them(planted_kinds: Any) -> None:
    known, z_gradients, kind, _ = planted_kinds
    codes, found = cluster_pairs(known, z_gradients[:200], 4)
    assert normalized_mutual_info_score(kind[200:], found[200:]) > 0.8
    same_codes, same = cluster_pairs(known[:200], z_gradients[:200], 4)
    assert torch.equal(codes, same_codes)
    assert torch.equal(found[:200], same)


def test_a_few_pairs_looked_at_all_with_all_will_do(planted_kinds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 40)
    known, z_gradients, kind, _ = planted_kinds
    _, found = cluster_pairs(known, z_gradients, 4)
    assert normalized_mutual_info_score(kind, found) == pytest.approx(1.0)


def test_more_codes_than_different_pairs_leave_codes_at_zero(planted_kinds: Any) -> None:
    _, z_gradients, kind, _ = planted_kinds
    codes, found = cluster_pairs(one_hot(kind).float(), z_gradients, 9)
    assert normalized_mutual_info_score(kind, found) == pytest.approx(1.0)
    used = torch.zeros(9, dtype=torch.bool).index_fill_(0, found.unique(), True)
    assert used.sum() == 4
    assert (codes[used].norm(dim=1) > 0).all()
    assert not codes[~used].any()


@pytest.mark.parametrize("known", ["all alike", "prompts"])
def test_one_kind_holds_all_pairs(known: str, planted_kinds: Any) -> None:
    prompts, z_gradients, _, _ = planted_kinds
    codes, found = cluster_pairs(torch.ones(300, 1) if known == "all alike" else prompts, z_gradients, 1)
    assert not found.any()
    assert (z_gradients @ codes[0]).mean() > 0
    if known == "all alike":
        # The whitened mean: Fisher's direction, up to scale.
        square = (z_gradients.T @ z_gradients / 300).double()
        square += module.MANY * square.diagonal().mean() * torch.eye(6)
        fisher = torch.linalg.solve(square, z_gradients.mean(0).double())
        assert cosine_similarity(codes[0].double(), fisher, dim=0) == pytest.approx(1.0, abs=1e-5)


def test_the_fewest_pairs_pass() -> None:
    codes, found = cluster_pairs(torch.randn(4, 3), torch.randn(4, 5), 2)
    assert codes.isfinite().all()
    assert set(found.tolist()) == {0, 1}


@pytest.fixture
def related() -> tuple[Tensor, Tensor]:
    """(2000, 6) and (2000, 5), which share two signals: one nearly whole, one in much noise."""
    generator = torch.Generator().manual_seed(1)
    signal = torch.randn(2000, 2, generator=generator, dtype=torch.float64)

    def seen(width: int) -> Tensor:
        mixing, noise = torch.randn(width, width, generator=generator).double(), torch.randn(2000, width).double()
        noise[:, :2] *= torch.tensor([0.3, 1.0])
        noise[:, :2] += signal
        return noise @ mixing + 5

    torch.manual_seed(0)
    return seen(6), seen(5)


def test_subjects_are_the_regularised_canonical_variates(related: tuple[Tensor, Tensor]) -> None:
    first, second = ((values - values.mean(0)).numpy() for values in related)
    across = first.T @ second / 2000
    inner, outer = (values.T @ values / 2000 for values in (first, second))
    for square in (inner, outer):
        square += FEW * square.trace() / len(square) * torch.eye(len(square)).numpy()
    squares, axes = scipy.linalg.eigh(across @ scipy.linalg.solve(outer, across.T), inner)
    expected = torch.from_numpy((first @ axes * squares)[:, ::-1][:, :5].copy())
    found = prompt_canonical_variates(*related)
    assert found.shape == (2000, 5)
    signs = (found * expected).sum(0).sign()
    torch.testing.assert_close(found, expected * signs, rtol=1e-6, atol=1e-8)


def test_the_leading_subject_is_that_of_a_plain_cca(related: tuple[Tensor, Tensor]) -> None:
    scores, _ = CCA(n_components=1).fit_transform(*(values.numpy() for values in related))
    found = prompt_canonical_variates(*related)[:, 0]
    together = torch.corrcoef(torch.stack([found, torch.from_numpy(scores[:, 0])]))[0, 1]
    assert together.abs() > 0.9


def test_what_is_not_related_is_no_subject(related: tuple[Tensor, Tensor]) -> None:
    sizes = prompt_canonical_variates(*related).std(0)
    assert sizes[0] > 2 * sizes[1]
    assert sizes[1] > 20 * sizes[2:].max()


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 10.0])
def test_whitening_brings_directions_to_one_or_below(shrinkage: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = (
        torch.randn(500, 4, generator=generator, dtype=torch.float64)
        @ torch.diag(torch.tensor([9.0, 3, 1, 0.1])).double()
    )
    before, axes = torch.linalg.eigh(values.T @ values / 500)
    after = whitened(values, shrinkage)
    expected = axes @ torch.diag(before / (before + shrinkage * before.mean())) @ axes.T
    torch.testing.assert_close(after.T @ after / 500, expected, rtol=1e-8, atol=1e-8)
