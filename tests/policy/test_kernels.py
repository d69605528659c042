"""Tests of attention kernels and compiled layers against sdpa, forward and backward, on a CPU.

flash_attention_2 and 3 need a GPU. flex_attention runs forward on a CPU, uncompiled. Its backward pass needs a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lpc_lightning.algorithms import DPO
from lpc_lightning.data.batching.layouts import Layout, PaddedLayout, SharedPrefixLayout
from lpc_lightning.distributed.sharding import policies_of
from lpc_lightning.errors import UnsupportedPolicyError
from lpc_lightning.policy import CausalPolicy, LoRA, TinyPolicy
from lpc_lightning.types import TokenizedPair

LENGTHS = [(5, 3, 7), (11, 9, 1), (40, 100, 60), (3, 13, 5)]
LAYOUTS = {"padded": PaddedLayout(0), "packed": SharedPrefixLayout(0, row_tokens=256)}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
Tiny = Callable[..., CausalPolicy]
pytestmark = [
    # From transformers, which builds the mask of the padded layout.
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning"),
    # From torch's compiler.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(scope="module")
def pairs(make_pairs: Callable[..., list[TokenizedPair]]) -> list[TokenizedPair]:
    return make_pairs(LENGTHS)


def outcome(policy: CausalPolicy, layout: Layout, pairs: list[TokenizedPair]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return log-probabilities, and the gradients of their mean square."""
    policy.zero_grad(set_to_none=True)
    logps = policy(layout(pairs)).logps()
    logps.square().mean().backward()
    named = policy.named_parameters()
    return logps.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-4)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        assert (gradient - expected[1][name]).abs().max() <= 1e-4 * expected[1][name].abs().max(), name


@every_layout
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_eager_and_sdpa_agree(family: str, layout: Layout, pairs: list[TokenizedPair], tiny: Tiny) -> None:
    eager, sdpa = (tiny(family, dtype="float32", attention=kernel, context=256) for kernel in ("eager", "sdpa"))
    assert_same(outcome(eager, layout, pairs), outcome(sdpa, layout, pairs))


@every_layout
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_auto_agrees_with_sdpa(family: str, layout: Layout, pairs: list[TokenizedPair], tiny: Tiny) -> None:
    """Compare also without attention by segment, as on a GPU, where rows have the block mask."""
    auto, sdpa = (tiny(family, dtype="float32", attention=kernel, context=256) for kernel in ("auto", "sdpa"))
    expected = outcome(sdpa, layout, pairs)
    assert_same(outcome(auto, layout, pairs), expected)
    auto.attends_by_segment = False
    masked = outcome(auto, layout, pairs)
    assert torch.equal(masked[0], expected[0])
    assert all(torch.equal(gradient, expected[1][name]) for name, gradient in masked[1].items())


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_padding_beyond_a_window_in_float64(
    family: str, make_pairs: Callable[..., list[TokenizedPair]], tiny: Tiny, naive_logps: Callable[..., Tensor]
) -> None:
    """Its softmax is in float32, and padding sees no key of the window of 8 tokens (gemma2) or 5 (mistral)."""
    policy = tiny(family, dtype="float64", attention="eager")
    pairs = make_pairs([(5, 3, 7), (11, 9, 1), (2, 4, 4)])
    logps, gradients = outcome(policy, PaddedLayout(0), pairs)
    with torch.no_grad():
        torch.testing.assert_close(logps, naive_logps(policy.causal_lm, pairs), rtol=1e-6, atol=1e-5)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    # Padding on the left, as generation has it.
    tokens, mask = torch.tensor([[0] * 9 + [5, 6, 7]]), torch.tensor([[0] * 9 + [1] * 3])
    alone = policy.states(tokens[:, 9:], mask[:, 9:], None, torch.arange(3)[None])
    padded = policy.states(tokens, mask, None, (mask.cumsum(-1) - 1).clamp(min=0))[:, 9:]
    torch.testing.assert_close(padded, alone, rtol=1e-6, atol=1e-6)


