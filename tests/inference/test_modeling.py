"""`forward` under a latent, against the formula written out and against a stock model with z baked into its head."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from lpc_lightning.inference.modeling_lpc import latent_causal_lm
from lpc_lightning.inference.opening import inference_prior
from lpc_lightning.latent import LatentSpace, MarginalSpace, VectorSpace
from tests.inference.conftest import CODES, close, logits_by_hand


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
        assert found.dtype == torch.promote_types(expected.dtype, torch.float32)


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


@torch.no_grad()
def test_rows_without_a_mask_are_reported_once(
    llama: Any, prompts: list[Tensor], padded: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """As lm-eval scores choices. Their z would be read at the end of a choice, or at padding."""
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    batch = padded(prompts, "right")
    ids, end = batch["input_ids"], batch["attention_mask"].sum(-1) - 1
    fixed: list[dict[str, Any]] = [{"prior_mode": 2}, {"code_weights": torch.ones(CODES)}, {"z": torch.zeros(16)}]
    for options in (*fixed, {"attention_mask": batch["attention_mask"]}, {"prompt_end": end}):
        llama.model(ids, **options)
    vector = VectorSpace()
    vector.build(16, llama.policy.head)
    latent_causal_lm(llama.stock, inference_prior(vector))(ids)
    llama.model(ids[:1])
    for cached in (True, False):
        llama.model.generate(ids, max_new_tokens=2, pad_token_id=0, use_cache=cached)

    def messages() -> list[str]:
        return [record.message for record in caplog.records if record.name.endswith(".modeling_lpc")]

    assert messages() == []
    for read in (llama.model, llama.model.infer_z, llama.model):
        read(ids)
    (message,) = messages()
    assert message.startswith("attention_mask: found none for several rows")
    assert "prompt_end" in message


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
