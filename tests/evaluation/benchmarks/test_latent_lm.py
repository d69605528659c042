"""Tests of the scores of LatentLM, against stock HFLM at z = 0, and against single sequences under z."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerBase

from lpc_lightning.evaluation.benchmarks.latent_lm import LatentLM
from lpc_lightning.inference.modeling_lpc import InferencePrior
from lpc_lightning.policy import CausalPolicy
from tests.evaluation.benchmarks.token_scores import (
    LONG,
    QUESTION,
    SEED,
    WINDOW,
    Build,
    Tokens,
    assert_close,
    every_family,
    instances,
    make_prior,
    naive,
    questions,
    score_tokens,
    shared_or_not,
    texts,
    z_under,
)


def add_greedy(policy: CausalPolicy, requests: Sequence[Tokens], z_of: Callable[..., Any]) -> list[Tokens]:
    """Return the requests, and for each context, a request with its likeliest next token."""
    actual = {}
    for context, _ in requests:
        inputs = context[-WINDOW:]
        state = policy.causal_lm(torch.tensor([inputs]), output_hidden_states=True).hidden_states[-1][0, -1]
        token = int(policy.causal_lm.get_output_embeddings()(state + z_of(state, context)).argmax())
        actual[tuple(context)] = (context, [token])
    return [*requests, *actual.values()]


# Stock HFLM


@every_family
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("prior", [None, make_prior(0.0)], ids=["no prior", "z = 0"])
def test_unshared_zero_z_equals_stock_bits(
    family: str, dtype: str, prior: InferencePrior | None, policies: Build, tokenizer: PreTrainedTokenizerBase
) -> None:
    """With a prior, everything after the head's product is in float32, as z is. Stock's head then returns float32."""
    policy = policies(family, dtype)
    rolling = instances("loglikelihood_rolling", [(LONG,), ("A short text.",), (QUESTION * 3,)])
    stock = HFLM(policy.causal_lm, tokenizer=tokenizer, batch_size=4)
    handle = policy.causal_lm.get_output_embeddings().register_forward_hook(
        lambda module, inputs, logits: logits if prior is None else logits.float()
    )
    expected = stock.loglikelihood(texts()), stock.loglikelihood_rolling(rolling)
    handle.remove()
    ours = LatentLM(policy, tokenizer, prior, share_contexts=False, batch_size=4)
    assert (ours.loglikelihood(texts()), ours.loglikelihood_rolling(rolling)) == expected


@every_family
@pytest.mark.parametrize("prior", [None, make_prior(0.0)], ids=["no prior", "z = 0"])
def test_shared_zero_z_equals_stock(
    family: str, prior: InferencePrior | None, policies: Build, tokenizer: PreTrainedTokenizerBase
) -> None:
    policy = policies(family)
    stock = HFLM(policy.causal_lm, tokenizer=tokenizer, batch_size=4)
    ours = LatentLM(policy, tokenizer, prior, batch_size=4)
    assert ours.share_contexts
    actual, expected = ours.loglikelihood(texts()), stock.loglikelihood(texts())
    assert_close(actual, expected, 1e-4)
    assert actual[0] == actual[4], "equal choices must have equal scores"
    rolling = instances("loglikelihood_rolling", [(LONG,), ("A short text.",), (QUESTION * 3,)])
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(stock.loglikelihood_rolling(rolling), abs=1e-4, rel=0)


# Single sequences


@pytest.mark.slow
@every_family
@shared_or_not
@pytest.mark.parametrize("mode", ["mean", "argmax", 3, "sample"])
def test_scores_under_z_match_single_sequences(
    family: str, share: bool, mode: str | int, policies: Build, tokenizer: PreTrainedTokenizerBase
) -> None:
    policy, prior = policies(family), make_prior()
    lm = LatentLM(policy, tokenizer, prior, prior_mode=mode, share_contexts=share, batch_size=4, seed=SEED)
    requests = add_greedy(policy, questions(), z_under(prior, mode))
    expected = naive(policy, requests, z_under(prior, mode))
    assert_close(score_tokens(lm, requests), expected, 1e-4)
    plain = naive(policy, requests, lambda state, context: 0.0)
    differences = sorted(abs(one[0] - other[0]) for one, other in zip(expected, plain, strict=True))
    assert differences[len(differences) // 10] > 1e-2, "z must have an effect in nine of ten requests"
    assert any(greedy for _, greedy in expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gpt2"])
@shared_or_not
def test_scores_in_float64_are_exact(
    family: str, share: bool, policies: Build, tokenizer: PreTrainedTokenizerBase
) -> None:
    policy, prior = policies(family, "float64"), make_prior(dtype=torch.float64)
    lm = LatentLM(policy, tokenizer, prior, share_contexts=share)
    requests = questions(seed=1)
    assert_close(score_tokens(lm, requests), naive(policy, requests, z_under(prior, "mean")), 1e-9)


@torch.no_grad()
@shared_or_not
def test_scores_in_bfloat16_keep_z(share: bool, tiny: Build, tokenizer: PreTrainedTokenizerBase) -> None:
    """With states much larger than z, a sum of both in bfloat16 would lose the effect of z."""
    policy, prior = tiny("llama", dtype="bfloat16", context=WINDOW), make_prior()
    model: Any = policy.causal_lm
    model.model.norm.weight *= 128
    requests = [(context, continuation[:1]) for context, continuation in questions()]
    scores = []
    for z_scale in (1.0, 0.0):
        lm = LatentLM(policy, tokenizer, make_prior(z_scale), prior_mode=3, share_contexts=share, batch_size=4)
        scores.append(torch.tensor([logp for logp, _ in score_tokens(lm, requests)], dtype=torch.float64))
    head, bias = model.lm_head.weight.double(), model.lm_head.weight.double() @ prior.codebook[3].double()
    states = torch.stack([model.model(torch.tensor([context[-WINDOW:]]))[0][0, -1] for context, _ in requests]).double()
    targets = torch.tensor([target for _, (target,) in requests])[:, None]
    under, plain = ((states @ head.T + shift).log_softmax(-1).gather(1, targets)[:, 0] for shift in (bias, 0 * bias))
    effect, error = (x.square().mean().sqrt() for x in (under - plain, scores[0] - scores[1] - (under - plain)))
    assert effect > 0.1
    assert error < effect / 50


@shared_or_not
def test_z_depends_on_end_of_context(share: bool, policies: Build, tokenizer: PreTrainedTokenizerBase) -> None:
    """Score requests whose inputs are equal, with different context lengths. Stock computes them in one run.

    Stock 0.4.13 then scores all but the longest continuation at wrong positions, even without z.
    """
    policy = policies("llama")
    whole = [5, 6, 7, 8, 9, 10]
    requests = [(whole[:cut], [*whole[cut:], last]) for last in (11, 12) for cut in (6, 2, 4, 6)]
    for prior in (make_prior(), make_prior(0.0)):
        lm = LatentLM(policy, tokenizer, prior, share_contexts=share)
        assert_close(score_tokens(lm, requests), naive(policy, requests, z_under(prior, "mean")), 1e-4)


@shared_or_not
def test_continuations_up_to_window_length(share: bool, policies: Build, tokenizer: PreTrainedTokenizerBase) -> None:
    policy, prior = policies("gpt2"), make_prior()
    context = list(range(100, 200))
    requests = [
        (context[:context_length], list(range(300, 300 + continuation_length)))
        for context_length in (1, 2, 100)
        for continuation_length in (1, 63, 64)
    ]
    lm = LatentLM(policy, tokenizer, prior, prior_mode="sample", share_contexts=share, seed=SEED)
    assert_close(score_tokens(lm, requests), naive(policy, requests, z_under(prior, "sample")), 1e-4)
    with pytest.raises(ValueError, match="found a continuation of 65 tokens, expected at most 64"):
        score_tokens(lm, [(context, list(range(300, 365)))])


@shared_or_not
def test_max_length_setting(share: bool, policies: Build, tokenizer: PreTrainedTokenizerBase) -> None:
    policy, prior = policies("llama"), make_prior()
    lm = LatentLM(policy, tokenizer, prior, share_contexts=share, max_length=12)
    (context, continuation), *_ = questions()
    cut = (context[len(continuation) - 13 :], continuation)
    assert len(cut[0]) + len(cut[1]) == 13
    assert_close(score_tokens(lm, [(context, continuation)]), naive(policy, [cut], z_under(prior, "mean")), 1e-4)


@pytest.mark.slow
@shared_or_not
@pytest.mark.parametrize("mode", ["mean", "sample"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_rolling_text_has_z_of_prefix_token(
    share: bool, mode: str, batch_size: int, policies: Build, tokenizer: PreTrainedTokenizerBase
) -> None:
    policy, prior = policies("llama"), make_prior()
    lm = LatentLM(policy, tokenizer, prior, prior_mode=mode, share_contexts=share, batch_size=batch_size, seed=SEED)
    rolling_texts = [LONG * 2, "A short text.", LONG, "A"]
    prefix = tokenizer.bos_token_id
    state = policy.causal_lm(torch.tensor([[prefix]]), output_hidden_states=True).hidden_states[-1][0, 0]
    z = z_under(prior, mode)(state, [prefix])
    expected = []
    for text in rolling_texts:
        tokens = tokenizer.encode(text)
        # Each window predicts up to 64 tokens. The last one has as much context as fits.
        windows = [([prefix], tokens[:WINDOW])]
        for start in range(WINDOW, len(tokens), WINDOW):
            stop = min(start + WINDOW, len(tokens))
            windows.append((tokens[max(stop - WINDOW - 1, 0) : start], tokens[start:stop]))
        expected.append(sum(logp for logp, _ in naive(policy, windows, lambda *_: z)))
    assert len(tokenizer.encode(rolling_texts[0])) > 2 * WINDOW
    actual = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in rolling_texts]))
    assert actual == pytest.approx(expected, abs=1e-3, rel=0)
    # After a rolling request, contexts have their own z again.
    assert_close(score_tokens(lm, questions()), naive(policy, questions(), z_under(prior, mode)), 1e-4)
