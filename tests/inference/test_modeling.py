"""`forward` under a latent, against the formula written out and against a stock model with z baked into its head."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from lpc_lightning.inference.modeling_lpc import LatentCausalLM, latent_causal_lm
from lpc_lightning.inference.opening import inference_prior
from lpc_lightning.latent import LatentSpace, MarginalSpace, VectorSpace
from lpc_lightning.policy import LoRA
from tests.fixtures.emulated_device import DEVICE

CODES = 5


def logits_by_hand(latent: Any, states: Tensor, z: Tensor) -> Tensor:
    """cap(scale (W (h + z) + b)), with the values of the config."""
    head, config = latent.stock.get_output_embeddings(), latent.stock.config
    logits = (states + z) @ head.weight.T + (0 if head.bias is None else head.bias)
    logits = logits * getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def tree(module: nn.Module) -> dict[str, Any]:
    """Everything of a module that a careless view could change."""
    return {
        f"{name}.{key}": (type(value), len(value) if hasattr(value, "__len__") else value)
        for name, child in module.named_modules()
        for key, value in vars(child).items()
    } | {"kinds": [type(child) for child in module.modules()]}


def close(found: Tensor, expected: Tensor, exact: float = 1e-9) -> None:
    tolerance = exact if found.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_logits_are_the_heads_of_states_plus_z(latent: Any, prompts: list[Tensor]) -> None:
    for ids in prompts:
        states = latent.policy.backbone(input_ids=ids[None], use_cache=False).last_hidden_state
        z = latent.space.infer(states[:, -1])
        outputs = latent.model(input_ids=ids[None])
        close(outputs.z, z)
        close(outputs.logits, logits_by_hand(latent, states, z))
        close(outputs.logits, latent.baked(z[0])(input_ids=ids[None]).logits)
        # The latent matters: a model that forgot it would not pass.
        assert (outputs.logits - latent.stock(input_ids=ids[None]).logits).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_each_prompt_alone(
    side: str, latent: Any, prompts: list[Tensor], padded: Callable[..., Any]
) -> None:
    batch = padded(prompts, side)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    together = latent.model(**batch, position_ids=positions)
    for row, ids in enumerate(prompts):
        alone = latent.model(input_ids=ids[None])
        close(together.z[row], alone.z[0])
        close(together.logits[row][batch["attention_mask"][row] == 1], alone.logits[0])
    assert (together.z[0] - together.z[1]).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("mode", ["mean", "sample", "argmax", 0, CODES - 1])
def test_prior_modes(mode: Any, llama: Any, prompts: list[Tensor]) -> None:
    for ids in prompts:
        torch.manual_seed(1)
        z = llama.space.infer(llama.prompt_state(ids), mode)
        torch.manual_seed(1)
        outputs = llama.model(input_ids=ids[None], prior_mode=mode)
        close(outputs.z, z)
        close(outputs.logits, llama.baked(z[0])(input_ids=ids[None]).logits)


@torch.no_grad()
def test_given_z_and_given_code_weights(llama: Any, prompts: list[Tensor], padded: Callable[..., Any]) -> None:
    batch, codebook = padded(prompts, "right"), llama.space.codebook.weight
    weights = torch.rand(len(prompts), CODES, dtype=torch.float64)
    by_weights = llama.model(**batch, code_weights=weights)
    close(by_weights.z, weights @ codebook)
    assert torch.equal(llama.model(**batch, z=weights @ codebook).logits, by_weights.logits)
    shared = llama.model(**batch, z=codebook[2])
    assert torch.equal(shared.z, codebook[2].expand(len(prompts), -1))
    assert torch.equal(shared.logits, llama.model(**batch, prior_mode=2).logits)
    assert torch.equal(llama.model(**batch, code_weights=torch.eye(CODES)[2]).logits, shared.logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_zero_is_the_stock_model_to_the_last_bit(dtype: str, make_latent: Callable[..., Any], prompts: Any) -> None:
    latent = make_latent(dtype=dtype)
    zero = torch.zeros(16, dtype=torch.float32)
    for ids in prompts:
        found, expected = latent.model(input_ids=ids[None], z=zero).logits, latent.stock(input_ids=ids[None]).logits
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype


@torch.no_grad()
def test_forward_prompt_end(latent: Any, prompts: list[Tensor], padded: Callable[..., Any]) -> None:
    """Teacher forcing: prompt and answer in one row, z from the prompt."""
    answers = [ids.flip(0) for ids in prompts]
    rows = [torch.cat(pair) for pair in zip(prompts, answers, strict=True)]
    end = torch.tensor([len(ids) - 1 for ids in prompts])
    outputs = latent.model(**padded(rows, "right"), prompt_end=end)
    for row, (ids, whole) in enumerate(zip(prompts, rows, strict=True)):
        z = latent.space.infer(latent.prompt_state(ids))
        close(outputs.z[row], z[0])
        close(outputs.logits[row, : len(whole)], latent.baked(z[0])(input_ids=whole[None]).logits[0])


@torch.no_grad()
def test_the_stock_models_arguments(llama: Any, prompts: list[Tensor]) -> None:
    ids = prompts[0][None]
    whole = llama.model(input_ids=ids)
    assert torch.equal(llama.model(ids).logits, whole.logits)
    assert torch.equal(llama.model(ids, torch.ones_like(ids)).logits, whole.logits)
    # Matrix libraries sum a product of one row in another order, so that only the number of roundings is bounded.
    head = llama.model.get_output_embeddings().weight
    states = llama.policy.backbone(input_ids=ids, use_cache=False).last_hidden_state + whole.z
    roundings = 2 * head.shape[1] * torch.finfo(head.dtype).eps * (states.abs() @ head.abs().T)[:, -1:]
    assert ((llama.model(ids, logits_to_keep=1).logits - whole.logits[:, -1:]).abs() <= roundings).all()
    close(llama.model(inputs_embeds=llama.stock.get_input_embeddings()(ids)).logits, whole.logits)
    as_tuple = llama.model(ids, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], whole.logits)
    assert torch.equal(as_tuple[-1], whole.z)


@torch.no_grad()
def test_forward_labels_without_prompt_end(llama: Any, prompts: list[Tensor]) -> None:
    ids = torch.cat(prompts[:2])[None]
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(prompts[0]), -100)
    with pytest.raises(ValueError, match="labels: found neither z nor prompt_end"):
        llama.model(input_ids=ids, labels=labels)
    outputs = llama.model(input_ids=ids, labels=labels, prompt_end=torch.tensor([len(prompts[0]) - 1]))
    expected = llama.baked(llama.space.infer(llama.prompt_state(prompts[0]))[0])(input_ids=ids, labels=labels)
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-6, atol=1e-6)


# A cache that goes on


@torch.no_grad()
def test_an_answer_goes_on_under_its_own_z(latent: Any, prompts: list[Tensor]) -> None:
    prompt, answer = prompts[0][None], prompts[1][None]
    first = latent.model(input_ids=prompt, use_cache=True)
    expected = latent.baked(first.z[0])(input_ids=torch.cat([prompt, answer], dim=1)).logits[:, prompt.shape[1] :]
    logits, outputs = [], first
    for token in answer.split(1, dim=1):
        outputs = latent.model(input_ids=token, past_key_values=outputs.past_key_values, z=outputs.z)
        logits.append(outputs.logits)
    close(torch.cat(logits, dim=1), expected)


@torch.no_grad()
def test_a_cache_without_its_z_is_refused(latent: Any, prompts: list[Tensor]) -> None:
    prompt, answer = prompts[0][None], prompts[1][None]
    for cache in (
        latent.model(input_ids=prompt).past_key_values,
        copy.deepcopy(latent.model(input_ids=prompt, prior_mode=0).past_key_values),
    ):
        with pytest.raises(ValueError, match=r"z: found none, and a cache .* pass the z it began with \(z=outputs.z\)"):
            latent.model(input_ids=answer, past_key_values=cache)


@torch.no_grad()
def test_a_new_prompt_behind_a_cache(latent: Any, prompts: list[Tensor]) -> None:
    first, second = prompts[0][None], prompts[1][None]
    whole = latent.model(input_ids=torch.cat([first, second], dim=1))
    end = torch.tensor([second.shape[1] - 1])
    ours = latent.model(input_ids=first).past_key_values
    stock = latent.stock(input_ids=first, use_cache=True).past_key_values  # a prefix that no latent was needed for
    for cache, options in ((ours, {"prompt_end": end}), (stock, {})):
        outputs = latent.model(input_ids=second, past_key_values=cache, **options)
        close(outputs.z, whole.z)
        close(outputs.logits, whole.logits[:, first.shape[1] :])


@torch.no_grad()
def test_a_mask_that_shows_no_end_is_refused(llama: Any, prompts: list[Tensor]) -> None:
    ids = prompts[0][None]
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="attention_mask: found 4 dimensions, expected 2"):
        llama.model(input_ids=ids, attention_mask=mask)
    end = torch.tensor([ids.shape[1] - 1])
    close(llama.model(input_ids=ids, attention_mask=mask, prompt_end=end).logits, llama.model(input_ids=ids).logits)


# A view


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


@torch.no_grad()
def test_a_deep_copy_stands_alone(llama: Any, prompts: list[Tensor]) -> None:
    ids = prompts[0][None]
    expected, twin = llama.model(input_ids=ids).logits, copy.deepcopy(llama.model)
    for parameter in twin.parameters():
        parameter.zero_()
    assert torch.equal(llama.model(input_ids=ids).logits, expected)
    assert not twin(input_ids=ids).logits.any()


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


def test_given_weights_are_saved_in_place_of_its_own(llama: Any, tmp_path: Path) -> None:
    """As transformers' Trainer saves: the latent's among them."""
    state = {name: tensor + 1 for name, tensor in llama.model.state_dict().items()}
    llama.model.save_pretrained(tmp_path, state_dict=state)
    weights, latent = (load_file(tmp_path / f"{name}.safetensors") for name in ("model", "latent"))
    assert weights.keys() == llama.stock.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights.items())
    assert all(torch.equal(tensor, state[f"latent_prior.{name}"]) for name, tensor in latent.items())
    assert latent.keys() == llama.model.latent_prior.state_dict().keys()


# Refused


def test_contradicting_arguments_are_refused(llama: Any, prompts: list[Tensor]) -> None:
    ids, z = prompts[0][None], torch.zeros(1, 16)
    for other in ({"prior_mode": "mean"}, {"code_weights": torch.ones(CODES)}):
        with pytest.raises(ValueError, match="found z and prior_mode or code_weights, expected one"):
            llama.model(input_ids=ids, z=z, **other)
    for wrong in (torch.zeros(2, 16), torch.zeros(1, 15), torch.zeros(1, 1, 16)):
        with pytest.raises(ValueError, match=r"z: found shape \(.*\), expected \(1, 16\), a row for each prompt"):
            llama.model(input_ids=ids, z=wrong)
    with pytest.raises(ValueError, match="prior_mode: found 9, expected one of mean"):
        llama.model(input_ids=ids, prior_mode=9)


def test_a_latent_of_another_width_is_refused(llama: Any) -> None:
    space: LatentSpace = VectorSpace()
    space.build(12, llama.policy.head)
    with pytest.raises(ValueError, match="latent: found a z of width 12, expected 16, the policy's"):
        latent_causal_lm(llama.stock, inference_prior(space))


def test_a_forward_that_goes_past_its_head_is_refused(make_latent: Callable[..., Any], prompts: Any) -> None:
    """As with losses that multiply by the head's weight themselves."""
    latent = make_latent("llama", MarginalSpace(num_codes=2, hidden=4))

    class Fused(LlamaForCausalLM):
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            outputs = self.model(input_ids=input_ids)
            outputs["logits"] = outputs[0] @ self.lm_head.weight.T
            return outputs

    latent.stock.__class__ = Fused
    model = latent_causal_lm(latent.stock, inference_prior(latent.space))
    with pytest.raises(
        RuntimeError, match="LatentFused: its forward did not call its LM head, so that z was not added"
    ):
        model(input_ids=prompts[0][None])


