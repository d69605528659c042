"""What is opened is what was trained, or published; and one sentence where there is nothing to open."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from lpc_lightning.algorithms import DPO
from lpc_lightning.errors import CheckpointError, ConfigError, UnsupportedPolicyError
from lpc_lightning.inference.checkpoints import read_checkpoint
from lpc_lightning.inference.opening import load_policy, open_module, open_policy
from lpc_lightning.policy import TinyPolicy

CODED = ["--latent=MarginalSpace", "--latent.num_codes=5", "--latent.hidden=8", "--latent.init_logit_std=1.0"]
IDS = torch.randint(3, 1024, (1, 9), generator=torch.Generator().manual_seed(0))


def stored(path: Path) -> Any:
    return torch.load(path, weights_only=True)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.fixture(scope="session")
def lora_checkpoint(fitted: Callable[..., Path]) -> Path:
    return fitted(*CODED, "--policy.lora.rank=2", "--policy.lora.dropout=0.5")


# A checkpoint


@torch.no_grad()
def test_a_checkpoint_is_policy_and_prior_as_trained(checkpoint: Path) -> None:
    opened = open_policy(str(checkpoint))
    state = stored(checkpoint)["state_dict"]
    weights = dict(opened.policy.named_parameters())
    trained = {name.removeprefix("policy."): value for name, value in state.items() if name.startswith("policy.")}
    assert weights.keys() == trained.keys()
    assert all(torch.equal(weights[name], value) for name, value in trained.items())
    untrained = TinyPolicy(width=16, layers=1, heads=2).build()
    assert (logits(untrained.causal_lm) - logits(opened.policy.causal_lm)).abs().max() > 1e-3

    assert opened.kind == "checkpoint"
    assert opened.prior is not None
    assert opened.prior.settings == {"kind": "discrete", "num_codes": 5, "prior_mode": "mean"}
    assert torch.equal(opened.prior.codebook, state["latent.codebook.weight"])
    space = open_module(str(checkpoint)).latent
    states = torch.randn(3, 16)
    torch.testing.assert_close(opened.prior(states), space.infer(states))
    assert opened.tokenizer.encode("text") == TinyPolicy().load_tokenizer().encode("text")


@torch.no_grad()
def test_module_answers_under_its_latent(checkpoint: Path) -> None:
    opened = open_policy(str(checkpoint))
    states = opened.policy.backbone(input_ids=IDS).last_hidden_state
    z = opened.prior(states[:, -1])
    expected = (states + z) @ opened.policy.head.weight.T
    torch.testing.assert_close(logits(opened.causal_lm), expected)
    assert (logits(opened.causal_lm) - logits(opened.policy.causal_lm)).abs().max() > 1e-3
    assert opened.causal_lm is opened.causal_lm
    assert opened.causal_lm.get_output_embeddings() is opened.policy.causal_lm.get_output_embeddings()


def test_it_is_ready_to_be_used_and_no_more(checkpoint: Path) -> None:
    opened = open_policy(str(checkpoint))
    for module in (opened.policy, opened.prior, opened.causal_lm):
        assert not any(child.training for child in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_plain_checkpoint_has_no_prior(fitted: Callable[..., Path]) -> None:
    opened = open_policy(str(fitted()))
    assert opened.prior is None
    assert opened.causal_lm is opened.policy.causal_lm
    assert opened.origin["latent"] is None


@torch.no_grad()
def test_an_adapter_is_active_and_its_dropout_off(lora_checkpoint: Path) -> None:
    opened = open_policy(str(lora_checkpoint))
    adapted = logits(opened.policy.causal_lm)
    assert torch.equal(logits(opened.policy.causal_lm), adapted)
    with opened.policy.as_reference():
        bare = logits(opened.policy.causal_lm)
    assert torch.equal(bare, logits(TinyPolicy(width=16, layers=1, heads=2).build().causal_lm))
    assert (adapted - bare).abs().max() > 1e-4
    state = stored(lora_checkpoint)["state_dict"]
    weights = {f"policy.{name}": value for name, value in opened.policy.named_parameters()}
    assert all(torch.equal(weights[name], value) for name, value in state.items() if name.startswith("policy."))


def test_open_policy_origin(checkpoint: Path) -> None:
    origin = open_policy(str(checkpoint)).origin
    assert json.loads(json.dumps(origin)) == origin
    assert origin["path"] == str(checkpoint)
    assert (origin["kind"], origin["algorithm"], origin["step"], origin["epoch"]) == ("checkpoint", "DPO", 2, 1)
    assert origin["settings"]["beta"] == 0.1
    assert origin["settings"]["optimizer"]["init_args"]["lr"] == 0.01
    assert not {"policy", "latent", "_class_path", "_instantiator"} & set(origin["settings"])
    assert origin["policy"]["init_args"]["width"] == 16
    assert origin["latent"]["init_args"]["num_codes"] == 5
    assert (origin["seed"], origin["training_pairs"], origin["dtype"]) == (4, 4, "float32")
    assert origin["data"]["init_args"]["train_pairs"] == 4
    assert origin["trainer"]["precision"] == "32-true"


def test_origin_without_the_runs_folder(checkpoint: Path, tmp_path: Path) -> None:
    alone = tmp_path / "some.ckpt"
    alone.write_bytes(checkpoint.read_bytes())
    origin = open_policy(str(alone)).origin
    assert (origin["algorithm"], origin["step"]) == ("DPO", 2)
    assert (origin["seed"], origin["data"], origin["trainer"]) == (None, None, {})


def test_names(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_policy(str(checkpoint)).name == "version_0-best"
    assert open_policy(str(checkpoint), name="mine").name == "mine"
    monkeypatch.chdir(checkpoint.parent)
    assert open_policy("best.ckpt").name == "version_0-best"
    place = tmp_path / "kept" / "some.ckpt"
    place.parent.mkdir()
    place.write_bytes(checkpoint.read_bytes())
    assert open_policy(str(place)).name == "kept-some"


@torch.no_grad()
def test_types(checkpoint: Path, fitted: Callable[..., Path]) -> None:
    narrow = open_policy(str(checkpoint), dtype="bfloat16")
    wide = open_policy(str(checkpoint))
    assert (wide.policy.model.dtype, narrow.policy.model.dtype) == (torch.float32, torch.bfloat16)
    assert narrow.origin["dtype"] == "bfloat16"
    for name, value in wide.policy.named_parameters():
        assert torch.equal(narrow.policy.get_parameter(name), value.bfloat16())
    # Rotary frequencies are not weights: rounded, they would turn far tokens by a wrong angle.
    assert narrow.policy.backbone.rotary_emb.inv_freq.dtype == torch.float32
    assert narrow.prior.codebook.dtype == torch.float32

    half = fitted(*CODED, "--trainer.precision=bf16-true")
    kept = {value.dtype for name, value in stored(half)["state_dict"].items() if name.startswith("policy.")}
    assert kept == {torch.bfloat16}
    assert open_policy(str(half)).policy.model.dtype == torch.bfloat16
    assert open_policy(str(half), dtype="float32").policy.model.dtype == torch.float32


ADAPTER, FROZEN = "--policy.lora.rank=2", "--policy.trainable=false"


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ([ADAPTER, "--trainer.precision=bf16-true"], torch.bfloat16),
        ([ADAPTER, "--policy.dtype=bfloat16"], torch.bfloat16),
        ([ADAPTER, "--trainer.precision=64-true"], torch.float64),
        ([FROZEN, "--trainer.precision=bf16-true"], torch.bfloat16),
        ([FROZEN, "--policy.dtype=bfloat16"], torch.bfloat16),
        ([FROZEN], torch.float32),
    ],
)
def test_type_of_weights_outside_the_checkpoint(
    settings: list[str], dtype: torch.dtype, fitted: Callable[..., Path]
) -> None:
    """A checkpoint of an adapter or a frozen policy does not hold them."""
    opened = open_policy(str(fitted(*CODED, *settings)))
    assert opened.policy.causal_lm.get_output_embeddings().weight.dtype == dtype
    assert opened.origin["dtype"] == str(dtype).removeprefix("torch.")


def test_opened_policy_is_not_compiled(checkpoint: Path, tmp_path: Path) -> None:
    """Compilation is for training. The machine may have no compiler."""
    kept = stored(checkpoint)
    kept["hyper_parameters"]["policy"]["init_args"]["compile"] = True
    torch.save(kept, tmp_path / "compiled.ckpt")
    assert not open_policy(str(tmp_path / "compiled.ckpt")).policy.is_compiled
    assert not open_module(str(tmp_path / "compiled.ckpt")).policy.is_compiled


def test_opened_policy_keeps_no_states(fitted: Any) -> None:
    """A sequence that is read once takes longer with kept states."""
    path = str(fitted(*CODED, FROZEN, "--policy.frozen_states_gib=1"))
    assert stored(Path(path))["hyper_parameters"]["policy"]["init_args"]["frozen_states_gib"] == 1.0
    assert open_policy(path).policy.frozen_states is None
    assert open_module(path).policy.frozen_states is None


def test_opening_leaves_the_random_state_alone(checkpoint: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    open_policy(str(checkpoint))
    open_module(str(checkpoint))
    assert torch.equal(torch.rand(3), expected)


# A module


def test_a_module_is_what_lightning_loads(checkpoint: Path, lora_checkpoint: Path) -> None:
    for path in (checkpoint, lora_checkpoint):
        ours, theirs = open_module(str(path)), LightningModule.load_from_checkpoint(path, weights_only=True)
        assert type(ours) is type(theirs) is DPO
        assert not ours.training
        found, expected = ours.state_dict(), theirs.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_open_module_with_reference(checkpoint: Path) -> None:
    assert open_module(str(checkpoint)).reference is not None
    module, _ = load_policy(str(checkpoint))
    assert module.reference is None


# A plain model


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory, perturb: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "small-gpt2"
    spec = TinyPolicy("gpt2", width=16, layers=1, heads=2, context=64)
    model = spec.build().causal_lm
    perturb(model)
    model.save_pretrained(folder)
    spec.load_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def test_a_plain_folder(plain_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_policy(str(plain_folder))
    assert (opened.kind, opened.name, opened.prior) == ("model", "small-gpt2", None)
    assert opened.origin == {"path": str(plain_folder), "kind": "model", "dtype": "float32"}
    assert type(opened.causal_lm) is GPT2LMHeadModel
    assert torch.equal(logits(opened.causal_lm), logits(AutoModelForCausalLM.from_pretrained(plain_folder)))
    assert open_policy(str(plain_folder), dtype="bfloat16").policy.model.dtype == torch.bfloat16
    monkeypatch.chdir(plain_folder.parent)
    assert open_policy("small-gpt2").name == "small-gpt2"
    assert open_policy("small-gpt2/").name == "small-gpt2"
    monkeypatch.chdir(plain_folder)
    assert open_policy(".").name == "small-gpt2"


def test_plain_folder_keeps_its_dtype(plain_folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(plain_folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    for file in plain_folder.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert open_policy(str(tmp_path)).policy.model.dtype == torch.bfloat16
    assert open_policy(str(tmp_path), dtype="float32").policy.model.dtype == torch.float32


# Nothing of these


def test_what_is_no_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"found no file nowhere/best.ckpt, expected a checkpoint such as runs/"):
        open_policy("nowhere/best.ckpt")
    text = tmp_path / "notes.ckpt"
    text.write_text("not one")
    with pytest.raises(CheckpointError, match=r"notes.ckpt is no checkpoint, or one that was cut short"):
        open_policy(str(text))
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(checkpoint.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match=r"cut.ckpt is no checkpoint, or one that was cut short"):
        open_module(str(cut))
    other = tmp_path / "other.ckpt"
    torch.save({"weights": torch.ones(2)}, other)
    with pytest.raises(CheckpointError, match=r"other.ckpt has no record of its policy and algorithm"):
        open_policy(str(other))
    code = tmp_path / "code.ckpt"
    torch.save({"weights": Path("x")}, code)
    with pytest.raises(CheckpointError, match=r"code.ckpt cannot be read \(UnpicklingError: "):
        open_policy(str(code))
    sharded = tmp_path / "sharded.ckpt"
    sharded.mkdir()
    for path in (str(sharded), f"{sharded}/"):  # shells complete a folder with a slash
        with pytest.raises(CheckpointError, match=r"sharded.ckpt is a folder without shards, expected a checkpoint"):
            open_policy(path)
    for file in ("meta.pt", ".metadata"):
        (sharded / file).write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match=r"sharded.ckpt/digests.json cannot be read .*Take another checkpoint"):
        read_checkpoint(sharded)
    with pytest.raises(CheckpointError, match=r"sharded.ckpt cannot be read \(UnpicklingError: .*Take another one"):
        read_checkpoint(sharded, weights=False)


def test_a_module_that_was_built_in_code(tmp_path: Path, make_trainer: Any, make_loader: Any, make_pairs: Any) -> None:
    module = DPO(policy=TinyPolicy(width=16, layers=1, heads=2), reference="live")
    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    pairs = make_pairs([(3, 2, 2)])
    trainer.fit(module, make_loader(pairs), make_loader(pairs))
    trainer.save_checkpoint(tmp_path / "code.ckpt")
    with pytest.raises(
        CheckpointError, match=r"has no record of its policy .* `DPO.load_from_checkpoint\(path, policy="
    ):
        open_policy(str(tmp_path / "code.ckpt"))


def test_open_policy_class_not_imported(checkpoint: Path, tmp_path: Path) -> None:
    kept = stored(checkpoint)
    for name in ("somewhere.Else", "os.system", "lpc_lightning.policy.TinyPolicy"):
        kept["hyper_parameters"]["_class_path"] = name
        torch.save(kept, tmp_path / "other.ckpt")
        with pytest.raises(CheckpointError, match=f"names {name!r} as its _class_path, which is no imported class"):
            open_policy(str(tmp_path / "other.ckpt"))


def test_checkpoint_weights_must_match_settings(checkpoint: Path, tmp_path: Path) -> None:
    kept = stored(checkpoint)
    kept["hyper_parameters"]["policy"]["init_args"]["width"] = 32
    torch.save(kept, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="its weights are of another architecture"):
        open_policy(str(tmp_path / "other.ckpt"))


def test_a_path_that_is_nothing(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = "expected a checkpoint .*, an exported folder, or a plain model: a folder .*, a GGUF file or a hub name"
    with pytest.raises(UnsupportedPolicyError, match=f"{tmp_path}: found a folder without config.json, {kinds}"):
        open_policy(str(tmp_path))
    run = checkpoint.parents[1]
    with pytest.raises(UnsupportedPolicyError, match=rf"Did you mean {run}/checkpoints/best.ckpt\?"):
        open_policy(str(run))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnsupportedPolicyError, match=f"^could not load {tmp_path} in the folder or file: "):
        open_policy(str(tmp_path))
    for path in ("/no/such/place", "./nothing", "runs/version_9/weights"):
        with pytest.raises(UnsupportedPolicyError, match=f"found no file or folder {path}, {kinds}"):
            open_policy(path)


@pytest.mark.parametrize(
    ("requested", "output"),
    [
        ({"dtype": "int8"}, "dtype: found 'int8', expected auto, float32, bfloat16"),
        ({"device": "gpu7"}, r"device: found 'gpu7' \(.*\), expected auto, cpu, cuda"),
    ],
)
def test_settings_out_of_range(requested: dict[str, str], output: str, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=output):
        open_policy(str(checkpoint), **requested)