@every_layout
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@torch.compiler.set_stance("force_eager")  # the C++ code of torch's compiler does not compile
@torch.no_grad()
def test_flex_attention_agrees(family: str, layout: Layout, pairs: list[TokenizedPair], tiny: Tiny) -> None:
    size = {"dtype": "float32", "context": 256, "width": 64}
    flex, plain = (tiny(family, attention=kernel, **size) for kernel in ("flex_attention", "eager"))
    assert flex.takes_block_mask
    assert flex.backbone.config._attn_implementation == "flex_attention"
    found, expected = (policy(layout(pairs)).logps() for policy in (flex, plain))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_flex_attention_training_on_cpu_is_refused(pairs: list[TokenizedPair], tiny: Tiny) -> None:
    policy = tiny("llama", dtype="float32", attention="flex_attention", context=256)
    with pytest.raises(UnsupportedPolicyError, match=r"policy\.attention: found flex_attention on a CPU"):
        policy(LAYOUTS["packed"](pairs))


@every_layout
@torch.compiler.set_stance("force_eager")
def test_flex_attention_of_frozen_policy_runs(layout: Layout, pairs: list[TokenizedPair], tiny: Tiny) -> None:
    """A latent alone is trained, so that there is no backward pass through attention."""
    size = {"dtype": "float32", "context": 256}
    frozen = tiny("llama", attention="flex_attention", trainable=False, **size)(layout(pairs)).logps()
    assert not frozen.requires_grad
    plain = tiny("llama", attention="eager", **size)(layout(pairs)).logps()
    torch.testing.assert_close(frozen, plain.detach(), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointing", "name"), [(False, "packed"), (True, "padded")])
def test_compiled_layers_agree(checkpointing: bool, name: str, pairs: list[TokenizedPair], tiny: Tiny) -> None:
    torch._dynamo.reset()
    plain, compiled = (
        tiny(
            "llama",
            dtype="float32",
            attention="sdpa",
            context=256,
            gradient_checkpointing=checkpointing,
        )
        for _ in range(2)
    )
    compiled.compile_layers("aot_eager")
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for some in (pairs, pairs[:2]):
        assert_same(outcome(compiled, LAYOUTS[name], some), outcome(plain, LAYOUTS[name], some))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.slow
def test_compiled_layers_with_adapter_agree(pairs: list[TokenizedPair], tiny: Tiny) -> None:
    torch._dynamo.reset()
    adapter = LoRA(rank=2, alpha=4, target_modules=["q_proj", "down_proj"])  # a trace of all seven layers takes seconds
    plain, compiled = (tiny("llama", dtype="float32", attention="sdpa", context=256, lora=adapter) for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    compiled.compile_layers("aot_eager")
    assert_same(outcome(compiled, LAYOUTS["packed"], pairs), outcome(plain, LAYOUTS["packed"], pairs))
    with compiled.as_reference() as found, plain.as_reference() as expected:
        batch = LAYOUTS["packed"](pairs)
        torch.testing.assert_close(found(batch).logps(), expected(batch).logps(), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["segment", "sdpa"])
def test_compiled_layers_compile_once(kernel: str, make_pairs: Callable[..., list[TokenizedPair]], tiny: Tiny) -> None:
    """Batches of other pairs, widths and numbers of blocks, with one or several pairs per row."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = (tiny("llama", dtype="float32", attention=kernel, context=512) for _ in range(2))
    compiled.compile_layers("aot_eager")
    graphs = []
    for lengths in (LENGTHS[:2], [(70, 90, 30)], LENGTHS, [(130, 80, 70), (8, 3, 3), (1, 1, 1)]):
        some = make_pairs(lengths, seed=len(graphs))
        layout = SharedPrefixLayout(0, row_tokens=512)
        assert_same(outcome(compiled, layout, some), outcome(plain, layout, some))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs == graphs[:1] * len(graphs)


@pytest.mark.parametrize("compiled", [False, True])
def test_compile_setting_covers_all_layers(compiled: bool) -> None:
    module = DPO(policy=TinyPolicy(width=16, layers=2, heads=2, compile=compiled), reference="live")
    module.configure_model()
    layers = [layer for policy in policies_of(module) for layer in policy.layers]
    assert len(layers) == 4
    assert all(("forward" in vars(layer)) == compiled for layer in layers)
