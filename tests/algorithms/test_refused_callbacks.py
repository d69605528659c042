"""Tests of callbacks that a module refuses."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging

from lpc_lightning.algorithms import DPO
from lpc_lightning.algorithms.refused_callbacks import check_averages, check_callbacks
from lpc_lightning.callbacks import AnnotatorAdaptation, BestAndLast, FinalValidation, LMEvaluation
from lpc_lightning.errors import ConfigError
from lpc_lightning.latent import MarginalSpace
from lpc_lightning.policy import LoRA


def test_averaging_of_no_weights_is_refused(small_policy: Any, fit_run: Any) -> None:
    callback = StochasticWeightAveraging(1e-3, swa_epoch_start=1)
    with pytest.raises(ConfigError, match=r"callbacks: found StochasticWeightAveraging, .*EMAWeightAveraging or"):
        fit_run(DPO(policy=small_policy()), max_epochs=2, callbacks=[callback])


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
@pytest.mark.parametrize(
    ("precision", "callback", "message"),
    [
        (
            "bf16-true",
            EMAWeightAveraging,
            r"found bf16-true with EMAWeightAveraging, .* expected bf16-mixed or 32-true",
        ),
        ("16-true", WeightAveraging, r"found 16-true with WeightAveraging, .* expected 16-mixed or 32-true"),
    ],
)
def test_average_in_16_bits_is_refused(
    precision: Any, callback: Any, message: str, small_policy: Any, fit_run: Any
) -> None:
    with pytest.raises(ConfigError, match=rf"^trainer\.precision: {message}\.$"):
        fit_run(DPO(policy=small_policy()), max_steps=1, precision=precision, callbacks=[callback()])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "64-true"])
def test_average_in_other_precision_is_accepted(precision: str) -> None:
    check_averages([EMAWeightAveraging()], precision, "float32")
    check_averages([EarlyStopping("val/loss")], "bf16-true", "bfloat16")
    check_averages([EMAWeightAveraging()], "64-true", "bfloat16")


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
@pytest.mark.parametrize("options", [{}, {"lora": LoRA(rank=2)}, {"trainable": False}])
def test_average_of_weights_of_16_bits_is_refused(options: dict[str, Any], small_policy: Any, fit_run: Any) -> None:
    """Also with an adapter and with a frozen policy: the average of equal weights is rounded in each step."""
    module = DPO(policy=small_policy(dtype="bfloat16", **options), latent=MarginalSpace(num_codes=4, hidden=8))
    message = r"^policy\.dtype: found bfloat16 with EMAWeightAveraging, .* expected float32\.$"
    with pytest.raises(ConfigError, match=message):
        fit_run(module, max_steps=1, callbacks=[EMAWeightAveraging()])


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
