"""Answers against a loop without batches, caches or padding."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from lpc_lightning.data import DataError
from lpc_lightning.errors import ConfigError
from lpc_lightning.inference.checkpoints import trained_template
from lpc_lightning.inference.generation import Answer, Answered, Condition, Decoding, _GumbelNoise, answers
from lpc_lightning.inference.opening import OpenedPolicy, inference_prior
from lpc_lightning.latent import GaussianSpace, LatentSpace, MarginalSpace
from lpc_lightning.policy import CausalPolicy, TinyPolicy
from lpc_lightning.types import Message

TEXTS = ("Why?", "How do I keep tomatoes from splitting in the late summer heat?", "Name a colour.", "Why? Why?")
PROMPTS = [(Message(role="user", content=text),) for text in TEXTS]
CONDITIONS = [
    Condition(),
    Condition("argmax", "argmax"),
    *(Condition(f"code {code}", code) for code in range(3)),
    Condition("mixture", code_weights=(0.2, -0.5, 1.0)),
]
PLAIN = {"template": {"kind": "plain", "arguments": None, "system_turns": "auto"}}
SHORT = Decoding(max_new_tokens=12)


class Case:
    """A policy, its latent space as it was trained, and the slow way to an answer."""

    def __init__(self, policy: CausalPolicy, space: LatentSpace | None) -> None:
        prior = None if space is None else inference_prior(space)
        self.tokenizer = TinyPolicy().load_tokenizer()
        self.opened = OpenedPolicy("tiny", "model", policy.eval(), self.tokenizer, prior, {})
        self.space = space

    def answers(self, decoding: Decoding = SHORT, conditions: Any = CONDITIONS[:1], prompts: Any = PROMPTS) -> Any:
        return list(answers(self.opened, prompts, conditions, decoding))

    def ids(self, prompt: Sequence[Message]) -> list[int]:
        return list(self.tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True)["input_ids"])

    def z(self, prompt: Tensor, condition: Condition) -> Tensor | float:
        if self.space is None:
            return 0.0
        if condition.code_weights is not None:
            codebook = self.space.codebook.weight
            return torch.tensor(condition.code_weights, dtype=codebook.dtype) @ codebook
        return self.space.infer(prompt[None], condition.prior_mode)[0]

    @torch.no_grad()
    def scores(self, ids: list[int], condition: Condition, prompt: int) -> Tensor:
        """(V,) logits behind `ids`, of which the first `prompt` are the prompt: one sequence, all of it read anew."""
        model = self.opened.policy.causal_lm
        hidden = model.get_decoder()(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        return model.get_output_embeddings()(hidden[-1] + self.z(hidden[prompt - 1], condition))

    def greedy(self, prompt: Sequence[Message], condition: Condition, most: int = SHORT.max_new_tokens) -> Answer:
        ids, new = self.ids(prompt), list[int]()
        while len(new) < most:
            token = int(self.scores(ids + new, condition, len(ids)).argmax())
            if token == self.tokenizer.eos_token_id:
                return Answer(condition.name, self.tokenizer.decode(new).strip(), len(new), True)
            new.append(token)
        return Answer(condition.name, self.tokenizer.decode(new, skip_special_tokens=True).strip(), len(new), False)


@pytest.fixture(scope="module")
def case(tiny: Callable[..., CausalPolicy], perturb: Callable[..., None]) -> Callable[..., Case]:
    """A policy of a family with a latent. Code 2 pulls towards the end token, so that answers end at many lengths."""

    def build(family: str = "llama", kind: type[LatentSpace] | None = MarginalSpace, **policy: Any) -> Case:
        built = tiny(family, **({"context": 256} | policy))
        if kind is None:
            return Case(built, None)
        space = kind(num_codes=3, hidden=8, init_logit_std=1.0)  # type: ignore[call-arg]
        torch.manual_seed(0)
        space.build(built.width, built.head)
        space.to(built.model.dtype)
        perturb(space, 0.5)
        towards = built.head.weight[built.causal_lm.config.eos_token_id]
        with torch.no_grad():
            space.codebook.weight[2] = 2 * towards / towards.square().sum()
        return Case(built, space)

    return build


@pytest.fixture(scope="module")
def llama(case: Callable[..., Case]) -> Case:
    return case()


# Greedy, beams, draws


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", "float64"), ("mistral", "float64"), ("gpt2", "float64"), ("gemma2", "float64")]
)
def test_greedy_answers_are_those_of_a_naive_loop(case: Callable[..., Case], family: str, dtype: str) -> None:
    made = case(family, dtype=dtype)
    found = made.answers(conditions=CONDITIONS)
    assert [answered.prompt for answered in found] == PROMPTS
    for answered in found:
        for condition, answer in zip(CONDITIONS, answered.answers, strict=True):
            assert answer == made.greedy(answered.prompt, condition)


def test_cases_have_distinct_answers_and_lengths(llama: Case, case: Any) -> None:
    """Else the tests here would see little."""
    found = llama.answers(conditions=CONDITIONS)
    assert all(len({answer.text for answer in answered.answers}) >= 4 for answered in found)
    lengths = {
        answer.tokens
        for made in (llama, case("mistral"))
        for answered in made.answers(conditions=CONDITIONS)
        for answer in answered.answers
    }
    assert {1, 3, 12} <= lengths


def test_a_policy_without_a_latent_answers_by_itself(case: Callable[..., Case]) -> None:
    plain = case(kind=None)
    for answered in plain.answers():
        assert answered.prior is None
        assert answered.answers == (plain.greedy(answered.prompt, Condition()),)


def test_answers_prior_of_each_prompt(llama: Case) -> None:
    backbone = llama.opened.policy.backbone
    for answered in llama.answers():
        with torch.no_grad():
            states = backbone(input_ids=torch.tensor([llama.ids(answered.prompt)])).last_hidden_state[:, -1]
            expected = llama.space.log_prior(states).exp()[0]
        assert answered.prior == pytest.approx(expected.tolist(), rel=1e-9)


@pytest.mark.slow
def test_beams_find_the_best_of_all_answers(llama: Case) -> None:
    """As many beams as there are tokens try every answer of two tokens."""
    decoding = Decoding(max_new_tokens=2, num_beams=1024, batch_size=1)
    condition = Condition("code 1", 1)
    (answered,) = llama.answers(decoding, [condition], PROMPTS[:1])
    ids = llama.ids(PROMPTS[0])
    first = llama.scores(ids, condition, len(ids)).log_softmax(-1)
    pairs = torch.stack([llama.scores([*ids, token], condition, len(ids)).log_softmax(-1) for token in range(1024)])
    best = divmod(int((first[:, None] + pairs).argmax()), 1024)
    assert llama.tokenizer.eos_token_id not in best
    assert answered.answers[0].text == llama.tokenizer.decode(list(best)).strip()


def test_gumbel_noise_draws_by_the_probabilities() -> None:
    shares = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0])
    noisy = _GumbelNoise(range(20_000))(torch.empty(0), shares.log().expand(20_000, -1))
    counts = noisy.argmax(-1).bincount(minlength=5)
    assert counts[4] == 0
    assert stats.chisquare(counts[:4].numpy(), (20_000 * shares[:4].double()).numpy()).pvalue > 1e-3


def test_gumbel_noise_is_made_on_the_device() -> None:
    """Expect the logarithms of (B, V) numbers where the scores are. The draws are those of the CPU on every device."""
    places = []

    class Record(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is Tensor.log:
                places.append(args[0].device.type)
            return func(*args, **(kwargs or {}))

    with Record():
        noisy = _GumbelNoise([1, 2])(torch.zeros(2, 1), torch.zeros(2, 5, device="meta"))
    assert places == [noisy.device.type] == ["meta"]


@pytest.mark.slow
def test_drawn_tokens_have_the_models_probabilities(llama: Case) -> None:
    """The first token of the same prompt by 600 seeds: how often the likeliest texts come, at temperature 0.7."""
    condition, temperature = Condition("code 0", 0), 0.7
    ids = llama.ids(PROMPTS[0])
    shares = (llama.scores(ids, condition, len(ids)) / temperature).softmax(-1)
    by_text = Counter[str]()  # several tokens may be the same text
    for token, share in enumerate(shares.tolist()):
        by_text[llama.tokenizer.decode([token], skip_special_tokens=True).strip()] += share
    drawn = Counter(
        llama.answers(Decoding(1, temperature, seed=seed), [condition], PROMPTS[:1])[0].answers[0].text
        for seed in range(600)
    )
    for text, share in by_text.most_common(4):
        assert stats.binomtest(drawn[text], 600, share).pvalue > 1e-3


def test_the_smallest_nucleus_is_greedy(llama: Case) -> None:
    drawn = llama.answers(Decoding(max_new_tokens=12, temperature=1.0, top_p=1e-6), CONDITIONS)
    assert drawn == llama.answers(SHORT, CONDITIONS)


# What an answer depends on


@pytest.mark.parametrize("origin", [PLAIN, {"training": PLAIN}], ids=["checkpoint", "export"])
def test_prompts_are_put_as_in_training(case: Callable[..., Case], origin: dict[str, Any]) -> None:
    made = case()
    chat = made.answers()
    made.opened = replace(made.opened, template=trained_template(origin))
    made.ids = lambda prompt: made.tokenizer.encode(f"User: {prompt[0]['content']}\n\nAssistant:")
    found = made.answers()
    assert found != chat
    for answered in found:
        assert answered.answers == (made.greedy(answered.prompt, Condition()),)


class NoCumulativeSum(TorchDispatchMode):
    """Refuses what CUDA refuses in deterministic mode."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.cumsum.default and args[0].is_floating_point():
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
        return func(*args, **(kwargs or {}))


