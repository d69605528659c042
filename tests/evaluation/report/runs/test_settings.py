"""Configs as flat names, and what tells runs apart."""

from __future__ import annotations

from typing import Any

import pytest

from lpc_lightning.evaluation.report.runs.settings import agreeing, as_value, differing, dotted


@pytest.mark.parametrize(
    ("value", "told"),
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
def test_values(value: Any, told: Any) -> None:
    found = as_value(value)
    assert found == told
    assert type(found) is type(told)


def latent(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"lpc_lightning.latent.{name}", "init_args": arguments}


def test_settings_stand_under_the_names_of_their_flags() -> None:
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
    assert dotted(config) == {
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
    return dotted(config)


def test_the_seed_and_where_a_run_writes_do_not_tell_runs_apart() -> None:
    runs = [settings(seed_everything=seed, trainer={"default_root_dir": f"runs/{seed}"}) for seed in (1, 2)]
    assert differing(runs) == []


def test_a_seed_that_goes_with_the_runs_seed_is_none_of_its_own() -> None:
    paired = [settings(seed_everything=seed, data={"data_seed": 10 + seed}) for seed in (1, 2, 1)]
    crossed = [settings(seed_everything=seed, data={"data_seed": other}) for seed in (1, 2) for other in (1, 2)]
    assert differing(paired) == []
    assert differing(crossed) == ["data.data_seed"]


def test_what_comes_with_a_class_does_not_tell_runs_apart() -> None:
    """SimPO has a beta of its own, and no latent has no codes."""
    dpo, simpo = latent("DPO", beta=0.1, robust=False), latent("SimPO", beta=2.0)
    runs = [settings(model=model, latent=space) for model in (dpo, simpo) for space in (None, latent("M", num_codes=4))]
    assert differing(runs) == ["model", "latent"]


def test_what_differs_within_a_class_does() -> None:
    runs = [settings(latent=space) for space in (None, latent("M", num_codes=4), latent("M", num_codes=8))]
    assert differing(runs) == ["latent", "latent.num_codes"]


def test_no_callbacks_are_an_empty_list_of_them() -> None:
    flips = [{"class_path": "lpc_lightning.callbacks.LabelFlipNoise", "init_args": {"rate": 0.3}}]
    assert differing([settings(callbacks=None), settings(callbacks=[])]) == []
    assert differing([settings(callbacks=None), settings(callbacks=flips)]) == ["callbacks.LabelFlipNoise"]


def test_agreement_is_of_all() -> None:
    runs = [{"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 3}, {"a": 1, "c": 3}]
    assert agreeing(runs) == {"a": 1}
    assert agreeing([]) == {}
