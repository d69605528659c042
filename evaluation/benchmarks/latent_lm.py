"""A policy with a latent as an lm-eval model. Each request is answered under the z of its own prompt."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models import huggingface
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from lm_eval.utils import warning_once
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lpc_lightning.data.tokenization.chat_template import ChatTemplate
from lpc_lightning.data.tokenization.template import Template
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.benchmarks.context_latent import ContextLatent, Latent
from lpc_lightning.evaluation.benchmarks.contexts import Request
from lpc_lightning.evaluation.benchmarks.ranks import TorchDistributed
from lpc_lightning.evaluation.benchmarks.scoring import Answer, SharedScorer, score_like_stock
from lpc_lightning.inference.modeling_lpc import InferencePrior, latent_causal_lm
from lpc_lightning.latent import PriorMode
from lpc_lightning.policy import CausalPolicy
from lpc_lightning.policy.attention_kernel import finite_masks

logger = logging.getLogger(__name__)

CPU_AUTO_BATCH_SIZE = 8
"""Batch size `auto` on a CPU. Free memory cannot be measured there, and larger batches are only slightly faster."""
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]
"""lm-eval's request: the texts, the context's tokens, the continuation's tokens."""


class LatentLM(TorchDistributed, HFLM):
    """`HFLM` on a `CausalPolicy`. At z = 0 or without a prior, its answers are those of `HFLM` on the same weights.

    z is inferred at one token, which depends on the kind of request:

    - `loglikelihood`: the last token of the context. All choices of a question have the same z.
    - `loglikelihood_rolling`: the prefix token, for all windows of the text. It is the only prompt, and a sequence has
      one z. Windows do not start a new sequence; they exist because the backbone's context is limited. The policy would
      also generate the text under this z.
    - `generate_until`: the last token of the prompt. z stays the same during decoding.

    In mode `sample`, z is drawn once per context, with a seed derived from the context. Answers depend on neither batch
    size nor order.

    With `share_contexts`, the model reads a context once for all its continuations. The LM head is applied at
    continuation tokens only, and computations after its matrix product are in float32. Without it, requests are batched
    and scored like in stock HFLM. This is slower, and equal to the last bit at z = 0 (in 16 bits, up to the rounding of
    stock's softmax).

    The policy is left in evaluation mode. Under `torch.distributed`, the rank is that of the process group (see
    `TorchDistributed`).
    """

    def __init__(
        self,
        policy: CausalPolicy,
        tokenizer: PreTrainedTokenizerBase,
        prior: InferencePrior | None = None,
        *,
        prior_mode: PriorMode | None = None,
        share_contexts: bool = True,
        batch_size: int | str = 8,
        max_batch_size: int = 64,
        max_length: int | None = None,
        mixed_precision_dtype: torch.dtype | None = None,
        seed: int = 0,
        template: Template | None = None,
    ) -> None:
        """Wrap a policy for lm-eval.

        Args:
            policy: The policy without a latent.
            tokenizer: The policy's tokenizer. A copy is used.
            prior: The prior that infers z. It is moved to the policy's device. None: the policy is used without z.
            prior_mode: How z is computed from the prior: `mean`, `sample`, `argmax`, or the number of a code. None: the
                prior's own setting.
            share_contexts: Read a context once for all its continuations, if the policy's attention accepts a mask.
            batch_size: Number of sequences per batch. With shared contexts, a batch has as many tokens as this number
                of the longest sequences. `auto` starts with `max_batch_size` and halves it whenever memory runs out; on
                a CPU it is 8.
            max_batch_size: First batch size of `auto`.
            max_length: Maximum number of input tokens. None: the maximum in the policy's config.
            mixed_precision_dtype: Data type of autocast. None: no autocast.
            seed: Seed of the draws in mode `sample`.
            template: Template of training, whose arguments and date a chat template gets as well. None, or a template
                that is no chat template: the tokenizer's chat template without arguments.

        Raises:
            ConfigError: The batch size is invalid, or the prior does not have this mode.
        """
        _check_batch_size(batch_size)
        tokenizer = copy.deepcopy(tokenizer)
        arguments: dict[str, object] = {}
        if isinstance(template, ChatTemplate):
            tokenizer.chat_template, arguments = template.source, template.arguments
        with _hidden_hflm_warnings():
            super().__init__(
                pretrained=policy.causal_lm,
                backend="causal",
                tokenizer=tokenizer,
                max_length=max_length,
                mixed_precision_dtype=mixed_precision_dtype,
                batch_size=batch_size,
                max_batch_size=max_batch_size,
                chat_template_args=arguments,
            )
        self.policy = policy
        self.share_contexts = share_contexts and policy.takes_block_mask
        if share_contexts and not self.share_contexts and self.rank == 0:
            warning_once(
                logger,
                f"share_contexts: {type(policy.causal_lm).__name__} accepts no block mask (flash attention, or layers "
                "with a recurrent state). The context is read again for each choice.",
            )
        self._generator = policy.causal_lm if prior is None else latent_causal_lm(policy.causal_lm, prior)
        self._latent = None if prior is None else ContextLatent(prior, prior_mode, seed)
        self._fixed_latent: Latent | None = None
        auto = self.batch_size == "auto"
        size = self._first_batch_size() if auto else self.batch_size
        self._score_shared = SharedScorer(policy, self.max_length, size, shrink=auto, precision=self._precision)

    @property
    def prior_mode(self) -> PriorMode | None:
        """How z is computed from the prior. None: there is no latent."""
        return None if self._latent is None else self._latent.mode

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """Compute each continuation's log-probability given its context, and whether greedy decoding produces it."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or self.rank != 0)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Compute the log-probability of each text after the prefix token, under the z of the prefix token."""
        if self._latent is None:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        prompt = torch.tensor([[self.prefix_token_id]], device=self.device)
        z = self._infer(prompt, torch.ones_like(prompt))
        self._fixed_latent = lambda states, contexts: z.expand(len(states), -1)
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self._fixed_latent = None

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        latent = self._fixed_latent or self._latent
        tokens = [(context, continuation) for _, context, continuation in requests]
        if self.share_contexts:
            scores = self._score_shared(tokens, latent)
        elif latent is not None:
            scores = self._score_like_stock(tokens, latent, override_bs)
        else:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        self._warn_about_truncation(tokens)
        answers: list[Any] = [None] * len(requests)
        quiet = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=quiet, desc="Running loglikelihood requests") as bar:
            for index, answer in scores:
                answers[index] = answer
                if (texts := requests[index][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answer)
                bar.update()
        return answers

    def _score_like_stock(
        self, requests: Sequence[Request], latent: Latent, override_bs: int | None
    ) -> Iterator[tuple[int, Answer]]:
        size = override_bs if self.batch_size == "auto" else self.batch_size
        self.batch_sizes.clear()
        return score_like_stock(
            requests,
            latent,
            call=self._model_call,
            head=self.policy.causal_lm.get_output_embeddings(),
            batched=partial(Collator.get_chunks, n=size or 0, fn=None if size else self._batch_scheduler),
            max_length=self.max_length,
            softmax_dtype=self.softmax_dtype,
        )

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        if self._latent is not None and self._latent.is_random:
            options["z"] = self._infer(context, options["attention_mask"])
        elif self._latent is not None:
            options["prior_mode"] = self._latent.mode
        self._model = self._generator
        try:
            with finite_masks(self._generator):
                return super()._model_generate(context, max_length, stop, **options)
        finally:
            self._model = self.policy.causal_lm

    @torch.no_grad()
    def _infer(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Infer z (B, d) of prompts (B, T) with padding on the left."""
        assert self._latent is not None
        positions = (attention_mask.cumsum(-1) - 1).clamp_min(0)
        with self._precision():
            states = self.policy.states(tokens, attention_mask, None, positions)[:, -1]
        rows = zip(tokens, attention_mask.bool(), strict=True)
        return self._latent(states, [row[mask].tolist() for row, mask in rows])

    def _precision(self) -> AbstractContextManager[Any]:
        dtype = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def _warn_about_truncation(self, requests: Sequence[Request]) -> None:
        truncated = sum(len(context) + len(continuation) > self.max_length + 1 for context, continuation in requests)
        if truncated:
            logger.warning(
                f"{truncated} of {len(requests)} requests are longer than the policy's window of {self.max_length} "
                "tokens. The first tokens of their contexts are removed."
            )

    def _first_batch_size(self) -> int:
        return min(self.max_batch_size, CPU_AUTO_BATCH_SIZE) if self.device.type == "cpu" else self.max_batch_size

    def _detect_batch_size(self, requests: Sequence[TokenRequest] | None = None, pos: int = 0) -> int:
        if self.device.type == "cpu":
            return self._first_batch_size()
        return super()._detect_batch_size(requests, pos)


def _check_batch_size(size: int | str) -> None:
    if not (str(size).startswith("auto") or (str(size).isdecimal() and int(size) > 0)):
        raise ConfigError(f"batch_size: found {size!r}, expected a whole number of at least 1, or auto.")


@contextmanager
def _hidden_hflm_warnings() -> Iterator[None]:
    """Hide HFLM's warnings about an existing model object. It is intended here; `TorchDistributed` handles ranks."""

    def is_other_message(record: logging.LogRecord) -> bool:
        return "`pretrained` model kwarg" not in record.msg and "already-initialized model" not in record.msg

    huggingface.eval_logger.addFilter(is_other_message)
    try:
        yield
    finally:
        huggingface.eval_logger.removeFilter(is_other_message)
