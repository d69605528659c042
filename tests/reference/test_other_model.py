"""Another model as the reference: its log-probabilities against those of the stock model, cached and live."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lpc_lightning.algorithms import DPO, ORPO, SimPO
from lpc_lightning.data.batching.layouts import PaddedLayout
from lpc_lightning.errors import ConfigError, UnsupportedPolicyError
from lpc_lightning.policy import LoRA, TinyPolicy
from lpc_lightning.types import TokenizedPair


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a wider model with the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    spec = TinyPolicy(width=32, layers=2, heads=2, seed=7)
    spec.build().causal_lm.save_pretrained(folder)
    spec.load_tokenizer().save_pretrained(folder)
    return str(folder)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["all weights", "an adapter"])
@torch.no_grad()
def test_cached_reference_is_other_model(
    lora: LoRA | None,
    other: str,
    small_policy: Any,
    small_data: Any,
    fit_run: Any,
    tmp_path: Path,
    naive_logps: Callable[..., Tensor],
) -> None:
    """Also in a second run of the trained module, which no longer has the other model in memory."""
    module = DPO(policy=small_policy(lora=lora), reference_path=other, optimizer=sgd)
    data = small_data(train_pairs=4, validation_pairs=2, cache_dir=str(tmp_path / "cache"))
    run = fit_run(module, data, max_steps=2)
    stock = AutoModelForCausalLM.from_pretrained(other)
    pairs = [data.training_pairs[index] for index in range(4)]
    found = torch.tensor([pair.reference_logps for pair in pairs], dtype=torch.float64).T.flatten()
    torch.testing.assert_close(found, naive_logps(stock, pairs), rtol=1e-5, atol=1e-4)
    assert not any(name.startswith("reference") for name, _ in module.named_parameters())
    batches = run.trainer.predict(module, datamodule=data)
    by_id = {data.pairs["test"][index].id: data.pairs["test"][index] for index in range(5)}
    tested = [by_id[name] for batch in batches for name in batch["ids"]]
    ratios = naive_logps(module.policy.causal_lm, tested) - naive_logps(stock, tested)
    found = torch.cat([batch["rewards/chosen"] for batch in batches]).double()
    torch.testing.assert_close(found, 0.1 * ratios[: len(tested)], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_live_run_equals_cached_run(
    other: str, small_policy: Any, small_data: Any, fit_run: Any, tmp_path: Path
) -> None:
    def run(reference: Any, path: str | None = other) -> list[float]:
        module = DPO(policy=small_policy(), reference=reference, reference_path=path, optimizer=sgd)
        data = small_data(train_pairs=6, validation_pairs=2, cache_dir=str(tmp_path / "cache"))
        return fit_run(module, data, max_steps=3).losses

    cached, live, own = run("cached"), run("live"), run("cached", None)
    assert cached == pytest.approx(live, rel=1e-5)
    assert abs(own[0] - cached[0]) > 1e-3


@torch.no_grad()
def test_live_reference_is_frozen(
    other: str, small_policy: Any, make_pairs: Callable[..., list[TokenizedPair]], naive_logps: Callable[..., Tensor]
) -> None:
    pairs = make_pairs([(5, 3, 7), (3, 4, 5)])
    modules = [DPO(policy=small_policy(), reference="live", reference_path=path) for path in (other, None)]
    for module in modules:
        torch.manual_seed(3)
        module.configure_model()
    module, plain = modules
    assert module.reference is not None
    found = module.reference.logps(PaddedLayout(0)(pairs)).double()
    torch.testing.assert_close(
        found, naive_logps(AutoModelForCausalLM.from_pretrained(other), pairs), rtol=1e-5, atol=1e-4
    )
    assert not any(parameter.requires_grad for parameter in module.reference.parameters())
    assert all(map(torch.equal, module.policy.parameters(), plain.policy.parameters()))


def test_other_vocabulary_is_refused(other: str, tmp_path: Path, small_policy: Any) -> None:
    tokenizer = TinyPolicy().load_tokenizer()
    tokenizer.add_tokens(["<|new|>"])
    model = AutoModelForCausalLM.from_pretrained(other)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    module = DPO(policy=small_policy(), reference_path=str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"reference_path: found another .* \(1025 tokens, '<\|new\|>' is 1024\), .* missing"
    ):
        module.configure_model()


def test_missing_model_is_refused(small_policy: Any) -> None:
    module = DPO(policy=small_policy(), reference_path="./nowhere")
    with pytest.raises(UnsupportedPolicyError, match=r"^model\.reference_path: .* no file or folder \./nowhere"):
        module.configure_model()


@pytest.mark.parametrize("algorithm", [SimPO, ORPO])
def test_algorithms_without_reference_take_no_other(algorithm: Any, small_policy: Any) -> None:
    with pytest.raises(TypeError, match="reference_path"):
        algorithm(policy=small_policy(), reference_path="other")
