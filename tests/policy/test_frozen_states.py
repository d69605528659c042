"""Tests of kept states of frozen layers: against all layers at every batch, and how often they are computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lpc_lightning.algorithms import DPO, IPO
from lpc_lightning.data.batching.layouts import Layout, PaddedLayout, SharedPrefixLayout
from lpc_lightning.distributed.sharding import check_frozen_states
from lpc_lightning.errors import ConfigError, UnsupportedPolicyError
from lpc_lightning.latent import MarginalSpace
from lpc_lightning.policy import CausalPolicy, LoRA
from lpc_lightning.policy.frozen_states import FrozenStates
from tests.fixtures.policies import FAMILIES
from tests.fixtures.training_runs import FitRun

LENGTHS = [(5, 3, 7), (6, 6, 1), (2, 7, 5)]
LAYOUTS = [PaddedLayout(0), SharedPrefixLayout(0, None), SharedPrefixLayout(0, 24)]
UPPER = r".*\.1\.(self_attn|attn|mlp)\.(.*_proj|c_attn|c_fc)"
"""Linear layers of the second decoder layer."""


def flops_of(policy: CausalPolicy, *batches: Any) -> list[int]:
    """Return the operations of the forward pass of each batch."""
    counts = []
    for batch in batches:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            policy(batch).logps()
        counts.append(counter.get_total_flops())
    return counts


@pytest.mark.parametrize("layout", LAYOUTS, ids=["padded", "one row", "rows"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {"lora": LoRA(rank=2, target_modules=UPPER)},
        {"lora": LoRA(rank=2, target_modules=UPPER), "gradient_checkpointing": True},
        {"trainable": False},
    ],
)
def test_frozen_states_keep_step_and_gradients(
    settings: dict[str, Any],
    family: str,
    layout: Layout,
    tiny: Callable[..., CausalPolicy],
    make_pairs: Any,
    naive_logps: Any,
) -> None:
    torch.manual_seed(0)  # the first weights of an adapter
    plain = tiny(family, **settings)
    kept = copy.deepcopy(plain)
    kept.keep_frozen_states(1.0)
    pairs = make_pairs(LENGTHS)
    results: list[tuple[Tensor, list[Tensor]]] = []
    for policy in (plain, kept, kept):
        z = torch.zeros(3, 16, dtype=torch.float64, requires_grad=True)
        logps = policy(layout(pairs)).logps(z)
        trained = [weight for weight in policy.parameters() if weight.requires_grad]
        results.append((logps.detach(), list(torch.autograd.grad(logps.square().sum(), [z, *trained]))))
    torch.testing.assert_close(results[0][0], naive_logps(plain.model, pairs).detach())
    for logps, gradients in results[1:]:  # peft's adapters and some kernels compute in float32
        torch.testing.assert_close(logps, results[0][0], rtol=1e-6, atol=1e-6)
        for own, expected in zip(gradients, results[0][1], strict=True):
            assert (own - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("first", ["compiled", "kept"])
@torch.no_grad()
def test_compiled_layers_use_frozen_states(first: str, tiny: Any, make_pairs: Any) -> None:
    batch = SharedPrefixLayout(0, None)(make_pairs(LENGTHS))
    policy = tiny(lora=LoRA(rank=2, target_modules=UPPER))
    expected = policy(batch).logps()
    for part in ("compiled", "kept") if first == "compiled" else ("kept", "compiled"):
        if part == "compiled":
            policy.compile_layers(backend="eager")
        else:
            policy.keep_frozen_states(1.0)
    for _ in range(2):
        torch.testing.assert_close(policy(batch).logps(), expected)
    policy.frozen_states = None
    torch.testing.assert_close(policy(batch).logps(), expected)


def test_known_sequences_skip_frozen_layers(tiny: Any, make_pairs: Any) -> None:
    """The second batch has the pairs of the first with other labels and order: one layer of four is computed."""
    adapter = LoRA(rank=2, target_modules=r".*\.3\..*_proj")
    pairs, layout = make_pairs(LENGTHS), SharedPrefixLayout(0, None)
    batches = layout(pairs), layout([pair.swapped() for pair in reversed(pairs)])
    policy, one_layer = tiny(layers=4, lora=adapter, frozen_states_gib=1.0), tiny(layers=1, lora=LoRA(rank=2))
    first, second = flops_of(policy, *batches)
    assert [second] == flops_of(one_layer, batches[1])
    assert 1.5 * second < first


def test_frozen_states_do_not_depend_on_history(tiny: Any, make_pairs: Any) -> None:
    """A resumed run has not computed the batches before, and has equal bits."""
    pairs = make_pairs([(5, 3, 7), (40, 30, 50), (5, 8, 2), (21, 4, 4)], seed=1)
    layout = SharedPrefixLayout(0, None)
    whole, resumed = (tiny(dtype="float32", trainable=False, frozen_states_gib=1.0, context=256) for _ in range(2))
    whole(layout(pairs[:3]))
    for chosen in (pairs[2:], pairs[:2]):
        assert torch.equal(whole(layout(chosen)).logps(), resumed(layout(chosen)).logps())


def test_full_memory_is_reported_once(tiny: Any, make_pairs: Any) -> None:
    pairs, layout = make_pairs(LENGTHS), SharedPrefixLayout(0, None)
    room = 20 * 16 * 8 / 2**30  # 20 of 42 tokens
    plain, kept = tiny(trainable=False), tiny(trainable=False, frozen_states_gib=room)
    with pytest.warns(UserWarning, match=r"policy.frozen_states_gib: found more states than .* GiB hold, after \d"):
        kept(layout(pairs))
    for _ in range(2):  # a second warning would be an error
        torch.testing.assert_close(kept(layout(pairs)).logps(), plain(layout(pairs)).logps())
    first, second = flops_of(kept, layout(pairs[:1]), layout(pairs[2:]))
    assert first < second < flops_of(plain, layout(pairs[2:]))[0] * 3


def test_loaded_weights_replace_frozen_states(tiny: Any, make_pairs: Any, perturb: Any) -> None:
    batch = SharedPrefixLayout(0, None)(make_pairs(LENGTHS))
    plain, kept = tiny(trainable=False), tiny(trainable=False, frozen_states_gib=1.0)
    before = kept(batch).logps()
    for policy in (plain, kept):
        perturb(policy.layers[0], seed=5)
    after = kept(batch).logps()
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, plain(batch).logps())
    kept.float()
    assert kept(batch).logps().dtype == torch.float32


def test_autocast_has_states_of_its_own(tiny: Any, make_pairs: Any) -> None:
    batch = SharedPrefixLayout(0, None)(make_pairs(LENGTHS))
    exact, mixed, kept = (tiny(dtype="float32", trainable=False, frozen_states_gib=gib) for gib in (0.0, 0.0, 1.0))
    expected = exact(batch).logps()
    torch.testing.assert_close(kept(batch).logps(), expected)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = mixed(batch).logps()
        assert (kept(batch).logps() - rounded).abs().max() < (rounded - expected).abs().max()
    torch.testing.assert_close(kept(batch).logps(), expected)


@pytest.mark.parametrize(
    "settings",
    [{}, {"lora": LoRA(rank=2)}, {"lora": LoRA(rank=2, target_modules=["embed_tokens", "layers.1.mlp.up_proj"])}],
)
def test_trained_lower_layers_are_refused(settings: dict[str, Any], tiny: Any) -> None:
    with pytest.raises(ConfigError, match="found 1, and a first layer or embeddings that are trained"):
        tiny(frozen_states_gib=1.0, **settings)


def test_layers_that_read_more_are_refused(tiny: Any) -> None:
    """The upper layer adds the inputs of the lower layer's last call, whatever states are passed on."""
    policy = tiny(trainable=False)
    lower, upper = policy.layers
    upper.requires_grad_(True)
    policy.keep_frozen_states(1.0)
    seen: list[Tensor] = []
    published = {layer: layer.forward for layer in (lower, upper)}

    def lower_forward(states: Tensor, **options: Any) -> Tensor:
        seen[:] = [states]
        return published[lower](states, **options)

    lower.forward = lower_forward
    upper.forward = lambda states, **options: published[upper](states, **options) + seen[0]
    with pytest.raises(UnsupportedPolicyError, match="found 1 for LlamaForCausalLM, whose layers do not pass on"):
        policy.keep_frozen_states(1.0)


