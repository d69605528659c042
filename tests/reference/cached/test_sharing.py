"""Tests of shared values: runs with the same reference and the same pairs share them."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lpc_lightning.algorithms import DPO, SimPO
from lpc_lightning.files.numbered_parts import NumberedParts
from lpc_lightning.latent import MarginalSpace
from lpc_lightning.policy import LoRA


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def marginal() -> MarginalSpace:
    return MarginalSpace(num_codes=4, hidden=8, init_logit_std=1.0)


def test_second_run_computes_nothing(
    small_policy: Any, own_data: Any, fit_run: Any, log_lines: Any, parts: Any
) -> None:
    def run() -> Any:
        return fit_run(DPO(policy=small_policy()), own_data(), max_epochs=1)

    first = run()
    assert [line.partition(" in ")[0] for line in log_lines()] == [
        "train: 0 pairs reused, 21 computed",
        "validation: 0 pairs reused, 6 computed",
    ]
    written = {part: part.stat().st_mtime_ns for part in parts()}
    second = run()
    assert log_lines() == ["train: 21 pairs reused, none computed.", "validation: 6 pairs reused, none computed."]
    assert written == {part: part.stat().st_mtime_ns for part in parts()}
    assert second.training == first.training


def test_run_reads_the_cache(small_policy: Any, own_data: Any, fit_run: Any, parts: Any) -> None:
    """Add a nat to every stored value. Implicit rewards then fall by beta."""

    def run() -> Any:
        module = DPO(policy=small_policy(), beta=0.1, optimizer=adam)
        return fit_run(module, own_data(), max_steps=1)

    before = run()
    for part in parts():
        with np.load(part) as arrays:
            indices, logps = arrays["indices"], arrays["values"]
        np.savez(content := io.BytesIO(), indices=indices, values=logps + np.array([1.0, 3.0]))
        part.unlink()
        NumberedParts(part.parent, ".npz").add(content.getvalue())
    after = run()
    (one,), (other,) = before.training.values(), after.training.values()
    assert other["train/rewards/chosen"] - one["train/rewards/chosen"] == pytest.approx(-0.1, abs=1e-5)
    assert other["train/rewards/rejected"] - one["train/rewards/rejected"] == pytest.approx(-0.3, abs=1e-5)


Change = dict[str, dict[str, Any]]
SHARED: dict[str, Change] = {
    "layout": {"data": {"layout": "padded"}},
    "rows": {"data": {"row_tokens": 300}},
    "batch size": {"data": {"batch_size": 3}},
    "num_workers": {"data": {"num_workers": 2}},
    "accumulation": {"trainer": {"accumulate_grad_batches": 4}},
    "seed": {"run": {"seed": 9}},
    "beta": {"module": {"beta": 0.7}},
    "latent": {"module": {"latent": marginal}},
    "adapter": {"policy": {"lora": LoRA(rank=2)}},
    "activation checkpointing": {"policy": {"gradient_checkpointing": True}},
    "length limit that cuts nothing": {"data": {"max_length": 700}},
}
OTHER: dict[str, Change] = {
    "weights": {"policy": {"seed": 3}},
    "config": {"policy": {"options": {"rms_norm_eps": 1e-2}}},
    "dtype": {"policy": {"dtype": "bfloat16"}},
    "attention kernel": {"policy": {"attention": "eager"}},
    "precision": {"trainer": {"precision": "bf16-mixed"}},
    "pairs": {"data": {"data_seed": 4}},
    "template": {"data": {"template": "plain"}},
}


@pytest.fixture
def run_with(small_policy: Any, own_data: Any, fit_run: Any) -> Callable[..., Any]:
    def run(change: Change, reference: str = "cached") -> Any:
        module = {"reference": reference, "optimizer": adam} | change.get("module", {})
        if "latent" in module:
            module["latent"] = module["latent"]()
        made = DPO(policy=small_policy(**change.get("policy", {})), **module)
        data = own_data(**change.get("data", {}))
        return fit_run(made, data, max_epochs=1, **change.get("run", {}), **change.get("trainer", {}))

    return run


@pytest.mark.slow
@pytest.mark.parametrize("change", SHARED.values(), ids=SHARED)
def test_values_shared_when_unaffected(change: Change, run_with: Any, log_lines: Any, entries: Any) -> None:
    run_with({})
    there = entries()
    log_lines()
    cached, live = run_with(change), run_with(change, "live")
    assert log_lines() == ["train: 21 pairs reused, none computed.", "validation: 6 pairs reused, none computed."]
    assert entries() == there
    assert len(there) == 2
    assert cached.losses == pytest.approx(live.losses, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_values_not_shared_when_affected(change: Change, run_with: Any, log_lines: Any, entries: Any) -> None:
    run_with({})
    log_lines()
    cached, live = run_with(change), run_with(change, "live")
    assert [line.partition(" in ")[0] for line in log_lines()] == [
        "train: 0 pairs reused, 21 computed",
        "validation: 0 pairs reused, 6 computed",
    ]
    assert len(entries()) == 4
    rounding = 1e-5 if "bf" not in str(change) else 1e-2
    assert cached.losses == pytest.approx(live.losses, rel=rounding)


def test_key_has_matmul_precision(run_with: Any, entries: Any) -> None:
    run_with({})
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        run_with({})
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(entries()) == 4


def test_no_cache_without_reference(
    small_policy: Any, own_data: Any, fit_run: Any, log_lines: Any, entries: Any
) -> None:
    fit_run(SimPO(policy=small_policy()), own_data(), max_steps=1)
    assert log_lines() == []
    assert entries() == []
    with pytest.raises(TypeError, match="reference"):
        SimPO(policy=small_policy(), reference="cached")
