"""Fits that start from an adapter: policy and reference against peft's own loading of the same adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from lpc_lightning.algorithms import DPO
from lpc_lightning.data.batching.layouts import PaddedLayout
from lpc_lightning.data.tokenization.templates import make_template
from lpc_lightning.errors import ConfigError, UnsupportedPolicyError
from lpc_lightning.inference.export import plain_model
from lpc_lightning.policy import LoRA, PretrainedPolicy, TinyPolicy, policy_fingerprint
from lpc_lightning.types import TokenizedPair

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")  # from peft
TINY: dict[str, Any] = {"width": 16, "layers": 2, "heads": 2}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""Stock models compute norms in float32, and read one sequence at a time."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a base model."""
    folder = tmp_path_factory.mktemp("base")
    spec = TinyPolicy(**TINY, dtype="float64")
    spec.build().causal_lm.save_pretrained(folder)
    spec.load_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def save_adapter(base: Path, tmp_path: Path, perturb: Callable[..., None]) -> Callable[..., str]:
    """Return a function that writes an adapter, trained by noise, as peft writes it."""

    def save(name: str = "adapter", kind: type = LoraConfig, **settings: Any) -> str:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        lora = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"]}
        torch.manual_seed(2)
        own = lora | settings if kind is LoraConfig else settings
        adapted = get_peft_model(model, kind(task_type="CAUSAL_LM", **own))
        perturb(torch.nn.ParameterList(p for p in adapted.parameters() if p.requires_grad), deviation=1.0, seed=4)
        adapted.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def pairs(make_pairs: Callable[..., list[TokenizedPair]]) -> list[TokenizedPair]:
    return make_pairs([(5, 3, 7), (11, 9, 1), (3, 4, 5)])


@pytest.fixture
def oracle(base: Path, naive_logps: Callable[..., Tensor], pairs: list[TokenizedPair]) -> Callable[..., Tensor]:
    """Return a function that loads base and adapter with peft, and computes (2B,) log-probabilities."""

    @torch.no_grad()
    def logps(adapter: str | None) -> Tensor:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        return naive_logps(model if adapter is None else PeftModel.from_pretrained(model, adapter).eval(), pairs)

    return logps


WAYS: dict[str, dict[str, Any]] = {
    "merged, all weights": {},
    "merged under an adapter": {"lora": LoRA(rank=2)},
    "kept under an adapter": {"lora": LoRA(rank=2), "merge_adapter": False},
}
every_way = pytest.mark.parametrize("way", list(WAYS))
EMBEDDINGS: dict[str, Any] = {"target_modules": ["embed_tokens", "q_proj"]}
ADAPTERS: dict[str, dict[str, Any]] = {
    "layers": {},
    "embeddings": EMBEDDINGS,
    "tokens": {"trainable_token_indices": list(range(0, 1024, 2))},
    "dropout": {"lora_dropout": 0.5},
}


@pytest.mark.parametrize("kind", list(ADAPTERS))
@every_way
@torch.no_grad()
def test_policy_and_reference_start_with_adapter(
    way: str,
    kind: str,
    base: Path,
    save_adapter: Any,
    oracle: Any,
    pairs: list[TokenizedPair],
    perturb: Callable[..., None],
) -> None:
    """The policy is in training mode, as in a fit. The oracle is not."""
    adapter = save_adapter(**ADAPTERS[kind])
    expected = oracle(adapter)
    assert (expected - oracle(None)).abs().min() > 0.01
    policy = PretrainedPolicy(str(base), adapter=adapter, dtype="float64", **WAYS[way]).build()
    batch = PaddedLayout(0)(pairs)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert policy.training
    torch.testing.assert_close(policy(batch).logps(), expected, **CLOSE)
    torch.testing.assert_close(policy.reference_logps(batch), expected, **CLOSE)
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == set(trained)
    if not WAYS[way]:
        assert len(trained) == len(list(policy.parameters()))
    else:
        assert all(".default." in name for name in trained)
        perturb(torch.nn.ParameterList(trained.values()))
        assert (policy(batch).logps() - expected).abs().min() > 1e-3
        torch.testing.assert_close(policy.reference_logps(batch), expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["cached", "live"])
@every_way
def test_trained_policy_keeps_adapter_in_reference(
    way: str,
    reference: Any,
    base: Path,
    save_adapter: Any,
    small_data: Any,
    fit_run: Any,
    tmp_path: Path,
    naive_logps: Callable[..., Tensor],
) -> None:
    """After two steps the rewards are still those against base and adapter, and the export has both adapters."""
    adapter = save_adapter()
    policy = PretrainedPolicy(str(base), adapter=adapter, dtype="float64", **WAYS[way])
    module = DPO(policy=policy, reference=reference, beta=1.0, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    data = small_data(train_pairs=4, validation_pairs=2, cache_dir=str(tmp_path / "cache"))
    run = fit_run(module, data, max_steps=2, precision="64-true")
    batches = run.trainer.predict(module, datamodule=data)
    rewards = {name: torch.cat([each[f"rewards/{name}"] for each in batches]) for name in ("chosen", "rejected")}
    by_id = {pair.id: pair for pair in (data.pairs["test"][index] for index in range(5))}
    pairs = [by_id[name] for each in batches for name in each["ids"]]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        start = naive_logps(PeftModel.from_pretrained(model, adapter).eval(), pairs)
        exported = plain_model(module, make_template(module.tokenizer, *data.template_settings))
        end = naive_logps(exported, pairs)
    chosen, rejected = (end - start).chunk(2)
    assert chosen.abs().min() > 1e-3
    torch.testing.assert_close(rewards["chosen"], chosen, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rewards["rejected"], rejected, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name in exported.state_dict())


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"adapter": None}, "base"),
        ({}, "base with the adapter sft (merged)"),
        ({"lora": LoRA(), "merge_adapter": False}, "base with the adapter sft (frozen)"),
    ],
)
def test_start_names_the_adapter(settings: dict[str, Any], start: str) -> None:
    """This name of the reference is printed at the start of a fit."""
    assert PretrainedPolicy("base", **({"adapter": "sft"} | settings)).start == start


