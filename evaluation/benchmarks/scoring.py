"""Log-probabilities of continuations under a latent: contexts shared, or request by request as stock HFLM does.

Both yield the number of a request with its answer, in the order in which they are worked out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lm_eval.models.utils_hf import clear_torch_cache, pad_and_concat
from torch import Tensor, nn

from lpc_lightning.evaluation.benchmarks.context_latent import Latent
from lpc_lightning.evaluation.benchmarks.contexts import Group, Request, batches, group_by_context, kept_of, lay_out
from lpc_lightning.policy import CausalPolicy
from lpc_lightning.policy.logprobs import token_logps_and_greedy

Answer = tuple[float, bool]
"""Log-probability of a continuation in nats, and whether greedy decoding would write it."""
Run = tuple[list[int], list[int], list[int]]
"""Numbers of the requests that a run of the model answers, and the context and continuation that it reads."""


class SharedScorer:
    """Reads each context once, and each distinct continuation behind it once."""

    def __init__(
        self,
        policy: CausalPolicy,
        max_length: int,
        batch_size: int,
        shrink: bool,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """Keep the settings.

        Args:
            policy: The policy; it takes a block mask.
            max_length: Most tokens of a sequence that it reads.
            batch_size: A batch holds about as many tokens as this many of the longest sequences.
            shrink: Halve the batch size, for good, whenever memory runs out.
            precision: Makes the context to compute in: autocast, or nothing.
        """
        self.policy, self.max_length, self.batch_size = policy, max_length, batch_size
        self.shrink, self.precision = shrink, precision

    def __call__(self, requests: Iterable[Request], latent: Latent | None) -> Iterator[tuple[int, Answer]]:
        """Score requests under z by `latent`, or (None) as the plain policy."""
        waiting = group_by_context(requests, self.max_length)
        longest = max((group.longest for group in waiting), default=0)
        while waiting:
            most = self.batch_size * longest
            plan = batches(waiting, most)
            waiting = []
            for done, groups in enumerate(plan):
                try:
                    with self.precision():
                        answers = score(self.policy, groups, latent, most)
                except torch.OutOfMemoryError:
                    if not self.shrink or self.batch_size == 1:
                        raise
                    waiting = [group for rest in plan[done:] for group in rest]
                    break
                numbers = (numbers for group in groups for numbers in group.requests)
                for same, answer in zip(numbers, answers, strict=True):
                    yield from ((number, answer) for number in same)
            if waiting:
                self.batch_size //= 2
                clear_torch_cache()


@torch.no_grad()
def score(policy: CausalPolicy, groups: Sequence[Group], latent: Latent | None, row_tokens: int) -> list[Answer]:
    """Answers of all continuations in the order of `groups`, by one backbone pass.

    Args:
        policy: The policy; it takes a block mask.
        groups: What to score.
        latent: What z to score it under; None: the plain policy.
        row_tokens: Most tokens a row may hold.
    """
    batch, head = lay_out(groups, row_tokens), policy.head
    device = head.weight.device
    fields = (batch.rows.input_ids, batch.rows.attention_mask, batch.rows.segments, batch.rows.position_ids)
    hidden = policy.states(*(field.to(device) for field in fields)).flatten(0, 1)
    states = hidden[batch.read_at.to(device)]
    if latent is not None:
        z = latent(hidden[batch.context_end.to(device)], [group.whole for group in groups])
        states = states + z.to(states.dtype)[batch.group[batch.owner].to(device)]
    logps, greedy = token_logps_and_greedy(states, batch.targets.to(device), head)
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
    """`HFLM._loglikelihood_tokens` with z: the same order, padding, model call and softmax, the same bits at z = 0.

    One difference is owed to z. Requests that the model reads alike up to the last token share a run, in stock and
    here; here they must part context and continuation at the same place as well, since z comes from there.

    Args:
        requests: What to score.
        latent: What z to score it under.
        call: Tokens (B, T) to logits (B, T, V).
        head: The module behind `call` that takes the hidden states (B, T, d).
        batched: Cuts the runs, the longest first, into batches.
        max_length: Most tokens of a sequence that the model reads.
        softmax_dtype: As in `HFLM`; None: the type of the logits.
    """
    alike: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for number, (context, continuation) in enumerate(requests):
        alike.setdefault((len(context), (*context, *continuation[:-1])), []).append(number)
    runs: list[Run] = []
    for numbers in alike.values():
        context, continuation = requests[numbers[0]]
        runs.append((numbers, list(context), list(continuation)))
    device = next(head.parameters()).device
    for batch in batched(sorted(runs, key=lambda run: (-len(run[1]) - len(run[2]), run[1] + run[2]))):
        ends = [kept_of(run[1:], max_length) - 1 for run in batch]
        contexts = [context for _, context, _ in batch]
        rows = [torch.tensor((run[1] + run[2])[-(max_length + 1) : -1], device=device) for run in batch]
        tokens = pad_and_concat(max(map(len, rows)), rows)
        with _under(latent, head, ends, contexts):
            logps = torch.log_softmax(call(tokens), dim=-1, dtype=softmax_dtype)
        for row, (numbers, _, continuation), end in zip(logps, batch, ends, strict=True):
            scored = row[end : end + len(continuation)]
            chosen = scored.argmax(-1)
            for number in numbers:
                targets = torch.tensor(requests[number][1], device=device)
                picked = scored.gather(-1, targets[:, None])
                yield number, (float(picked.sum()), bool((chosen == targets).all()))


@contextmanager
def _under(latent: Latent, head: nn.Module, ends: Sequence[int], contexts: Sequence[Sequence[int]]) -> Iterator[None]:
    """Adds z to the states that enter the head; z from the states at each row's `ends`."""

    def lift(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states, *rest = inputs
        z = latent(states[torch.arange(len(states)), torch.tensor(ends)], contexts)
        return states + z[:, None].to(states), *rest

    handle = head.register_forward_pre_hook(lift)
    try:
        yield
    finally:
        handle.remove()
