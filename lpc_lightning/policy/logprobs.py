"""Hidden states to log-probabilities of the answers, through the LM head in chunks.

The head's logits over the vocabulary are by far the largest values of a step. They exist for one chunk of tokens at a
time, are reduced to one number a token (or K, one a code), and are worked out again in the backward pass.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lpc_lightning.types import LogitHead, PairStates, PreferenceBatch

CHUNK_ELEMENTS = 2**25
"""Logits alive at once: 128 MiB in float32."""
THIN_RANGE = 60.0
"""Nats between a code's largest and smallest logit bias up to which exp() in float32 loses nothing that counts."""
WIDE_RANGE = 600.0
"""The same in float64, up to which sums over the vocabulary are then taken. Losses without a reference go there."""


def token_logps(hidden: Tensor, targets: Tensor, head: LogitHead) -> Tensor:
    """log softmax(head(hidden))[target] for each token.

    Args:
        hidden: (N, d) states that enter the head.
        targets: (N,) token ids.
        head: The policy's head; matrix products run in autocast's type, or else in the type of `hidden`.

    Returns:
        (N,) in nats, float32 (float64 for float64 input).
    """
    return _TokenLogps.apply(hidden, head.weight, head.bias, None, targets, head.scale, head.softcap)[:, 0]


def token_logps_per_code(
    hidden: Tensor, targets: Tensor, head: LogitHead, codes: Tensor, code_range: float | None = None
) -> Tensor:
    """log softmax(head(hidden + e_k))[target] for each token under every code, by one pass through the head.

    With a = head(h) and b_k = scale W e_k, the normaliser under code k is
    logsumexp_v(a_v + b_kv) = logsumexp_v(a_v) + log sum_v softmax(a)_v exp(b_kv): a thin (N, V) by (V, K) product, at
    about K/d of the head's own cost. Where a code has a logit range beyond `THIN_RANGE`, exp(b_k - max b_k) would
    underflow in float32, and all that comes after a is float64. K passes are left for a soft-capped head, which is not
    linear, for ranges beyond `WIDE_RANGE`, and for devices without float64.

    Args:
        hidden: (N, d) states that enter the head, without any code.
        targets: (N,) token ids.
        head: The policy's head.
        codes: (K, d) the codebook.
        code_range: `code_range` of these codes, as of a few steps ago: the two limits have room. None: it is measured,
            for which the CPU waits for the device.

    Returns:
        (N, K) in nats, float32 (float64 for float64 input).
    """
    if head.softcap is None:
        table = code_logits(head, codes)
        across = float(_range(table)) if code_range is None else code_range
        if across <= THIN_RANGE:
            return _TokenLogps.apply(hidden, head.weight, head.bias, table, targets, head.scale, None)
        if across <= WIDE_RANGE and hidden.device.type != "mps":
            exact = _types(hidden)[1]
            found = _TokenLogps.apply(hidden, head.weight, head.bias, table.double(), targets, head.scale, None)
            return found.to(exact)
    return torch.stack([token_logps(hidden + code.to(hidden.dtype), targets, head) for code in codes], dim=-1)


@torch.no_grad()
def token_logps_and_greedy(hidden: Tensor, targets: Tensor, head: LogitHead) -> tuple[Tensor, Tensor]:
    """`token_logps` without gradient, and whether greedy decoding would choose each target.

    Args:
        hidden: (N, d) states that enter the head.
        targets: (N,) token ids.
        head: The policy's head.

    Returns:
        (N,) in nats, float32 (float64 for float64 input), and (N,) bool: the target has the largest logit. Of equal
        logits, the lowest token id is chosen.
    """
    product, exact = _types(hidden)
    logps, greedy = hidden.new_empty(len(hidden), dtype=exact), targets.new_empty(len(hidden), dtype=torch.bool)
    with torch.autocast(hidden.device.type, enabled=False):
        states, rows = hidden.to(product), head.weight.to(product)
        for chunk in _chunks(len(hidden), len(rows)):
            logits = _logits(states[chunk], rows, head.bias, head.scale, head.softcap, exact)
            greedy[chunk] = logits.argmax(-1) == targets[chunk]
            logps[chunk] = logits.gather(1, targets[chunk, None])[:, 0] - logits.logsumexp(-1)
    return logps, greedy