def test_fingerprint_depends_on_start_adapter(base: Path, save_adapter: Any) -> None:
    """The scale of a frozen adapter is no parameter."""
    adapters = [None, save_adapter("one"), save_adapter("two", lora_alpha=3)]
    for way in WAYS.values():
        prints = [
            policy_fingerprint(PretrainedPolicy(str(base), **({"adapter": each} | way if each else {})).build())
            for each in adapters
        ]
        assert len(set(prints)) == 3
    again = PretrainedPolicy(str(base), adapter=adapters[2], **way)
    assert policy_fingerprint(again.build()) == prints[2]


@pytest.mark.parametrize("kind", list(ADAPTERS))
@torch.no_grad()
def test_fingerprint_includes_frozen_weights(kind: str, base: Path, save_adapter: Any) -> None:
    adapter = save_adapter(**ADAPTERS[kind])
    policy = PretrainedPolicy(str(base), adapter=adapter, **WAYS["kept under an adapter"]).build()
    prints = {policy_fingerprint(policy)}
    frozen = [weight for name, weight in policy.named_parameters() if "start" in name.split(".")]
    for weight in frozen:
        weight += 1
        prints.add(policy_fingerprint(policy))
    assert len(prints) == 1 + len(frozen) > 2


def test_adapter_folder_as_path_names_its_base(base: Path, save_adapter: Any) -> None:
    adapter = save_adapter()
    spec = PretrainedPolicy(adapter)
    assert (spec.path, spec.adapter) == (str(base), adapter)
    tokenizer = TinyPolicy().load_tokenizer()
    assert spec.load_tokenizer().chat_template == tokenizer.chat_template
    tokenizer.chat_template = "{{ 'of the adapter' }}"
    tokenizer.save_pretrained(adapter)
    assert spec.load_tokenizer().chat_template == "{{ 'of the adapter' }}"


@pytest.mark.parametrize(
    ("recorded", "requested", "revision"),
    [("v2", {}, "v2"), ("v2", {"revision": "0123abc"}, "0123abc"), (None, {}, "main")],
)
def test_revision_of_the_base_of_an_adapter(
    recorded: str | None, requested: dict[str, str], revision: str, tmp_path: Path
) -> None:
    content = {"base_model_name_or_path": "ann/base", "revision": recorded}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    spec = PretrainedPolicy(str(tmp_path), **requested)
    assert (spec.path, spec.revision) == ("ann/base", revision)


def test_adapter_folder_without_base_is_refused(save_adapter: Any) -> None:
    adapter = save_adapter()
    file = Path(adapter) / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"base_model_name_or_path": "./nowhere"}))
    with pytest.raises(
        UnsupportedPolicyError, match=rf"no file or folder \./nowhere, the base model of .* {adapter}\."
    ):
        PretrainedPolicy(adapter).build()
    file.write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(UnsupportedPolicyError, match=r"no base_model_name_or_path .* policy\.adapter to this folder"):
        PretrainedPolicy(adapter)


def test_adapter_of_another_model_is_refused(save_adapter: Any, tmp_path: Path) -> None:
    spec = TinyPolicy(width=32, layers=2, heads=2)
    spec.build().causal_lm.save_pretrained(tmp_path / "wide")
    spec.load_tokenizer().save_pretrained(tmp_path / "wide")
    for way in WAYS.values():
        with pytest.raises(UnsupportedPolicyError, match=r"policy\.adapter: could not load .* size mismatch"):
            PretrainedPolicy(str(tmp_path / "wide"), adapter=save_adapter(), **way).build()


def test_adapter_with_missing_weights_is_refused(base: Path, save_adapter: Any) -> None:
    adapter = save_adapter()
    file = Path(adapter) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ["q_proj", "k_proj"]}))
    for way in WAYS.values():
        with pytest.raises(UnsupportedPolicyError, match=r"policy\.adapter: could not load .* missing adapter keys"):
            PretrainedPolicy(str(base), adapter=adapter, **way).build()


def test_adapter_of_another_kind_is_refused(base: Path, save_adapter: Any) -> None:
    adapter = save_adapter(kind=PromptTuningConfig, num_virtual_tokens=2)
    with pytest.raises(UnsupportedPolicyError, match=r"policy\.adapter: found an adapter of the kind PROMPT_TUNING in"):
        PretrainedPolicy(str(base), adapter=adapter).build()


def test_adapter_with_whole_layers_cannot_be_kept(base: Path, save_adapter: Any) -> None:
    adapter = save_adapter(modules_to_save=["lm_head"])
    with pytest.raises(UnsupportedPolicyError, match=r"policy\.merge_adapter: found false .* whole layers \(lm_head\)"):
        PretrainedPolicy(str(base), adapter=adapter, **WAYS["kept under an adapter"]).build()
    PretrainedPolicy(str(base), adapter=adapter).build()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merge_adapter": False}, r"policy\.merge_adapter: found false and no policy\.lora"),
        ({"lora": LoRA(), "quantization": "nf4"}, r"policy\.merge_adapter: found true with policy\.quantization nf4"),
    ],
)
def test_adapter_settings_that_exclude_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PretrainedPolicy("base", adapter="adapter", **settings)
