"""A policy and its latent as an lm-eval model: every request is answered under the z of its own prompt."""

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

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.benchmarks.context_latent import ContextLatent, Latent
from lpc_lightning.evaluation.benchmarks.contexts import Request
from lpc_lightning.evaluation.benchmarks.ranks import TorchDistributed
from lpc_lightning.evaluation.benchmarks.scoring import Answer, SharedScorer, score_like_stock
from lpc_lightning.inference.modeling_lpc import InferencePrior, latent_causal_lm
from lpc_lightning.latent import PriorMode
from lpc_lightning.policy import CausalPolicy

logger = logging.getLogger(__name__)

AUTO_ON_CPU = 8
"""Batch size `auto` on a CPU, which does not say when its memory ends and gains little by larger batches."""
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]
"""lm-eval's: the texts, the context's tokens, the continuation's tokens."""


class LatentLM(TorchDistributed, HFLM):
    """`HFLM` on a `CausalPolicy`. At z = 0, or without a prior, it answers what `HFLM` answers on the same weights.

    Where z comes from, for each kind of request:

    - `loglikelihood`: the last token of the context. The choices of a question are answered under one z.
    - `loglikelihood_rolling`: the prefix token, for all windows of the text. It is the only prompt there is, and a
      sequence has one z: windows are cut because the backbone's sight is short, and do not start a new sequence. The
      policy would write the text under that z as well.
    - `generate_until`: the last token of the prompt, kept through decoding.

    In mode `sample`, z is drawn once for each context, by a seed that belongs to the context. Answers depend on neither
    batch size nor order.

    With `share_contexts`, a context is read once for all its continuations and the LM head is applied at continuations
    alone, in float32 behind the matrix product. Without, requests are batched and scored as stock HFLM does it: equal
    to the last bit at z = 0, and slower.

    The policy is in evaluation mode afterwards. Under `torch.distributed` it knows its rank (`TorchDistributed`).
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
    ) -> None:
        """Stand a policy up for lm-eval.

        Args:
            policy: The plain policy.
            tokenizer: Its tokenizer. A copy is used.
            prior: Infers z; it moves to the policy's device. None: the plain policy.
            prior_mode: How z is taken from the prior: `mean`, `sample`, `argmax`, or the number of a code. None: the
                prior's own setting.
            share_contexts: Read a context once for all its continuations, where the policy's attention takes a mask.
            batch_size: Sequences at once; with shared contexts, as many tokens as that many of the longest ones. `auto`
                takes what fits: `max_batch_size`, halved while memory runs out; on a CPU 8.
            max_batch_size: Where `auto` starts.
            max_length: Most tokens that the policy reads. None: as its config says.
            mixed_precision_dtype: Autocast to this type. None: none.
            seed: Seed of the draws of mode `sample`.

        Raises:
            ConfigError: No such batch size, or no such mode of this prior.
        """
        _check_batch_size(batch_size)
        with _expecting_a_model():
            super().__init__(
                pretrained=policy.causal_lm,
                backend="causal",
                tokenizer=copy.deepcopy(tokenizer),
                max_length=max_length,
                mixed_precision_dtype=mixed_precision_dtype,
                batch_size=batch_size,
                max_batch_size=max_batch_size,
            )
        self.policy = policy
        self.share_contexts = share_contexts and policy.takes_block_mask
        if share_contexts and not self.share_contexts and self.rank == 0:
            warning_once(
                logger,
                f"share_contexts: {type(policy.causal_lm).__name__} takes no block mask (flash attention, or layers "
                "with a memory of their own): each choice reads its context again.",
            )
        self._writer = policy.causal_lm if prior is None else latent_causal_lm(policy.causal_lm, prior)
        self._latent = None if prior is None else ContextLatent(prior, prior_mode, seed)
        self._given: Latent | None = None
        auto = self.batch_size == "auto"
        size = self._first_batch_size() if auto else self.batch_size
        self._score_shared = SharedScorer(policy, self.max_length, size, shrink=auto, precision=self._precision)

    @property
    def prior_mode(self) -> PriorMode | None:
        """How z is taken from the prior; None: there is no latent."""
        return None if self._latent is None else self._latent.mode

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """Log-probability of each continuation given its context, and whether greedy decoding would write it."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or self.rank != 0)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text behind the prefix token, under the one z of that prompt."""
        if self._latent is None:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        prompt = torch.tensor([[self.prefix_token_id]], device=self.device)
        z = self._infer(prompt, torch.ones_like(prompt))
        self._given = lambda states, contexts: z.expand(len(states), -1)
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self._given = None

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        latent = self._given or self._latent
        tokens = [(context, continuation) for _, context, continuation in requests]
        if self.share_contexts:
            scores = self._score_shared(tokens, latent)
        elif latent is not None:
            scores = self._score_like_stock(tokens, latent, override_bs)
        else:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        self._tell_cuts(tokens)
        answers: list[Any] = [None] * len(requests)
        quiet = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=quiet, desc="Running loglikelihood requests") as bar:
            for number, answer in scores:
                answers[number] = answer
                if (texts := requests[number][0]) is not None:
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
        if self._latent is None:
            return super()._model_generate(context, max_length, stop, **options)
        if self._latent.draws:
            options["z"] = self._infer(context, options["attention_mask"])
        else:
            options["prior_mode"] = self._latent.mode
        self._model = self._writer
        try:
            return super()._model_generate(context, max_length, stop, **options)
        finally:
            self._model = self.policy.causal_lm

    @torch.no_grad()
    def _infer(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """z (B, d) of prompts (B, T), padded on the left."""
        assert self._latent is not None
        positions = (attention_mask.cumsum(-1) - 1).clamp_min(0)
        with self._precision():
            states = self.policy.states(tokens, attention_mask, None, positions)[:, -1]
        rows = zip(tokens, attention_mask.bool(), strict=True)
        return self._latent(states, [row[shown].tolist() for row, shown in rows])

    def _precision(self) -> AbstractContextManager[Any]:
        kind = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=kind, enabled=kind is not None)

    def _tell_cuts(self, requests: Sequence[Request]) -> None:
        cut = sum(len(context) + len(continuation) > self.max_length + 1 for context, continuation in requests)
        if cut:
            logger.warning(
                f"{cut} of {len(requests)} requests are longer than the {self.max_length} tokens that the policy "
                "reads: their contexts lose their first tokens."
            )

    def _first_batch_size(self) -> int:
        return min(self.max_batch_size, AUTO_ON_CPU) if self.device.type == "cpu" else self.max_batch_size

    def _detect_batch_size(self, requests: Sequence[TokenRequest] | None = None, pos: int = 0) -> int:
        if self.device.type == "cpu":
            return self._first_batch_size()
        return super()._detect_batch_size(requests, pos)


def _check_batch_size(size: int | str) -> None:
    if not (str(size).startswith("auto") or (str(size).isdecimal() and int(size) > 0)):
        raise ConfigError(f"batch_size: found {size!r}, expected a number from 1 on, or auto.")


@contextmanager
def _expecting_a_model() -> Iterator[None]:
    """Keeps HFLM from warning that it was handed a model, which is meant: `TorchDistributed` serves the ranks."""

    def expected(record: logging.LogRecord) -> bool:
        return "`pretrained` model kwarg" not in record.msg and "already-initialized model" not in record.msg

    huggingface.eval_logger.addFilter(expected)
    try:
        yield
    finally:
        huggingface.eval_logger.removeFilter(expected)
