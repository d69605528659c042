"""Tests on two processes (gloo, CPU) with different sources: their results equal those of one process."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lpc_lightning.algorithms import DPO
from lpc_lightning.data import SharedPrefixLayout
from lpc_lightning.data.synthetic import PreferenceGenerator
from lpc_lightning.data.tokenization.templates import make_template
from lpc_lightning.distributed.sharding import shard
from lpc_lightning.evaluation.accuracy.accuracy_modes import AccuracyModes
from lpc_lightning.evaluation.adaptation.pairs import AdaptationPairs
from lpc_lightning.evaluation.codebook.statistics import CodebookStatistics
from lpc_lightning.latent import MarginalSpace
from lpc_lightning.policy import TinyPolicy
from tests.fixtures.processes import ForkedProcess

pytestmark = pytest.mark.distributed

SOURCES = ("one", "one", "one", "a much longer name, ünïcode", "a much longer name, ünïcode", "", "third")
SHARES = ((slice(0, 3), slice(3, 5)), (slice(5, 7),))
"""Batches of each process: five pairs in two batches, two pairs in one batch."""


def build_module():
    torch.manual_seed(0)
    policy, latent = TinyPolicy(width=16, layers=1, heads=2), MarginalSpace(num_codes=4, init_logit_std=2.0)
    module = DPO(policy=policy, latent=latent, reference="live")
    module.configure_model()
    with torch.no_grad():
        for parameter in (*module.policy.parameters(), *module.latent.parameters()):
            parameter += 0.1 * torch.randn_like(parameter)
    return module


def batches(module):
    template, layout = make_template(module.tokenizer), SharedPrefixLayout(pad_id=0, row_tokens=256)
    examples = PreferenceGenerator().examples(len(SOURCES))
    labels = zip(SOURCES, (True, False, False, False, False, False, True), strict=True)
    examples = [replace(e, source=s, flipped=f) for e, (s, f) in zip(examples, labels, strict=True)]
    pairs = [template.tokenize(example) for example in examples]
    return [[layout(pairs[part]) for part in share] for share in SHARES]


@torch.no_grad()
def collect_results(module, parts, most_points=4):
    """Return all reported results of some batches."""
    modes, codebook = AccuracyModes(), CodebookStatistics(module.latent, most_points)
    adaptation = AdaptationPairs("source", (0, 1, 2), rounds=3)
    for number, batch in enumerate(parts):
        evaluated = module.validation_step(batch, number)
        modes.update(evaluated, batch, module.latent)
        codebook.update(evaluated, batch, module.latent)
        adaptation.update(evaluated, batch, module.latent)
    accuracy, use = modes.collect(), codebook.collect()
    adapted = {name: score.accuracy for name, score in adaptation.collect().metrics.items()}
    return {
        "metrics": accuracy.metrics | use.metrics | adapted,
        "errors": accuracy.standard_errors,
        "items": accuracy.items,
        "codes": use.codes.tolist(),
        "prior": use.prior.tolist(),
        "points": use.points.tolist(),
        "sampled": [row["id"] for row in use.point_rows],
    }


def one_process_of_two(rank, rendezvous, result):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    module = build_module()
    own_batches = batches(module)[rank]
    together = collect_results(module, own_batches)
    sharded = build_module()
    shard(sharded, init_device_mesh("cpu", (2,)))
    # All processes must run the same number of steps, because each step gathers the weights.
    both = [part for share in zip(*([*share, *share][:2] for share in batches(module)), strict=True) for part in share]
    sharded_results = collect_results(sharded, both[rank::2])
    Path(result).write_text(json.dumps({"together": together, "sharded": sharded_results}))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    files = [folder / f"{rank}.json" for rank in range(2)]
    processes = [
        ForkedProcess(one_process_of_two, rank, str(folder / "rendezvous"), str(file), log=folder / f"{rank}.log")
        for rank, file in enumerate(files)
    ]
    assert [process.wait() for process in processes] == [0, 0], [process.errors for process in processes]
    return [json.loads(file.read_text()) for file in files]


def assert_close(actual, expected, tolerance):
    assert actual["metrics"].keys() == expected["metrics"].keys()
    assert actual["codes"] == expected["codes"]
    assert actual["sampled"] == expected["sampled"]
    assert [item["id"] for item in actual["items"]] == [item["id"] for item in expected["items"]]
    assert actual["metrics"] == pytest.approx(expected["metrics"], rel=tolerance, abs=tolerance)
    assert actual["errors"] == pytest.approx(expected["errors"], rel=tolerance, abs=tolerance)
    assert actual["prior"] == pytest.approx(expected["prior"], rel=tolerance)
    for one, other in zip(actual["items"], expected["items"], strict=True):
        assert one["margins"] == pytest.approx(other["margins"], rel=tolerance, abs=tolerance)
        assert (one["source"], one["flipped"]) == (other["source"], other["flipped"])


def test_two_processes_equal_one_process(results):
    module = build_module()
    expected = collect_results(module, [batch for share in batches(module) for batch in share])
    for result in results:
        assert_close(result["together"], expected, tolerance=1e-12)
        assert result["together"]["points"] == expected["points"]
    metrics = expected["metrics"]
    assert metrics["pairs"] == 7
    assert metrics["pairs/source/a much longer name, ünïcode"] == 2
    assert metrics["pairs/flipped"] == 2
    assert {"accuracy/marginal/source/third", "mutual_information/source", "latent/kl"} <= metrics.keys()


def test_sharded_weights_equal_one_process(results):
    module = build_module()
    first, second = batches(module)
    expected = collect_results(module, [*first, *second, *second])
    for result in results:
        assert_close(result["sharded"], expected, tolerance=1e-4)
