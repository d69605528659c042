"""Tests of refused strategies and of DeepSpeed's settings. `test_distributed.py` compares two processes with one."""

import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch.distributed.device_mesh import init_device_mesh

from lpc_lightning.algorithms import DPO, FSDP2Strategy
from lpc_lightning.distributed.sharding import check_strategy, keeps_weights_elsewhere, set_micro_batch_size
from lpc_lightning.errors import ConfigError
from lpc_lightning.policy import TinyPolicy


class DeepSpeedOfStage(DeepSpeedStrategy):
    """DeepSpeed's settings without its `__init__`, which needs DeepSpeed."""

    def __init__(self, stage: int) -> None:
        self.config = {"zero_optimization": {"stage": stage}}


def test_check_strategy_refuses_zero_stage_3() -> None:
    for stage in (1, 2):
        check_strategy(DeepSpeedOfStage(stage))
    with pytest.raises(ConfigError, match=r"trainer\.strategy: found DeepSpeed with stage 3, .* Expected stage 1"):
        check_strategy(DeepSpeedOfStage(3))


def test_micro_batch_size_is_set_if_absent() -> None:
    strategy = DeepSpeedOfStage(2)
    settings = dict(strategy.config)
    check_strategy(strategy)
    assert strategy.config == settings
    set_micro_batch_size(strategy)
    assert strategy.config == settings | {"train_micro_batch_size_per_gpu": 1}
    strategy.config["train_micro_batch_size_per_gpu"] = 7
    set_micro_batch_size(strategy)
    assert strategy.config["train_micro_batch_size_per_gpu"] == 7


def test_keeps_weights_elsewhere_by_strategy() -> None:
    assert keeps_weights_elsewhere(DeepSpeedOfStage(1))
    assert keeps_weights_elsewhere(FSDP2Strategy())
    assert not keeps_weights_elsewhere(SingleDeviceStrategy())
    assert not keeps_weights_elsewhere(DDPStrategy())


def test_check_strategy_accepts_others() -> None:
    strategy = SingleDeviceStrategy()
    check_strategy(strategy)
    set_micro_batch_size(strategy)


def test_received_policy_turns_off_cudnn() -> None:
    """FSDP2 sends a policy to all processes but the first."""
    sent = pickle.dumps(TinyPolicy(width=32, layers=1).build())
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    pickle.loads(sent)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_sharded_policy_has_no_cuda_graphs(tmp_path: Path) -> None:
    spec = TinyPolicy(width=32, layers=1, cuda_graphs=True)
    module, policy = DPO(policy=spec), spec.build()
    module._device = torch.device("cuda", 0)  # only its type is read
    assert module._replays(policy)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        module._device_mesh = init_device_mesh("cpu", (1,))
        assert not module._replays(policy)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("strategy", "replays"), [("auto", True), ("ddp", False)])
def test_only_one_device_has_cuda_graphs(strategy: str, replays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP has hooks on gradients even if it has one device."""
    spec = TinyPolicy(width=32, layers=1, cuda_graphs=True)
    module = DPO(policy=spec)
    module.trainer = Trainer(strategy=strategy, devices=1, accelerator="cpu", logger=False)
    monkeypatch.setattr(DPO, "_on_gpu", True)
    assert module._replays(spec.build()) is replays
