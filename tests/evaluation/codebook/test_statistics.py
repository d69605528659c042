"""Tests of codebook statistics, on batches with known numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from lpc_lightning.algorithms import DPO
from lpc_lightning.algorithms.outputs import EvaluationOutput
from lpc_lightning.data.batching.layouts import PaddedLayout
from lpc_lightning.evaluation.codebook.recovery import matched_accuracy, purity
from lpc_lightning.evaluation.codebook.statistics import CodebookReport, CodebookStatistics, PointSample, point_key
from lpc_lightning.latent import ExpectedSpace, GaussianSpace, LatentTerms, MarginalSpace, MLPSpace
from lpc_lightning.types import PairLogps, PairLosses, PairStates, PreferenceBatch, TokenizedPair
from tests.fixtures.processes import forked_ranks

COUNT, CODES, WIDTH = 24, 4, 6


class FixedPosteriorSpace(MarginalSpace):
    """A space with a fixed posterior. Its exact posterior is the same with the codes reversed."""

    def __init__(self, posterior: Tensor | None) -> None:
        super().__init__(num_codes=CODES)
        self.fixed = posterior

    def log_posterior(self, states: PairStates, score: Any) -> Tensor | None:  # type: ignore[override]
        return None if self.fixed is None else self.fixed[states.prompt[:, 0].long()]

    def log_exact_posterior(self, states: PairStates, score: Any) -> Tensor | None:  # type: ignore[override]
        fixed = self.log_posterior(states, score)
        return None if fixed is None else fixed.flip(-1)


def make_batch(
    sources: Sequence[str], factors: Sequence[str], seed: int = 0
) -> tuple[PreferenceBatch, EvaluationOutput, Tensor]:
    """Make pairs with given labels, random priors and random lengths. h_x contains the index of the pair."""
    draw = torch.Generator().manual_seed(seed)
    pairs = [
        TokenizedPair(
            id=f"pair {number}",
            prompt_ids=[3],
            chosen_ids=[4] * int(torch.randint(1, 9, (), generator=draw)),
            rejected_ids=[5] * int(torch.randint(1, 9, (), generator=draw)),
            source=source,
            factor=factor,
        )
        for number, (source, factor) in enumerate(zip(sources, factors, strict=True))
    ]
    batch = PaddedLayout(0)(pairs)
    count = len(pairs)
    prior = (3 * torch.randn(count, CODES, generator=draw)).log_softmax(-1)
    z = torch.randn(count, WIDTH, generator=draw)
    zeros = torch.zeros(count)
    numbers = torch.arange(count, dtype=torch.float32)[:, None].expand(-1, WIDTH) + torch.tensor([0.0] + [1.0] * 5)
    terms = LatentTerms(
        PairLosses(zeros, zeros, zeros), PairLogps(zeros, zeros, None, None, zeros, zeros), z=z, prior=prior
    )
    evaluated: Any = {"terms": terms, "states": PairStates(numbers, numbers, numbers), "score": None}
    return batch, evaluated, prior


def part(batch: PreferenceBatch, evaluated: EvaluationOutput, rows: slice) -> tuple[Any, Any]:
    """Return some of the pairs as a separate batch."""
    terms = evaluated["terms"]
    lengths = torch.cat([half[rows] for half in batch.lengths.chunk(2)])
    labels = {
        name: getattr(batch, name)[rows]
        for name in ("ids", "sources", "factors", "annotators", "prompts", "flipped", "has_gold")
    }
    small = PreferenceBatch(
        **{**{f: getattr(batch, f) for f in batch.__dataclass_fields__}, **labels, "lengths": lengths}
    )
    states = PairStates(*(evaluated["states"].prompt[rows] for _ in range(3)))
    cut = LatentTerms(terms.pairs, terms.logps, z=terms.z[rows], prior=terms.prior[rows])  # type: ignore[index]
    return small, {"terms": cut, "states": states, "score": None}


@pytest.mark.parametrize("batch_size", [COUNT, 7, 1])
def test_metrics_match_torch_and_scikit_learn(batch_size: int) -> None:
    sources = [["books", "films", "games"][number % 3] for number in range(COUNT)]
    factors = ["" if number % 4 == 3 else ["kind", "terse"][number % 2] for number in range(COUNT)]
    batch, evaluated, prior = make_batch(sources, factors)
    posterior = (2 * torch.randn(COUNT, CODES, generator=torch.Generator().manual_seed(9))).log_softmax(-1)
    space = FixedPosteriorSpace(posterior)
    statistics = CodebookStatistics(space)
    for start in range(0, COUNT, batch_size):
        small, small_evaluated = part(batch, evaluated, slice(start, start + batch_size))
        statistics.update(small_evaluated, small, space)
    report = statistics.collect()

    mean_prior, mean_posterior = prior.exp().double().mean(0), posterior.exp().double().mean(0)
    assert report.prior == pytest.approx(mean_prior.numpy(), rel=1e-6)
    assert report.posterior == pytest.approx(mean_posterior.numpy(), rel=1e-6)
    codes, posterior_codes = prior.argmax(-1).numpy(), posterior.argmax(-1).numpy()
    assert report.codes is not None
    assert report.codes.tolist() == codes.tolist()
    assert [row["source"] for row in report.rows] == sources
    p, q = Categorical(logits=prior.double()), Categorical(logits=posterior.double())
    expected = {
        "latent/kl": float(kl_divergence(q, p).mean()),
        "latent/posterior_entropy": float(q.entropy().mean()),
        "latent/agreement": float((codes == posterior_codes).mean()),
        "latent/posterior_perplexity": float(Categorical(probs=mean_posterior).entropy().exp()),
    }
    chosen, rejected = (half.tolist() for half in batch.lengths.chunk(2))
    differences = np.array(chosen) - np.array(rejected)
    quartiles = sum((differences >= np.quantile(differences, share)).astype(int) for share in (0.25, 0.5, 0.75))
    some = np.array([bool(factor) for factor in factors])
    for column, kind in ((codes, ""), (posterior_codes, "posterior_"), (CODES - 1 - posterior_codes, "exact_")):
        prefix = f"{kind}mutual_information"
        expected[f"codebook/{kind}matched/factor"] = matched_accuracy(column[some], np.array(factors)[some])
        expected[f"codebook/{kind}purity/factor"] = purity(column[some], np.array(factors)[some])
        for name, labels, members in (
            ("source", np.array(sources), np.ones(COUNT, dtype=bool)),
            ("factor", np.array(factors), some),
            ("length_difference", quartiles, np.ones(COUNT, dtype=bool)),
        ):
            expected[f"{prefix}/{name}"] = mutual_info_score(column[members], labels[members])
            expected[f"{prefix}/{name}_normalized"] = normalized_mutual_info_score(column[members], labels[members])
    shuffled = {name for name in report.metrics if name.endswith("_shuffled")}
    assert {
        name for name in expected if ("information" in name and "normalized" not in name) or "codebook/" in name
    } == {name.removesuffix("_shuffled") for name in shuffled}
    actual = {name: value for name, value in report.metrics.items() if name not in shuffled}
    assert actual == pytest.approx(expected, rel=1e-6)
    assert all(0 < report.metrics[name] < 1 for name in shuffled)


def test_information_of_codes_equal_to_source() -> None:
    sources = [f"source {number % CODES}" for number in range(400)]
    batch, evaluated, _ = make_batch(sources, [""] * 400)
    object.__setattr__(evaluated["terms"], "prior", torch.eye(CODES).repeat(100, 1).clamp_min(1e-9).log())
    space = FixedPosteriorSpace(None)
    statistics = CodebookStatistics(space)
    statistics.update(evaluated, replace(batch, prompts=tuple(map(str, range(400)))), space)
    report = statistics.collect()
    assert report.metrics["mutual_information/source"] == pytest.approx(math.log(CODES))
    assert report.metrics["mutual_information/source_normalized"] == pytest.approx(1)
    assert report.metrics["mutual_information/source_shuffled"] == pytest.approx(9 / 800, rel=0.5)
    assert report.posterior is None
    assert not any("factor" in name or "posterior" in name or "latent" in name for name in report.metrics)


def test_no_metrics_for_single_label() -> None:
    batch, evaluated, _ = make_batch(["only"] * 6, [""] * 6)
    statistics = CodebookStatistics(FixedPosteriorSpace(None))
    statistics.update(evaluated, batch, FixedPosteriorSpace(None))
    assert {name.split("/")[1].split("_")[0] for name in statistics.collect().metrics} == {"length"}


def test_collect_resets() -> None:
    batch, evaluated, _ = make_batch(["a", "b"] * 3, [""] * 6)
    space = FixedPosteriorSpace(None)
    statistics = CodebookStatistics(space)
    assert statistics.collect() == CodebookReport()
    statistics.update(evaluated, batch, space)
    first = statistics.collect()
    statistics.update(evaluated, batch, space)
    assert statistics.collect().metrics == first.metrics
    assert statistics.collect() == CodebookReport()


@pytest.mark.parametrize(
    "latent", [None, MLPSpace(hidden=4), GaussianSpace(num_codes=3, init_logit_std=1.0), ExpectedSpace(num_codes=3)]
)
def test_report_of_each_space(
    latent: Any, tiny_spec: Callable[..., Any], perturb: Callable[..., None], make_pairs: Callable[..., Any]
) -> None:
    module = DPO(policy=tiny_spec(), latent=latent, reference="live")
    module.configure_model()
    perturb(module.policy)
    if latent is not None:
        perturb(latent.double())
    batch = PaddedLayout(0)(make_pairs([(2, 3, 4), (3, 1, 6), (2, 2, 2)]))
    statistics = CodebookStatistics(latent)
    with torch.no_grad():
        statistics.update(module.validation_step(batch, 0), batch, latent)
    report = statistics.collect()
    if latent is None:
        assert report == CodebookReport()
        return
    assert report.points is not None
    assert report.points.shape == (3, 16)
    assert (report.codes is not None) == (report.prior is not None) == isinstance(latent, ExpectedSpace)
    assert ("latent/agreement" in report.metrics) == isinstance(latent, ExpectedSpace)


def test_exact_posterior_recovers_its_own_labels(
    tiny_spec: Callable[..., Any], perturb: Callable[..., None], make_pairs: Callable[..., Any]
) -> None:
    """Labels are the likeliest codes of the exact posterior. Only the exact posterior recovers all of them."""
    space = ExpectedSpace(num_codes=3, init_logit_std=2.0)
    module = DPO(policy=tiny_spec(), latent=space, reference="live", beta=2.0)
    module.configure_model()
    perturb(module.policy)
    perturb(space.double())
    batch = PaddedLayout(0)(make_pairs([(2 + number % 3, 3, 4) for number in range(24)]))
    with torch.no_grad():
        evaluated = module.validation_step(batch, 0)
        states, score = evaluated["states"], evaluated["score"]
        losses = torch.stack([score.under(code.expand(24, -1))[0].losses for code in space.codebook.weight], dim=-1)
        exact = (space.log_prior(states.prompt).exp() * (-losses).exp()).argmax(-1)
        assert len(exact.unique()) > 1
        labelled = replace(batch, factors=tuple(f"factor {int(code)}" for code in exact))
        statistics = CodebookStatistics(space)
        statistics.update(evaluated, labelled, space)
    metrics = statistics.collect().metrics
    assert metrics["codebook/exact_matched/factor"] == metrics["codebook/exact_purity/factor"] == 1
    assert metrics["exact_mutual_information/factor_normalized"] == pytest.approx(1)
    assert metrics["codebook/posterior_matched/factor"] < 1
    assert 1 / 3 < metrics["codebook/exact_matched/factor_shuffled"] < 1


def test_point_sample_independent_of_batches() -> None:
    points = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    expected = sorted(range(200), key=lambda number: point_key(labels(number)))[:20]
    for batch_size, order in ((200, 1), (7, 1), (7, -1), (1, 1)):
        sample = PointSample(20)
        for start in range(0, 200, batch_size):
            members = list(range(200))[::order][start : start + batch_size]
            sample.update(points[members], [labels(member) for member in members])
            assert sum(len(kept) for kept in sample.points) <= max(2 * 20, batch_size)
        keys, kept = sample.compute()
        assert keys.tolist() == [point_key(labels(number)) for number in expected]
        assert torch.equal(kept, points[expected])


def labels(number: int) -> dict[str, str]:
    return {"id": "pair", "annotator": "", "source": "", "prompt": f"prompt {number}"}


def sample_of_process(folder: str) -> None:
    """Add every second pair, in the second process one by one, and write the sample of both."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    points, sample = torch.arange(120.0)[:, None], PointSample(20)
    for members in torch.arange(rank, 120, 2).split(1 if rank else 12):
        sample.update(points[members], [labels(number) for number in members.tolist()])
    torch.save(sample.compute(), f"{folder}/{rank}.pt")


