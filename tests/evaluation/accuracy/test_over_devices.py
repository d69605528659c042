"""Two processes (gloo, CPU) that see different sources say what one process says of all pairs; sharded weights too."""

import json
import subprocess
import sys
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

SOURCES = ("one", "one", "one", "a much longer name, ünïcode", "a much longer name, ünïcode", "", "third")
SHARES = ((slice(0, 3), slice(3, 5)), (slice(5, 7),))
"""The batches of each process: five pairs in two, two pairs in one."""


def built():
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
def said(module, parts, most_points=4):
    """Everything that is reported of some batches."""
    modes, codebook = AccuracyModes(), CodebookStatistics(module.latent, most_points)
    few_shot = AdaptationPairs("source", (0, 1, 2), rounds=3)
    for number, batch in enumerate(parts):
        evaluated = module.validation_step(batch, number)
        modes.update(evaluated, batch, module.latent)
        codebook.update(evaluated, batch, module.latent)
        few_shot.update(evaluated, batch, module.latent)
    accuracy, use = modes.collect(), codebook.collect()
    return {
        "metrics": accuracy.metrics | use.metrics | few_shot.collect().metrics,
        "errors": accuracy.standard_errors,
        "items": accuracy.items,
        "codes": use.codes.tolist(),
        "prior": use.prior.tolist(),
        "points": use.points.tolist(),
        "sampled": [row["id"] for row in use.point_rows],
    }


def one_process_of_two(rank, rendezvous, result):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    module = built()
    mine = batches(module)[rank]
    together = said(module, mine)
    sharded = built()
    shard(sharded, init_device_mesh("cpu", (2,)))
    # Each process takes as many steps: all take part in gathering the weights.
    both = [part for share in zip(*([*share, *share][:2] for share in batches(module)), strict=True) for part in share]
    apart = said(sharded, both[rank::2])
    Path(result).write_text(json.dumps({"together": together, "sharded": apart}))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    files = [folder / f"{rank}.json" for rank in range(2)]
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder / "rendezvous"), str(file)])
        for rank, file in enumerate(files)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    return [json.loads(file.read_text()) for file in files]


def assert_alike(found, expected, exact):
    assert found["metrics"].keys() == expected["metrics"].keys()
    assert found["codes"] == expected["codes"]
    assert found["sampled"] == expected["sampled"]
    assert [item["id"] for item in found["items"]] == [item["id"] for item in expected["items"]]
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=exact, abs=exact)
    assert found["errors"] == pytest.approx(expected["errors"], rel=exact, abs=exact)
    assert found["prior"] == pytest.approx(expected["prior"], rel=exact)
    for one, other in zip(found["items"], expected["items"], strict=True):
        assert one["margins"] == pytest.approx(other["margins"], rel=exact, abs=exact)
        assert (one["source"], one["flipped"]) == (other["source"], other["flipped"])


def test_two_processes_say_what_one_says_of_all_pairs(results):
    module = built()
    expected = said(module, [batch for share in batches(module) for batch in share])
    for result in results:
        assert_alike(result["together"], expected, exact=1e-12)
        assert result["together"]["points"] == expected["points"]
    metrics = expected["metrics"]
    assert metrics["pairs"] == 7
    assert metrics["pairs/source/a much longer name, ünïcode"] == 2
    assert metrics["pairs/flipped"] == 2
    assert {"accuracy/marginal/source/third", "mutual_information/source", "latent/kl"} <= metrics.keys()


def test_sharded_weights_say_the_same(results):
    module = built()
    first, second = batches(module)
    expected = said(module, [*first, *second, *second])
    for result in results:
        assert_alike(result["sharded"], expected, exact=1e-4)


if __name__ == "__main__":
    one_process_of_two(int(sys.argv[1]), *sys.argv[2:])