@pytest.mark.parametrize("gib", [-1.0, float("nan"), float("inf")])
def test_impossible_memory_is_refused(gib: float, tiny_spec: Any) -> None:
    with pytest.raises(ConfigError, match=r"policy.frozen_states_gib: found .*, expected a number of at least 0"):
        tiny_spec(trainable=False, frozen_states_gib=gib)


def test_frozen_states_need_a_cpu() -> None:
    check_frozen_states(1.0, SingleDeviceStrategy("cpu"))
    check_frozen_states(0.0, SingleDeviceStrategy("cuda"))
    with pytest.raises(ConfigError, match=r"frozen_states_gib: found 1 with SingleDeviceStrategy on cuda, expected 0"):
        check_frozen_states(1.0, SingleDeviceStrategy("cuda"))


@pytest.mark.parametrize("reference", ["cached", "live"])
def test_fit_with_frozen_states_is_the_same(reference: Any, small_policy: Any, fit_run: FitRun) -> None:
    """With an adapter in the second layer, a latent, accumulation, and a second epoch from memory."""
    runs = []
    for gib in (0.0, 1.0):
        spec = small_policy(layers=2, lora=LoRA(rank=2, target_modules=UPPER), frozen_states_gib=gib)
        module = DPO(policy=spec, latent=MarginalSpace(num_codes=3), reference=reference)
        runs.append(fit_run(module, max_epochs=2, accumulate_grad_batches=2))
    plain, kept = runs
    assert kept.losses == pytest.approx(plain.losses, rel=1e-5)
    for name, value in plain.weights.items():
        torch.testing.assert_close(kept.weights[name], value, rtol=1e-3, atol=1e-6)