@pytest.mark.distributed
def test_point_sample_of_two_processes(tmp_path: Path) -> None:
    for process in forked_ranks(sample_of_process, str(tmp_path), folder=tmp_path):
        assert process.wait() == 0, process.errors
    expected = sorted(range(120), key=lambda number: point_key(labels(number)))[:20]
    for rank in range(2):
        keys, points = torch.load(tmp_path / f"{rank}.pt")
        assert keys.tolist() == [point_key(labels(number)) for number in expected]
        assert points[:, 0].tolist() == expected


def test_report_of_one_pair() -> None:
    batch, evaluated, prior = make_batch(["a"], ["f"])
    statistics = CodebookStatistics(FixedPosteriorSpace(None))
    statistics.update(evaluated, batch, FixedPosteriorSpace(None))
    report = statistics.collect()
    assert [row["id"] for row in report.point_rows] == ["pair 0"]
    assert report.codes is not None
    assert report.codes.tolist() == [int(prior.argmax())]


@pytest.mark.parametrize("ids", [30, 10])
def test_point_rows_match_points(ids: int) -> None:
    """With 10 ids, three pairs of different sources have each id, as in a mixture of data sets."""
    batch, evaluated, _ = make_batch([f"s{number}" for number in range(30)], [""] * 30)
    batch = replace(batch, ids=tuple(f"pair {number % ids}" for number in range(30)))
    statistics = CodebookStatistics(FixedPosteriorSpace(None), most_points=8)
    statistics.update(evaluated, batch, FixedPosteriorSpace(None))
    report = statistics.collect()
    assert report.points is not None
    z = evaluated["terms"].z
    assert z is not None
    for point, row in zip(report.points, report.point_rows, strict=True):
        number = int(row["source"][1:])
        assert np.array_equal(point, z[number].numpy())
        assert row["id"] == f"pair {number % ids}"
    assert len(report.point_rows) == 8
