"""Tests of tiny policies: equal weights in every run, no dropout, and errors for unsupported settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from lpc_lightning.data.batching.layouts import SharedPrefixLayout
from lpc_lightning.data.synthetic import PreferenceGenerator
from lpc_lightning.errors import ConfigError, UnsupportedPolicyError
from lpc_lightning.policy import CausalPolicy, LoRA, TinyPolicy

FAMILIES = ["llama", "mistral", "qwen2", "gpt2", "gemma2"]
every_family = pytest.mark.parametrize("family", FAMILIES)
DROPOUT: dict[str, dict[str, float]] = {
    "llama": {"attention_dropout": 0.5},
    "mistral": {"attention_dropout": 0.5},
    "qwen2": {"attention_dropout": 0.5},
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "gemma2": {"attention_dropout": 0.5},
}


@every_family
def test_family_builds_at_default_size(family: str) -> None:
    policy = TinyPolicy(family=family).build()
    assert policy.causal_lm.config.model_type == family
    assert policy.width == 64
    assert policy.head.weight.shape == (1024, 64)
    assert policy.training
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in policy.parameters())


@every_family
def test_weights_depend_on_spec_seed_only(family: str, tiny_spec: Callable[..., TinyPolicy]) -> None:
    built = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        built.append(dict(tiny_spec(family).build().named_parameters()))
        assert torch.equal(torch.get_rng_state(), before)
    first, second = built
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = dict(tiny_spec(family, seed=1).build().named_parameters())
    random = [name for name in first if first[name].std() > 0]
    assert random
    assert not any(torch.equal(first[name], other[name]) for name in random)


@every_family
@torch.no_grad()
def test_dropout_is_off(family: str, tiny: Callable[..., CausalPolicy], make_pairs: Callable[..., Any]) -> None:
    policy = tiny(family, options=DROPOUT[family])
    batch = SharedPrefixLayout(0, 40)(make_pairs([(5, 6, 7), (3, 4, 5)]))
    assert policy.training
    first, second = policy(batch).logps(), policy(batch).logps()
    assert torch.equal(first, second)
    policy.eval()
    assert torch.equal(policy(batch).logps(), first)
    assert all(module.p == 0 for module in policy.modules() if isinstance(module, nn.Dropout))


@torch.no_grad()
def test_adapter_dropout_is_separate(tiny: Callable[..., CausalPolicy], make_pairs: Callable[..., Any]) -> None:
    policy = tiny("llama", lora=LoRA(rank=2, dropout=0.5))
    batch = SharedPrefixLayout(0, 40)(make_pairs([(5, 6, 7), (3, 4, 5)]))
    assert not torch.equal(policy(batch).logps(), policy(batch).logps())
    with policy.as_reference() as reference:
        assert torch.equal(reference(batch).logps(), reference(batch).logps())


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
@every_family
def test_gradient_checkpointing_recomputes_layers(
    family: str, lora: LoRA | None, tiny: Callable[..., CausalPolicy], make_pairs: Callable[..., Any]
) -> None:
    batch = SharedPrefixLayout(0, 40)(make_pairs([(5, 6, 7), (3, 4, 5)]))
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)  # the run's seed determines a new adapter
        policy = tiny(family, gradient_checkpointing=checkpointing, lora=lora)
        calls: list[str] = []
        last = [module for name, module in policy.named_modules() if name.endswith(".mlp")][-1]
        last.register_forward_pre_hook(lambda *_, calls=calls: calls.append("mlp"))
        logps = policy(batch).logps()
        logps.square().sum().backward()
        gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
        found.append((logps.detach(), gradients, len(calls)))
    (plain, gradients, once), (checkpointed, same, twice) = found
    assert (once, twice) == (1, 2)
    assert torch.equal(plain, checkpointed)
    assert set(gradients) == set(same)
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-12, atol=1e-12)


def test_small_vocabulary_is_refused(tiny_spec: Callable[..., TinyPolicy]) -> None:
    spec = tiny_spec("llama", options={"vocab_size": 1023})
    with pytest.raises(UnsupportedPolicyError, match="the tokenizer makes ids up to 1023, the embedding has 1023"):
        spec.build()
    tiny_spec("llama", options={"vocab_size": 1025}).build()


def test_given_tokenizer_is_checked(tiny_spec: Callable[..., TinyPolicy]) -> None:
    spec = tiny_spec("llama")
    larger = spec.load_tokenizer()
    larger.add_tokens(["<|one more|>"])
    with pytest.raises(UnsupportedPolicyError, match="ids up to 1024, the embedding has 1024 rows"):
        spec.build(larger)


def test_attention_without_its_package_is_refused(tiny_spec: Callable[..., TinyPolicy]) -> None:
    message = r"policy\.attention: found flash_attention_3, which cannot be used here \(FlashAttention3 .*\), expected"
    with pytest.raises(UnsupportedPolicyError, match=message):
        tiny_spec("llama", attention="flash_attention_3").build()


def test_sdpa_with_capped_scores_is_refused(tiny_spec: Callable[..., TinyPolicy]) -> None:
    with pytest.raises(UnsupportedPolicyError, match="found sdpa for gemma2, whose attention in transformers"):
        tiny_spec("gemma2", attention="sdpa").build()
    assert tiny_spec("llama", attention="sdpa").build().backbone.config._attn_implementation == "sdpa"
    assert tiny_spec("llama", attention="eager").build().backbone.config._attn_implementation == "eager"


@pytest.mark.parametrize("text", ["Plain words.", "Zoë paid 3 € — 你好 🥚\n\n  two spaces", "<|im_end|> within", ""])
def test_tokenizer_encodes_any_text(text: str) -> None:
    tokenizer = TinyPolicy().load_tokenizer()
    assert len(tokenizer) == 1024
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_tokenizer_has_chatml_template() -> None:
    chat = [{"role": "user", "content": "Hi?"}]
    rendered = TinyPolicy().load_tokenizer().apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"


READERS = ["llama", "mistral", "qwen2", "gemma2"]


@pytest.mark.parametrize("family", READERS)
def test_reader_values_and_outputs_are_rotations(family: str) -> None:
    policy = TinyPolicy(family=family, width=32, heads=4, reader=True, options={"num_key_value_heads": 4}).build()
    grouped = TinyPolicy(family=family, width=32, heads=4, reader=True).build()
    found = 0
    for built, values in ((policy, 32), (grouped, 16)):
        for name, weight in built.named_parameters():
            if name.endswith(("v_proj.weight", "o_proj.weight")):
                found += 1
                assert len(weight) == (values if "v_proj" in name else 32)
                torch.testing.assert_close(weight @ weight.T, torch.eye(len(weight)), rtol=0, atol=1e-5)
    assert found == 2 * 2 * 2
    # The final norm returns states with a mean square of 1.
    assert policy.head.weight.std().item() == pytest.approx(32**-0.5, rel=0.03)


@pytest.mark.parametrize("family", READERS)
def test_reader_weights_depend_on_spec_seed_only(family: str, tiny_spec: Callable[..., TinyPolicy]) -> None:
    built = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        built.append(tiny_spec(family, reader=True).build().state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    first, second = built
    assert all(torch.equal(first[name], second[name]) for name in first)
    plain, other = (
        tiny_spec(family, **settings).build().state_dict() for settings in ({}, {"seed": 1, "reader": True})
    )
    changed = {name.split(".")[-2] for name in first if not torch.equal(first[name], plain[name])}
    assert changed == {"v_proj", "o_proj", "lm_head"} | ({"embed_tokens"} if family == "gemma2" else set())
    name = next(name for name in first if "v_proj" in name)
    assert not torch.equal(first[name], other[name])


@pytest.mark.slow
@torch.no_grad()
def test_reader_state_predicts_prompt_domain() -> None:
    """Fit a linear probe for the pair's domain to the state at the last prompt token."""
    examples = PreferenceGenerator(seed=0).examples(1000, "train")
    domains = [example.source for example in examples]
    scores = []
    for reader in (False, True):
        policy = TinyPolicy(width=128, layers=1, reader=reader, options={"num_key_value_heads": 4}).build()
        tokenizer = TinyPolicy().load_tokenizer()
        prompts = [
            tokenizer.apply_chat_template(list(example.prompt), add_generation_prompt=True, return_dict=False)
            for example in examples
        ]
        states = torch.stack([policy.backbone(torch.tensor([prompt]))[0][0, -1] for prompt in prompts]).numpy()
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        scores.append(cross_val_score(probe, states, domains, cv=4).mean())
    plain, reader_score = scores
    assert len(set(domains)) == 10
    assert reader_score > plain + 0.12
    assert reader_score > 0.85


