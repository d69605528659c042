"""Tests of log-probabilities in both layouts against a loop over the model's logits, one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import sdpa_mask

from lpc_lightning.data.batching.layouts import Layout, PaddedLayout, SharedPrefixLayout
from lpc_lightning.policy import CausalPolicy, LoRA
from lpc_lightning.types import TokenizedPair

LENGTHS = [(5, 3, 7), (11, 9, 1), (1, 1, 4), (3, 13, 5), (1, 6, 1), (17, 2, 11)]
"""Odd lengths, prompts and answers of one token, and answers longer than a window of 8."""
LAYOUTS: dict[str, Layout] = {
    "padded": PaddedLayout(0),
    "wide rows": SharedPrefixLayout(0, row_tokens=10_000),
    "narrow rows": SharedPrefixLayout(0, row_tokens=35),
}
FAMILIES = ["llama", "mistral", "qwen2", "gpt2", "gemma2"]
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
Naive = Callable[..., Tensor]


@pytest.fixture(scope="module")
def pairs(make_pairs: Callable[..., list[TokenizedPair]]) -> list[TokenizedPair]:
    return make_pairs(LENGTHS)


def exact_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention with a soft cap in the type of its inputs. The softmax of transformers is in float32."""
    key, value = (states.repeat_interleave(module.num_key_value_groups, dim=1) for states in (key, value))
    scores = query @ key.mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is None:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    # transformers makes boolean masks. Masks of packed rows are added to the scores.
    hidden = ~attention_mask if attention_mask.dtype == torch.bool else attention_mask < 0
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


@pytest.fixture(scope="module")
def exact_kernel() -> str:
    AttentionInterface.register("exact", exact_attention)
    AttentionMaskInterface.register("exact", sdpa_mask)
    return "exact"


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request: pytest.FixtureRequest, tiny: Callable[..., CausalPolicy], exact_kernel: str) -> CausalPolicy:
    policy = tiny(request.param)
    if request.param == "gemma2":
        assert policy.backbone.config._attn_implementation == "eager"
        policy.causal_lm.set_attn_implementation(exact_kernel)
    return policy


@pytest.fixture(scope="module")
def llama(tiny: Callable[..., CausalPolicy]) -> CausalPolicy:
    return tiny("llama")


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


def test_layouts_of_these_tests_pack_rows(pairs: list[TokenizedPair]) -> None:
    shapes = {name: len(layout(pairs).input_ids) for name, layout in LAYOUTS.items()}
    assert shapes == {"padded": 12, "wide rows": 2, "narrow rows": 4}


@torch.no_grad()
def test_pairs_in_one_row_equal_separate_sequences(
    policy: CausalPolicy, make_pairs: Callable[..., list[TokenizedPair]], naive_logps: Naive
) -> None:
    pairs = make_pairs([(1, 3, 2), (9, 11, 12), (2, 1, 1), (3, 2, 2)])
    batch = SharedPrefixLayout(0, row_tokens=10_000)(pairs)
    assert len(batch.input_ids) == 1
    close(policy(batch).logps(), naive_logps(policy.model, pairs))


@every_layout
@torch.no_grad()
def test_logps_equal_those_of_model_logits(
    policy: CausalPolicy, layout: Layout, pairs: list[TokenizedPair], naive_logps: Naive
) -> None:
    close(policy(layout(pairs)).logps(), naive_logps(policy.model, pairs))


@every_layout
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logps_in_float32(
    family: str,
    layout: Layout,
    pairs: list[TokenizedPair],
    tiny: Callable[..., CausalPolicy],
    naive_logps: Naive,
) -> None:
    policy = tiny(family, dtype="float32")
    found = policy(layout(pairs)).logps()
    assert found.dtype == torch.float32
    close(found, naive_logps(policy.model, pairs), 1e-4)


