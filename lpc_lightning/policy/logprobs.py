"""Hidden states to log-probabilities of the answers, through the LM head in chunks.

The head's logits over the vocabulary are by far the largest values of a step. They exist for one chunk of tokens at a
time, are reduced to one number a token (or K, one a code), and are worked out again in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lpc_lightning.types import LogitHead, PairStates, PreferenceBatch

CHUNK_ELEMENTS = 2**25
"""Logits alive at once on a CPU: 128 MiB in float32."""
GPU_CHUNK_ELEMENTS = 2**28
"""Logits alive at once on a GPU: 1 GiB in float32, so that a few large products do the work."""
THIN_RANGE = 60.0
"""Nats between a code's largest and smallest logit bias up to which exp() in float32 loses nothing that counts."""
WIDE_RANGE = 600.0
"""The same in float64, up to which sums over the vocabulary are then taken. Losses without a reference go there."""


def token_logps(
    hidden: Tensor, targets: Tensor, head: LogitHead, z: Tensor | None = None, group: Tensor | None = None
) -> Tensor:
    """log softmax(head(hidden + z[group]))[target] for each token.

    LMHead(h + z) is computed as LMHead(h) + LMHead(z), the second in float32: the sum of the states would be rounded to
    the type of the product, by about as much as a code's whole effect.

    Args:
        hidden: (N, d) states that enter the head.
        targets: (N,) token ids.
        head: The policy's head; matrix products run in autocast's type, or else in the type of `hidden`.
        z: (B, d) representations that are added to the states. None adds nothing.
        group: (N,) which of them is added to each state.

    Returns:
        (N,) in nats, float32 (float64 for float64 input).
    """
    shifts = None if z is None else code_logits(head, z.to(torch.promote_types(z.dtype, torch.float32)))
    return _shifted_logps(hidden, targets, head, shifts, group)


def _shifted_logps(
    hidden: Tensor, targets: Tensor, head: LogitHead, shifts: Tensor | None, group: Tensor | None
) -> Tensor:
    """`token_logps` with the logit biases (B, V) of the representations in place of these."""
    return _TokenLogps.apply(hidden, head.weight, head.bias, None, shifts, group, targets, head)[:, 0]


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
    table = code_logits(head, codes)
    if head.softcap is None:
        across = float(_range(table)) if code_range is None else code_range
        if across <= THIN_RANGE:
            return _TokenLogps.apply(hidden, head.weight, head.bias, table, None, None, targets, head)
        if across <= WIDE_RANGE and hidden.device.type != "mps":
            exact = _types(hidden)[1]
            logps = _TokenLogps.apply(hidden, head.weight, head.bias, table.double(), None, None, targets, head)
            return logps.to(exact)
    alone = torch.zeros_like(targets)
    return torch.stack([_shifted_logps(hidden, targets, head, row[None], alone) for row in table], dim=-1)


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
        for chunk in _chunks(hidden, len(rows)):
            logits = _logits(_product(states[chunk], rows.T), (head.bias, None, None), head.scale, head.softcap, exact)
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
    product = _product(hidden, head.weight.to(hidden.dtype).T)
    return _logits(product, (head.bias, None, None), head.scale, head.softcap, exact)