def test_later_fits_read_stored_states(
    small_policy: Any, small_data: Any, fit_run: FitRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another loss and other labels. A fit in float64 has states of its own, also in the same module."""
    computed: list[Tensor] = []
    compute = FrozenStates._compute

    def counted(self: FrozenStates, ids: Tensor) -> Tensor:
        states = compute(self, ids)
        computed.append(states)
        return states

    monkeypatch.setattr(FrozenStates, "_compute", counted)
    adapter = LoRA(rank=2, target_modules=UPPER)

    def fit(module: Any = None, gib: float = 1.0, **trainer: Any) -> tuple[Any, int]:
        computed.clear()
        spec = small_policy(layers=2, lora=adapter, frozen_states_gib=gib)
        run = fit_run(module or DPO(policy=spec), small_data(cache_dir=str(tmp_path)), max_steps=3, **trainer)
        return run, len(computed) - 2 * (module is None and gib > 0)  # the check of a new policy

    first, number = fit()
    assert number > 10
    assert (again := fit())[1] == 0
    assert again[0].losses == first.losses
    assert fit(IPO(policy=small_policy(layers=2, lora=adapter, frozen_states_gib=1.0)))[1] == 2
    exact, number = fit(first.module, precision="64-true")
    assert number > 10
    assert computed[-1].dtype == torch.float64
    plain, _ = fit(fit(gib=0.0)[0].module, precision="64-true")
    assert exact.losses == pytest.approx(plain.losses, rel=1e-9)
