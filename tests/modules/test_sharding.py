"""Strategies that the module cannot run under. (That two processes are as good as one: `test_distributed.py`.)"""

import pytest
from lightning.pytorch.strategies import DeepSpeedStrategy

from lpc_lightning.errors import SettingError
from lpc_lightning.modules.sharding import check_strategy


class DeepSpeedOfStage(DeepSpeedStrategy):
    """Its settings alone: without DeepSpeed its `__init__` refuses to run."""

    def __init__(self, stage: int) -> None:
        self.config = {"zero_optimization": {"stage": stage}}


def test_deepspeed_must_leave_the_weights_whole() -> None:
    for stage in (1, 2):
        strategy = DeepSpeedOfStage(stage)
        check_strategy(strategy)
        # Left out, it would be asked of the training data, before there is a policy.
        assert strategy.config["train_micro_batch_size_per_gpu"] == 1
    with pytest.raises(SettingError, match=r"trainer\.strategy: found DeepSpeed with stage 3, .* Expected stage 1"):
        check_strategy(DeepSpeedOfStage(3))
