"""Tests of exports of models whose classes are code that comes with the base model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lpc_lightning.errors import ConfigError
from lpc_lightning.inference.export import export
from lpc_lightning.inference.opening import open_policy
from lpc_lightning.policy import TinyPolicy
from tests.inference.conftest import CODED, batch

pytestmark = pytest.mark.slow
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MarkedConfig(LlamaConfig):
    model_type = "marked"

class MarkedForCausalLM(LlamaForCausalLM):
    config_class = MarkedConfig
"""
LOADERS = {"AutoConfig": "marked.MarkedConfig", "AutoModelForCausalLM": "marked.MarkedForCausalLM"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model of a type that transformers does not have, with its code."""
    folder = tmp_path_factory.mktemp("base")
    spec = TinyPolicy(width=16, layers=1, heads=2)
    spec.build().causal_lm.save_pretrained(folder)
    spec.load_tokenizer().save_pretrained(folder)
    (folder / "marked.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "marked", "auto_map": LOADERS}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr("sys.path", [*sys.path])
        yield folder


@pytest.fixture(scope="module")
def flags(base: Path) -> list[str]:
    return ["--policy=PretrainedPolicy", f"--policy.path={base}", "--policy.trust_remote_code=true"]


def test_latent_on_code_of_the_base(flags: list[str], fitted: Callable[..., Path], tmp_path: Path) -> None:
    """Transformers would open the folder by the code of the base model, without the latent."""
    checkpoint = str(fitted(*flags, *CODED))
    with pytest.raises(ConfigError, match=r"checkpoint: found a latent on MarkedForCausalLM, .*\. Use the checkpoint"):
        export(checkpoint, str(tmp_path / "out"), trust_remote_code=True)
    model = open_policy(checkpoint, trust_remote_code=True).causal_lm
    with pytest.raises(ValueError, match="save_pretrained: found MarkedForCausalLM, whose code comes with"):
        model.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_plain_export_keeps_code_of_the_base(flags: list[str], fitted: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = str(fitted(*flags))
    folder = export(checkpoint, str(tmp_path / "out"), trust_remote_code=True)
    assert json.loads((folder / "config.json").read_text())["auto_map"] == LOADERS
    assert (folder / "marked.py").read_text() == CODE
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == "MarkedForCausalLM"
    expected = open_policy(checkpoint, trust_remote_code=True).causal_lm(**batch()).logits
    assert torch.equal(model(**batch()).logits, expected)


@torch.no_grad()
def test_adapter_on_code_of_the_base(flags: list[str], fitted: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = str(fitted(*flags, "--policy.lora.rank=2"))
    folder = export(checkpoint, str(tmp_path / "out"), adapter=True, trust_remote_code=True)
    expected = open_policy(checkpoint, trust_remote_code=True).causal_lm(**batch()).logits
    found = open_policy(str(folder), trust_remote_code=True).causal_lm(**batch()).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # merged here, beside the weights there


@torch.no_grad()
def test_export_without_code_names_none(fitted: Callable[..., Path], base: Path, tmp_path: Path) -> None:
    """A base model that has code of its own and a type of transformers, opened by transformers."""
    known = tmp_path / "known"
    known.mkdir()
    for file in base.iterdir():
        (known / file.name).write_bytes(file.read_bytes())
    config = json.loads((known / "config.json").read_text())
    (known / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    checkpoint = str(fitted("--policy=PretrainedPolicy", f"--policy.path={known}"))
    folder = export(checkpoint, str(tmp_path / "out"))
    assert not (folder / "marked.py").exists()
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(model(**batch()).logits, open_policy(checkpoint).causal_lm(**batch()).logits)
