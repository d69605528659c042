"""Answers to fixed prompts at each validation, beside those of the policy before training."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.algorithms.averaged_weights import validated_weights
from lpc_lightning.data import PreferenceDataModule
from lpc_lightning.data.trainer_data import required_data, template_settings
from lpc_lightning.distributed.sharding import keeps_weights_elsewhere
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.benchmarks.preserve import preserved
from lpc_lightning.evaluation.samples import TEXT, Record, samples_text, write_samples
from lpc_lightning.files.plain_values import plain
from lpc_lightning.inference.generate import conditions
from lpc_lightning.inference.generation import Answered, Condition, Decoding, answers
from lpc_lightning.inference.opening import OpenedPolicy, view_module
from lpc_lightning.inference.prompts import Prompt, read_prompts, text_prompt
from lpc_lightning.loggers import log_text, run_folder
from lpc_lightning.reference.live import FrozenModel

BEFORE = "before training"
"""Name of the answers of the policy before training."""
LIKELIEST = 2
"""Number of codes to answer under if no codes are set."""


class AnswerSamples(Callback):
    """Callback that answers the same prompts at each validation: under the prior, under codes, and before training.

    The answers are written to `samples.md` and `samples.jsonl` in the run folder, as text to every logger that takes
    text, and to the page of `lpc-lightning report`. Greedy answers change only with the weights; drawn ones have the
    same seed at every step and under every code. The policy before training answers once, before the first step. These
    answers are kept in the checkpoint, with all others: a resumed run writes the same files as an uninterrupted one.
    Without a latent there are the policy's answers, and those before training. With `WeightAveraging`, the averaged
    weights answer, which are those that are validated.

    The training is not changed. The cost is logged as `resources/samples_seconds` and `resources/samples_tokens`, and
    printed at the first validation and at the end. A policy that is sharded over processes (FSDP, DeepSpeed) gives no
    answers; with several processes (DDP) the first one answers.
    """

    def __init__(
        self,
        prompts: str | list[str] | None = None,
        count: int = 4,
        codes: list[int] | None = None,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = 8,
    ) -> None:
        """Check and store the settings.

        Args:
            prompts: A file of prompts (`.txt` with one a line, or `.jsonl` with `prompt` as text or messages, and
                perhaps a system text in `system`), or a list of prompts as text. null: the first validation prompts.
            count: Number of prompts, the first ones.
            codes: Codes to answer under as well, from 0. null: the two that are likeliest over these prompts at that
                step. Not used without codes.
            max_new_tokens: Tokens of an answer at most.
            temperature: Temperature of the drawn answers. 0: greedy answers only.
            seed: Seed of the drawn answers.
            batch_size: Prompts that are answered at a time.

        Raises:
            ConfigError: A setting is out of range, or there are no prompts.
        """
        if count < 1:
            raise ConfigError(f"AnswerSamples.count: found {count}, expected at least 1.")
        self.decodings = {"greedy": Decoding(max_new_tokens, seed=seed, batch_size=batch_size)}
        if temperature:
            drawn = replace(self.decodings["greedy"], temperature=temperature)
            self.decodings[f"drawn at temperature {temperature:g}"] = drawn
        if prompts == []:
            raise ConfigError("AnswerSamples.prompts: found an empty list, expected prompts, a file, or null.")
        self.codes, self.count, self._given = codes, count, prompts
        self.prompts: list[Prompt] = []
        self.records: list[Record] = []
        """All answers of the run; see `evaluation.samples`."""
        self.seconds, self.tokens, self.rounds = 0.0, 0, 0
        self._before: list[list[dict[str, Any]]] | None = None
        self._request = ""
        self._is_on = False

    def state_dict(self) -> dict[str, Any]:
        """Return all answers so far, and those before training with their prompts and decodings."""
        return {"records": self.records, "before": self._before, "request": self._request}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the answers."""
        self.records, self._before = list(state_dict["records"]), state_dict["before"]
        self._request = state_dict["request"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run, and read the prompts."""
        if stage != "fit":
            return
        self.records, self._before, self._request = [], None, ""
        self.seconds, self.tokens, self.rounds = 0.0, 0, 0
        self.prompts = self._read_prompts(trainer)[: self.count]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer before training.

        Raises:
            ConfigError: The latent does not have one of the codes.
            DataError: A prompt has no room for an answer in the policy's context.
        """
        assert isinstance(pl_module, PreferenceModule)
        self._is_on = not keeps_weights_elsewhere(trainer.strategy)
        if not self._is_on:
            rank_zero_warn(
                f"AnswerSamples: {type(trainer.strategy).__name__} shards the policy over devices, so that nothing is "
                "answered. After the fit, run `lpc-lightning generate` on a checkpoint."
            )
            return
        if not trainer.is_global_zero:
            return
        self._conditions(view_module(pl_module, "policy", template_settings(trainer)), [])
        request = json.dumps(plain([self.prompts, {name: asdict(each) for name, each in self.decodings.items()}]))
        if request == self._request:
            return
        self._request, started = request, time.perf_counter()
        with self._ready(trainer, pl_module), self._policy_before(trainer, pl_module) as policy:
            if policy is None:
                rank_zero_warn(
                    "AnswerSamples: the checkpoint has no answers to these prompts from before training, and the "
                    "policy is trained by now. They are left out."
                )
                self._before = None
                return
            answered = self._answer(policy, [Condition(BEFORE)])
        self._before = [record["answers"] for record in answered]
        self._count(trainer, time.perf_counter() - started, answered)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer, and write the answers."""
        if not self._is_on or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        assert isinstance(pl_module, PreferenceModule)
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        started = time.perf_counter()
        with self._ready(trainer, pl_module), validated_weights(trainer, pl_module):
            answered = self._answer_now(view_module(pl_module, "policy", template_settings(trainer)))
        cost = self._count(trainer, time.perf_counter() - started, answered)
        for record, before in zip(answered, self._before or [[]] * len(answered), strict=True):
            record["answers"] = [*record["answers"], *before]
        step = trainer.global_step
        # A validation may be repeated at the same step, after a resume.
        self.records = [record for record in self.records if record["step"] < step]
        self.records += [{"step": step, **record} for record in answered]
        write_samples(folder, self.records)
        text = samples_text([record for record in self.records if record["step"] == step])
        log_text(trainer, "samples", text, trainer.global_step)
        if not self.rounds:
            rank_zero_info(f"Samples at a validation, such as this one: {cost}. See {folder / TEXT}.")
        self.rounds += 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the cost."""
        if self.rounds:
            rank_zero_info(
                f"Samples before training and at each validation ({self.rounds}): "
                f"{_cost(self.seconds, self.tokens)} together."
            )
        elif self._is_on and trainer.is_global_zero:
            rank_zero_warn("AnswerSamples: this run had no validation, so that nothing was answered.")

    def _read_prompts(self, trainer: Trainer) -> list[Prompt]:
        if isinstance(self._given, str):
            return read_prompts(self._given)
        if self._given is not None:
            return [text_prompt(each) for each in self._given]
        data = required_data(
            trainer, "AnswerSamples.prompts: found null", "Give prompts, because other data has none as text."
        )
        return list(_validation_prompts(data, self.count))

    def _conditions(self, policy: OpenedPolicy, likeliest: Sequence[int]) -> list[Condition]:
        """Return the prior and the codes, or the plain policy.

        Raises:
            ConfigError: The latent does not have one of the codes.
        """
        if policy.prior is None:
            return [Condition("policy")]
        has_codes = policy.prior.num_codes is not None
        codes = likeliest if self.codes is None else self.codes
        return conditions(policy, None, codes if has_codes else [], None)

    @contextmanager
    def _ready(self, trainer: Trainer, module: PreferenceModule) -> Iterator[None]:
        """Prepare for generation, and restore all that belongs to the training afterwards."""
        with preserved(module, module.tokenizer), trainer.precision_plugin.forward_context():
            yield

    @contextmanager
    def _policy_before(self, trainer: Trainer, module: PreferenceModule) -> Iterator[OpenedPolicy | None]:
        """Yield the policy before training. None: a resumed run no longer has it."""
        policy = view_module(module, BEFORE, template_settings(trainer), latent=False)
        if trainer.global_step == 0 or not module.policy_spec.trainable:
            context: Any = nullcontext()
        elif module.policy_spec.lora is not None:
            context = module.policy.as_reference()
        elif isinstance(module.reference, FrozenModel) and module.reference_path is None:
            policy, context = replace(policy, policy=module.reference.policy), nullcontext()
        else:
            yield None
            return
        with context:
            yield policy

    def _answer_now(self, policy: OpenedPolicy) -> list[Record]:
        prior_is_read = policy.prior is not None and policy.prior.num_codes is not None and self.codes is None
        likeliest: list[int] = []
        if prior_is_read:
            short = replace(self.decodings["greedy"], max_new_tokens=1)
            priors = [each.prior for each in answers(policy, self.prompts, [Condition()], short)]
            means = [sum(column) for column in zip(*(prior for prior in priors if prior is not None), strict=True)]
            likeliest = sorted(range(len(means)), key=lambda code: -means[code])[:LIKELIEST]
        return self._answer(policy, self._conditions(policy, likeliest))

    def _answer(self, policy: OpenedPolicy, under: Sequence[Condition]) -> list[Record]:
        """Return a record without a step for each prompt, with greedy and drawn answers under each condition."""
        by_decoding: dict[str, list[Answered]] = {
            name: list(answers(policy, self.prompts, under, decoding)) for name, decoding in self.decodings.items()
        }
        records = []
        for number, prompt in enumerate(self.prompts):
            of_prompt = {name: answered[number] for name, answered in by_decoding.items()}
            prior = of_prompt["greedy"].prior
            records.append(
                {
                    "prompt": [dict(message) for message in prompt],
                    "prior": None if prior is None else list(prior),
                    "answers": [
                        {"decoding": name, **asdict(answer)}
                        for name, answered in of_prompt.items()
                        for answer in answered.answers
                    ],
                }
            )
        return records

    def _count(self, trainer: Trainer, seconds: float, records: Sequence[Record]) -> str:
        """Log the cost of the answers, add it to the total, and return it as text."""
        tokens = sum(answer["tokens"] for record in records for answer in record["answers"])
        self.seconds, self.tokens = self.seconds + seconds, self.tokens + tokens
        for logger in trainer.loggers:
            values = {"resources/samples_seconds": seconds, "resources/samples_tokens": tokens}
            logger.log_metrics(values, trainer.global_step)
        return _cost(seconds, tokens)


def _validation_prompts(data: PreferenceDataModule, count: int) -> Iterator[Prompt]:
    """Yield the first different prompts of the validation pairs."""
    seen: list[Prompt] = []
    for example in data.kept_examples("validation"):
        if example.prompt not in seen:
            seen.append(example.prompt)
            yield example.prompt
        if len(seen) == count:
            return


def _cost(seconds: float, tokens: int) -> str:
    return f"{tokens:,} tokens in {seconds:.1f} s"