def code_logits(head: LogitHead, codes: Tensor) -> Tensor:
    """The logit bias that each code is, LMHead(e_k) without the head's own bias: (K, V) in the type of `codes`."""
    with torch.autocast(codes.device.type, enabled=False):
        return head.scale * codes @ head.weight.to(codes.dtype).T


@torch.no_grad()
def code_range(head: LogitHead, codes: Tensor) -> Tensor:
    """() the largest difference, in nats, between two logits that one code is the bias of."""
    return _range(code_logits(head, codes))


def _range(table: Tensor) -> Tensor:
    return (table.detach().amax(-1) - table.detach().amin(-1)).max()


def logits_of(hidden: Tensor, head: LogitHead) -> Tensor:
    """Logits of states (N, d): (N, V), float32 or wider. Meant for few tokens: nothing is chunked."""
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return _logits(hidden, head.weight.to(hidden.dtype), head.bias, head.scale, head.softcap, exact)


class _TokenLogps(torch.autograd.Function):
    """(N, K) log-probabilities of `targets` under K logit biases `table` (K, V), or (N, 1) without a table.

    A table in float64 has everything after the head's matrix product in float64.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        table: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        product, exact = _types(hidden)
        if table is not None and table.dtype == torch.float64:
            exact = torch.float64
        ctx.scale, ctx.softcap, ctx.product = scale, softcap, product
        with torch.autocast(hidden.device.type, enabled=False):
            states, rows = hidden.to(product), weight.to(product)
            lifts = None if table is None else _lifts(table, exact)
            out = hidden.new_empty(hidden.shape[0], 1 if table is None else table.shape[0], dtype=exact)
            normaliser = hidden.new_empty(hidden.shape[0], dtype=exact)
            sums = torch.empty_like(out) if table is not None else None
            for chunk in _chunks(hidden.shape[0], weight.shape[0]):
                logits = _logits(states[chunk], rows, bias, scale, softcap, exact)
                normaliser[chunk] = logits.logsumexp(-1)
                picked = logits.gather(1, targets[chunk, None])
                out[chunk] = picked - normaliser[chunk, None]
                if lifts is not None and sums is not None:
                    sums[chunk] = _probabilities(logits, normaliser[chunk]) @ lifts.T
            if table is not None and sums is not None:
                biases = table.to(exact)
                out += biases[:, targets].T - biases.amax(-1) - sums.log()
        ctx.save_for_backward(hidden, weight, bias, table, targets, normaliser, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, table, targets, normaliser, sums = ctx.saved_tensors
        to_hidden, to_weight, to_bias, to_table = ctx.needs_input_grad[:4]
        exact, device = normaliser.dtype, hidden.device.type
        with torch.autocast(device, enabled=False):
            states, rows = hidden.to(ctx.product), weight.to(ctx.product)
            lifts = None if table is None else _lifts(table, exact)
            grad_hidden = torch.empty_like(hidden) if to_hidden else None
            grad_weight = torch.zeros_like(weight) if to_weight else None
            grad_bias = torch.zeros_like(bias) if to_bias else None
            grad_table = torch.zeros_like(table, dtype=exact) if to_table else None
            for chunk in _chunks(hidden.shape[0], weight.shape[0]):
                logits = _logits(states[chunk], rows, bias, ctx.scale, ctx.softcap, exact)
                slope = 1.0 if ctx.softcap is None else 1 - (logits / ctx.softcap).square()
                shares = _probabilities(logits, normaliser[chunk])
                upstream = grad[chunk]
                if lifts is None:
                    pulled = shares * -upstream
                else:
                    thin = upstream / sums[chunk]
                    if grad_table is not None:
                        grad_table -= lifts * (thin.T @ shares)
                        grad_table.index_add_(1, targets[chunk], upstream.T)
                    pulled = shares.mul_(-(thin @ lifts))
                pulled.scatter_add_(1, targets[chunk, None], upstream.sum(-1, keepdim=True))
                pulled = (pulled * slope if ctx.softcap is not None else pulled).mul_(ctx.scale)
                if grad_bias is not None:
                    grad_bias += pulled.sum(0)
                pulled = pulled.to(ctx.product)
                if grad_hidden is not None:
                    grad_hidden[chunk] = (pulled @ rows).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight += pulled.T @ states[chunk]
        table_grad = None if grad_table is None else grad_table.to(table.dtype)
        return grad_hidden, grad_weight, grad_bias, table_grad, None, None, None


def _types(hidden: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The type of the head's matrix product (autocast's, or else that of the states) and of all that comes after it."""
    device = hidden.device.type
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return product, torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, start + size) for start in range(0, tokens, size)]


