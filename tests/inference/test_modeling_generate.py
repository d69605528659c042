"""`generate` under a latent, against stock generation by a model with z baked into its head, one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache, pipeline

from lpc_lightning.policy import TinyPolicy

NEW = 9


def draw(model: Any, seed: int = 0, **options: Any) -> Tensor:
    torch.manual_seed(seed)
    found = model.generate(**({"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options))
    assert isinstance(found, Tensor)
    return found


def alone(latent: Any, ids: Tensor, mode: Any = None, **options: Any) -> Tensor:
    """The answers to one prompt, by stock transformers."""
    torch.manual_seed(options.get("seed", 0))
    z = latent.space.infer(latent.prompt_state(ids), mode)[0]
    after_z = torch.get_rng_state()
    baked = latent.baked(z)
    torch.set_rng_state(after_z)
    found = baked.generate(
        input_ids=ids[None],
        **({"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options),
    )
    return found[:, len(ids) :]


def naive(latent: Any, ids: Tensor, again: bool = False) -> list[int]:
    """Greedy search without a cache; `again` infers z anew at each token, which is what must not happen."""
    tokens, z = ids, latent.space.infer(latent.prompt_state(ids))
    for _ in range(NEW):
        z = latent.space.infer(latent.prompt_state(tokens)) if again else z
        states = latent.policy.backbone(input_ids=tokens[None], use_cache=False).last_hidden_state[0, -1:]
        head = latent.policy.head
        logits = (states + z) @ head.weight.T + (0 if head.bias is None else head.bias)  # a cap or a scale is monotone
        tokens = torch.cat([tokens, logits[0].argmax()[None]])
    return tokens[len(ids) :].tolist()


# Greedy


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_greedy_answers_keep_the_z_of_their_prompt(use_cache: bool, latent: Any, prompts: list[Tensor]) -> None:
    drifted = 0
    for ids in prompts:
        found = draw(latent.model, input_ids=ids[None], use_cache=use_cache)[0, len(ids) :].tolist()
        assert found == naive(latent, ids)
        assert found == alone(latent, ids)[0].tolist()
        drifted += found != naive(latent, ids, again=True)
    assert drifted  # the prompts can tell


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_a_left_padded_batch_is_each_prompt_alone(
    use_cache: bool, latent: Any, prompts: list[Tensor], padded: Callable[..., Any]
) -> None:
    found = draw(latent.model, **padded(prompts), use_cache=use_cache)[:, max(map(len, prompts)) :]
    assert found.tolist() == [alone(latent, ids)[0].tolist() for ids in prompts]
    assert len({tuple(row) for row in found.tolist()}) == len(prompts)


@torch.no_grad()
def test_logits_of_every_step(llama: Any, prompts: list[Tensor], padded: Callable[..., Any]) -> None:
    out = llama.model.generate(
        **padded(prompts), max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    for row, ids in enumerate(prompts):
        baked = llama.baked(llama.space.infer(llama.prompt_state(ids))[0])
        answer = out.sequences[row, -4:]
        expected = baked(input_ids=torch.cat([ids, answer])[None]).logits[0, len(ids) - 1 : -1]
        found = torch.stack([step[row] for step in out.logits])
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_end_token_ends_its_own_row_only(llama: Any, prompts: list[Tensor], padded: Callable[..., Any]) -> None:
    end = naive(llama, prompts[0])[3]
    found = draw(llama.model, **padded(prompts), eos_token_id=end)[:, max(map(len, prompts)) :].tolist()
    for row, ids in zip(found, prompts, strict=True):
        expected = naive(llama, ids)
        stop = expected.index(end) + 1 if end in expected else NEW
        assert row == expected[:stop] + [0] * (len(row) - stop)
    assert found[0][-1] == 0


# Sampling


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("mode", [None, "mean", "sample", "argmax", 3])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_sampled_answers(use_cache: bool, mode: Any, latent: Any, prompts: list[Tensor]) -> None:
    for seed, ids in enumerate(prompts):
        options = {"do_sample": True, "top_k": 50, "temperature": 0.9, "use_cache": use_cache}
        found = draw(latent.model, seed=seed, input_ids=ids[None], prior_mode=mode, **options)[:, len(ids) :]
        torch.manual_seed(seed)
        z = latent.space.infer(latent.prompt_state(ids), mode)[0]
        state = torch.get_rng_state()
        baked = latent.baked(z)
        torch.set_rng_state(state)
        expected = baked.generate(input_ids=ids[None], max_new_tokens=NEW, pad_token_id=0, **options)[:, len(ids) :]
        assert torch.equal(found, expected)


@torch.no_grad()
def test_each_returned_sequence_draws_its_own_z(llama: Any, prompts: list[Tensor]) -> None:
    ids, copies = prompts[0], 40
    shares = llama.space.log_prior(llama.prompt_state(ids)).exp()[0]
    by_code = {tuple(alone(llama, ids, code)[0].tolist()): code for code in range(5)}
    assert len(by_code) == 5
    # top_k=1 is greedy search by way of sampling: what differs between sequences is z alone.
    options: dict[str, Any] = {"do_sample": True, "top_k": 1, "num_return_sequences": copies, "prior_mode": "sample"}
    found = draw(llama.model, input_ids=ids[None], **options)[:, len(ids) :]
    codes = [by_code[tuple(row)] for row in found.tolist()]
    torch.manual_seed(0)
    assert codes == torch.multinomial(shares.expand(copies, -1), 1)[:, 0].tolist()
    assert len(set(codes)) > 1


# Beams


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_beams(use_cache: bool, latent: Any, prompts: list[Tensor], padded: Callable[..., Any]) -> None:
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "use_cache": use_cache}
    found = draw(latent.model, **padded(prompts), **options)[:, max(map(len, prompts)) :]
    expected = torch.cat([alone(latent, ids, **options) for ids in prompts])
    assert torch.equal(found, expected)
    greedy = draw(latent.model, **padded(prompts))[:, max(map(len, prompts)) :]
    assert not torch.equal(found[::2], greedy)  # there is something for beams to find


@torch.no_grad()
def test_beams_of_a_prompt_share_a_sampled_z(llama: Any, prompts: list[Tensor], padded: Callable[..., Any]) -> None:
    codes = set()
    for seed in range(6):
        found = draw(llama.model, seed=seed, **padded(prompts), num_beams=3, prior_mode="sample")
        torch.manual_seed(seed)
        shares = torch.cat([llama.space.log_prior(llama.prompt_state(ids)) for ids in prompts]).exp()
        drawn = torch.multinomial(shares, 1)[:, 0].tolist()
        expected = [alone(llama, ids, code, num_beams=3)[0] for ids, code in zip(prompts, drawn, strict=True)]
        assert torch.equal(found[:, max(map(len, prompts)) :], torch.stack(expected))
        codes |= set(drawn)
    assert len(codes) > 2


# What is given


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2, "top_k": 1}])
def test_given_z_and_code_weights(
    options: dict[str, Any], llama: Any, prompts: list[Tensor], padded: Callable[..., Any]
) -> None:
    batch, codebook = padded(prompts), llama.space.codebook.weight
    weights = torch.rand(len(prompts), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = draw(llama.model, **batch, z=weights @ codebook, **options)
    assert torch.equal(draw(llama.model, **batch, code_weights=weights, **options), expected)
    one = draw(llama.model, **batch, z=codebook[1], **options)
    assert torch.equal(draw(llama.model, **batch, prior_mode=1, **options), one)
    assert torch.equal(draw(llama.model, **batch, code_weights=torch.eye(5)[1], **options), one)
    assert not torch.equal(one, expected)
    copies = options.get("num_return_sequences", 1)
    rows = one[:, max(map(len, prompts)) :][::copies]
    for row, ids in zip(rows, prompts, strict=True):
        beams = {"num_beams": options.get("num_beams", 1)}
        assert row.tolist() == alone(llama, ids, 1, **beams)[0].tolist()


def test_typing_errors_are_caught(llama: Any, prompts: list[Tensor]) -> None:
    ids = prompts[0][None]
    with pytest.raises(ValueError, match="prior_mod"):
        llama.model.generate(input_ids=ids, prior_mod="mean")
    with pytest.raises(ValueError, match="found z and prior_mode"):
        llama.model.generate(input_ids=ids, z=torch.zeros(16), prior_mode="mean", max_new_tokens=1)
    with pytest.raises(ValueError, match="prior_mode: found 7, expected one of mean, sample, argmax"):
        llama.model.generate(input_ids=ids, prior_mode=7, max_new_tokens=1)


# Caches and chunks


@torch.no_grad()
def test_a_second_turn_infers_its_own_z(llama: Any, prompts: list[Tensor]) -> None:
    first = llama.model.generate(
        input_ids=prompts[0][None], max_new_tokens=4, do_sample=False, return_dict_in_generate=True
    )
    turn = torch.cat([first.sequences[0], prompts[1]])
    found = draw(llama.model, input_ids=turn[None], past_key_values=first.past_key_values)[0, len(turn) :]
    assert found.tolist() == naive(llama, turn)
    # The first turn's z would say something else.
    z = llama.space.infer(llama.prompt_state(prompts[0]))
    assert found.tolist() != draw(llama.model, input_ids=turn[None], z=z)[0, len(turn) :].tolist()


@torch.no_grad()
def test_chunked_prefill_infers_z_at_the_end(llama: Any, prompts: list[Tensor], padded: Callable[..., Any]) -> None:
    """Chunks of 4: of the longest prompt, and of a batch whose first chunks hold padding alone."""
    for chosen in (prompts[2:3], prompts):
        batch = padded(chosen)
        width = batch["input_ids"].shape[1]
        found = draw(llama.model, **batch, prefill_chunk_size=4)[:, width:]
        assert found.tolist() == [naive(llama, ids) for ids in chosen]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_static_cache(
    family: str, latents: Callable[[str], Any], prompts: list[Tensor], padded: Callable[..., Any]
) -> None:
    """It hands masks of four dimensions to `forward`."""
    latent = latents(family)
    expected = [naive(latent, ids) for ids in prompts]
    width = max(map(len, prompts))
    batch = padded(prompts)
    assert draw(latent.model, **batch, cache_implementation="static")[:, width:].tolist() == expected
    cache = StaticCache(config=latent.stock.config, max_cache_len=width + NEW)
    assert draw(latent.model, **batch, past_key_values=cache)[:, width:].tolist() == expected


@torch.no_grad()
def test_embeddings_for_tokens(llama: Any, prompts: list[Tensor]) -> None:
    embedded = llama.stock.get_input_embeddings()(prompts[0])[None]
    assert draw(llama.model, inputs_embeds=embedded)[0].tolist() == naive(llama, prompts[0])


def test_generate_unsupported_modes(llama: Any, prompts: list[Tensor]) -> None:
    with pytest.raises(NotImplementedError, match="assisted decoding: its first pass holds guesses"):
        draw(llama.model, input_ids=prompts[0][None], prompt_lookup_num_tokens=2)
    with pytest.raises(NotImplementedError, match="continuous batching: it packs the tokens of many prompts"):
        llama.model.generate_batch([prompts[0].tolist()])


@torch.no_grad()
def test_generate_guidance_scale_is_refused(llama: Any, prompts: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a call and in a generation config, before the first pass. 1 is no guidance."""
    ids = prompts[0][None]
    expected = draw(llama.model, input_ids=ids)
    assert torch.equal(draw(llama.model, input_ids=ids, guidance_scale=1.0), expected)
    message = "guidance_scale: found 1.5, expected none or 1: .* has another prompt"
    passes: list[Any] = []
    monkeypatch.setattr(llama.model.generation_config, "guidance_scale", None)
    hook = llama.model.get_decoder().register_forward_pre_hook(lambda *call: passes.append(call))
    for options in ({}, {"do_sample": True}, {"num_beams": 2}, {"negative_prompt_ids": ids[:, :2]}):
        with pytest.raises(NotImplementedError, match=message):
            draw(llama.model, input_ids=ids, guidance_scale=1.5, **options)
    llama.model.generation_config.guidance_scale = 1.5
    with pytest.raises(NotImplementedError, match=message):
        draw(llama.model, input_ids=ids)
    hook.remove()
    assert passes == []
    # The advice of the error.
    steer = llama.model.logits_processor(ids)
    assert draw(llama.stock, input_ids=ids, guidance_scale=1.5, logits_processor=[steer]).shape == expected.shape


@torch.no_grad()
def test_in_a_pipeline(make_latent: Callable[..., Any]) -> None:
    latent = make_latent(dtype="float32")
    tokenizer = TinyPolicy(context=64).load_tokenizer()
    ids = tokenizer("a prompt", return_tensors="pt").input_ids
    write = pipeline("text-generation", model=latent.model, tokenizer=tokenizer)
    found = write("a prompt", max_new_tokens=5, do_sample=False, return_full_text=False, prior_mode=2)
    expected = latent.baked(latent.space.codebook.weight[2]).generate(ids, max_new_tokens=5, do_sample=False)
    assert found[0]["generated_text"] == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