@torch.no_grad()
def test_pickled_model_is_the_same_model(llama: Any, prompts: list[Tensor]) -> None:
    ids = prompts[0][None]
    expected = llama.model(input_ids=ids)
    again = pickle.loads(pickle.dumps(llama.model))
    assert type(again) is type(llama.model)
    saved = io.BytesIO()
    torch.save(llama.model, saved)
    saved.seek(0)
    for model in (again, torch.load(saved, weights_only=False)):
        assert torch.equal(model(input_ids=ids).logits, expected.logits)
        assert torch.equal(model(input_ids=ids).z, expected.z)
    assert torch.equal(again.plain_causal_lm()(input_ids=ids).logits, llama.stock(input_ids=ids).logits)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")
@torch.no_grad()
def test_quantised_model_keeps_its_latent(make_latent: Callable[..., Any], prompts: list[Tensor]) -> None:
    latent, ids = make_latent(dtype="float32"), prompts[0][None]
    quantise = partial(torch.ao.quantization.quantize_dynamic, qconfig_spec={nn.Linear}, dtype=torch.qint8)
    model, stock = quantise(latent.model), quantise(latent.stock)
    assert all(parameter.dtype == torch.float32 for parameter in model.latent_prior.parameters())
    assert not [child for child in model.latent_prior.modules() if "quantized" in type(child).__module__]
    zero = torch.zeros(latent.policy.width)
    assert torch.equal(model(input_ids=ids, z=zero).logits, stock(input_ids=ids).logits)
    states = stock.get_decoder()(input_ids=ids).last_hidden_state
    assert torch.equal(model(input_ids=ids).z, latent.model.latent_prior(states[:, -1]))
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, ids.shape[1] + 3)


