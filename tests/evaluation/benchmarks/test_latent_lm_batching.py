"""Tests of the batches of LatentLM: order, size, precision, attention kernels and memory do not change scores."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedTokenizerBase
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lpc_lightning.evaluation.benchmarks.latent_lm import LatentLM
from lpc_lightning.inference.modeling_lpc import InferencePrior
from lpc_lightning.policy import CausalPolicy
from tests.evaluation.benchmarks.token_scores import (
    LONG,
    SEED,
    Build,
    Tokens,
    assert_close,
    instances,
    make_prior,
    naive,
    questions,
    score_tokens,
    shared_or_not,
    texts,
    z_under,
)

# Invariances


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@shared_or_not
@pytest.mark.parametrize("mode", ["mean", "sample"])
def test_scores_independent_of_batching_and_order(
    family: str, share: bool, mode: str, policies: Build, tokenizer: PreTrainedTokenizerBase
) -> None:
    policy, prior = policies(family), make_prior()

    def answers(requests: Sequence[Tokens], batch_size: int | str) -> list[tuple[float, bool]]:
        options: dict[str, Any] = {"share_contexts": share, "prior_mode": mode, "seed": SEED}
        return score_tokens(LatentLM(policy, tokenizer, prior, batch_size=batch_size, **options), requests)

    requests = questions(seed=2, count=10)
    one = answers(requests, 1)
    for batch_size in (2, 16, "auto"):
        assert_close(answers(requests, batch_size), one, 1e-4)
    order = list(range(len(requests)))
    random.Random(0).shuffle(order)
    shuffled = answers([requests[number] for number in order], 16)
    assert_close(shuffled, [one[number] for number in order], 1e-4)
    assert_close(answers(requests * 2, 16), one * 2, 1e-4)
    assert_close([answers([request], 16)[0] for request in requests[:8]], one[:8], 1e-4)


def test_scores_depend_on_seed(policies: Build, tokenizer: PreTrainedTokenizerBase) -> None:
    answers = [
        score_tokens(LatentLM(policies("llama"), tokenizer, make_prior(), prior_mode="sample", seed=seed), questions())
        for seed in (0, 0, 1)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_no_requests_give_no_answers(policies: Build, tokenizer: PreTrainedTokenizerBase) -> None:
    assert LatentLM(policies("llama"), tokenizer, make_prior()).loglikelihood([]) == []


# Precision


@shared_or_not
def test_autocast_matches_single_sequences(share: bool, policies: Build, tokenizer: PreTrainedTokenizerBase) -> None:
    policy, prior = policies("llama"), make_prior()
    lm = LatentLM(policy, tokenizer, prior, share_contexts=share, batch_size=4, mixed_precision_dtype=torch.bfloat16)
    requests = questions()
    with torch.autocast("cpu", torch.bfloat16):
        expected = naive(policy, requests, z_under(prior, "mean"))
    exact = naive(policy, requests, z_under(prior, "mean"))
    ours, rounded, truth = (
        torch.tensor([logp for logp, _ in answers]) for answers in (score_tokens(lm, requests), expected, exact)
    )
    assert (rounded - truth).abs().mean() > 0.01, "bfloat16 was not used"
    # Rounding differs between the two, and stock's softmax is in bfloat16.
    assert (ours - truth).abs().mean() < (2 if share else 4) * (rounded - truth).abs().mean()
    assert not torch.equal(ours, truth)


@pytest.mark.parametrize("prior", [None, make_prior(0.0)], ids=["no prior", "z = 0"])
def test_unshared_autocast_equals_stock_bits(
    prior: InferencePrior | None, policies: Build, tokenizer: PreTrainedTokenizerBase
) -> None:
    policy, options = policies("llama"), {"mixed_precision_dtype": "bfloat16"}
    options |= {} if prior is None else {"softmax_dtype": "float32"}  # z is added in float32
    stock = HFLM(policy.causal_lm, tokenizer=tokenizer, batch_size=4, **options)
    ours = LatentLM(policy, tokenizer, prior, share_contexts=False, batch_size=4, mixed_precision_dtype=torch.bfloat16)
    assert ours.loglikelihood(texts()) == stock.loglikelihood(texts())
    rolling = instances("loglikelihood_rolling", [(LONG,)])
    assert ours.loglikelihood_rolling(rolling) == stock.loglikelihood_rolling(rolling)


# Policies without a block mask, and out of memory


@pytest.fixture
def maskless(tiny: Build) -> CausalPolicy:
    """Policy whose attention kernel has another name, like flash attention. It may not accept a mask."""
    AttentionInterface.register("other", sdpa_attention_forward)
    AttentionMaskInterface.register("other", sdpa_mask)
    model = tiny("llama", dtype="float32").causal_lm
    model.set_attn_implementation("other")
    return CausalPolicy(model)


def test_policy_without_block_mask_warns_once(
    maskless: CausalPolicy, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    prior = make_prior()
    lms = [LatentLM(maskless, tokenizer, prior) for _ in range(2)]
    messages = [record.message for record in caplog.records if "accepts no block mask" in record.message]
    assert len(messages) == 1
    assert not lms[0].share_contexts
    assert_close(score_tokens(lms[0], questions()), naive(maskless, questions(), z_under(prior, "mean")), 1e-4)
    stock = HFLM(maskless.causal_lm, tokenizer=tokenizer, batch_size=8)
    assert LatentLM(maskless, tokenizer).loglikelihood(texts()) == stock.loglikelihood(texts())


class LimitedMemoryPolicy(CausalPolicy):
    """A policy that runs out of memory above a number of tokens."""

    max_tokens = 10_000

    def states(self, input_ids: Tensor, *layout: Any) -> Tensor:
        if input_ids.numel() > self.max_tokens:
            raise torch.OutOfMemoryError("too many tokens")
        return super().states(input_ids, *layout)


@pytest.mark.slow
def test_auto_batch_size_shrinks_without_memory(policies: Build, tokenizer: PreTrainedTokenizerBase) -> None:
    prior, policy = make_prior(), LimitedMemoryPolicy(policies("llama").model)
    requests = questions(count=12)
    expected = naive(policy, requests, z_under(prior, "mean"))
    for max_tokens in (150, 300):
        policy.max_tokens = max_tokens
        lm = LatentLM(policy, tokenizer, prior, batch_size="auto")
        assert_close(score_tokens(lm, requests), expected, 1e-4)
    policy.max_tokens = 150
    with pytest.raises(torch.OutOfMemoryError):
        score_tokens(LatentLM(policy, tokenizer, prior, batch_size=8), requests)
    policy.max_tokens = 20
    with pytest.raises(torch.OutOfMemoryError):
        score_tokens(LatentLM(policy, tokenizer, prior, batch_size="auto"), requests)
