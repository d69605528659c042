"""Tests of flattened configs, and of the settings in which runs differ."""

from __future__ import annotations

from typing import Any

import pytest

from lpc_lightning.evaluation.report.runs.settings import as_value, common_settings, flatten, is_without_influence


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


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("trainer.default_root_dir", True),
        ("trainer.logger.save_dir", True),
        ("data.cache_dir", True),
        ("data.num_workers", True),
        ("callbacks.ResourceMonitor", True),
        ("callbacks.RunSummary-2", True),
        ("callbacks.CodeExplanations.tokens", True),
        ("callbacks.StepProfile.steps", True),
        ("callbacks.AnnotatorAdaptation.rounds", False),
        ("trainer.log_every_n_steps_more", False),
        ("data.train_pairs", False),
        ("data", False),
    ],
)
def test_settings_without_influence(name: str, expected: bool) -> None:
    assert is_without_influence(name) == expected


def test_common_settings() -> None:
    runs = [{"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 3}, {"a": 1, "c": 3}]
    assert common_settings(runs) == {"a": 1}
    assert common_settings([]) == {}
