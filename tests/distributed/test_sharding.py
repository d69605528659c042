"""Strategies that are refused, and what one is told. (Two processes against one: `test_distributed.py`.)"""

import pytest
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

from lpc_lightning.algorithms import FSDP2Strategy
from lpc_lightning.distributed.sharding import check_strategy, keeps_weights_elsewhere, set_micro_batch_size
from lpc_lightning.errors import ConfigError


class DeepSpeedOfStage(DeepSpeedStrategy):
    """Its settings alone: without DeepSpeed its `__init__` refuses to run."""

    def __init__(self, stage: int) -> None:
        self.config = {"zero_optimization": {"stage": stage}}


def test_deepspeed_must_leave_the_weights_whole() -> None:
    for stage in (1, 2):
        check_strategy(DeepSpeedOfStage(stage))
    with pytest.raises(ConfigError, match=r"trainer\.strategy: found DeepSpeed with stage 3, .* Expected stage 1"):
        check_strategy(DeepSpeedOfStage(3))


def test_deepspeed_is_told_a_batch_size_unless_it_has_one() -> None:
    strategy = DeepSpeedOfStage(2)
    settings = dict(strategy.config)
    check_strategy(strategy)
    assert strategy.config == settings
    set_micro_batch_size(strategy)
    assert strategy.config == settings | {"train_micro_batch_size_per_gpu": 1}
    strategy.config["train_micro_batch_size_per_gpu"] = 7
    set_micro_batch_size(strategy)
    assert strategy.config["train_micro_batch_size_per_gpu"] == 7


def test_weights_are_elsewhere_where_they_are_shared_out_or_copied() -> None:
    assert keeps_weights_elsewhere(DeepSpeedOfStage(1))
    assert keeps_weights_elsewhere(FSDP2Strategy())
    assert not keeps_weights_elsewhere(SingleDeviceStrategy())
    assert not keeps_weights_elsewhere(DDPStrategy())


def test_other_strategies_pass() -> None:
    strategy = SingleDeviceStrategy()
    check_strategy(strategy)
    set_micro_batch_size(strategy)
