"""A latent as a bias on the logits (method.md, what follows from the algebra, 1) against the model that keeps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from lpc_lightning.inference.modeling_lpc import LatentLogitsProcessor
from lpc_lightning.latent import GaussianSpace, MLPSpace, VectorSpace

LINEAR = ["llama", "gpt2", "qwen2", "mistral", "granite", "cohere"]
SCALES = {"granite": 4.0, "cohere": 0.5}
NEW = 8


@pytest.fixture(params=LINEAR)
def linear(request: pytest.FixtureRequest, latents: Callable[[str], Any]) -> Any:
    """Every family whose head is linear."""
    return latents(request.param)


def draw(model: Any, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return model.generate(**({"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options))


@torch.no_grad()
def test_bias_is_the_scaled_head_of_z(linear: Any, prompts: list[Tensor]) -> None:
    for ids in prompts:
        z = linear.space.infer(linear.prompt_state(ids))
        processor = linear.model.logits_processor(ids[None])
        scale = SCALES.get(linear.stock.config.model_type, 1.0)
        expected = scale * z @ linear.stock.get_output_embeddings().weight.T
        torch.testing.assert_close(processor.bias, expected, rtol=1e-9, atol=1e-9)
        assert expected.abs().max() > 0.1


@torch.no_grad()
def test_logits_agree(linear: Any, prompts: list[Tensor]) -> None:
    for ids in prompts:
        scores = linear.stock(input_ids=ids[None]).logits[:, -1]
        expected = linear.model(input_ids=ids[None]).logits[:, -1].log_softmax(-1)
        found = linear.model.logits_processor(ids[None])(ids[None], scores)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


GENERATION = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.9},
    "sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "no repetition": {"no_repeat_ngram_size": 1},
}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION)
@pytest.mark.parametrize("mode", [None, 2])
def test_a_stock_model_with_it_writes_the_same(
    mode: Any, options: dict[str, Any], linear: Any, prompts: list[Tensor], padded: Callable[..., Any]
) -> None:
    batch = padded(prompts)
    processor = linear.model.logits_processor(**batch, prior_mode=mode)
    found = draw(linear.stock, **batch, logits_processor=LogitsProcessorList([processor]), **options)
    assert torch.equal(found, draw(linear.model, **batch, prior_mode=mode, **options))
    assert not torch.equal(found, draw(linear.stock, **batch, **options))


@torch.no_grad()
def test_repetition_penalty_is_before_the_bias(llama: Any, prompts: list[Tensor]) -> None:
    """A loop that divides positive logits of the tokens so far, multiplies negative ones, and then adds LMHead(z)."""
    ids = prompts[0][None]
    processor, penalty, answer = llama.model.logits_processor(ids), 3.0, ids[0].tolist()
    for _ in range(NEW):
        scores = llama.stock(input_ids=torch.tensor([answer])).logits[0, -1]
        for token in set(answer):
            scores[token] *= penalty if scores[token] < 0 else 1 / penalty
        answer.append(int((scores + processor.bias[0]).argmax()))
    options = {"input_ids": ids, "repetition_penalty": penalty, "eos_token_id": None}
    assert draw(llama.stock, logits_processor=LogitsProcessorList([processor]), **options).tolist() == [answer]


@torch.no_grad()
def test_by_code_weights_and_by_a_draw(llama: Any, prompts: list[Tensor], padded: Callable[..., Any]) -> None:
    batch = padded(prompts)
    weights = torch.rand(len(prompts), 5, generator=torch.Generator().manual_seed(0))
    processor = llama.model.logits_processor(**batch, code_weights=weights)
    found = draw(llama.stock, **batch, logits_processor=LogitsProcessorList([processor]))
    assert torch.equal(found, draw(llama.model, **batch, code_weights=weights))
    torch.manual_seed(4)
    processor = llama.model.logits_processor(**batch, prior_mode="sample")
    found = draw(llama.stock, **batch, logits_processor=LogitsProcessorList([processor]))
    assert torch.equal(found, draw(llama.model, seed=4, **batch, prior_mode="sample"))


@torch.no_grad()
def test_a_table_of_codes_steers_by_number(linear: Any, prompts: list[Tensor], padded: Callable[..., Any]) -> None:
    table, batch = linear.model.code_biases(), padded(prompts)
    assert table.shape == (5, 1024)
    for code in range(5):
        steered = LogitsProcessorList([LatentLogitsProcessor(table[code])])
        found = draw(linear.stock, **batch, logits_processor=steered)
        assert torch.equal(found, draw(linear.model, **batch, prior_mode=code))


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_other_types(dtype: str, make_latent: Callable[..., Any]) -> None:
    latent = make_latent(dtype=dtype)
    table = latent.model.code_biases()
    assert table.dtype == torch.float32
    expected = latent.space.codebook.weight.float() @ latent.stock.get_output_embeddings().weight.float().T
    torch.testing.assert_close(table, expected, rtol=0, atol=(1e-5 if dtype == "float32" else 0.02) * expected.max())


@torch.no_grad()
def test_a_soft_cap_is_no_bias(latents: Callable[[str], Any], prompts: list[Tensor]) -> None:
    gemma = latents("gemma2")
    for ask in (lambda: gemma.model.logits_processor(prompts[0][None]), gemma.model.code_biases):
        with pytest.raises(
            ValueError, match=r"LatentGemma2ForCausalLM: found a head that is not linear \(a soft cap\?\)"
        ):
            ask()


@torch.no_grad()
@pytest.mark.parametrize("cap", [30.0, 500.0])
def test_code_biases_weak_soft_cap(cap: float, latents: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    gemma = latents("gemma2")
    monkeypatch.setattr(gemma.stock.config, "final_logit_softcapping", cap)
    with pytest.raises(ValueError, match="found a head that is not linear"):
        gemma.model.code_biases()
    monkeypatch.setattr(gemma.stock.config, "final_logit_softcapping", None)
    assert gemma.model.code_biases().shape == (5, 1024)


@pytest.mark.parametrize(
    ("space", "kind"), [(VectorSpace(1.0), "vector"), (MLPSpace(hidden=4), "mlp"), (GaussianSpace(5), "gaussian")]
)
def test_a_latent_without_codes_has_no_table(space: Any, kind: str, make_latent: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=f"code_biases: a latent of kind {kind} has no codes"):
        make_latent(space=space).model.code_biases()


def test_rows_that_do_not_fit_are_refused() -> None:
    processor = LatentLogitsProcessor(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="logits processor: found 3 rows, expected a multiple of 2 prompts"):
        processor(torch.zeros(3, 1, dtype=torch.long), torch.zeros(3, 7))


def test_nothing_is_left_on_the_model(llama: Any, prompts: list[Tensor]) -> None:
    def hooks() -> list[tuple[int, int]]:
        return [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in llama.stock.modules()]

    before = hooks()
    llama.model.logits_processor(prompts[0][None])
    llama.model.code_biases()
    assert hooks() == before
