"""A model with a latent as a view: it shares weights with its original, and leaves it as it is."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from lpc_lightning.inference.modeling_lpc import latent_causal_lm
from lpc_lightning.inference.opening import inference_prior
from lpc_lightning.latent import VectorSpace
from lpc_lightning.policy import LoRA
from tests.inference.conftest import close, logits_by_hand


def tree(module: nn.Module) -> dict[str, Any]:
    """Everything of a module that a careless view could change."""
    return {
        f"{name}.{key}": (type(value), len(value) if hasattr(value, "__len__") else value)
        for name, child in module.named_modules()
        for key, value in vars(child).items()
    } | {"kinds": [type(child) for child in module.modules()]}


@torch.no_grad()
def test_the_original_is_left_as_it_is(make_latent: Callable[..., Any], prompts: list[Tensor], tmp_path: Path) -> None:
    latent = make_latent("gpt2", dtype="float32")
    plain = copy.deepcopy(latent.stock)
    model = latent_causal_lm(plain, inference_prior(latent.space))
    before, logits, config = tree(plain), plain(input_ids=prompts[0][None]).logits, plain.config.to_dict()
    model.generate(input_ids=prompts[0][None], max_new_tokens=3, num_beams=2)
    model(input_ids=prompts[0][None])
    model.code_biases()
    model.save_pretrained(tmp_path)
    model.generation_config.max_new_tokens = 7
    model.register_forward_hook(lambda *_: None)
    assert type(plain) is GPT2LMHeadModel
    assert tree(plain) == before
    assert plain.config.to_dict() == config
    assert plain.generation_config.max_new_tokens is None
    assert torch.equal(plain(input_ids=prompts[0][None]).logits, logits)
    assert "z" not in plain(input_ids=prompts[0][None])


@torch.no_grad()
@pytest.mark.parametrize("where", ["decoder", "head", "latent"])
def test_nothing_is_left_behind_by_a_pass_that_fails(where: str, llama: Any, prompts: list[Tensor]) -> None:
    parts = {
        "decoder": llama.stock.get_decoder().layers[1],
        "head": llama.stock.get_output_embeddings(),
        "latent": llama.model.latent_prior,
    }
    ids = prompts[0][None]
    expected, before = llama.model(input_ids=ids).logits, tree(llama.stock)

    def fail(*_: Any) -> None:
        raise FloatingPointError("on purpose")

    handle = parts[where].register_forward_hook(fail)
    with pytest.raises(FloatingPointError):
        llama.model(input_ids=ids)
    handle.remove()
    assert tree(llama.stock) == before
    assert torch.equal(llama.model(input_ids=ids).logits, expected)


def test_it_shares_all_weights(llama: Any) -> None:
    assert isinstance(llama.model, LlamaForCausalLM)
    assert type(llama.model).__name__ == "LatentLlamaForCausalLM"
    theirs, ours = dict(llama.stock.named_parameters()), dict(llama.model.named_parameters())
    assert all(ours[name] is parameter for name, parameter in theirs.items())
    assert {name for name in ours if name not in theirs} == {
        f"latent_prior.{name}" for name, _ in llama.model.latent_prior.named_parameters()
    }


def test_it_follows_the_weights_of_the_original(make_latent: Callable[..., Any], prompts: list[Tensor]) -> None:
    latent, ids = make_latent(dtype="float32"), prompts[0][None]
    with torch.no_grad():
        before = latent.model(input_ids=ids).logits
        latent.stock.get_output_embeddings().weight *= 2
        torch.testing.assert_close(latent.model(input_ids=ids).logits, 2 * before)
        latent.stock.double()
        assert latent.model(input_ids=ids).logits.dtype == torch.float64


def test_it_follows_an_adapter(make_latent: Callable[..., Any], perturb: Callable[..., None], prompts: Any) -> None:
    latent, ids = make_latent(lora=LoRA(rank=2)), prompts[0][None]
    states = latent.prompt_state(prompts[0])
    z = latent.space.infer(states)
    with torch.no_grad():
        on = latent.model(input_ids=ids)
        close(on.z, z)
        close(on.logits[:, -1], logits_by_hand(latent, states, z))
        with latent.policy.as_reference():
            off = latent.model(input_ids=ids)
            close(off.logits, logits_by_hand(latent, latent.policy.backbone(input_ids=ids).last_hidden_state, off.z))
    assert (on.logits - off.logits).abs().max() > 0.01


@torch.no_grad()
def test_two_threads_do_not_steer_each_other(llama: Any, prompts: list[Tensor]) -> None:
    expected = [llama.model(input_ids=ids[None]).logits for ids in prompts[:2]]
    meet, found = threading.Barrier(2, timeout=30), {}
    # Both passes are between decoder and head at the same time, with the hooks of both in place.
    handle = llama.stock.get_decoder().register_forward_hook(lambda *_: (meet.wait(), None)[1])

    def answer(number: int) -> None:
        with torch.no_grad():
            found[number] = llama.model(input_ids=prompts[number][None]).logits

    threads = [threading.Thread(target=answer, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    for number in range(2):
        assert torch.equal(found[number], expected[number])


def test_gradients_reach_policy_and_latent(make_latent: Callable[..., Any], prompts: list[Tensor]) -> None:
    latent = make_latent()
    latent.model.requires_grad_(True)
    latent.model(input_ids=prompts[0][None]).logits.logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for parameter in latent.model.parameters())


def test_the_plain_model_comes_back(llama: Any, prompts: list[Tensor]) -> None:
    plain = llama.model.plain_causal_lm()
    assert type(plain) is LlamaForCausalLM
    assert plain.state_dict().keys() == llama.stock.state_dict().keys()
    assert torch.equal(plain(input_ids=prompts[0][None]).logits, llama.stock(input_ids=prompts[0][None]).logits)


@torch.no_grad()
def test_one_latent_takes_the_place_of_another(llama: Any, prompts: list[Tensor]) -> None:
    space, ids = VectorSpace(1.0), prompts[0][None]
    space.build(16, llama.policy.head)
    space.double()
    other = latent_causal_lm(llama.model, inference_prior(space))
    assert type(other) is type(llama.model)
    close(other(input_ids=ids).logits, llama.baked(space.vector)(input_ids=ids).logits)
