"""Tests of the metrics against closed forms and plain means."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical

from lpc_lightning.algorithms.metrics import (
    CodeUse,
    PairMeans,
    PreferenceMetrics,
    SourceMeans,
    entropy,
    latent_values,
    pair_values,
)
from lpc_lightning.latent import LatentTerms
from lpc_lightning.types import PairLogps, PairLosses, PairStates


def column(*values: float) -> Tensor:
    return torch.tensor(values)


def terms(**extra: object) -> LatentTerms:
    pairs = PairLosses(column(0.5, 1.5, 4.0), column(1.0, -2.0, 3.0), column(0.0, -2.0, 5.0))
    logps = PairLogps(column(-1, -2, -3), column(-4, -5, -6), None, None, column(1, 1, 1), column(1, 1, 1))
    return LatentTerms(pairs, logps, **extra)


STATES = PairStates(*(torch.tensor([[3.0, 4.0], [0.0, 2.0], [6.0, 8.0]]) for _ in range(3)))


def test_pair_values_tie_is_half_right() -> None:
    values = pair_values(terms())
    assert values["rewards/accuracies"].tolist() == [1.0, 0.5, 0.0]
    assert values["rewards/margins"].tolist() == [1.0, 0.0, -2.0]


def test_pair_values_loss_includes_penalty() -> None:
    assert pair_values(terms())["loss"].tolist() == [0.5, 1.5, 4.0]
    paid = pair_values(terms(penalty=column(0.5, 0.0, 1.0).requires_grad_()))
    assert paid["loss"].tolist() == [1.0, 1.5, 5.0]
    assert not any(value.requires_grad for value in paid.values())


def test_pair_values_have_trls_names() -> None:
    values = pair_values(terms())
    assert set(values) == {
        *("loss", "logps/chosen", "logps/rejected"),
        *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    }
    assert values["logps/chosen"].tolist() == [-1, -2, -3]
    assert values["logps/rejected"].tolist() == [-4, -5, -6]


def test_latent_values_of_available_terms() -> None:
    assert latent_values(terms(), STATES) == {}
    prior = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3], [0.1, 0.1, 0.8]])
    posterior = torch.tensor([[0.9, 0.05, 0.05], [0.2, 0.2, 0.6], [0.8, 0.1, 0.1]])
    z = torch.tensor([[0.0, 5.0], [0.0, 1.0], [0.0, 0.0]])
    full = terms(z=z, kl=column(0.1, 0.2, 0.3), weighted_kl=column(0.01, 0.02, 0.03), prior=prior.log())
    full = replace(full, penalty=column(0.5, 0.5, 0.5))  # with a diversity penalty
    values = latent_values(full, STATES)
    assert values["latent/z_norm_ratio"].tolist() == [1.0, 0.5, 0.0]
    assert values["latent/kl"].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert values["latent/kl_weighted"].tolist() == pytest.approx([0.01, 0.02, 0.03])
    torch.testing.assert_close(values["latent/prior_entropy"], Categorical(probs=prior).entropy())
    assert "latent/posterior_entropy" not in values
    both = latent_values(terms(prior=prior.log(), posterior=posterior.log()), STATES)
    torch.testing.assert_close(both["latent/posterior_entropy"], Categorical(probs=posterior).entropy())
    assert both["latent/agreement"].tolist()[::2] == [1.0, 0.0]


def test_entropy_equals_torch_distributions() -> None:
    logits = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    values = entropy(logits.log_softmax(-1))
    torch.testing.assert_close(values, Categorical(logits=logits.detach()).entropy(), rtol=1e-12, atol=1e-12)
    assert not values.requires_grad


@pytest.mark.parametrize(
    ("rows", "perplexity", "dead"),
    [
        # Every prompt on the same code.
        ([[1.0, 0, 0, 0]] * 5, 1.0, 3),
        # Each code is used by one prompt in four.
        ([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]], 4.0, 0),
        # Half of the prompts use one code, half another.
        ([[1.0, 0, 0, 0], [0, 0, 0, 1.0]] * 3, 2.0, 2),
        # The mean prior is (1/2, 1/4, 1/8, 1/8): 7/4 bits.
        ([[0.75, 0.25, 0, 0], [0.25, 0.25, 0.25, 0.25]], 2**1.75, None),
        # Three prompts and one: (3/4, 1/4).
        ([[1.0, 0, 0, 0]] * 3 + [[0, 1.0, 0, 0]], 4 / 3**0.75, 2),
        # Nearly uniform for every prompt, and one code always most probable: a high perplexity without information.
        ([[0.28, 0.24, 0.24, 0.24]] * 2, math.exp(-0.28 * math.log(0.28) - 0.72 * math.log(0.24)), 3),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_code_use(rows: list[list[float]], perplexity: float, dead: int | None, batch_size: int) -> None:
    use = CodeUse(4)
    log_prior = torch.tensor(rows).log()
    for start in range(0, len(rows), batch_size):
        use.update(log_prior[start : start + batch_size])
    values = use.compute()
    assert float(values["latent/codebook_perplexity"]) == pytest.approx(perplexity, rel=1e-6)
    if dead is not None:
        assert float(values["latent/dead_codes"]) == dead
    use.reset()
    use.update(torch.tensor([[0.0, 0, 1.0, 0]]).log())
    assert float(use.compute()["latent/codebook_perplexity"]) == pytest.approx(1.0)


def test_pair_means_weigh_pairs_equally() -> None:
    means = PairMeans()
    values = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for start, end in ((0, 4), (4, 5), (5, 7)):
        means.update({"a": values[start:end], "b": values[start:end].square()})
    result = means.compute()
    assert float(result["a"]) == pytest.approx(math.fsum(values.tolist()) / 7, rel=1e-14)
    assert float(result["b"]) == pytest.approx(math.fsum(value**2 for value in values.tolist()) / 7, rel=1e-14)
    means.reset()
    means.update({"a": column(3.0, 4.0)})
    assert {name: float(value) for name, value in means.compute().items()} == {"a": 3.5}


def test_pair_means_of_many_float32_values() -> None:
    means = PairMeans()
    for _ in range(1000):
        means.update({"a": torch.full((10,), 0.1)})
    assert float(means.compute()["a"]) == pytest.approx(float(torch.tensor(0.1)), rel=1e-14)


def test_preference_metrics_collect_and_reset() -> None:
    metrics = PreferenceMetrics(num_codes=2)
    prior = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]).log()
    metrics.update(terms(prior=prior, settings={"g": 0.1}), STATES)
    metrics.update(terms(prior=prior, settings={"g": 0.3}), STATES)
    values = metrics.collect()
    assert float(values["loss"]) == pytest.approx(2.0)
    assert float(values["rewards/accuracies"]) == 0.5
    assert values["latent/g"] == 0.3
    assert float(values["latent/dead_codes"]) == 0
    metrics.update(terms(prior=prior[:, [1, 0]] * torch.tensor([1.0, 0.0]) + torch.tensor([-9.0, -1e-9])), STATES)
    again = metrics.collect()
    assert float(again["latent/dead_codes"]) == 1
    assert float(again["loss"]) == pytest.approx(2.0)
    plain = PreferenceMetrics(num_codes=None)
    plain.update(terms(), STATES)
    assert not any(name.startswith("latent/") for name in plain.collect())


def test_loss_is_0_if_all_weights_are_0() -> None:
    """As in `weighted_mean`, whose value is the loss of such a step. Source b has one pair, whose loss is 4."""
    metrics = PreferenceMetrics(None)
    metrics.split_by_source(("a", "b"))
    metrics.update(terms(), STATES, ("a", "a", "b"), column(0.0, 0.0, 0.0))
    values = {name: float(value) for name, value in metrics.collect().items()}
    assert [values[name] for name in ("loss", "weight", "loss/a", "loss/b")] == [0, 0, 0, 0]
    metrics.update(terms(), STATES, ("a", "a", "b"), column(0.0, 0.0, 2.0))
    values = {name: float(value) for name, value in metrics.collect().items()}
    assert (values["loss/a"], values["pairs/a"]) == (0, 2)
    assert values["loss"] == values["loss/b"] == 4.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_metrics_in_a_module_of_16_bits(dtype: torch.dtype) -> None:
    """`bf16-true` converts the module. Counts of bfloat16 end at 256. One pair of four is wrong."""
    use, means, pairs = CodeUse(4), SourceMeans(("a", "b")), PairMeans()
    torch.nn.ModuleList([use, means, pairs]).to(dtype)
    for _ in range(500):
        use.update(torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log())
        values = {"loss": column(0.1, 0.2, 0.3, 0.9), "rewards/accuracies": column(1.0, 1.0, 0.0, 1.0)}
        means.update(("a", "a", "a", "b"), values)
        pairs.update(values)
    actual = {name: float(value) for name, value in (means.compute() | use.compute() | pairs.compute()).items()}
    expected = {
        **{"accuracy/a": 2 / 3, "loss/a": 0.2, "pairs/a": 1500, "accuracy/b": 1.0, "loss/b": 0.9, "pairs/b": 500},
        **{"latent/codebook_perplexity": 2**1.75, "latent/dead_codes": 3, "loss": 0.375, "rewards/accuracies": 0.75},
    }
    assert actual == pytest.approx(expected, rel=1e-6)
    use.reset()
    assert use.mass.dtype == torch.float64


def test_source_means_keep_bad_values_apart() -> None:
    means = SourceMeans(("a", "b"))
    bad = torch.nan
    means.update(("a", "b", "b"), {"loss": torch.tensor([bad, 1, 3]), "rewards/accuracies": torch.tensor([bad, 1, 0])})
    values = {name: float(value) for name, value in means.compute().items()}
    assert [name for name, value in values.items() if math.isnan(value)] == ["accuracy/a", "loss/a"]
    assert [values[name] for name in ("loss/b", "accuracy/b", "pairs/a", "pairs/b")] == [2, 0.5, 1, 2]


def test_weights_count_in_the_loss_alone() -> None:
    metrics = PreferenceMetrics(None)
    metrics.split_by_source(("a", "b", "empty"))
    metrics.update(terms(), STATES, ("a", "b", "a"), column(3.0, 0.5, 1.0))
    metrics.update(terms(), STATES, ("b", "b", "b"), column(0.0, 2.0, 0.0))
    values = metrics.collect()
    of_a, of_b = (3 * 0.5 + 4.0, 4.0), (2.5 * 1.5, 2.5)
    assert float(values["loss"]) == pytest.approx((of_a[0] + of_b[0]) / (of_a[1] + of_b[1]))
    assert float(values["weight"]) == pytest.approx(6.5 / 6)
    assert float(values["rewards/accuracies"]) == pytest.approx(0.5)
    by_source = {name: float(value) for name, value in values.items() if name.endswith(("/a", "/b", "/empty"))}
    assert by_source == pytest.approx(
        {
            **{"accuracy/a": 0.5, "loss/a": of_a[0] / of_a[1], "pairs/a": 2},
            **{"accuracy/b": 0.5, "loss/b": of_b[0] / of_b[1], "pairs/b": 4},
        }
    )