class _TokenLogps(torch.autograd.Function):
    """(N, K) log-probabilities of `targets` under K logit biases `table` (K, V), or (N, 1) without a table.

    `shifts` (B, V) are logit biases of groups of tokens, and `group` (N,) is the group of each token. A table in
    float64 has everything after the head's matrix product in float64.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        table: Tensor | None,
        shifts: Tensor | None,
        group: Tensor | None,
        targets: Tensor,
        head: LogitHead,
    ) -> Tensor:
        product, exact = _types(hidden)
        if table is not None and table.dtype == torch.float64:
            exact = torch.float64
        chunks = _chunks(hidden, weight.shape[0])
        ctx.head, ctx.product, ctx.chunks = replace(head, weight=weight.new_empty(0), bias=None), product, chunks
        vocabulary = _Vocabulary(head, exact)
        with torch.autocast(hidden.device.type, enabled=False):
            states, rows = hidden.to(product), weight.to(product)
            lifts = None if table is None else _lifts(table, exact)
            picked, normaliser = (hidden.new_empty(hidden.shape[0], dtype=exact) for _ in range(2))
            sums = None if table is None else hidden.new_empty(hidden.shape[0], table.shape[0], dtype=exact)
            for chunk in chunks:
                logits = _product(states[chunk], rows.T)
                terms = (bias, shifts, None if group is None else group[chunk])
                if lifts is None or sums is None:
                    picked[chunk], normaliser[chunk] = vocabulary.reduce(logits, terms, targets[chunk])
                else:
                    picked[chunk], normaliser[chunk], shares = vocabulary.shares(logits, terms, targets[chunk])
                    sums[chunk] = shares @ lifts.T
                del logits
            out = (picked - normaliser)[:, None]
            if table is not None and sums is not None:
                biases = table.to(exact)
                out = out + biases[:, targets].T - biases.amax(-1) - sums.log()
        ctx.save_for_backward(hidden, weight, bias, table, shifts, group, targets, normaliser, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, table, shifts, group, targets, normaliser, sums = ctx.saved_tensors
        to_hidden, to_weight, to_bias, to_table, to_shifts = ctx.needs_input_grad[:5]
        exact, product = normaliser.dtype, ctx.product
        vocabulary = _Vocabulary(ctx.head, exact)
        with torch.autocast(hidden.device.type, enabled=False):
            states, rows = hidden.to(product), weight.to(product)
            lifts = None if table is None else _lifts(table, exact)
            grad_hidden = torch.empty_like(hidden) if to_hidden else None
            # Sums over chunks: in bfloat16 they would be off by 3 % after 256 of them.
            grad_weight = torch.zeros_like(weight, dtype=exact) if to_weight else None
            grad_bias = torch.zeros_like(bias, dtype=exact) if to_bias else None
            grad_table = torch.zeros_like(table, dtype=exact) if to_table else None
            grad_shifts = torch.zeros_like(shifts, dtype=exact) if to_shifts else None
            for chunk in ctx.chunks:
                logits = _product(states[chunk], rows.T)
                terms = (bias, shifts, None if group is None else group[chunk])
                known = (targets[chunk], normaliser[chunk])
                upstream = grad[chunk]
                if lifts is None:
                    pulled = vocabulary.slopes(logits, terms, *known, upstream[:, 0], product)
                else:
                    shares = vocabulary.probabilities(logits, terms, normaliser[chunk])
                    thin = upstream / sums[chunk]
                    if grad_table is not None:
                        grad_table -= lifts * (thin.T @ shares)
                        grad_table.index_add_(1, targets[chunk], upstream.T)
                    pulled = vocabulary.mixed_slopes(shares, thin @ lifts, targets[chunk], upstream.sum(-1), product)
                    del shares
                del logits
                if grad_shifts is not None and group is not None:
                    members = torch.arange(len(grad_shifts), device=group.device)[:, None] == group[chunk]
                    grad_shifts += _product(members.to(pulled.dtype), pulled)
                pulled = pulled if ctx.head.scale == 1.0 else pulled * ctx.head.scale
                if grad_bias is not None:
                    grad_bias += pulled.sum(0, dtype=exact)
                pulled = pulled.to(product)
                if grad_hidden is not None:
                    grad_hidden[chunk] = (pulled @ rows).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight += _product(pulled.T, states[chunk])
                del pulled
        gradients = (grad_weight, grad_bias, grad_table, grad_shifts)
        leaves = (weight, bias, table, shifts)
        cast = (None if g is None else g.to(leaf.dtype) for g, leaf in zip(gradients, leaves, strict=True))
        return grad_hidden, *cast, None, None, None


Settings = tuple[float, float | None, torch.dtype]
"""Scale and soft cap of the head, and the type of all that comes after its product."""
Terms = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Addends of the product: the head's bias (V,); logit biases (B, V) of groups, and the group of each token (n,)."""