def test_draws_have_deterministic_kernels(llama: Case) -> None:
    drawn = Decoding(max_new_tokens=12, temperature=1.0)
    with NoCumulativeSum():
        found = llama.answers(drawn, CONDITIONS)
    assert found == llama.answers(drawn, CONDITIONS)


@pytest.mark.slow
@pytest.mark.parametrize("decoding", [SHORT, Decoding(12, temperature=1.0, top_p=0.9)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("mode", [None, "sample"])
def test_answers_independent_of_batch(llama: Case, decoding: Decoding, mode: Any) -> None:
    def texts(found: Sequence[Answered]) -> list[Any]:
        return [answered.answers for answered in found]

    conditions = [Condition("first", mode), Condition("code 2", 2)]
    settings = {name: getattr(decoding, name) for name in ("max_new_tokens", "temperature", "top_p")}
    alone = texts(llama.answers(Decoding(**settings, batch_size=1), conditions))
    assert texts(llama.answers(Decoding(**settings, batch_size=3), conditions)) == alone
    assert texts(llama.answers(Decoding(**settings, batch_size=16), conditions)) == alone
    assert texts(llama.answers(decoding, conditions, PROMPTS[::-1])) == alone[::-1]


def test_the_seed_decides_the_draws(llama: Case) -> None:
    found = [llama.answers(Decoding(12, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]
    codes = [llama.answers(Decoding(4, seed=seed), [Condition("drawn", "sample")]) for seed in range(8)]
    assert len({found[0].answers[0].text for found in codes}) == 3


def test_equal_conditions_draw_the_same_tokens(llama: Case) -> None:
    """So that answers under two codes differ by the codes alone."""
    conditions = [Condition("by number", 1), Condition("by weights", code_weights=(0.0, 1.0, 0.0))]
    for answered in llama.answers(Decoding(12, temperature=1.0), conditions):
        one, other = answered.answers
        assert one.text == other.text


def test_published_generation_config_is_ignored(case: Callable[..., Case]) -> None:
    made = case()
    expected = made.answers()
    published = GenerationConfig(do_sample=True, temperature=3.0, repetition_penalty=9.0, max_length=3)
    made.opened.causal_lm.generation_config = published
    assert made.answers() == expected
    assert made.opened.causal_lm.generation_config is published


@pytest.mark.parametrize("several", [False, True])
def test_published_end_tokens_end_an_answer(several: bool, case: Callable[..., Case]) -> None:
    """Take a token from the middle of an answer as a further end token of the model."""
    made = case()
    ids = made.ids(PROMPTS[0])
    new: list[int] = []
    while len(new) < 6:
        new.append(int(made.scores(ids + new, Condition(), len(ids)).argmax()))
    end = new[4]
    made.opened.policy.causal_lm.generation_config.eos_token_id = [1000, end] if several else end
    (answer,) = made.answers(prompts=PROMPTS[:1])[0].answers
    first = new.index(end)
    assert answer == Answer("prior", made.tokenizer.decode(new[:first], skip_special_tokens=True).strip(), first, True)


def test_a_gaussian_latent_draws_by_the_seed(case: Callable[..., Case]) -> None:
    made = case(kind=GaussianSpace)
    mode = [Condition("drawn", "sample")]
    one, again, other = (made.answers(Decoding(12, seed=seed), mode) for seed in (1, 1, 2))
    assert one == again != other
    assert one[0].prior is None
    assert made.answers()[0].answers == (made.greedy(PROMPTS[0], Condition()),)


# The context, and bad input


def test_an_answer_ends_with_the_context(case: Callable[..., Case]) -> None:
    made = case(context=64)
    decoding = Decoding(max_new_tokens=1000, batch_size=4)
    for answered in made.answers(decoding):
        room = 64 - len(made.ids(answered.prompt))
        assert answered.answers == (made.greedy(answered.prompt, Condition(), room),)


def test_answers_prompt_fills_context(case: Callable[..., Case]) -> None:
    made = case(context=32)
    with pytest.raises(DataError, match=r"prompt 2: found \d+ tokens, expected fewer than the policy's context of 32"):
        answers(made.opened, PROMPTS)


def test_a_prompt_that_the_template_refuses_is_named(case: Callable[..., Case]) -> None:
    made = case()
    made.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content == 'Be brief.' %}{{ raise_exception('too brief') }}{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}"
    )
    brief = (Message(role="user", content="Be brief."),)
    with pytest.raises(DataError, match="prompt 2: refused by the chat template: too brief"):
        answers(made.opened, [PROMPTS[0], brief])


def test_template_and_system_turns_of_training(case: Callable[..., Case]) -> None:
    """The template refuses system turns. The greedy oracle gets the text that training used."""
    made = case()
    made.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt and loud %}{{ 'LOUD:' }}{% endif %}"
    )
    made.opened = replace(made.opened, template=trained_template({"template": {"arguments": {"loud": True}}}))
    made.ids = lambda prompt: made.tokenizer.encode(f"Be kind.\n\n{TEXTS[1]}<|im_end|>LOUD:")
    (found,) = made.answers(prompts=[(Message(role="system", content="Be kind."), *PROMPTS[1])])
    assert found.answers == (made.greedy(found.prompt, Condition()),)


