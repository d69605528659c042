"""Tests of exported adapters, opened by peft."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lpc_lightning.errors import ConfigError, UnsupportedPolicyError
from lpc_lightning.inference.export import export
from lpc_lightning.inference.opening import open_policy
from lpc_lightning.inference.trained_policy import TrainedPolicy
from tests.inference.conftest import CODED, batch

pytestmark = pytest.mark.slow
FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md", "training.json", "digests.json"}
FILES |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


@pytest.fixture(scope="module")
def trained(fitted: Callable[..., Path], plain: str) -> Path:
    """Checkpoint of an adapter on a model in a folder."""
    return fitted(
        "--policy=PretrainedPolicy", f"--policy.path={plain}", "--policy.lora.rank=2", "--model.optimizer.lr=0.1"
    )


@pytest.fixture(scope="module")
def folder(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export of the adapter alone."""
    return export(str(trained), str(tmp_path_factory.mktemp("adapters") / "mine"), adapter=True)


def test_files_of_an_adapter(folder: Path, plain: str, trained: Path) -> None:
    assert {file.name for file in folder.iterdir()} == FILES
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["r"], settings["peft_type"]) == (plain, 2, "LORA")
    state = torch.load(trained, weights_only=True)["state_dict"]
    stored = load_file(folder / "adapter_model.safetensors")
    expected = {name.removeprefix("policy.model.").replace(".default.", "."): value for name, value in state.items()}
    assert {name: value for name, value in expected.items() if "lora" in name}.keys() == stored.keys()
    assert all(torch.equal(value, expected[name]) for name, value in stored.items())


@torch.no_grad()
def test_peft_opens_an_adapter(folder: Path, trained: Path, tmp_path: Path) -> None:
    """As its card says. The logits are those of the checkpoint and of the merged export."""
    opened = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert "AutoPeftModelForCausalLM.from_pretrained(folder)" in (folder / "README.md").read_text()
    AutoTokenizer.from_pretrained(folder)
    expected = open_policy(str(trained)).causal_lm(**batch()).logits
    merged = open_policy(str(export(str(trained), str(tmp_path / "merged"))))
    torch.testing.assert_close(opened(**batch()).logits, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged.causal_lm(**batch()).logits, expected, rtol=1e-5, atol=1e-6)
    with opened.disable_adapter():
        assert (opened(**batch()).logits - expected).abs().max() > 1e-2


@torch.no_grad()
def test_the_suite_opens_an_adapter(folder: Path, trained: Path) -> None:
    opened, checkpoint = open_policy(str(folder)), open_policy(str(trained))
    assert (opened.kind, opened.name, opened.template) == ("model", "mine", checkpoint.template)
    assert opened.origin["training"]["algorithm"] == "DPO"
    expected = checkpoint.causal_lm(**batch()).logits
    for policy in (opened.policy, TrainedPolicy(str(folder)).build()):
        torch.testing.assert_close(policy.causal_lm(**batch()).logits, expected, rtol=1e-5, atol=1e-6)


def test_half_precision_of_an_adapter(
    trained: Path, folder: Path, plain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = load_file(
        export(str(trained), str(tmp_path / "half"), "bfloat16", adapter=True) / "adapter_model.safetensors"
    )
    assert f"names the base model by a folder of this machine, {plain}." in capsys.readouterr().out
    full = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(half[name], value.bfloat16()) for name, value in full.items())


def test_a_damaged_adapter_is_refused(trained: Path, tmp_path: Path) -> None:
    damaged = export(str(trained), str(tmp_path / "damaged"), adapter=True)
    weights = damaged / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UnsupportedPolicyError, match=r"adapter_model.safetensors does not have the SHA-256"):
        open_policy(str(damaged))


