"""Checkpoints that are opened from another working directory, and after their base model was moved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lpc_lightning.cli import main
from lpc_lightning.errors import CheckpointError
from lpc_lightning.files.yaml_files import read_yaml
from lpc_lightning.inference.checkpoints import read_checkpoint
from lpc_lightning.inference.model_places import find_models
from lpc_lightning.inference.opening import open_policy
from lpc_lightning.policy import TinyPolicy
from tests.fixtures.commands import DATA, MODEL, TRAINER, checkpoint_of

FIT = ["fit", *MODEL, *DATA, *TRAINER, "--callbacks=null", "--policy=PretrainedPolicy", "--policy.path=models/base"]


@pytest.mark.slow
def test_checkpoint_opens_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, other = tmp_path / "models" / "base", tmp_path / "other"
    spec = TinyPolicy(width=16, layers=1, heads=2)
    spec.build().causal_lm.save_pretrained(base)
    spec.load_tokenizer().save_pretrained(base)
    other.mkdir()
    monkeypatch.chdir(tmp_path)
    main([*FIT, "--trainer.max_epochs=1", "--policy.lora.rank=2", "--model.reference_path=models/base"])
    monkeypatch.chdir(other)
    run = tmp_path / "runs" / "version_0"
    checkpoint = checkpoint_of(run)
    settings = read_checkpoint(checkpoint)["hyper_parameters"]
    assert settings["policy"]["init_args"]["path"] == settings["reference_path"] == str(base)
    assert read_yaml(run / "config.yaml")["policy"]["init_args"]["path"] == "models/base"
    tokens = torch.arange(6)[None]
    logits = open_policy(str(checkpoint)).causal_lm(tokens).logits

    base.parent.rename(other / "models")
    moved = f"found no {base}, its (reference_)?path, and takes {other / 'models' / 'base'} in its place"
    with pytest.warns(UserWarning, match=moved):
        torch.testing.assert_close(open_policy(str(checkpoint)).causal_lm(tokens).logits, logits, rtol=0, atol=0)

    (other / "models").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{checkpoint} needs {base}, the path of its policy: found no such file"):
        open_policy(str(checkpoint))


def test_names_on_the_hub_stay_as_they_are(tmp_path: Path) -> None:
    policy = {"class_path": "PretrainedPolicy", "init_args": {"path": "owner/name", "adapter": None}}
    settings = {"policy": policy, "reference_path": "owner/other"}
    assert find_models(settings, tmp_path) == settings


def test_missing_reference_is_no_error_yet(tmp_path: Path) -> None:
    settings = {"policy": {"init_args": {"width": 16}}, "reference_path": str(tmp_path / "gone")}
    assert find_models(settings, tmp_path) == settings
