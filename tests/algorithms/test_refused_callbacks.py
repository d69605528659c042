"""Tests of callbacks that a module refuses."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging

from lpc_lightning.algorithms import DPO
from lpc_lightning.algorithms.refused_callbacks import check_callbacks
from lpc_lightning.callbacks import AnnotatorAdaptation, BestAndLast, FinalValidation, LMEvaluation
from lpc_lightning.errors import ConfigError


def test_averaging_of_no_weights_is_refused(small_policy: Any, fit_run: Any) -> None:
    callback = StochasticWeightAveraging(1e-3, swa_epoch_start=1)
    with pytest.raises(ConfigError, match=r"callbacks: found StochasticWeightAveraging, .*EMAWeightAveraging or"):
        fit_run(DPO(policy=small_policy()), max_epochs=2, callbacks=[callback])


class MyAdaptation(AnnotatorAdaptation):
    """Own callback that extends one of this package, and logs the same names."""


@pytest.mark.parametrize(
    ("pair", "name"),
    [
        ((BestAndLast(), BestAndLast("val/loss", "min")), "BestAndLast"),
        ((AnnotatorAdaptation("annotator"), AnnotatorAdaptation("source")), "AnnotatorAdaptation"),
        ((AnnotatorAdaptation("annotator"), MyAdaptation("source")), "AnnotatorAdaptation"),
        ((LMEvaluation(["gsm8k"]), LMEvaluation(["arc_easy"])), "LMEvaluation"),
    ],
)
def test_second_callback_of_a_class_is_refused(pair: Any, name: str) -> None:
    """Both would log by the same names and write the same files. Others of Lightning may be given twice."""
    others = [FinalValidation(), EarlyStopping("val/loss"), EarlyStopping("val/rewards/margins")]
    check_callbacks([*others, pair[0]])
    with pytest.raises(ConfigError, match=rf"callbacks: found 2 of {name}, expected one"):
        check_callbacks([pair[0], *others, pair[1]])