@pytest.mark.parametrize("device_map", [{"model": "cpu", "lm_head": "disk"}, {"": "disk"}], ids=["head", "all"])
@torch.no_grad()
def test_offloaded_model_keeps_its_latent(
    device_map: dict[str, str], make_latent: Callable[..., Any], prompts: list[Tensor], tmp_path: Path
) -> None:
    """Weights on disk are on the meta device until they are used. The latent is not."""
    whole = make_latent(dtype="float32").model
    whole.save_pretrained(tmp_path / "saved")
    places: dict[str, Any] = {"device_map": device_map, "offload_folder": tmp_path / "weights"}
    model, ids = LatentCausalLM.from_pretrained(tmp_path / "saved", **places), prompts[0][None]
    assert model.get_output_embeddings().weight.is_meta
    expected = whole(input_ids=ids)
    close(model(input_ids=ids).logits, expected.logits)
    close(model.infer_z(ids), expected.z)
    close(model.logits_processor(ids).bias, whole.logits_processor(ids).bias)
    answer = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(ids, **answer), whole.generate(ids, **answer))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("mode", ["mean", "argmax", 3])
@torch.no_grad()
def test_prior_on_another_device(mode: Any, make_latent: Callable[..., Any], prompts: list[Tensor]) -> None:
    """With a model over several GPUs, the last layer is not always where the LM head and the prior are."""
    model, ids = make_latent(dtype="float32").model, prompts[0][None]
    expected, bias = model(input_ids=ids, prior_mode=mode), model.logits_processor(ids, prior_mode=mode).bias
    model.latent_prior.to(DEVICE)
    outputs = model(input_ids=ids, prior_mode=mode)
    assert outputs.z.device == DEVICE
    close(outputs.logits, expected.logits)
    close(model.infer_z(ids, prior_mode=mode).cpu(), expected.z)
    close(model.logits_processor(ids, prior_mode=mode).bias, bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_model_cast_as_a_whole_answers_alike(
    dtype: torch.dtype, make_latent: Callable[..., Any], prompts: list[Tensor]
) -> None:
    latent, ids = make_latent(dtype="float32"), prompts[0][None]
    expected = latent.model(input_ids=ids)
    cast = copy.deepcopy(latent.model).to(dtype)
    outputs = cast(input_ids=ids)
    assert outputs.logits.dtype == outputs.z.dtype == dtype
    error = (outputs.logits.float() - expected.logits).norm() / expected.logits.norm()
    assert error < 16 * torch.finfo(dtype).eps
