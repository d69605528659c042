"""Test of callbacks of Lightning that a module refuses."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch.callbacks import StochasticWeightAveraging

from lpc_lightning.algorithms import DPO
from lpc_lightning.errors import ConfigError


def test_averaging_of_no_weights_is_refused(small_policy: Any, fit_run: Any) -> None:
    callback = StochasticWeightAveraging(1e-3, swa_epoch_start=1)
    with pytest.raises(ConfigError, match=r"callbacks: found StochasticWeightAveraging, .*EMAWeightAveraging or"):
        fit_run(DPO(policy=small_policy()), max_epochs=2, callbacks=[callback])
