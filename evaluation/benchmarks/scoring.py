"""Log-probabilities of continuations under a latent, with shared contexts or request by request like stock HFLM.

Both variants yield the index of a request with its answer, in the order of computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lm_eval.models.utils_hf import clear_torch_cache, pad_and_concat
from torch import Tensor, nn

from lpc_lightning.evaluation.benchmarks.context_latent import Latent
from lpc_lightning.evaluation.benchmarks.contexts import (
    Group,
    Request,
    group_by_context,
    kept_context_length,
    lay_out,
    make_batches,
)
from lpc_lightning.inference.modeling_lpc import head_product
from lpc_lightning.policy import CausalPolicy
from lpc_lightning.policy.logprobs import token_logps_and_greedy

Answer = tuple[float, bool]
"""Log-probability of a continuation in nats, and whether greedy decoding produces the continuation."""
Run = tuple[list[int], list[int], list[int]]
"""Indices of the requests that one input sequence answers, and the context and continuation of the sequence."""


class SharedScorer:
    """A scorer that reads each context once, followed by each distinct continuation once."""

    def __init__(
        self,
        policy: CausalPolicy,
        max_length: int,
        batch_size: int,
        shrink: bool,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """Store the settings.

        Args:
            policy: The policy. Its attention must accept a block mask.
            max_length: Maximum number of input tokens of a sequence.
            batch_size: A batch has about as many tokens as this number of the longest sequences.
            shrink: Permanently halve the batch size whenever memory runs out.
            precision: Function that creates the context of the computation: autocast, or an empty context.
        """
        self.policy, self.max_length, self.batch_size = policy, max_length, batch_size
        self.shrink, self.precision = shrink, precision

    def __call__(self, requests: Iterable[Request], latent: Latent | None) -> Iterator[tuple[int, Answer]]:
        """Score requests under the z of `latent`, or without z if `latent` is None."""
        waiting = group_by_context(requests, self.max_length)
        longest = max((group.longest for group in waiting), default=0)
        while waiting:
            max_tokens = self.batch_size * longest
            batches = make_batches(waiting, max_tokens)
            waiting = []
            for done, groups in enumerate(batches):
                try:
                    with self.precision():
                        answers = score(self.policy, groups, latent, max_tokens)
                except torch.OutOfMemoryError:
                    if not self.shrink or self.batch_size == 1:
                        raise
                    waiting = [group for batch in batches[done:] for group in batch]
                    break
                requests_by_answer = (indices for group in groups for indices in group.requests)
                for indices, answer in zip(requests_by_answer, answers, strict=True):
                    yield from ((index, answer) for index in indices)
            if waiting:
                self.batch_size //= 2
                clear_torch_cache()


@torch.no_grad()
def score(policy: CausalPolicy, groups: Sequence[Group], latent: Latent | None, row_tokens: int) -> list[Answer]:
    """Score all continuations in one backbone pass, and return the answers in the order of `groups`.

    Args:
        policy: The policy. Its attention must accept a block mask.
        groups: The groups to score.
        latent: Function that infers z. None: no z.
        row_tokens: Maximum number of tokens of a row.
    """
    batch, head = lay_out(groups, row_tokens), policy.head
    device = head.weight.device
    fields = (batch.rows.input_ids, batch.rows.attention_mask, batch.rows.segments, batch.rows.position_ids)
    input_ids, attention_mask, segments, position_ids = (field.to(device) for field in fields)
    hidden = policy.states(input_ids, attention_mask, segments, position_ids).flatten(0, 1)
    z = group = None
    if latent is not None:
        z = latent(hidden[batch.context_end.to(device)], [group.full_context for group in groups])
        group = batch.group[batch.owner].to(device)
    states = hidden[batch.read_at.to(device)]
    logps, greedy = token_logps_and_greedy(states, batch.targets.to(device), head, z, group)
    sums = torch.zeros(len(batch.group), dtype=torch.float64).index_add(0, batch.owner, logps.cpu().double())
    misses = torch.zeros(len(batch.group)).index_add(0, batch.owner, (~greedy).cpu().float())
    return list(zip(sums.tolist(), (misses == 0).tolist(), strict=True))


@torch.no_grad()
def score_like_stock(
    requests: Sequence[Request],
    latent: Latent,
    *,
    call: Callable[[Tensor], Tensor],
    head: nn.Module,
    batched: Callable[[list[Run]], Iterable[list[Run]]],
    max_length: int,
    softmax_dtype: torch.dtype | None,
) -> Iterator[tuple[int, Answer]]:
    """Score requests like `HFLM._loglikelihood_tokens`, with z.

    Order, padding, model call and softmax are those of HFLM, so the answers at z = 0 are equal to the last bit.

    Two differences are necessary. HFLM computes requests together if their input tokens are equal. Here they must also
    have the same context length, because z is inferred at the end of the context. And where the head's product is in 16
    bits, everything after it is in float32, as in training. Stock rounds log-probabilities to 16 bits, by about as much
    as the whole effect of a code.

    Args:
        requests: The requests to score.
        latent: Function that infers z.
        call: Function from tokens (B, T) to logits (B, T, V).
        head: The module inside `call` whose input is the hidden states (B, T, d).
        batched: Function that splits the runs, longest first, into batches.
        max_length: Maximum number of input tokens of a sequence.
        softmax_dtype: Data type of the softmax, as in `HFLM`. None: that of the logits, float32 or wider.
    """
    requests_by_input: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for index, (context, continuation) in enumerate(requests):
        requests_by_input.setdefault((len(context), (*context, *continuation[:-1])), []).append(index)
    runs: list[Run] = []
    for indices in requests_by_input.values():
        context, continuation = requests[indices[0]]
        runs.append((indices, list(context), list(continuation)))
    device = next(head.parameters()).device
    for batch in batched(sorted(runs, key=lambda run: (-len(run[1]) - len(run[2]), run[1] + run[2]))):
        ends = [kept_context_length(run[1:], max_length) - 1 for run in batch]
        contexts = [context for _, context, _ in batch]
        rows = [torch.tensor((run[1] + run[2])[-(max_length + 1) : -1], device=device) for run in batch]
        tokens = pad_and_concat(max(map(len, rows)), rows)
        with _added_latent(latent, head, ends, contexts):
            logits = call(tokens)
        for row, (indices, _, continuation), end in zip(logits, batch, ends, strict=True):
            continuation_logps = row[end : end + len(continuation)].log_softmax(-1, dtype=softmax_dtype)
            greedy_tokens = continuation_logps.argmax(-1)
            for index in indices:
                targets = torch.tensor(requests[index][1], device=device)
                target_logps = continuation_logps.gather(-1, targets[:, None])
                yield index, (float(target_logps.sum()), bool((greedy_tokens == targets).all()))


@contextmanager
def _added_latent(
    latent: Latent, head: nn.Module, ends: Sequence[int], contexts: Sequence[Sequence[int]]
) -> Iterator[None]:
    """Add W z to the head's output. z is inferred from each row's state at its position in `ends`."""

    def add_z(module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        states = inputs[0]
        z = latent(states[torch.arange(len(states)), torch.tensor(ends)], contexts)
        return logits + head_product(module, z, states.dtype)[:, None]

    handle = head.register_forward_hook(add_z)
    try:
        yield
    finally:
        handle.remove()
