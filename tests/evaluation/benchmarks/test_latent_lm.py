"""Scores of LatentLM against stock HFLM at z = 0, and against one sequence at a time under z."""

from __future__ import annotations

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

from lpc_lightning.errors import ConfigError
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
"""Choices that are prefixes of others, of one token, and twice the same; contexts beyond the window, and none."""


def instances(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]  # type: ignore[arg-type]


def texts() -> list[Instance]:
    return instances("loglikelihood", TEXTS)


def make_prior(spread: float = 1.0, dtype: torch.dtype = torch.float32, mode: str = "mean") -> InferencePrior:
    """A prior that says something else of each prompt; its codes are zero where `spread` is."""
    generator = torch.Generator().manual_seed(3)
    sizes = {
        "codebook": (CODES, WIDTH),
        "prior.first.weight": (8, WIDTH),
        "prior.first.bias": (8,),
        "prior.second.weight": (CODES, 8),
        "prior.second.bias": (CODES,),
    }
    tensors = {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}
    tensors["codebook"] *= spread
    tensors["prior.second.weight"] *= 0.3  # no code is sure
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
    """One sequence at a time, token by token, logits by the model's own head. `z_of` gets h_x and the whole context."""
    model, answers = policy.causal_lm, []
    cap = getattr(model.config, "final_logit_softcapping", None)
    for context, continuation in requests:
        read = (context + continuation)[-(WINDOW + 1) :][:-1]
        outputs = model(input_ids=torch.tensor([read]), output_hidden_states=True, use_cache=False)
        states = outputs.hidden_states[-1][0]
        first = len(read) - len(continuation)
        z = z_of(states[first], context)
        total, greedy = 0.0, True
        for place, token in enumerate(continuation, start=first):
            logits = model.get_output_embeddings()(states[place] + z).double()
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            total += float(logits[token] - logits.logsumexp(-1))
            greedy &= int(logits.argmax()) == token
        answers.append((total, greedy))
    return answers


def under(prior: InferencePrior, mode: str | int) -> Callable[[Tensor, Sequence[int]], Tensor]:
    """z of a context, by the words of `LatentLM`."""

    def z_of(state: Tensor, context: Sequence[int]) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(derive(SEED, *context))
            return prior(state[None], mode)[0].to(state.dtype)

    return z_of