@pytest.mark.parametrize(
    ("file", "old", "new", "setting"),
    [
        ("adapter_config.json", '"base_model_name_or_path": "{plain}"', '"base_model_name_or_path": "{moved}"', None),
        ("adapter_config.json", '"lora_alpha": ', '"lora_alpha": 1', "policy.adapter"),
        ("training.json", '"DPO"', '"IPO"', "policy.adapter"),
        ("chat_template.jinja", "", " ", "policy.tokenizer"),
    ],
)
def test_edited_adapter_gives_at_most_one_warning(
    file: str, old: str, new: str, setting: str | None, folder: Path, plain: str, tmp_path: Path
) -> None:
    """The name of the base model is to be changed on another machine."""
    base, adapter = shutil.copytree(plain, tmp_path / "base"), shutil.copytree(folder, tmp_path / "moved")
    text = (adapter / file).read_text()
    edited = text.replace(old.replace("{plain}", plain), new.replace("{moved}", str(base)), 1)
    assert edited != text
    (adapter / file).write_text(edited)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        open_policy(str(adapter))
    messages = [str(each.message) for each in caught if "changed after the folder was written" in str(each.message)]
    assert messages == [] if setting is None else len(messages) == 1 and messages[0].startswith(f"{setting}: {file} in")


@pytest.fixture(scope="module")
def latent_export(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export of a policy with a latent, to train on."""
    return export(str(checkpoint), str(tmp_path_factory.mktemp("bases") / "base"))


@pytest.mark.filterwarnings("ignore:policy.path. found an export with a latent")
@torch.no_grad()
def test_adapter_trained_on_the_export_of_a_latent(
    latent_export: Path, fitted: Callable[..., Path], tmp_path: Path
) -> None:
    """It was trained at z = 0. Its folder holds no latent, and that of its base model is not taken."""
    path = ["--policy=PretrainedPolicy", f"--policy.path={latent_export}"]
    trained = fitted(*path, "--policy.lora.rank=2", "--model.optimizer.lr=0.1")
    adapter = export(str(trained), str(tmp_path / "mine"), adapter=True)
    expected, base = open_policy(str(trained)).causal_lm(**batch()).logits, open_policy(str(latent_export))
    for trusted in (False, True):
        opened = open_policy(str(adapter), trust_remote_code=trusted)
        assert (opened.kind, opened.prior) == ("model", None)
        torch.testing.assert_close(opened.causal_lm(**batch()).logits, expected, rtol=1e-5, atol=1e-6)
    again = TrainedPolicy(str(adapter)).build().causal_lm(**batch()).logits
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-6)
    for other in (base.causal_lm, base.policy.causal_lm):
        assert (other(**batch()).logits - expected).abs().max() > 1e-3


@torch.no_grad()
def test_adapter_of_peft_trained_under_a_latent(latent_export: Path, tmp_path: Path) -> None:
    """Its folder does not state whether it was trained with the latent. The advice of the warning keeps both."""
    latent = AutoModelForCausalLM.from_pretrained(latent_export, trust_remote_code=True)
    adapted = get_peft_model(latent, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    expected = adapted(**batch()).logits
    adapted.save_pretrained(tmp_path / "peft")
    message = r"peft: found an adapter whose base model .*base has a latent.*merge_and_unload\(\)\.save_pretrained\("
    with pytest.warns(UserWarning, match=message):
        opened = open_policy(str(tmp_path / "peft"))
    assert opened.prior is None
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(latent_export), tmp_path / "peft")
    torch.testing.assert_close(opened.causal_lm(**batch()).logits, stock(**batch()).logits, rtol=1e-5, atol=1e-6)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(latent_export).save_pretrained(tmp_path / "merged")
    merged = open_policy(str(tmp_path / "merged"))
    torch.testing.assert_close(merged.causal_lm(**batch()).logits, expected, rtol=1e-5, atol=1e-6)


def test_adapters_that_cannot_stand_alone(
    fitted: Callable[..., Path], plain: str, folder: Path, tmp_path: Path
) -> None:
    lora, path = "--policy.lora.rank=2", ["--policy=PretrainedPolicy", f"--policy.path={plain}"]
    refused = [
        ([], "found a policy whose weights were trained, expected one with policy.lora"),
        ([*CODED, lora, *path], "found a policy with a latent"),
        ([lora], "trained on TinyPolicy. No folder holds these weights"),
        ([lora, *path, f"--policy.adapter={folder}"], r"trained on .*plain with the adapter .*mine \(merged\)"),
    ]
    for flags, outcome in refused:
        with pytest.raises(ConfigError, match=f"^adapter: .*{outcome}"):
            export(str(fitted(*flags)), str(tmp_path / "out"), adapter=True)
    assert list(tmp_path.iterdir()) == []
