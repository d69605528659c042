"""Tests of the warning about 16-bit products on processors without instructions for them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from lightning.pytorch import Trainer

from lpc_lightning import DPO, SyntheticPreferences, TinyPolicy
from lpc_lightning.policy.precision import warn_of_slow_products

OLD = {"architecture": "x86_64", "avx2": True}
NEW = OLD | {"avx512_bf16": True}


@pytest.mark.parametrize(
    ("features", "device", "dtype", "is_slow"),
    [
        (OLD, "cpu", "bfloat16", True),
        (OLD, "cpu", "float16", True),
        (NEW, "cpu", "float16", True),
        (OLD | {"amx_fp16": True}, "cpu", "float16", False),
        (NEW, "cpu", "bfloat16", False),
        (OLD | {"amx_bf16": True}, "cpu", "bfloat16", False),
        (OLD, "cpu", "float32", False),
        (OLD, "cpu", "auto", False),
        (OLD, "cuda", "bfloat16", False),
        ({"architecture": "aarch64", "bf16": True}, "cpu", "bfloat16", False),
    ],
)
def test_slow_products_are_warned_of(
    features: dict[str, object], device: str, dtype: str, is_slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    found = _warnings(lambda: warn_of_slow_products(device, dtype, "Advice."))
    names = {"bfloat16": "AVX512-BF16 nor AMX-BF16", "float16": "AVX512-FP16 nor AMX-FP16"}
    assert [f"which has neither {names[dtype]}: " in text for text in found] == [True] * is_slow


@pytest.mark.slow
@pytest.mark.parametrize(
    ("features", "precision", "dtype", "setting"),
    [
        (OLD, "bf16-mixed", "float32", "`trainer.precision` to 32-true"),
        (OLD, "bf16-true", "bfloat16", "`trainer.precision` to 32-true"),
        (OLD, "32-true", "bfloat16", "`policy.dtype` (generate, alpaca: --dtype) to float32"),
        (OLD, "32-true", "float32", None),
        (NEW, "bf16-mixed", "float32", None),
    ],
)
def test_a_slow_fit_warns_once(
    features: dict[str, object], precision: str, dtype: str, setting: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    module = DPO(policy=TinyPolicy(width=16, layers=1, heads=2, dtype=dtype))
    data = SyntheticPreferences(train_pairs=8, validation_pairs=8, test_pairs=0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=2, accelerator="cpu", precision=precision, **quiet)
    found = _warnings(lambda: trainer.fit(module, datamodule=data))
    assert len(found) == (setting is not None)
    assert all(setting in text for text in found)


def _warnings(function: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [text for each in caught if "is slow on this processor" in (text := str(each.message))]
