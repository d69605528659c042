"""Copies of a model with a latent: deep, saved, pickled, quantized, cast and on other devices."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lpc_lightning.inference.modeling_lpc import LatentCausalLM
from tests.fixtures.emulated_device import DEVICE
from tests.inference.conftest import close


@torch.no_grad()
def test_a_deep_copy_stands_alone(llama: Any, prompts: list[Tensor]) -> None:
    ids = prompts[0][None]
    expected, twin = llama.model(input_ids=ids).logits, copy.deepcopy(llama.model)
    for parameter in twin.parameters():
        parameter.zero_()
    assert torch.equal(llama.model(input_ids=ids).logits, expected)
    assert not twin(input_ids=ids).logits.any()


def test_given_weights_are_saved_in_place_of_its_own(llama: Any, tmp_path: Path) -> None:
    """As transformers' Trainer saves: the latent's among them."""
    state = {name: tensor + 1 for name, tensor in llama.model.state_dict().items()}
    llama.model.save_pretrained(tmp_path, state_dict=state)
    weights, latent = (load_file(tmp_path / f"{name}.safetensors") for name in ("model", "latent"))
    assert weights.keys() == llama.stock.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights.items())
    assert all(torch.equal(tensor, state[f"latent_prior.{name}"]) for name, tensor in latent.items())
    assert latent.keys() == llama.model.latent_prior.state_dict().keys()


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
def test_quantized_model_keeps_its_latent(make_latent: Callable[..., Any], prompts: list[Tensor]) -> None:
    latent, ids = make_latent(dtype="float32"), prompts[0][None]
    quantize = partial(torch.ao.quantization.quantize_dynamic, qconfig_spec={nn.Linear}, dtype=torch.qint8)
    model, stock = quantize(latent.model), quantize(latent.stock)
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
    assert outputs.z.dtype == dtype
    assert outputs.logits.dtype == torch.float32
    error = (outputs.logits.float() - expected.logits).norm() / expected.logits.norm()
    assert error < 16 * torch.finfo(dtype).eps