def test_reader_of_gpt2_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"policy\.reader: found true with family gpt2, expected another family, or false"
    ):
        TinyPolicy(family="gpt2", reader=True)
    TinyPolicy(family="gpt2")


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_reader_in_bfloat16(default: torch.dtype) -> None:
    """Build in bfloat16 too, as a `bf16-true` trainer does: the weights are the same ones, rounded."""
    wide = TinyPolicy(width=32, reader=True).build().state_dict()
    torch.set_default_dtype(default)
    try:
        narrow = TinyPolicy(width=32, reader=True, dtype="bfloat16").build().state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, weight in narrow.items():
        assert weight.dtype == torch.bfloat16
        if "v_proj" in name:
            square = weight.float() @ weight.float().T
            torch.testing.assert_close(square, torch.eye(len(weight)), rtol=0, atol=0.01)
    assert narrow.keys() == wide.keys()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 0}, r"policy\.width: found 0, expected at least 1"),
        ({"layers": -1}, r"policy\.layers: found -1, expected at least 1"),
        ({"heads": 0}, r"policy\.heads: found 0, expected at least 1"),
        ({"context": 0}, r"policy\.context: found 0, expected at least 1"),
        ({"width": 4, "heads": 8}, r"policy\.heads: found 8, expected at most policy\.width, which is 4"),
    ],
)
def test_sizes_out_of_range_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TinyPolicy(**sizes)
