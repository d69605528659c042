"""Requests of benchmarks, and their scores by single sequences, token by token."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from torch import Tensor

from lpc_lightning.evaluation.benchmarks.latent_lm import LatentLM
from lpc_lightning.inference.modeling_lpc import InferencePrior
from lpc_lightning.policy import CausalPolicy
from lpc_lightning.seeding import derive

WIDTH, CODES, WINDOW, SEED = 16, 5, 64, 7
FAMILIES = ["llama", "mistral", "qwen2", "gpt2", "gemma2"]
every_family = pytest.mark.parametrize("family", FAMILIES)
shared_or_not = pytest.mark.parametrize("share", [True, False], ids=["shared", "like stock"])
Build = Callable[..., Any]
Tokens = tuple[list[int], list[int]]
QUESTION = "Question: What do you do when a friend asks for help?\nAnswer:"
LONG = "You asked me about the weather, and I said that it was raining. " * 8
TEXTS = [
    (QUESTION, " I help"),
    (QUESTION, " I help them and then I go home"),
    (QUESTION, " a"),
    (QUESTION, "!"),
    (QUESTION, " I help"),
    ("Why? ", "Because of the rain."),
    (LONG, " So it was."),
    (LONG, " a"),
    ("", "An answer without a question"),
    ("What", " is it?"),
]
"""Choices that are prefixes of others, have one token, or are repeated. Contexts longer than the window, and empty."""


def instances(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def texts() -> list[Instance]:
    return instances("loglikelihood", TEXTS)


def questions(seed: int = 0, count: int = 6) -> list[Tokens]:
    """Make questions with five choices each. Some choices have one token, some contexts exceed the window."""
    draw = random.Random(seed)
    requests: list[Tokens] = []
    for number in range(count):
        context = [draw.randrange(3, 1024) for _ in range(draw.choice([1, 3, 20, 50, 90]) if number else 90)]
        for _ in range(4):
            requests.append((context, [draw.randrange(3, 1024) for _ in range(draw.choice([1, 1, 2, 5, 17]))]))
        context, choice = requests[-1]
        requests.append((context, choice[:1]))  # a prefix of another choice, or an equal choice
    return requests


def make_prior(scale: float = 1.0, dtype: torch.dtype = torch.float32, mode: str = "mean") -> InferencePrior:
    """Make a prior that depends on the prompt. `scale` multiplies the codes."""
    generator = torch.Generator().manual_seed(3)
    sizes = {
        "codebook": (CODES, WIDTH),
        "prior.first.weight": (8, WIDTH),
        "prior.first.bias": (8,),
        "prior.second.weight": (CODES, 8),
        "prior.second.bias": (CODES,),
    }
    tensors = {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}
    tensors["codebook"] *= scale
    tensors["prior.second.weight"] *= 0.3  # so that no code has a probability close to 1
    return InferencePrior.of({"kind": "discrete", "num_codes": CODES, "prior_mode": mode}, tensors)


@torch.no_grad()
def naive(
    policy: CausalPolicy, requests: Sequence[Tokens], z_of: Callable[[Tensor, Sequence[int]], Tensor | float]
) -> list[tuple[float, bool]]:
    """Score single sequences, token by token, with the model's head. `z_of` has the arguments h_x and full context."""
    model, answers = policy.causal_lm, []
    cap = getattr(model.config, "final_logit_softcapping", None)
    for context, continuation in requests:
        inputs = (context + continuation)[-(WINDOW + 1) :][:-1]
        outputs = model(input_ids=torch.tensor([inputs]), output_hidden_states=True, use_cache=False)
        states = outputs.hidden_states[-1][0]
        first = len(inputs) - len(continuation)
        z = z_of(states[first], context)
        total, greedy = 0.0, True
        for index, token in enumerate(continuation, start=first):
            logits = model.get_output_embeddings()(states[index] + z).double()
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            total += float(logits[token] - logits.logsumexp(-1))
            greedy &= int(logits.argmax()) == token
        answers.append((total, greedy))
    return answers


def z_under(prior: InferencePrior, mode: str | int) -> Callable[[Tensor, Sequence[int]], Tensor]:
    """Return a function that computes z of a context, as documented in `LatentLM`."""

    def z_of(state: Tensor, context: Sequence[int]) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(derive(SEED, *context))
            return prior(state[None], mode)[0].to(state.dtype)

    return z_of


def score_tokens(lm: LatentLM, requests: Sequence[Tokens]) -> list[tuple[float, bool]]:
    return lm._loglikelihood_tokens([(None, *request) for request in requests], disable_tqdm=True)


def assert_close(actual: Sequence[Any], expected: Sequence[Any], tolerance: float) -> None:
    assert [greedy for _, greedy in actual] == [greedy for _, greedy in expected]
    ours, theirs = (torch.tensor([logp for logp, _ in answers], dtype=torch.float64) for answers in (actual, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