def test_changes_to_prompts_are_logged(case: Callable[..., Case], caplog: pytest.LogCaptureFixture) -> None:
    made = case()
    made.opened = replace(made.opened, template=trained_template({"template": {"system_turns": "drop"}}))
    system = Message(role="system", content="Be kind.")
    answers(made.opened, [PROMPTS[0], *((system, *prompt) for prompt in PROMPTS[1:3])])
    assert caplog.messages == ["2 of 3 prompts with a change: system turn left out"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: found 0, expected at least 1"),
        ({"num_beams": 0}, "num_beams: found 0, expected at least 1"),
        ({"batch_size": 0}, "batch_size: found 0, expected at least 1"),
        ({"temperature": -1.0}, "temperature: found -1.0, expected a number of at least 0"),
        ({"temperature": math.nan}, "temperature: found nan, expected a number of at least 0"),
        ({"temperature": math.inf}, "temperature: found inf, expected a number of at least 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p: found 0.0, expected a share above 0"),
        ({"top_p": 0.5}, "top_p: found 0.5 at temperature 0, where nothing is drawn"),
        ({"num_beams": 2, "temperature": 1.0}, "num_beams: found 2 at temperature 1.0; beams go with temperature 0"),
    ],
)
def test_decoding_invalid_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Decoding(**settings)
