"""Tests of the files of an export, of its settings, and of models that are opened from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lpc_lightning.algorithms import DPO
from lpc_lightning.errors import CheckpointError, ConfigError
from lpc_lightning.inference.code_biases import CodeBiases
from lpc_lightning.inference.export import export
from lpc_lightning.inference.modeling_lpc import LatentCausalLM
from lpc_lightning.inference.opening import open_module, open_policy
from lpc_lightning.policy import PretrainedPolicy, TinyPolicy
from tests.inference.conftest import CASES, CODED, FILES, LATENT_FILES, batch

pytestmark = pytest.mark.slow


# What is in the folder


def test_files(exported: dict[str, Path]) -> None:
    for case, folder in exported.items():
        assert {file.name for file in folder.iterdir()} == (FILES if case == "plain" else FILES | LATENT_FILES)
        assert {oct(file.stat().st_mode) for file in folder.iterdir()} == {oct((folder / "config.json").stat().st_mode)}
    assert {each.name for each in exported["codes"].parent.iterdir()} == set(CASES)  # nothing is left beside them


def test_config(exported: dict[str, Path]) -> None:
    config = json.loads((exported["codes"] / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_lpc.LatentCausalLM"}
    assert config["lpc"] == {"kind": "discrete", "num_codes": 5, "prior_mode": "mean"}
    plain = json.loads((exported["plain"] / "config.json").read_text())
    assert not {"lpc", "auto_map"} & set(plain)


def test_export_holds_the_checkpoint_weights(exported: dict[str, Path], checkpoint: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    weights = load_file(exported["codes"] / "model.safetensors")
    assert {f"policy.model.{name}" for name in weights} == {name for name in state if name.startswith("policy.")}
    assert all(torch.equal(state[f"policy.model.{name}"], value) for name, value in weights.items())
    latent = load_file(exported["codes"] / "latent.safetensors")
    assert torch.equal(latent.pop("codebook"), state["latent.codebook.weight"])
    assert latent.keys() == {f"prior.{layer}.{what}" for layer in ("first", "second") for what in ("weight", "bias")}
    assert state["latent.prior.moments.pairs"] > 0
    deviation = open_module(str(checkpoint)).latent.prior.moments.deviation  # type: ignore[union-attr]
    weight = state["latent.prior.first.weight"] / deviation
    bias = state["latent.prior.first.bias"] - weight @ state["latent.prior.moments.mean"]
    assert torch.equal(latent.pop("prior.first.weight"), weight)
    assert torch.equal(latent.pop("prior.first.bias"), bias)
    assert all(torch.equal(state[f"latent.{name}"], value) for name, value in latent.items())


def test_an_adapter_is_merged(exported: dict[str, Path], fitted: Callable[..., Path]) -> None:
    state = torch.load(fitted(*CASES["adapter"]), weights_only=True)["state_dict"]
    weights = load_file(exported["adapter"] / "model.safetensors")
    assert not [name for name in weights if "lora" in name or "base_layer" in name]
    place = "layers.0.self_attn.q_proj"
    down, up = (next(value for name, value in state.items() if f"{place}.lora_{side}" in name) for side in ("A", "B"))
    base = open_policy(str(fitted(*CASES["adapter"]))).policy.causal_lm.get_parameter(
        f"model.{place}.base_layer.weight"
    )
    expected = base + 32 / 2 * up @ down  # alpha / rank
    torch.testing.assert_close(weights[f"model.{place}.weight"], expected, rtol=1e-6, atol=1e-7)
    assert (expected - base).abs().max() > 1e-4


def test_tied_weights_are_stored_once(exported: dict[str, Path]) -> None:
    assert json.loads((exported["tied"] / "config.json").read_text())["tie_word_embeddings"]
    assert "lm_head.weight" not in load_file(exported["tied"] / "model.safetensors")


def test_half_precision(
    checkpoint: Path, fitted: Callable[..., Path], exported: dict[str, Path], tmp_path: Path
) -> None:
    folder = export(str(checkpoint), str(tmp_path / "half"), dtype="bfloat16")
    full, half = (load_file(place / "model.safetensors") for place in (exported["codes"], folder))
    assert all(torch.equal(half[name], value.bfloat16()) for name, value in full.items())
    assert {value.dtype for value in load_file(folder / "latent.safetensors").values()} == {torch.float32}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    merged = load_file(export(str(fitted(*CASES["adapter"])), str(tmp_path / "lora"), "bfloat16") / "model.safetensors")
    # Merged first and rounded then.
    assert all(
        torch.equal(merged[name], value.bfloat16())
        for name, value in load_file(exported["adapter"] / "model.safetensors").items()
    )


def test_wider_export_has_exact_updates(fitted: Callable[..., Path], tmp_path: Path) -> None:
    """Weights of 16 bits and a float32 adapter, merged without a rounding between them."""
    base = TinyPolicy(width=16, layers=1, heads=2, dtype="bfloat16")
    base.build().causal_lm.save_pretrained(tmp_path / "base")
    base.load_tokenizer().save_pretrained(tmp_path / "base")
    policy = ["--policy=PretrainedPolicy", f"--policy.path={tmp_path / 'base'}", "--policy.dtype=bfloat16"]
    path = fitted(*policy, "--policy.lora.rank=2")
    state = torch.load(path, weights_only=True)["state_dict"]
    weights = load_file(export(str(path), str(tmp_path / "out"), "float32") / "model.safetensors")
    place = "layers.0.self_attn.q_proj"
    down, up = (next(value for name, value in state.items() if f"{place}.lora_{side}" in name) for side in ("A", "B"))
    start = load_file(tmp_path / "base" / "model.safetensors")[f"model.{place}.weight"].float()
    torch.testing.assert_close(weights[f"model.{place}.weight"] - start, 32 / 2 * up @ down, rtol=1e-4, atol=1e-7)


def test_dropout_is_as_published(fitted: Callable[..., Path], tmp_path: Path) -> None:
    path = fitted(*CODED, '--policy.options={"attention_dropout": 0.25}')
    assert open_policy(str(path)).policy.causal_lm.config.attention_dropout == 0
    folder = export(str(path), str(tmp_path / "out"))
    assert json.loads((folder / "config.json").read_text())["attention_dropout"] == 0.25


def test_answers_end_where_training_ended_them(fitted: Callable[..., Path], tmp_path: Path) -> None:
    """A base model's own end token is another one than its chat template's."""
    base = export(str(fitted()), str(tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    end, other = tokenizer.eos_token_id, tokenizer.bos_token_id
    tokenizer.eos_token = tokenizer.bos_token
    tokenizer.save_pretrained(base)
    config = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": other}))
    (base / "digests.json").unlink()
    pretrained = ["--policy=PretrainedPolicy", f"--policy.path={base}"]
    folder = export(str(fitted(*CODED, *pretrained)), str(tmp_path / "out"))
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [other, end]
    assert json.loads((base / "generation_config.json").read_text())["eos_token_id"] == other


@pytest.mark.parametrize("published", [{"temperature": 0.9, "top_p": 0.6}, {"length_penalty": 0.8}])
def test_decoding_stays_as_published(published: dict[str, Any], fitted: Callable[..., Path], tmp_path: Path) -> None:
    """Flags that greedy decoding ignores, as Llama 2 was published. transformers refuses to save them in a change."""
    base = tmp_path / "base"
    spec = TinyPolicy(width=16, layers=1, heads=2)
    spec.build().causal_lm.save_pretrained(base)
    spec.load_tokenizer().save_pretrained(base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 1} | published))
    for name, latent in (("codes", CODED), ("plain", [])):
        checkpoint = fitted(*latent, "--policy=PretrainedPolicy", f"--policy.path={base}")
        folder = export(str(checkpoint), str(tmp_path / name))
        config = json.loads((folder / "generation_config.json").read_text())
        assert config.pop("transformers_version")
        assert config == {"eos_token_id": [1, 2]} | published
        stock = AutoModelForCausalLM.from_pretrained(base).generation_config
        found = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).generation_config
        assert found.to_diff_dict() | {"eos_token_id": 1} == stock.to_diff_dict()


# Settings


def test_prior_mode_is_a_setting(checkpoint: Path, tmp_path: Path, exported: dict[str, Path]) -> None:
    folder = export(str(checkpoint), str(tmp_path / "out"), prior_mode=3)
    assert json.loads((folder / "config.json").read_text())["lpc"]["prior_mode"] == 3
    fixed, free = open_policy(str(folder)), open_policy(str(exported["codes"]))
    with torch.no_grad():
        assert torch.equal(fixed.causal_lm(**batch()).logits, free.causal_lm(**batch(), prior_mode=3).logits)


def test_a_table_of_codes_on_request(checkpoint: Path, tmp_path: Path) -> None:
    folder = export(str(checkpoint), str(tmp_path / "out"), code_biases=True)
    table = load_file(folder / "code_biases.safetensors")["code_biases"]
    opened = open_policy(str(checkpoint))
    torch.testing.assert_close(table, opened.prior.codebook @ opened.policy.head.weight.T)
    assert "`code_biases.safetensors` holds that table" in (folder / "README.md").read_text()


@torch.no_grad()
def test_table_of_earlier_weights_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """The model is changed and saved into its own folder, where the table of the export stays."""
    folder = export(str(checkpoint), str(tmp_path / "out"), code_biases=True)
    model = LatentCausalLM.from_pretrained(folder)
    torch.testing.assert_close(CodeBiases.read(folder).table, model.code_biases())
    model.latent_prior.codebook.mul_(3)
    model.save_pretrained(folder)
    assert set(json.loads((folder / "digests.json").read_text())) == {"model.safetensors", "latent.safetensors"}
    with pytest.raises(ConfigError, match=r"code_biases\.safetensors has no SHA-256 in .*Export the checkpoint again"):
        CodeBiases.read(folder)
    assert torch.equal(open_policy(str(folder)).prior.codebook, model.latent_prior.codebook)


def test_settings_that_the_checkpoint_cannot_have(fitted: Callable[..., Path], tmp_path: Path) -> None:
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("codes", {"prior_mode": 5}, "prior_mode: found 5, expected one of mean, sample, argmax, or .* 0 to 4"),
        ("plain", {"prior_mode": "mean"}, "prior_mode: found 'mean' for a policy that was trained without a latent"),
        ("plain", {"code_biases": True}, "code_biases: the policy was trained without a latent"),
        ("gaussian", {"code_biases": True}, "code_biases: a latent of kind gaussian has no codes"),
        ("soft-cap", {"code_biases": True}, "found a head that is not linear"),
    ]
    for case, requested, outcome in refused:
        with pytest.raises(ConfigError, match=outcome):
            export(str(fitted(*CASES[case])), str(tmp_path / "out"), **requested)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="found no file"):
        export("none.ckpt", str(tmp_path / "out"))


# Models from an export


@pytest.mark.parametrize("trusted", [False, True])
@torch.no_grad()
def test_the_suite_opens_its_own_exports(trusted: bool, checkpoint: Path, exported: dict[str, Path]) -> None:
    """The code of an export is run by stock transformers only."""
    trained, opened = open_policy(str(checkpoint)), open_policy(str(exported["codes"]), trust_remote_code=trusted)
    assert (opened.kind, opened.name) == ("export", "codes")
    assert opened.prior.settings == trained.prior.settings
    assert torch.equal(opened.causal_lm(**batch()).logits, trained.causal_lm(**batch()).logits)
    assert opened.origin["latent"] == {"kind": "discrete", "num_codes": 5, "prior_mode": "mean"}
    assert opened.origin["training"]["algorithm"] == "DPO"
    assert opened.origin["training"]["step"] == 2
    assert json.loads(json.dumps(opened.origin)) == opened.origin
    assert open_policy(str(exported["plain"])).kind == "model"


def test_fit_from_an_export_starts_without_its_latent(exported: dict[str, Path], fit_run: Any) -> None:
    """The policy is the stock model in the folder. The latent is lost, and the run warns."""
    policy = PretrainedPolicy(str(exported["codes"]))
    with pytest.warns(UserWarning, match="found an export with a latent in .* The latent in the export is not used"):
        run = fit_run(DPO(policy=policy), max_steps=1)
    stock = AutoModelForCausalLM.from_pretrained(exported["codes"])
    start = PretrainedPolicy(str(exported["codes"])).build().causal_lm
    assert all(torch.equal(value, start.state_dict()[name]) for name, value in stock.state_dict().items())
    assert run.trainer.global_step == 1


@pytest.mark.filterwarnings("ignore:policy.path. found an export with a latent")
def test_fit_without_the_latent_of_an_export(
    exported: dict[str, Path], fitted: Callable[..., Path], tmp_path: Path
) -> None:
    """The export of such a fit is a plain model, whichever way the fit takes the policy from the first export."""
    for policy in (["TrainedPolicy", "--policy.keep_latent=false"], ["PretrainedPolicy"]):
        kind, *settings = policy
        checkpoint = fitted(f"--policy={kind}", f"--policy.path={exported['codes']}", *settings)
        folder = export(str(checkpoint), str(tmp_path / kind))
        assert not {"lpc", "auto_map"} & set(json.loads((folder / "config.json").read_text()))
        assert open_policy(str(folder)).kind == "model"


def test_plain_model_of_an_export_is_saved_alone(exported: dict[str, Path], tmp_path: Path) -> None:
    latent = LatentCausalLM.from_pretrained(exported["codes"])
    latent.config.auto_map |= {"AutoConfig": "name/of_base--configuration_base.Config"}
    latent.plain_causal_lm().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "lpc" not in config
    assert config["auto_map"] == {"AutoConfig": "name/of_base--configuration_base.Config"}
    assert latent.config.lpc == {"kind": "discrete", "num_codes": 5, "prior_mode": "mean"}


def test_the_model_refuses_to_be_saved_by_halves(fitted: Callable[..., Path], tmp_path: Path, llama: Any) -> None:
    adapted = open_policy(str(fitted(*CASES["adapter"]))).causal_lm
    with pytest.raises(ValueError, match="save_pretrained: found an adapter in the model, expected it merged"):
        adapted.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="save_pretrained: found push_to_hub, expected a local save"):
        llama.model.save_pretrained(tmp_path, push_to_hub=True)
    assert list(tmp_path.iterdir()) == []