def assert_close(found: Sequence[Any], expected: Sequence[Any], tolerance: float) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    ours, theirs = (torch.tensor([logp for logp, _ in answers], dtype=torch.float64) for answers in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def questions(seed: int = 0, count: int = 6) -> list[Tokens]:
    """Questions with five choices each, some of one token; some contexts are longer than the window."""
    draw = random.Random(seed)
    requests: list[Tokens] = []
    for number in range(count):
        context = [draw.randrange(3, 1024) for _ in range(draw.choice([1, 3, 20, 50, 90]) if number else 90)]
        for _ in range(4):
            requests.append((context, [draw.randrange(3, 1024) for _ in range(draw.choice([1, 1, 2, 5, 17]))]))
        context, choice = requests[-1]
        requests.append((context, choice[:1]))  # a prefix of another choice, or the same one again
    return requests


def scored(lm: LatentLM, requests: Sequence[Tokens]) -> list[tuple[float, bool]]:
    return lm._loglikelihood_tokens([(None, *request) for request in requests], disable_tqdm=True)


def with_greedy(policy: CausalPolicy, requests: Sequence[Tokens], z_of: Callable[..., Any]) -> list[Tokens]:
    """The requests, and the likeliest first token of each, as a continuation of its own."""
    found = {}
    for context, _ in requests:
        read = context[-WINDOW:]
        state = policy.causal_lm(torch.tensor([read]), output_hidden_states=True).hidden_states[-1][0, -1]
        token = int(policy.causal_lm.get_output_embeddings()(state + z_of(state, context)).argmax())
        found[tuple(context)] = (context, [token])
    return [*requests, *found.values()]


# Stock HFLM


@every_family
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("prior", [None, make_prior(0.0)], ids=["no prior", "z = 0"])
def test_without_sharing_z_of_0_is_stock_to_the_last_bit(
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
def test_with_sharing_z_of_0_is_stock(
    family: str, prior: InferencePrior | None, policies: Build, tokenizer: PreTrainedTokenizerBase
) -> None:
    policy = policies(family)
    stock = HFLM(policy.causal_lm, tokenizer=tokenizer, batch_size=4)
    ours = LatentLM(policy, tokenizer, prior, batch_size=4)
    assert ours.share_contexts
    found, expected = ours.loglikelihood(texts()), stock.loglikelihood(texts())
    assert_close(found, expected, 1e-4)
    assert found[0] == found[4], "a choice that is there twice"
    rolling = instances("loglikelihood_rolling", [(LONG,), ("A short text.",), (QUESTION * 3,)])
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(stock.loglikelihood_rolling(rolling), abs=1e-4, rel=0)


# One sequence at a time


@every_family
@shared_or_not
@pytest.mark.parametrize("mode", ["mean", "argmax", 3, "sample"])
def test_under_z_it_is_one_sequence_at_a_time(
    family: str, share: bool, mode: str | int, policies: Build, tokenizer: PreTrainedTokenizerBase
) -> None:
    policy, prior = policies(family), make_prior()
    lm = LatentLM(policy, tokenizer, prior, prior_mode=mode, share_contexts=share, batch_size=4, seed=SEED)
    requests = with_greedy(policy, questions(), under(prior, mode))
    expected = naive(policy, requests, under(prior, mode))
    assert_close(scored(lm, requests), expected, 1e-4)
    plain = naive(policy, requests, lambda state, context: 0.0)
    apart = sorted(abs(one[0] - other[0]) for one, other in zip(expected, plain, strict=True))
    assert apart[len(apart) // 10] > 1e-2, "z says something in nine requests of ten"
    assert any(greedy for _, greedy in expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gpt2"])
@shared_or_not
def test_in_float64_it_is_exact(family: str, share: bool, policies: Build, tokenizer: PreTrainedTokenizerBase) -> None:
    policy, prior = policies(family, "float64"), make_prior(dtype=torch.float64)
    lm = LatentLM(policy, tokenizer, prior, share_contexts=share)
    requests = questions(seed=1)
    assert_close(scored(lm, requests), naive(policy, requests, under(prior, "mean")), 1e-9)


@shared_or_not
def test_where_the_context_ends_decides_z(share: bool, policies: Build, tokenizer: PreTrainedTokenizerBase) -> None:
    """The model reads the same tokens here but for the last one, for which stock computes them in one run.

    Stock 0.4.13 then scores all but the longest continuation at the wrong places, even without z.
    """
    policy = policies("llama")
    whole = [5, 6, 7, 8, 9, 10]
    requests = [(whole[:cut], [*whole[cut:], last]) for last in (11, 12) for cut in (6, 2, 4, 6)]
    for prior in (make_prior(), make_prior(0.0)):
        lm = LatentLM(policy, tokenizer, prior, share_contexts=share)
        assert_close(scored(lm, requests), naive(policy, requests, under(prior, "mean")), 1e-4)


@shared_or_not
def test_continuations_up_to_the_length_of_the_window(
    share: bool, policies: Build, tokenizer: PreTrainedTokenizerBase
) -> None:
    policy, prior = policies("gpt2"), make_prior()
    context = list(range(100, 200))
    requests = [(context[:have], list(range(300, 300 + want))) for have in (1, 2, 100) for want in (1, 63, 64)]
    lm = LatentLM(policy, tokenizer, prior, prior_mode="sample", share_contexts=share, seed=SEED)
    assert_close(scored(lm, requests), naive(policy, requests, under(prior, "sample")), 1e-4)
    with pytest.raises(ValueError, match="found a continuation of 65 tokens, expected at most 64"):
        scored(lm, [(context, list(range(300, 365)))])


@shared_or_not
def test_a_window_of_ones_own(share: bool, policies: Build, tokenizer: PreTrainedTokenizerBase) -> None:
    policy, prior = policies("llama"), make_prior()
    lm = LatentLM(policy, tokenizer, prior, share_contexts=share, max_length=12)
    (context, continuation), *_ = questions()
    cut = (context[len(continuation) - 13 :], continuation)
    assert len(cut[0]) + len(cut[1]) == 13
    assert_close(scored(lm, [(context, continuation)]), naive(policy, [cut], under(prior, "mean")), 1e-4)


@shared_or_not
@pytest.mark.parametrize("mode", ["mean", "sample"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_rolling_text_has_one_z_from_the_prefix_token(
    share: bool, mode: str, batch_size: int, policies: Build, tokenizer: PreTrainedTokenizerBase
) -> None:
    policy, prior = policies("llama"), make_prior()
    lm = LatentLM(policy, tokenizer, prior, prior_mode=mode, share_contexts=share, batch_size=batch_size, seed=SEED)
    written = [LONG * 2, "A short text.", LONG, "A"]
    prefix = tokenizer.bos_token_id
    state = policy.causal_lm(torch.tensor([[prefix]]), output_hidden_states=True).hidden_states[-1][0, 0]
    z = under(prior, mode)(state, [prefix])
    expected = []
    for text in written:
        tokens = tokenizer.encode(text)
        # Windows that predict up to 64 tokens each; the last one sees as much as fits.
        windows = [([prefix], tokens[:WINDOW])]
        for start in range(WINDOW, len(tokens), WINDOW):
            stop = min(start + WINDOW, len(tokens))
            windows.append((tokens[max(stop - WINDOW - 1, 0) : start], tokens[start:stop]))
        expected.append(sum(logp for logp, _ in naive(policy, windows, lambda *_: z)))
    assert len(tokenizer.encode(written[0])) > 2 * WINDOW
    found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in written]))
    assert found == pytest.approx(expected, abs=1e-3, rel=0)
    # Contexts have their own z again afterwards.
    assert_close(scored(lm, questions()), naive(policy, questions(), under(prior, mode)), 1e-4)


# What must not matter


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@shared_or_not
@pytest.mark.parametrize("mode", ["mean", "sample"])
def test_neither_batch_size_nor_order_nor_company_matters(
    family: str, share: bool, mode: str, policies: Build, tokenizer: PreTrainedTokenizerBase
) -> None:
    policy, prior = policies(family), make_prior()

    def answers(requests: Sequence[Tokens], batch_size: int | str) -> list[tuple[float, bool]]:
        options: dict[str, Any] = {"share_contexts": share, "prior_mode": mode, "seed": SEED}
        return scored(LatentLM(policy, tokenizer, prior, batch_size=batch_size, **options), requests)

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


def test_another_seed_draws_other_codes(policies: Build, tokenizer: PreTrainedTokenizerBase) -> None:
    answers = [
        scored(LatentLM(policies("llama"), tokenizer, make_prior(), prior_mode="sample", seed=seed), questions())
        for seed in (0, 0, 1)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_nothing_asked_is_nothing_answered(policies: Build, tokenizer: PreTrainedTokenizerBase) -> None:
    assert LatentLM(policies("llama"), tokenizer, make_prior()).loglikelihood([]) == []


# Precision


@shared_or_not
def test_autocast_is_that_of_one_sequence_at_a_time(
    share: bool, policies: Build, tokenizer: PreTrainedTokenizerBase
) -> None:
    policy, prior = policies("llama"), make_prior()
    lm = LatentLM(policy, tokenizer, prior, share_contexts=share, batch_size=4, mixed_precision_dtype=torch.bfloat16)
    requests = questions()
    with torch.autocast("cpu", torch.bfloat16):
        expected = naive(policy, requests, under(prior, "mean"))
    exact = naive(policy, requests, under(prior, "mean"))
    ours, rounded, truth = (
        torch.tensor([logp for logp, _ in answers]) for answers in (scored(lm, requests), expected, exact)
    )
    assert (rounded - truth).abs().mean() > 0.01, "bfloat16 was not in use"
    # The two round in other places, and stock's softmax is in bfloat16 on top.
    assert (ours - truth).abs().mean() < (2 if share else 4) * (rounded - truth).abs().mean()
    assert not torch.equal(ours, truth)


@pytest.mark.parametrize("prior", [None, make_prior(0.0)], ids=["no prior", "z = 0"])
def test_autocast_without_sharing_is_stocks_own(
    prior: InferencePrior | None, policies: Build, tokenizer: PreTrainedTokenizerBase
) -> None:
    policy = policies("llama")
    stock = HFLM(policy.causal_lm, tokenizer=tokenizer, batch_size=4, mixed_precision_dtype="bfloat16")
    ours = LatentLM(policy, tokenizer, prior, share_contexts=False, batch_size=4, mixed_precision_dtype=torch.bfloat16)
    assert ours.loglikelihood(texts()) == stock.loglikelihood(texts())
    rolling = instances("loglikelihood_rolling", [(LONG,)])
    assert ours.loglikelihood_rolling(rolling) == stock.loglikelihood_rolling(rolling)


# Policies without a block mask, and memory that runs out


@pytest.fixture
def maskless(tiny: Build) -> CausalPolicy:
    """Attention by a kernel of another name, as flash attention is: nothing says that it takes a mask."""
    AttentionInterface.register("other", sdpa_attention_forward)
    AttentionMaskInterface.register("other", sdpa_mask)
    model = tiny("llama", dtype="float32").causal_lm
    model.set_attn_implementation("other")
    return CausalPolicy(model)


def test_where_no_mask_is_taken_contexts_are_read_again_and_the_log_says_so_once(
    maskless: CausalPolicy, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    prior = make_prior()
    lms = [LatentLM(maskless, tokenizer, prior) for _ in range(2)]
    said = [record.message for record in caplog.records if "accepts no block mask" in record.message]
    assert len(said) == 1
    assert not lms[0].share_contexts
    assert_close(scored(lms[0], questions()), naive(maskless, questions(), under(prior, "mean")), 1e-4)
    stock = HFLM(maskless.causal_lm, tokenizer=tokenizer, batch_size=8)
    assert LatentLM(maskless, tokenizer).loglikelihood(texts()) == stock.loglikelihood(texts())


class Crowded(CausalPolicy):
    """Runs out of memory beyond so many tokens."""

    room = 10_000

    def states(self, input_ids: Tensor, *layout: Any) -> Tensor:
        if input_ids.numel() > self.room:
            raise torch.OutOfMemoryError("too many tokens")
        return super().states(input_ids, *layout)


def test_auto_goes_on_with_smaller_batches_where_memory_runs_out(
    policies: Build, tokenizer: PreTrainedTokenizerBase
) -> None:
    prior, policy = make_prior(), Crowded(policies("llama").model)
    requests = questions(count=12)
    expected = naive(policy, requests, under(prior, "mean"))
    for room in (150, 300):
        policy.room = room
        lm = LatentLM(policy, tokenizer, prior, batch_size="auto")
        assert_close(scored(lm, requests), expected, 1e-4)
    policy.room = 150
    with pytest.raises(torch.OutOfMemoryError):
        scored(LatentLM(policy, tokenizer, prior, batch_size=8), requests)
    policy.room = 20
    with pytest.raises(torch.OutOfMemoryError):
        scored(LatentLM(policy, tokenizer, prior, batch_size="auto"), requests)


# What was handed in, and what is told


def hooks(model: nn.Module) -> list[tuple[int, int]]:
    return [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in model.modules()]


def test_policy_and_tokenizer_stay_as_they_are(tiny: Build, tiny_spec: Build) -> None:
    policy, tokenizer = tiny("llama", dtype="float32"), tiny_spec("llama").load_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = None, "right"
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    identities = {name: id(parameter) for name, parameter in policy.named_parameters()}
    hooked = hooks(policy)
    lm = LatentLM(policy, tokenizer, make_prior())
    lm.loglikelihood(texts())
    lm.loglikelihood_rolling(instances("loglikelihood_rolling", [("A text.",)]))
    lm.generate_until(instances("generate_until", [("A", {"until": ["."], "max_gen_toks": 2})]))
    assert (tokenizer.pad_token, tokenizer.padding_side) == (None, "right")
    assert {name: id(parameter) for name, parameter in policy.named_parameters()} == identities
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.named_parameters())
    assert hooks(policy) == hooked


def test_only_what_the_user_should_know_is_said(
    policies: Build, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    lm = LatentLM(policies("llama"), tokenizer, make_prior())
    assert not caplog.records
    lm.loglikelihood(texts())
    said = [
        record.message for record in caplog.records if record.name.startswith(("lpc_lightning.evaluation", "lm_eval"))
    ]
    assert said == [
        "2 of 10 requests are longer than the policy's window of 64 tokens. "
        "The first tokens of their contexts are removed."
    ]


def test_a_progress_bar_counts_the_requests(
    policies: Build, tokenizer: PreTrainedTokenizerBase, capfd: pytest.CaptureFixture[str]
) -> None:
    lm = LatentLM(policies("llama"), tokenizer, make_prior())
    lm.loglikelihood(texts())
    shown = capfd.readouterr().err
    assert "Running loglikelihood requests: 100%" in shown
    assert "10/10" in shown
    lm.loglikelihood(texts(), disable_tqdm=True)
    assert not capfd.readouterr().err


@shared_or_not
def test_every_answer_reaches_lm_evals_cache(share: bool, policies: Build, tokenizer: PreTrainedTokenizerBase) -> None:
    lm = LatentLM(policies("llama"), tokenizer, make_prior(), share_contexts=share)
    kept = {}

    class Hook:
        def add_partial(self, kind: str, arguments: Any, answer: Any) -> None:
            kept[kind, arguments] = answer

    lm.set_cache_hook(Hook())
    answers = lm.loglikelihood(texts())
    assert kept == {("loglikelihood", args): answer for args, answer in zip(TEXTS, answers, strict=True)}


@pytest.mark.parametrize("setting", [{"batch_size": 0}, {"batch_size": "some"}, {"prior_mode": CODES}])
def test_settings_that_cannot_be_are_refused_at_once(
    setting: dict[str, Any], policies: Build, tokenizer: PreTrainedTokenizerBase
) -> None:
    (name,) = setting
    with pytest.raises(ConfigError, match=f"{name}: found {setting[name]!r}, expected"):
        LatentLM(policies("llama"), tokenizer, make_prior(), **setting)


def test_what_lm_eval_asks_of_a_model(policies: Build, tokenizer: PreTrainedTokenizerBase) -> None:
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