class _Vocabulary:
    """What is computed from a chunk's (n, V) products with the head, in few passes over them.

    Each method is one function: it works in place on a CPU, and is one or two kernels where torch compiles it.
    """

    def __init__(self, head: LogitHead, exact: torch.dtype) -> None:
        self._settings: Settings = (head.scale, head.softcap, exact)
        self._run = _compiled if head.compiled else _as_written

    def reduce(self, *chunk: Any) -> tuple[Tensor, Tensor]:
        """Return each target's logit and the normaliser."""
        return self._run(_reduce)(self._settings, *chunk)

    def shares(self, *chunk: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return each target's logit, the normaliser and the probabilities."""
        return self._run(_shares)(self._settings, *chunk)

    def probabilities(self, *chunk: Any) -> Tensor:
        """Return the probabilities, from products and normaliser."""
        return self._run(_probabilities)(self._settings, *chunk)

    def slopes(self, *chunk: Any) -> Tensor:
        """Return the gradient with respect to the logits before the soft cap."""
        return self._run(_slopes)(self._settings, *chunk)

    def mixed_slopes(self, *chunk: Any) -> Tensor:
        """Return the same where the upstream gradient is one of log-probabilities under every code."""
        return self._run(_mixed_slopes)(*chunk)


def _as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # For any number of tokens: the last chunk is a smaller one.
    return torch.compile(function, fullgraph=True, dynamic=True)


def _reduce(settings: Settings, product: Tensor, terms: Terms, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = _logits(product, terms, *settings)
    return logits.gather(1, targets[:, None])[:, 0], logits.logsumexp(-1)


def _shares(settings: Settings, product: Tensor, terms: Terms, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = _logits(product, terms, *settings)
    picked, normaliser = logits.gather(1, targets[:, None])[:, 0], logits.logsumexp(-1)
    return picked, normaliser, logits.sub_(normaliser[:, None]).exp_()


def _probabilities(settings: Settings, product: Tensor, terms: Terms, normaliser: Tensor) -> Tensor:
    return _logits(product, terms, *settings).sub_(normaliser[:, None]).exp_()


def _slopes(
    settings: Settings,
    product: Tensor,
    terms: Terms,
    targets: Tensor,
    normaliser: Tensor,
    upstream: Tensor,
    narrow: torch.dtype,
) -> Tensor:
    logits = _logits(product, terms, *settings)
    softcap = settings[1]
    slope = None if softcap is None else 1 - (logits / softcap).square()
    pulled = logits.sub_(normaliser[:, None]).exp_().mul_(-upstream[:, None])
    pulled = _add_at_targets(pulled, targets, upstream)
    return _narrow(pulled if slope is None else pulled.mul_(slope), narrow)


def _mixed_slopes(shares: Tensor, mixture: Tensor, targets: Tensor, upstream: Tensor, narrow: torch.dtype) -> Tensor:
    shares = shares.clone() if torch.compiler.is_compiling() else shares
    return _narrow(_add_at_targets(shares.mul_(mixture).neg_(), targets, upstream), narrow)


def _narrow(pulled: Tensor, narrow: torch.dtype) -> Tensor:
    """Round to the type of the products that follow, within the same kernel. Sums over rows are exact on a CPU."""
    return pulled.to(narrow) if torch.compiler.is_compiling() else pulled


def _add_at_targets(values: Tensor, targets: Tensor, addend: Tensor) -> Tensor:
    """Add (n,) to the target's column of each row of `values` (n, V)."""
    if not torch.compiler.is_compiling():
        return values.scatter_add_(1, targets[:, None], addend[:, None])
    columns = torch.arange(values.shape[1], device=values.device)
    return values + torch.where(columns == targets[:, None], addend[:, None], 0.0)


def _types(hidden: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The type of the head's matrix product (autocast's, or else that of the states) and of all that comes after it."""
    device = hidden.device.type
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return product, torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _chunks(hidden: Tensor, vocabulary: int) -> list[slice]:
    """Cut N tokens into chunks: as large as allowed on a CPU; of equal size on a GPU."""
    tokens = len(hidden)
    size = max(1, (GPU_CHUNK_ELEMENTS if hidden.is_cuda else CHUNK_ELEMENTS) // vocabulary)
    if hidden.is_cuda:
        size = math.ceil(tokens / max(1, math.ceil(tokens / size)))
    return [slice(start, start + size) for start in range(0, tokens, max(1, size))]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product, summed up and returned in float32 or wider where the device can; a CPU returns its own type."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


def _logits(product: Tensor, terms: Terms, scale: float, softcap: float | None, exact: torch.dtype) -> Tensor:
    """Logits from the head's matrix product, which they may overwrite."""
    bias, shifts, group = terms
    # A compiler would write what it is to work on in place back into its input.
    logits = product.to(exact).clone() if torch.compiler.is_compiling() else product.to(exact)
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    if shifts is not None and group is not None:
        logits = _add_rows(logits, shifts.to(exact), group)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _add_rows(logits: Tensor, shifts: Tensor, group: Tensor) -> Tensor:
    """Add to each of (n, V) logits its row of (B, V), as a product with zeros and ones: no second (n, V) is needed."""
    if torch.compiler.is_compiling():
        return logits + shifts[group]
    members = group[:, None] == torch.arange(len(shifts), device=group.device)
    return logits.addmm_(members.to(logits.dtype), shifts)


def _lifts(table: Tensor, exact: torch.dtype) -> Tensor:
    """exp(b_k - max b_k): (K, V), at most 1."""
    biases = table.to(exact)
    return (biases - biases.amax(-1, keepdim=True)).exp()


def sum_by_answer(values: Tensor, owner: Tensor, answers: int) -> Tensor:
    """Sum (N, ...) values of tokens over the answers that they belong to.

    Args:
        values: Of each token; those of owner `answers` are left out.
        owner: (N,).
        answers: 2B.

    Returns:
        (2B, ...) in the type of `values`.
    """
    if not values.is_cuda:
        sums = values.new_zeros(answers + 1, *values.shape[1:]).index_add(0, owner, values)
        return sums[:answers]
    return sum_by_product(values, owner, answers)


def sum_by_product(values: Tensor, owner: Tensor, answers: int) -> Tensor:
    """`sum_by_answer` as a product with zeros and ones, in float64: the same to the last bit in every run on a GPU."""
    members = (torch.arange(answers, device=owner.device)[:, None] == owner).double()
    sums = members @ values.double().flatten(1) if values.dim() > 1 else members @ values.double()
    return sums.to(values.dtype).reshape(answers, *values.shape[1:])


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
        # One gather: the backward pass of each is a sum over all tokens.
        at = torch.cat([batch.read_at, batch.prompt_end, batch.completion_end])
        sizes = [len(batch.read_at), batch.pairs, batch.pairs, batch.pairs]
        self._hidden, prompt, chosen, rejected = hidden[at].split(sizes)
        self.states = PairStates(prompt, chosen, rejected, annotators=batch.annotators)
        self._batch = batch
        self._head = head

    def logps(self, z: Tensor | None = None) -> Tensor:
        """(2B,) log-probability of each answer, under `z` (B, d) of its pair, or (None) as the plain policy."""
        batch = self._batch
        group = None if z is None else batch.owner % batch.pairs
        return self._sum(token_logps(self._hidden, batch.targets, self._head, z, group))

    def logps_per_code(self, codes: Tensor, code_range: float | None = None) -> Tensor:
        """(2B, K) log-probability of each answer under every code of `codes` (K, d).

        See `token_logps_per_code` for `code_range`.
        """
        batch = self._batch
        return self._sum(token_logps_per_code(self._hidden, batch.targets, self._head, codes, code_range))

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
        answers = 2 * self._batch.pairs
        real = self._batch.owner < answers
        sums = [
            (logits_of(self._hidden[chunk], self._head).log_softmax(-1) + real[chunk, None].log()).logsumexp(0)
            for chunk in _chunks(self._hidden, len(self._head.weight))
        ]
        total = torch.stack(sums).logsumexp(0)
        return total - real.sum().to(total.dtype).log()

    def _sum(self, per_token: Tensor) -> Tensor:
        return sum_by_answer(per_token, self._batch.owner, 2 * self._batch.pairs)
