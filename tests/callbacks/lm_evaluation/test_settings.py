"""Tests of the settings of LMEvaluation and of its config file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

from lpc_lightning.callbacks import LMEvaluation
from lpc_lightning.cli import PreferenceCLI
from lpc_lightning.errors import ConfigError
from tests.callbacks.lm_evaluation.conftest import Losses

CONFIGS = Path(__file__).parents[3] / "configs" / "callbacks"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["arc_eazy"], "data_dir": "."}, "found 'arc_eazy'"),
        ({"data_dir": "/nowhere", "tasks": ["arc_easy"]}, "found no file arc/ARC-Easy/train.jsonl"),
        ({"limit": 0}, "limit: found 0"),
        ({"num_fewshot": -2}, "num_fewshot: found -2"),
        ({"step_limit": 0}, "LMEvaluation.step_limit: found 0"),
        ({"every_n_steps": 0}, "LMEvaluation.every_n_steps: found 0"),
        ({"batch_size": "many"}, "batch_size: found 'many'"),
        ({"prior_mode": 4}, "4"),
    ],
)
def test_settings_are_checked_before_training(settings, message, fit, task) -> None:
    losses = Losses()
    with pytest.raises(ConfigError, match=message):
        fit("run", losses, LMEvaluation(**({"tasks": [task]} | settings)))
    assert losses.values == []


def test_config_file() -> None:
    stated = yaml.safe_load((CONFIGS / "lm_eval.yaml").read_text())
    assert len(stated) == 1
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback", required=True)
    parsed = parser.parse_object({"callback": stated[-1]})
    assert set(stated[-1]["init_args"]) == set(parsed.callback.as_dict()["init_args"])
    built = parser.instantiate(parsed).callback
    assert isinstance(built, LMEvaluation)
    assert built.tasks == LMEvaluation().tasks

    class Parsed(PreferenceCLI):
        def _run_subcommand(self, subcommand: str) -> None:
            pass

    flags = ["--model=DPO", "--policy=TinyPolicy", "--data=SyntheticPreferences", "--trainer.accelerator=cpu"]
    cli = Parsed(["fit", *flags, f"--callbacks={CONFIGS / 'lm_eval.yaml'}", "--callbacks.limit=7"])
    (evaluation,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, LMEvaluation)]
    assert evaluation.limit == 7