@every_layout
def test_gradients_equal_those_of_loop(
    policy: CausalPolicy, layout: Layout, pairs: list[TokenizedPair], naive_logps: Naive
) -> None:
    named = dict(policy.named_parameters())
    weights = torch.linspace(-1, 1, 2 * len(pairs), dtype=torch.float64)
    ours = torch.autograd.grad((weights * policy(layout(pairs)).logps()).sum(), list(named.values()))
    theirs = torch.autograd.grad((weights * naive_logps(policy.model, pairs)).sum(), list(named.values()))
    for name, found, expected in zip(named, ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=12)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 14), st.integers(1, 14)), min_size=1, max_size=5),
    row_tokens=st.integers(1, 150),
    seed=st.integers(0, 2**16),
)
@torch.no_grad()
def test_layouts_agree_for_all_lengths(
    lengths: list[tuple[int, int, int]],
    row_tokens: int,
    seed: int,
    policy: CausalPolicy,
    make_pairs: Callable[..., list[TokenizedPair]],
) -> None:
    pairs = make_pairs(lengths, seed=seed)
    padded, packed = (policy(layout(pairs)) for layout in (PaddedLayout(0), SharedPrefixLayout(0, row_tokens)))
    close(packed.logps(), padded.logps())
    for state in ("prompt", "chosen", "rejected"):
        close(getattr(packed.states, state), getattr(padded.states, state))


@every_layout
@torch.no_grad()
def test_answer_changes_only_its_own_logps(policy: CausalPolicy, layout: Layout, pairs: list[TokenizedPair]) -> None:
    before = policy(layout(pairs)).logps()
    pair = pairs[3]
    for changed, number in (
        (replace(pair, chosen_ids=[token ^ 1 for token in pair.chosen_ids]), 3),
        (replace(pair, rejected_ids=[token ^ 1 for token in pair.rejected_ids]), 3 + len(pairs)),
    ):
        after = policy(layout([*pairs[:3], changed, *pairs[4:]])).logps()
        moved = (after - before).abs()
        assert moved[number] > 1e-2
        moved[number] = 0
        assert moved.max() < 1e-9


@every_layout
@torch.no_grad()
def test_prompt_changes_only_its_own_answers(policy: CausalPolicy, layout: Layout, pairs: list[TokenizedPair]) -> None:
    before = policy(layout(pairs)).logps()
    changed = replace(pairs[0], prompt_ids=[token ^ 1 for token in pairs[0].prompt_ids])
    moved = (policy(layout([changed, *pairs[1:]])).logps() - before).abs()
    own = [0, len(pairs)]
    assert moved[own].min() > 1e-2
    moved[own] = 0
    assert moved.max() < 1e-9


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": False}),
        ("gemma2", {"sliding_window": 4096}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"attn_logit_softcapping": None}),
    ],
)
@torch.no_grad()
def test_windows_and_soft_caps_change_logps(
    family: str, setting: dict[str, Any], pairs: list[TokenizedPair], tiny: Callable[..., CausalPolicy]
) -> None:
    batch = LAYOUTS["narrow rows"](pairs)
    kernel = "eager" if family == "gemma2" else "auto"
    default, without = (tiny(family, options=o, attention=kernel)(batch).logps() for o in ({}, setting))
    assert (default - without).abs().max() > 1e-2


# Heads


