"""Tests of flattened configs, and of the settings in which runs differ."""

from __future__ import annotations

from typing import Any

import pytest

from lpc_lightning.evaluation.report.runs.settings import as_value, common_settings, differing_settings, flatten


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "none"),
        ("null", "none"),
        (True, "true"),
        (0.3, 0.3),
        ("0.3", 0.3),
        ("1e-5", 1e-5),
        ("32", 32),
        ("nan", "nan"),
        (float("inf"), "inf"),
        ("marginal", "marginal"),
        ([1, "a"], '[1, "a"]'),
    ],
)
def test_as_value(value: Any, expected: Any) -> None:
    result = as_value(value)
    assert result == expected
    assert type(result) is type(expected)


def latent(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"lpc_lightning.latent.{name}", "init_args": arguments}


def test_flatten_uses_names_of_flags() -> None:
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-5, "betas": [0.9, 0.999]}}
    config = {
        "seed_everything": 4,
        "trainer": {"max_steps": 20, "logger": None},
        "model": {"class_path": "lpc_lightning.algorithms.DPO", "init_args": {"beta": 0.1, "optimizer": optimizer}},
        "latent": latent("MarginalSpace", num_codes=4),
        "callbacks": [
            {"class_path": "lpc_lightning.callbacks.LabelFlipNoise", "init_args": {"rate": 0.3}},
            {"class_path": "lpc_lightning.callbacks.RunSummary"},
            {"class_path": "lpc_lightning.callbacks.LabelFlipNoise", "init_args": {"rate": 0.1}},
        ],
    }
    assert flatten(config) == {
        "seed_everything": 4,
        "trainer.max_steps": 20,
        "trainer.logger": "none",
        "model": "DPO",
        "model.beta": 0.1,
        "model.optimizer": "AdamW",
        "model.optimizer.lr": 1e-5,
        "model.optimizer.betas": "[0.9, 0.999]",
        "latent": "MarginalSpace",
        "latent.num_codes": 4,
        "callbacks.LabelFlipNoise": "LabelFlipNoise",
        "callbacks.LabelFlipNoise.rate": 0.3,
        "callbacks.RunSummary": "RunSummary",
        "callbacks.LabelFlipNoise-2": "LabelFlipNoise",
        "callbacks.LabelFlipNoise-2.rate": 0.1,
    }


def settings(**config: Any) -> dict[str, Any]:
    return flatten(config)


def test_differing_ignores_seed_and_paths() -> None:
    runs = [settings(seed_everything=seed, trainer={"default_root_dir": f"runs/{seed}"}) for seed in (1, 2)]
    assert differing_settings(runs) == []


def test_differing_ignores_derived_seeds() -> None:
    paired = [settings(seed_everything=seed, data={"data_seed": 10 + seed}) for seed in (1, 2, 1)]
    crossed = [settings(seed_everything=seed, data={"data_seed": other}) for seed in (1, 2) for other in (1, 2)]
    assert differing_settings(paired) == []
    assert differing_settings(crossed) == ["data.data_seed"]


def test_differing_ignores_arguments_of_a_class() -> None:
    """SimPO has its own default of beta, and a run without latent has no codes."""
    dpo, simpo = latent("DPO", beta=0.1, robust=False), latent("SimPO", beta=2.0)
    runs = [settings(model=model, latent=space) for model in (dpo, simpo) for space in (None, latent("M", num_codes=4))]
    assert differing_settings(runs) == ["model", "latent"]


def test_differing_within_a_class() -> None:
    runs = [settings(latent=space) for space in (None, latent("M", num_codes=4), latent("M", num_codes=8))]
    assert differing_settings(runs) == ["latent", "latent.num_codes"]


def test_flatten_empty_list_of_callbacks() -> None:
    flips = [{"class_path": "lpc_lightning.callbacks.LabelFlipNoise", "init_args": {"rate": 0.3}}]
    assert differing_settings([settings(callbacks=None), settings(callbacks=[])]) == []
    assert differing_settings([settings(callbacks=None), settings(callbacks=flips)]) == ["callbacks.LabelFlipNoise"]


def test_common_settings() -> None:
    runs = [{"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 3}, {"a": 1, "c": 3}]
    assert common_settings(runs) == {"a": 1}
    assert common_settings([]) == {}