def _logits(
    states: Tensor, rows: Tensor, bias: Tensor | None, scale: float, softcap: float | None, exact: torch.dtype
) -> Tensor:
    logits = (states @ rows.T).to(exact)
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _probabilities(logits: Tensor, normaliser: Tensor) -> Tensor:
    """softmax in place of `logits`, whose memory is not needed any more."""
    return logits.sub_(normaliser[:, None]).exp_()


def _lifts(table: Tensor, exact: torch.dtype) -> Tensor:
    """exp(b_k - max b_k): (K, V), at most 1."""
    biases = table.to(exact)
    return (biases - biases.amax(-1, keepdim=True)).exp()


class BatchForward:
    """What one backbone pass says of a batch: the answers' log-probabilities under any z, and the states of each pair.

    Hidden states do not depend on z, so that one reading serves every latent.
    """

    def __init__(self, hidden: Tensor, batch: PreferenceBatch, head: LogitHead) -> None:
        """Keep the states at the places that the batch says to read.

        Args:
            hidden: (R T, d) the backbone's last hidden states, flattened.
            batch: The batch that they come from.
            head: The LM head that reads them.
        """
        self.states = PairStates(
            prompt=hidden[batch.prompt_end],
            chosen=hidden[batch.completion_end[: batch.pairs]],
            rejected=hidden[batch.completion_end[batch.pairs :]],
            annotators=batch.annotators,
        )
        self._hidden = hidden[batch.read_at]
        self._batch = batch
        self._head = head

    def logps(self, z: Tensor | None = None) -> Tensor:
        """(2B,) log-probability of each answer, under `z` (B, d) of its pair, or (None) as the plain policy."""
        hidden = self._hidden
        if z is not None:
            hidden = hidden + z.to(hidden.dtype)[self._batch.owner % self._batch.pairs]
        return self._sum(token_logps(hidden, self._batch.targets, self._head))

    def logps_per_code(self, codes: Tensor, code_range: float | None = None) -> Tensor:
        """(2B, K) log-probability of each answer under every code of `codes` (K, d).

        See `token_logps_per_code` for `code_range`.
        """
        per_token = token_logps_per_code(self._hidden, self._batch.targets, self._head, codes, code_range)
        return self._sum(per_token)

    def first_order(self) -> tuple[Tensor, Tensor]:
        """(2B,) log-probability of each answer without z, and (2B, d) its gradient with respect to z at z = 0."""
        hidden = self._hidden.detach().requires_grad_()
        head = replace(self._head, weight=self._head.weight.detach())
        with torch.enable_grad():
            per_token = token_logps(hidden, self._batch.targets, head)
        (z_gradients,) = torch.autograd.grad(per_token, hidden, torch.ones_like(per_token))
        return self._sum(per_token.detach()), self._sum(z_gradients)

    @torch.no_grad()
    def mean_token(self) -> Tensor:
        """(V,) log of the mean, over all tokens of all answers, of the distribution that they are drawn from."""
        sums = [
            logits_of(self._hidden[chunk], self._head).log_softmax(-1).logsumexp(0)
            for chunk in _chunks(len(self._hidden), len(self._head.weight))
        ]
        return torch.stack(sums).logsumexp(0) - math.log(len(self._hidden))

    def _sum(self, per_token: Tensor) -> Tensor:
        sums = per_token.new_zeros(2 * self._batch.pairs, *per_token.shape[1:])
        return sums.index_add(0, self._batch.owner, per_token)