def small(family: str, **options: Any) -> CausalPolicy:
    config = AutoConfig.for_model(
        family,
        vocab_size=1024,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    return CausalPolicy(AutoModelForCausalLM.from_config(config, dtype=torch.float64))


@pytest.mark.parametrize(
    ("family", "options", "scale", "bias"),
    [
        ("cohere", {"logit_scale": 0.25}, 0.25, False),
        ("granite", {"logits_scaling": 0.2}, 5.0, False),
        ("phi", {}, 1.0, True),
    ],
)
@every_layout
def test_heads_with_scale_or_bias(
    family: str,
    options: dict[str, Any],
    scale: float,
    bias: bool,
    layout: Layout,
    pairs: list[TokenizedPair],
    naive_logps: Naive,
    perturb: Callable[..., None],
    exact: Callable[[CausalPolicy], CausalPolicy],
) -> None:
    policy = exact(small(family, **options))
    perturb(policy)
    assert policy.head.scale == pytest.approx(scale)
    assert (policy.head.bias is not None) == bias
    ours, theirs = policy(layout(pairs)).logps(), naive_logps(policy.model, pairs)
    close(ours, theirs)
    if family == "cohere":
        return  # its rotary embeddings are in float32, so that gradients of shared prompts are not exact
    weights = list(policy.parameters())
    for found, expected in zip(
        torch.autograd.grad(ours.sum(), weights), torch.autograd.grad(theirs.sum(), weights), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# Adapters


@pytest.fixture(scope="module")
def adapted(tiny_spec: Callable[..., Any], perturb: Callable[..., None]) -> CausalPolicy:
    """A LoRA policy with a random adapter. Its base is the untrained model of the same spec."""
    policy = tiny_spec("llama", lora=LoRA(rank=3, alpha=6)).build()
    for name, module in policy.named_modules():
        if name.endswith(("lora_A.default", "lora_B.default")):
            perturb(module, deviation=0.5, seed=len(name))
    return policy


@every_layout
@torch.no_grad()
def test_reference_excludes_adapter(
    adapted: CausalPolicy,
    layout: Layout,
    pairs: list[TokenizedPair],
    tiny_spec: Callable[..., Any],
    naive_logps: Naive,
) -> None:
    batch = layout(pairs)
    policy = adapted(batch).logps()
    close(policy, naive_logps(adapted.model, pairs))
    merged, base = (tiny_spec("llama").build() for _ in range(2))
    for name, module in adapted.causal_lm.named_modules():
        if hasattr(module, "lora_B"):
            update = module.lora_B["default"].weight @ module.lora_A["default"].weight
            merged.model.get_submodule(name).weight += 6 / 3 * update
    close(policy, naive_logps(merged.model, pairs))

    with adapted.as_reference() as reference:
        close(reference(batch).logps(), naive_logps(base.model, pairs))
    assert (policy - naive_logps(base.model, pairs)).abs().min() > 1e-3
    assert torch.equal(adapted(batch).logps(), policy), "the adapter is on again"


def test_only_adapter_gets_gradients(adapted: CausalPolicy, pairs: list[TokenizedPair]) -> None:
    batch = LAYOUTS["narrow rows"](pairs)
    with adapted.as_reference() as reference:
        assert not reference(batch).logps().requires_grad
    adapted(batch).logps().sum().backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in adapted.named_parameters() if "lora_" in name}
    adapted.zero_grad()


def test_reference_without_adapter_is_policy(llama: CausalPolicy, pairs: list[TokenizedPair]) -> None:
    batch = LAYOUTS["narrow rows"](pairs)
    found = llama.reference_logps(batch)
    assert torch.equal(found, llama(batch).logps())
    assert not found.requires_grad


# Layouts of a policy


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_families_accept_packed_rows(family: str, dtype: str, tiny: Callable[..., CausalPolicy]) -> None:
    assert tiny(family, dtype=dtype).takes_block_mask


def test_recurrent_layers_accept_padded_rows_only(
    pairs: list[TokenizedPair],
    naive_logps: Naive,
    perturb: Callable[..., None],
    exact: Callable[[CausalPolicy], CausalPolicy],
) -> None:
    # `LogitHead` does not support its soft cap, which is therefore set to a very large value.
    options = {"lru_width": 16, "attention_window_size": 8, "conv1d_width": 3, "logits_soft_cap": 1e8}
    recurrent = exact(small("recurrent_gemma", **options))
    perturb(recurrent)
    assert not recurrent.takes_block_mask
    close(recurrent(PaddedLayout(0)(pairs)).logps().detach(), naive_logps(recurrent.model, pairs).detach())


def test_unknown_kernel_accepts_no_packed_rows(llama: CausalPolicy, exact_kernel: str) -> None:
    assert llama.takes_block_mask
    model = AutoModelForCausalLM.from_config(llama.causal_lm.config, attn_implementation=exact_kernel)
    assert not CausalPolicy(model).takes_block_mask
