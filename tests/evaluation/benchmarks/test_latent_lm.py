"""Tests of the scores of LatentLM, against stock HFLM at z = 0, and against single sequences under z."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedTokenizerBase
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lpc_lightning.data.tokenization.templates import make_template
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.benchmarks.latent_lm import LatentLM
from lpc_lightning.inference.modeling_lpc import InferencePrior
from lpc_lightning.policy import CausalPolicy
from lpc_lightning.seeding import derive
from lpc_lightning.types import Message

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
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]  # type: ignore[arg-type]


def texts() -> list[Instance]:
    return instances("loglikelihood", TEXTS)


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


@pytest.fixture(scope="module")
def tokenizer(tiny_spec: Build) -> PreTrainedTokenizerBase:
    return tiny_spec("llama").load_tokenizer()


@pytest.fixture(scope="module")
def policies(tiny: Build) -> Callable[..., CausalPolicy]:
    built: dict[tuple[str, str], CausalPolicy] = {}

    def policy(family: str, dtype: str = "float32") -> CausalPolicy:
        if (family, dtype) not in built:
            built[family, dtype] = tiny(family, dtype=dtype, context=WINDOW)
        return built[family, dtype]

    return policy


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


def assert_close(actual: Sequence[Any], expected: Sequence[Any], tolerance: float) -> None:
    assert [greedy for _, greedy in actual] == [greedy for _, greedy in expected]
    ours, theirs = (torch.tensor([logp for logp, _ in answers], dtype=torch.float64) for answers in (actual, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


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


def score_tokens(lm: LatentLM, requests: Sequence[Tokens]) -> list[tuple[float, bool]]:
    return lm._loglikelihood_tokens([(None, *request) for request in requests], disable_tqdm=True)


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
    policy = policies(family, dtype)
    stock = HFLM(policy.causal_lm, tokenizer=tokenizer, batch_size=4)
    ours = LatentLM(policy, tokenizer, prior, share_contexts=False, batch_size=4)
    assert ours.loglikelihood(texts()) == stock.loglikelihood(texts())
    rolling = instances("loglikelihood_rolling", [(LONG,), ("A short text.",), (QUESTION * 3,)])
    assert ours.loglikelihood_rolling(rolling) == stock.loglikelihood_rolling(rolling)


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
    policy = policies("llama")
    stock = HFLM(policy.causal_lm, tokenizer=tokenizer, batch_size=4, mixed_precision_dtype="bfloat16")
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


# Arguments, logs and attributes


def count_hooks(model: nn.Module) -> list[tuple[int, int]]:
    return [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in model.modules()]


def test_policy_and_tokenizer_are_unchanged(tiny: Build, tiny_spec: Build) -> None:
    policy, tokenizer = tiny("llama", dtype="float32"), tiny_spec("llama").load_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = None, "right"
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    identities = {name: id(parameter) for name, parameter in policy.named_parameters()}
    hooks_before = count_hooks(policy)
    lm = LatentLM(policy, tokenizer, make_prior())
    lm.loglikelihood(texts())
    lm.loglikelihood_rolling(instances("loglikelihood_rolling", [("A text.",)]))
    lm.generate_until(instances("generate_until", [("A", {"until": ["."], "max_gen_toks": 2})]))
    assert (tokenizer.pad_token, tokenizer.padding_side) == (None, "right")
    assert {name: id(parameter) for name, parameter in policy.named_parameters()} == identities
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.named_parameters())
    assert count_hooks(policy) == hooks_before


def test_log_warns_about_truncation_only(
    policies: Build, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    lm = LatentLM(policies("llama"), tokenizer, make_prior())
    assert not caplog.records
    lm.loglikelihood(texts())
    messages = [
        record.message for record in caplog.records if record.name.startswith(("lpc_lightning.evaluation", "lm_eval"))
    ]
    assert messages == [
        "2 of 10 requests are longer than the policy's window of 64 tokens. "
        "The first tokens of their contexts are removed."
    ]


def test_progress_bar_counts_requests(
    policies: Build, tokenizer: PreTrainedTokenizerBase, capfd: pytest.CaptureFixture[str]
) -> None:
    lm = LatentLM(policies("llama"), tokenizer, make_prior())
    lm.loglikelihood(texts())
    output = capfd.readouterr().err
    assert "Running loglikelihood requests: 100%" in output
    assert "10/10" in output
    lm.loglikelihood(texts(), disable_tqdm=True)
    assert not capfd.readouterr().err


@shared_or_not
def test_answers_are_added_to_lm_eval_cache(share: bool, policies: Build, tokenizer: PreTrainedTokenizerBase) -> None:
    lm = LatentLM(policies("llama"), tokenizer, make_prior(), share_contexts=share)
    cached = {}

    class Hook:
        def add_partial(self, kind: str, arguments: Any, answer: Any) -> None:
            cached[kind, arguments] = answer

    lm.set_cache_hook(Hook())
    answers = lm.loglikelihood(texts())
    assert cached == {("loglikelihood", args): answer for args, answer in zip(TEXTS, answers, strict=True)}


@pytest.mark.parametrize("setting", [{"batch_size": 0}, {"batch_size": "some"}, {"prior_mode": CODES}])
def test_latent_lm_rejects_invalid_settings(
    setting: dict[str, Any], policies: Build, tokenizer: PreTrainedTokenizerBase
) -> None:
    (name,) = setting
    with pytest.raises(ConfigError, match=f"{name}: found {setting[name]!r}, expected"):
        LatentLM(policies("llama"), tokenizer, make_prior(), **setting)


def test_latent_lm_attributes_for_lm_eval(policies: Build, tokenizer: PreTrainedTokenizerBase) -> None:
    lm = LatentLM(policies("llama"), tokenizer, make_prior(mode="argmax"))
    stock = HFLM(policies("llama").causal_lm, tokenizer=tokenizer)
    assert lm.get_model_info() == stock.get_model_info()
    history = [{"role": "user", "content": "Hello"}]
    assert lm.apply_chat_template(history) == stock.apply_chat_template(history)
    assert lm.chat_template(True) == stock.chat_template(True) == tokenizer.chat_template
    assert lm.tokenizer_name == stock.tokenizer_name
    assert (lm.rank, lm.world_size, lm.max_length) == (0, 1, WINDOW)
    assert lm.prior_mode == "argmax"
    assert LatentLM(policies("llama"), tokenizer).prior_mode is None


def test_latent_lm_renders_the_template_of_training(policies: Build, tokenizer: PreTrainedTokenizerBase) -> None:
    """lm-eval's prompt is the trained prompt: the template gets the arguments, and the day of training."""
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = (
        "{{ strftime_now('%Y') }}{% if quiet %}Be quiet. {% endif %}{{ messages[0].content }}: "
        "{% if messages | length > 1 %}{{ messages[1].content }}{% endif %}"
    )
    template = make_template(dated, "chat", {"quiet": True})
    lm = LatentLM(policies("llama"), dated, template=template)
    assert lm.apply_chat_template([{"role": "user", "content": "Hello"}]) == "2024Be quiet. Hello: "
    assert template.render([Message(role="user", content="Hello")]) == "2024Be quiet. Hello: "
    assert lm.chat_template_args == {"quiet": True}
    assert LatentLM(policies("llama"), dated, template=make_template(dated, "plain")).chat_template_args == {}
