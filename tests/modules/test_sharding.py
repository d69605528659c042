"""FSDP2 on two processes (gloo, CPU) against one process."""

import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lpc_lightning.data import SharedPrefixLayout
from lpc_lightning.data.synthetic import PreferenceGenerator
from lpc_lightning.data.templates import make_template
from lpc_lightning.latent import MarginalSpace
from lpc_lightning.modules import DPO
from lpc_lightning.modules.sharding import shard
from lpc_lightning.policy import TinyPolicy


class Step(DPO):
    """The training step without a trainer."""

    def training_step(self, batch, batch_idx):
        reading, score = self.read(batch)
        terms = self.training_terms(reading.states, score, 0.0)
        return terms.pairs.losses.mean()


def built():
    torch.manual_seed(0)
    module = Step(policy=TinyPolicy(), latent=MarginalSpace(codes=4, spread=1.0))
    module.configure_model()
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return module


def one_process_of_two(rank, rendezvous, result):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    whole, sharded = built(), built()
    template, layout = make_template(whole.tokenizer), SharedPrefixLayout(pad_id=0, row_tokens=256)
    pairs = [template.tokenize(example) for example in PreferenceGenerator().examples(4)]
    (sum(whole.training_step(layout(part), 0) for part in (pairs[:2], pairs[2:])) / 2).backward()
    shard(sharded, init_device_mesh("cpu", (2,)))
    sharded.training_step(layout(pairs[2 * rank : 2 * rank + 2]), 0).backward()
    expected = dict(whole.named_parameters())
    apart = [
        (parameter.grad.full_tensor() - expected[name].grad).abs().max() / expected[name].grad.abs().max()
        for name, parameter in sharded.named_parameters()
        if parameter.requires_grad
    ]
    local = sum(parameter.to_local().numel() for parameter in sharded.parameters())
    share = local / sum(parameter.numel() for parameter in whole.parameters())
    Path(result).write_text(json.dumps({"apart": float(max(apart)), "share": share}))
    dist.destroy_process_group()


def test_two_processes_give_the_gradients_of_one_and_hold_half_of_the_weights(tmp_path):
    results = [tmp_path / f"{rank}.json" for rank in range(2)]
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path / "rendezvous"), str(result)])
        for rank, result in enumerate(results)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    for result in results:
        found = json.loads(result.read_text())
        assert found["apart"] < 1e-5
        assert 0.45 < found["share"] < 0.55


if __name__ == "__main__":
    one_process_of_two(int(sys.argv[1]), *sys.argv[2:])
