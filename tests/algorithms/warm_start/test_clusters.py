"""Tests of the clusters against planted ones, and of canonical variates against another solver."""

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
from lpc_lightning.algorithms.warm_start.clusters import (
    STATE_SHRINKAGE,
    cluster_pairs,
    prompt_canonical_variates,
    whitened,
)


@pytest.fixture
def planted_clusters() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features (300, 7), z-gradients (300, 6), clusters (300,) and the directions (4, 6) of the clusters."""
    generator = torch.Generator().manual_seed(0)
    cluster = torch.randint(4, (300,), generator=generator)
    directions = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0][:4]
    noise = torch.randn(300, 6, generator=generator)
    features = torch.cat([one_hot(cluster).float(), torch.randn(300, 3, generator=generator)], dim=1)
    return features, directions[cluster] + noise, cluster, directions


def test_cluster_pairs_recovers_planted_clusters(planted_clusters: Any) -> None:
    features, z_gradients, cluster, directions = planted_clusters
    codes, assigned = cluster_pairs(features, z_gradients, 4)
    assert normalized_mutual_info_score(cluster, assigned) == pytest.approx(1.0)
    assert codes.shape == (4, 6)
    for number in range(4):
        (code,) = assigned[cluster == number].unique().tolist()
        assert cosine_similarity(codes[code], directions[number], dim=0) > 0.8
        # On average, the pairs of a cluster agree most with their own code.
        assert (z_gradients[cluster == number] @ codes.T).mean(0).argmax() == code


def test_cluster_pairs_with_swapped_labels(planted_clusters: Any) -> None:
    features, z_gradients, _, _ = planted_clusters
    (codes, assigned), (turned, same) = (
        cluster_pairs(features, z_gradients, 4),
        cluster_pairs(features, -z_gradients, 4),
    )
    assert normalized_mutual_info_score(assigned, same) == pytest.approx(1.0)
    torch.testing.assert_close(turned[same], -codes[assigned], rtol=1e-4, atol=1e-5)


def test_cluster_pairs_without_gradients(planted_clusters: Any) -> None:
    features, z_gradients, cluster, _ = planted_clusters
    codes, assigned = cluster_pairs(features, z_gradients[:200], 4)
    assert normalized_mutual_info_score(cluster[200:], assigned[200:]) > 0.8
    same_codes, same = cluster_pairs(features[:200], z_gradients[:200], 4)
    assert torch.equal(codes, same_codes)
    assert torch.equal(assigned[:200], same)


def test_cluster_pairs_with_small_ward_sample(planted_clusters: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WARD_PAIRS", 40)
    features, z_gradients, cluster, _ = planted_clusters
    _, assigned = cluster_pairs(features, z_gradients, 4)
    assert normalized_mutual_info_score(cluster, assigned) == pytest.approx(1.0)


def test_cluster_pairs_unused_codes_are_zero(planted_clusters: Any) -> None:
    _, z_gradients, cluster, _ = planted_clusters
    codes, assigned = cluster_pairs(one_hot(cluster).float(), z_gradients, 9)
    assert normalized_mutual_info_score(cluster, assigned) == pytest.approx(1.0)
    used = torch.zeros(9, dtype=torch.bool).index_fill_(0, assigned.unique(), True)
    assert used.sum() == 4
    assert (codes[used].norm(dim=1) > 0).all()
    assert not codes[~used].any()


@pytest.mark.parametrize("features", ["constant", "prompts"])
def test_cluster_pairs_with_one_cluster(features: str, planted_clusters: Any) -> None:
    prompts, z_gradients, _, _ = planted_clusters
    codes, assigned = cluster_pairs(torch.ones(300, 1) if features == "constant" else prompts, z_gradients, 1)
    assert not assigned.any()
    assert (z_gradients @ codes[0]).mean() > 0
    if features == "constant":
        # The whitened mean: Fisher's direction, up to scale.
        square = (z_gradients.T @ z_gradients / 300).double()
        square += module.GRADIENT_SHRINKAGE * square.diagonal().mean() * torch.eye(6)
        fisher = torch.linalg.solve(square, z_gradients.mean(0).double())
        assert cosine_similarity(codes[0].double(), fisher, dim=0) == pytest.approx(1.0, abs=1e-5)


def test_cluster_pairs_with_four_pairs() -> None:
    features = torch.tensor([[1.0, 0.0, 0.1], [1.0, 0.1, 0.0], [-1.0, 0.0, 0.1], [-1.0, 0.1, 0.0]])
    codes, assigned = cluster_pairs(features, features[:, :1] * torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0]), 2)
    assert codes.isfinite().all()
    first, second, *others = assigned.tolist()
    assert (first, others) == (second, [1 - first] * 2)


@pytest.fixture
def related() -> tuple[Tensor, Tensor]:
    """Features (2000, 6) and (2000, 5) that share two signals, one with little and one with much noise."""
    generator = torch.Generator().manual_seed(1)
    signal = torch.randn(2000, 2, generator=generator, dtype=torch.float64)

    def mixed(width: int) -> Tensor:
        mixing, noise = torch.randn(width, width, generator=generator).double(), torch.randn(2000, width).double()
        noise[:, :2] *= torch.tensor([0.3, 1.0])
        noise[:, :2] += signal
        return noise @ mixing + 5

    torch.manual_seed(0)
    return mixed(6), mixed(5)


def test_canonical_variates_equal_eigen_solution(related: tuple[Tensor, Tensor]) -> None:
    first, second = ((values - values.mean(0)).numpy() for values in related)
    across = first.T @ second / 2000
    inner, outer = (values.T @ values / 2000 for values in (first, second))
    for square in (inner, outer):
        square += STATE_SHRINKAGE * square.trace() / len(square) * torch.eye(len(square)).numpy()
    squares, axes = scipy.linalg.eigh(across @ scipy.linalg.solve(outer, across.T), inner)
    expected = torch.from_numpy((first @ axes * squares)[:, ::-1][:, :5].copy())
    variates = prompt_canonical_variates(*related)
    assert variates.shape == (2000, 5)
    signs = (variates * expected).sum(0).sign()
    torch.testing.assert_close(variates, expected * signs, rtol=1e-6, atol=1e-8)


def test_first_canonical_variate_equals_cca(related: tuple[Tensor, Tensor]) -> None:
    scores, _ = CCA(n_components=1).fit_transform(*(values.numpy() for values in related))
    variate = prompt_canonical_variates(*related)[:, 0]
    correlation = torch.corrcoef(torch.stack([variate, torch.from_numpy(scores[:, 0])]))[0, 1]
    assert correlation.abs() > 0.9


def test_canonical_variates_of_unrelated_features(related: tuple[Tensor, Tensor]) -> None:
    sizes = prompt_canonical_variates(*related).std(0)
    assert sizes[0] > 2 * sizes[1]
    assert sizes[1] > 20 * sizes[2:].max()


def test_equal_prompts_share_one_cluster(planted_clusters: Any) -> None:
    """All pairs have one prompt, whose states are equal: only the mean gradient is left."""
    _, z_gradients, _, _ = planted_clusters
    variates = prompt_canonical_variates(torch.full((300, 8), 2.0), z_gradients)
    assert torch.equal(variates, torch.zeros(300, 6))
    codes, assigned = cluster_pairs(variates, z_gradients, 3)
    expected, _ = cluster_pairs(torch.ones(300, 1), z_gradients, 1)
    torch.testing.assert_close(codes[:1], expected)
    assert not codes[1:].any()
    assert not assigned.any()


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 10.0])
def test_whitened_variances(shrinkage: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = (
        torch.randn(500, 4, generator=generator, dtype=torch.float64)
        @ torch.diag(torch.tensor([9.0, 3, 1, 0.1])).double()
    )
    before, axes = torch.linalg.eigh(values.T @ values / 500)
    after = whitened(values, shrinkage)
    expected = axes @ torch.diag(before / (before + shrinkage * before.mean())) @ axes.T
    torch.testing.assert_close(after.T @ after / 500, expected, rtol=1e-8, atol=1e-8)
