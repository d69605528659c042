"""Log-probabilities of the answers from hidden states, through the LM head in chunks.

The logits over the vocabulary are by far the largest tensor of a step. They exist for one chunk of tokens at a time.
Each chunk is reduced to one number per token (or K, one per code), and is recomputed in the backward pass. If only the
states have a gradient (a frozen head, as under LoRA), the forward pass computes it from the same logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from lpc_lightning.types import LogitHead

P = ParamSpec("P")
R = TypeVar("R")

CHUNK_ELEMENTS = 2**25
"""Logits in memory at a time on a CPU: 128 MiB in float32."""
GPU_CHUNK_ELEMENTS = 2**28
"""Logits in memory at a time on a GPU: 1 GiB in float32, so that there are few, large products."""
THIN_RANGE = 60.0
"""Largest range of a code's logit biases, in nats, for which exp() in float32 is exact enough."""
WIDE_RANGE = 600.0
"""The same in float64, used beyond `THIN_RANGE`. Losses without a reference reach such ranges."""


def token_logps(
    hidden: Tensor, targets: Tensor, head: LogitHead, z: Tensor | None = None, group: Tensor | None = None
) -> Tensor:
    """Compute log softmax(head(hidden + z[group]))[target] of each token.

    LMHead(h + z) is computed as LMHead(h) + LMHead(z), the second term in float32. A sum of the states would be rounded
    to the type of the product, by about as much as the whole effect of a code.

    Args:
        hidden: (N, d) states that enter the head.
        targets: (N,) token ids.
        head: The policy's head. Matrix products run in autocast's type, or without autocast in the type of `hidden`.
        z: (B, d) representations that are added to the states. None: nothing is added.
        group: (N,) index of the row of `z` that is added to each state.

    Returns:
        (N,) in nats, float32 (float64 for float64 input).
    """
    return _biased_logps(hidden, targets, head, None if z is None else _shifts(head, z), group)


def _biased_logps(
    hidden: Tensor, targets: Tensor, head: LogitHead, shifts: Tensor | None, group: Tensor | None
) -> Tensor:
    """Compute `token_logps` from the logit biases (B, V) of the representations."""
    if torch.is_grad_enabled() and hidden.requires_grad and _is_frozen(hidden, head, shifts):
        return _FrozenHeadLogps.apply(hidden, head, shifts, group, targets)
    return _TokenLogps.apply(hidden, head.weight, head.bias, None, shifts, group, targets, head)[:, 0]


def _is_frozen(hidden: Tensor, head: LogitHead, shifts: Tensor | None) -> bool:
    """Return True if the states alone have a gradient, and its type can hold it before the loss scaler's factor."""
    frozen = all(tensor is None or not tensor.requires_grad for tensor in (head.weight, head.bias, shifts))
    return frozen and _types(hidden)[0] != torch.float16


def token_logps_per_code(
    hidden: Tensor, targets: Tensor, head: LogitHead, codes: Tensor, code_range: float | None = None
) -> Tensor:
    """Compute log softmax(head(hidden + e_k))[target] of each token under every code, in one pass through the head.

    With a = head(h) and b_k = scale W e_k, the normalizer under code k is
    logsumexp_v(a_v + b_kv) = logsumexp_v(a_v) + log sum_v softmax(a)_v exp(b_kv): a thin (N, V) by (V, K) product, at
    about K/d of the head's cost. If a code has a logit range beyond `THIN_RANGE`, exp(b_k - max b_k) would underflow in
    float32, and everything after a is computed in float64. K passes are needed for a soft-capped head, which is not
    linear, for ranges beyond `WIDE_RANGE`, and on devices without float64.

    Args:
        hidden: (N, d) states that enter the head, without a code.
        targets: (N,) token ids.
        head: The policy's head.
        codes: (K, d) the codebook, of any floating-point type. Its logit biases are in float32 or wider.
        code_range: `code_range` of these codes. It may be a few steps old, since both limits have a margin. None: it
            is measured, and the CPU waits for the device.

    Returns:
        (N, K) in nats, float32 (float64 for float64 input).
    """
    table = _shifts(head, codes)
    if head.softcap is None:
        nats = float(_range(table)) if code_range is None else code_range
        if _fits_product(nats, hidden.device.type):
            return _logps_by_product(hidden, targets, head, table, nats)
    group = torch.zeros_like(targets)
    return torch.stack([_biased_logps(hidden, targets, head, row[None], group) for row in table], dim=-1)


def token_logps_of_groups(
    hidden: Tensor, targets: Tensor, head: LogitHead, z: Tensor, token: Tensor, group: Tensor
) -> Tensor:
    """Compute log softmax(head(hidden[token] + z[group]))[target] of each of P pairs of a token and a z.

    If few tokens stand in many pairs, they are scored under every z as `token_logps_per_code` does: M products with the
    head and M times G thin ones in place of P products with the head. Waits for the device.

    Args:
        hidden: (M, d) states that enter the head.
        targets: (M,) token ids.
        head: The policy's head.
        z: (G, d) representations.
        token: (P,) index of a state.
        group: (P,) index of a row of `z`.

    Returns:
        (P,) in nats, float32 (float64 for float64 input).
    """
    shifts = _shifts(head, z)
    (tokens, width), groups = hidden.shape, len(z)
    if head.softcap is None and tokens * (width + groups) < len(token) * width:
        nats = float(_range(shifts))
        if _fits_product(nats, hidden.device.type):
            return _logps_by_product(hidden, targets, head, shifts, nats)[token, group]
    return _biased_logps(hidden[token], targets[token], head, shifts, group)


def _fits_product(nats: float, device: str) -> bool:
    """Return True if `_logps_by_product` is exact enough for logit biases of this range."""
    return nats <= THIN_RANGE or (nats <= WIDE_RANGE and device != "mps")


def _logps_by_product(hidden: Tensor, targets: Tensor, head: LogitHead, table: Tensor, nats: float) -> Tensor:
    """Compute log-probabilities (N, K) under every row of logit biases `table` (K, V), whose range is `nats`."""
    if nats <= THIN_RANGE:
        return _TokenLogps.apply(hidden, head.weight, head.bias, table, None, None, targets, head)
    logps = _TokenLogps.apply(hidden, head.weight, head.bias, table.double(), None, None, targets, head)
    return logps.to(_types(hidden)[1])


@torch.no_grad()
def token_logps_and_greedy(
    hidden: Tensor, targets: Tensor, head: LogitHead, z: Tensor | None = None, group: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `token_logps` without gradients, and whether greedy decoding would choose each target.

    Args:
        hidden: (N, d) states that enter the head.
        targets: (N,) token ids.
        head: The policy's head.
        z: (B, d) representations that are added to the states. None: nothing is added.
        group: (N,) index of the row of `z` that is added to each state.

    Returns:
        (N,) in nats, float32 (float64 for float64 input), and (N,) bool: True if the target has the largest logit.
        Greedy decoding chooses the lowest token id of equal logits.
    """
    product, exact = _types(hidden)
    shifts = None if z is None else _shifts(head, z)
    form, all_terms = _HeadForm(head.scale, head.softcap, exact), _LogitTerms(head.bias, shifts, group)
    logps, greedy = hidden.new_empty(len(hidden), dtype=exact), targets.new_empty(len(hidden), dtype=torch.bool)
    with torch.autocast(hidden.device.type, enabled=False):
        states, rows = hidden.to(product), head.weight.to(product)
        for chunk in token_chunks(hidden, len(rows)):
            logits = _logits(_product(states[chunk], rows.T), all_terms.of(chunk), form)
            greedy[chunk] = logits.argmax(-1) == targets[chunk]
            logps[chunk] = logits.gather(1, targets[chunk, None])[:, 0] - logits.logsumexp(-1)
    return logps, greedy


def _shifts(head: LogitHead, z: Tensor) -> Tensor:
    """Return the logit biases (B, V) of z (B, d), in float32 or wider."""
    return code_logits(head, z.to(torch.promote_types(z.dtype, torch.float32)))


def code_logits(head: LogitHead, codes: Tensor) -> Tensor:
    """Return the logit bias of each code, LMHead(e_k) without the head's bias: (K, V) in the type of `codes`."""
    with torch.autocast(codes.device.type, enabled=False):
        return head.scale * codes @ head.weight.to(codes.dtype).T


@torch.no_grad()
def code_range(head: LogitHead, codes: Tensor) -> Tensor:
    """Return (): the largest difference, in nats, between two logit biases of one code."""
    return _range(_shifts(head, codes))


def _range(table: Tensor) -> Tensor:
    return (table.detach().amax(-1) - table.detach().amin(-1)).max()


def logits_of(hidden: Tensor, head: LogitHead) -> Tensor:
    """Return logits (N, V) of states (N, d), in float32 or wider. For few tokens only: there are no chunks."""
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    product = _product(hidden, head.weight.to(hidden.dtype).T)
    return _logits(product, _LogitTerms(head.bias), _HeadForm(head.scale, head.softcap, exact))


class _FrozenHeadLogps(torch.autograd.Function):
    """(N,) log-probabilities of `targets` under a head and `shifts` (B, V) that have no gradient.

    The gradient with respect to the states is computed in the forward pass, up to the factor of the backward pass. This
    takes two products with the head, where computing the logits again would take three.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: LogitHead, shifts: Tensor | None, group: Tensor | None, targets: Tensor
    ) -> Tensor:
        product, exact = _types(hidden)
        form, all_terms = _HeadForm(head.scale, head.softcap, exact), _LogitTerms(head.bias, shifts, group)
        reduce_with_gradient = _kernel(_reduce_with_gradient, head.compiled)
        logps, gradient = hidden.new_empty(len(hidden), dtype=exact), torch.empty_like(hidden, dtype=exact)
        with torch.autocast(hidden.device.type, enabled=False):
            states, rows = hidden.to(product), head.weight.to(product)
            for chunk in token_chunks(hidden, len(rows)):
                logits = _product(states[chunk], rows.T)
                logps[chunk], logit_grad = reduce_with_gradient(
                    form, logits, all_terms.of(chunk), targets[chunk], product
                )
                del logits
                logit_grad = logit_grad if form.scale == 1.0 else logit_grad * form.scale
                gradient[chunk] = _product(logit_grad.to(product), rows)
                del logit_grad
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(gradient)
        return logps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (grad[:, None] * gradient).to(ctx.dtype), None, None, None, None


class _TokenLogps(torch.autograd.Function):
    """(N, K) log-probabilities of `targets` under K logit biases `table` (K, V), or (N, 1) without a table.

    `shifts` (B, V) are logit biases of groups of tokens, and `group` (N,) is the group of each token. With a table in
    float64, everything after the head's matrix product is computed in float64.
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
        chunks = token_chunks(hidden, weight.shape[0])
        form, all_terms = _HeadForm(head.scale, head.softcap, exact), _LogitTerms(bias, shifts, group)
        ctx.form, ctx.compiled, ctx.product, ctx.chunks = form, head.compiled, product, chunks
        reduce = _kernel(_reduce, head.compiled)
        reduce_with_probabilities = _kernel(_reduce_with_probabilities, head.compiled)
        with torch.autocast(hidden.device.type, enabled=False):
            states, rows = hidden.to(product), weight.to(product)
            exp_biases = None if table is None else _exp_biases(table, exact)
            at_target, normalizer = (hidden.new_empty(hidden.shape[0], dtype=exact) for _ in range(2))
            sums = None if table is None else hidden.new_empty(hidden.shape[0], table.shape[0], dtype=exact)
            for chunk in chunks:
                logits = _product(states[chunk], rows.T)
                terms = all_terms.of(chunk)
                if exp_biases is None or sums is None:
                    at_target[chunk], normalizer[chunk] = reduce(form, logits, terms, targets[chunk])
                else:
                    at_target[chunk], normalizer[chunk], probabilities = reduce_with_probabilities(
                        form, logits, terms, targets[chunk]
                    )
                    sums[chunk] = probabilities @ exp_biases.T
                del logits
            out = (at_target - normalizer)[:, None]
            if table is not None and sums is not None:
                biases = table.to(exact)
                out = out + biases[:, targets].T - biases.amax(-1) - sums.log()
        ctx.save_for_backward(hidden, weight, bias, table, shifts, group, targets, normalizer, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, table, shifts, group, targets, normalizer, sums = ctx.saved_tensors
        form, product, all_terms = ctx.form, ctx.product, _LogitTerms(bias, shifts, group)
        gradients = _Gradients(hidden, (weight, bias, table, shifts), ctx.needs_input_grad, form.exact)
        logit_gradient = _kernel(_logit_gradient, ctx.compiled)
        mixed_logit_gradient = _kernel(_mixed_logit_gradient, ctx.compiled)
        probabilities_of = _kernel(_probabilities, ctx.compiled)
        with torch.autocast(hidden.device.type, enabled=False):
            states, rows = hidden.to(product), weight.to(product)
            exp_biases = None if table is None else _exp_biases(table, form.exact)
            for chunk in ctx.chunks:
                logits = _product(states[chunk], rows.T)
                terms, upstream = all_terms.of(chunk), grad[chunk]
                if exp_biases is None:
                    logit_grad = logit_gradient(
                        form, logits, terms, targets[chunk], normalizer[chunk], upstream[:, 0], product
                    )
                else:
                    probabilities = probabilities_of(form, logits, terms, normalizer[chunk])
                    thin = upstream / sums[chunk]
                    gradients.add_to_table(exp_biases, thin, probabilities, targets[chunk], upstream)
                    logit_grad = mixed_logit_gradient(
                        probabilities, thin @ exp_biases, targets[chunk], upstream.sum(-1), product
                    )
                    del probabilities
                del logits
                gradients.add_to_shifts(logit_grad, terms.group)
                logit_grad = logit_grad if form.scale == 1.0 else logit_grad * form.scale
                gradients.add_to_bias(logit_grad)
                logit_grad = logit_grad.to(product)
                gradients.add_to_product(chunk, logit_grad, states, rows)
                del logit_grad
        return *gradients.cast(), None, None, None


class _Gradients:
    """Gradients of a `_TokenLogps`, filled chunk by chunk. One that is not needed is None.

    Sums over chunks are in the type `exact`: in bfloat16, their error would be 3 % after 256 chunks.
    """

    def __init__(
        self, hidden: Tensor, leaves: Sequence[Tensor | None], needed: Sequence[bool], exact: torch.dtype
    ) -> None:
        """Create empty gradients.

        Args:
            hidden: (N, d) states.
            leaves: Weight and bias of the head, table and shifts. None: there is no such tensor.
            needed: Whether the gradients of the states and of each of the leaves are needed.
            exact: Type of the sums.
        """
        self._leaves = leaves
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight, self.bias, self.table, self.shifts = (
            torch.zeros_like(leaf, dtype=exact) if leaf is not None and need else None
            for leaf, need in zip(leaves, needed[1:5], strict=True)
        )

    def add_to_table(
        self, exp_biases: Tensor, thin: Tensor, probabilities: Tensor, targets: Tensor, upstream: Tensor
    ) -> None:
        """Add a chunk to the gradient of the table: from its targets (n,), and from its (n, V) probabilities."""
        if self.table is not None:
            self.table -= exp_biases * (thin.T @ probabilities)
            self.table.index_add_(1, targets, upstream.T)

    def add_to_shifts(self, logit_grad: Tensor, group: Tensor | None) -> None:
        """Add a chunk to the gradient of the shifts, by the group (n,) of each token."""
        if self.shifts is not None and group is not None:
            members = torch.arange(len(self.shifts), device=group.device)[:, None] == group
            self.shifts += _product(members.to(logit_grad.dtype), logit_grad)

    def add_to_bias(self, logit_grad: Tensor) -> None:
        """Add a chunk to the gradient of the head's bias."""
        if self.bias is not None:
            self.bias += logit_grad.sum(0, dtype=self.bias.dtype)

    def add_to_product(self, chunk: slice, logit_grad: Tensor, states: Tensor, rows: Tensor) -> None:
        """Add a chunk to the gradients of both factors of the head's matrix product, the states and the weight."""
        if self.hidden is not None:
            self.hidden[chunk] = (logit_grad @ rows).to(self.hidden.dtype)
        if self.weight is not None:
            self.weight += _product(logit_grad.T, states[chunk])

    def cast(self) -> tuple[Tensor | None, ...]:
        """Return the gradients of states, weight, bias, table and shifts in the types of these."""
        sums = (self.weight, self.bias, self.table, self.shifts)
        pairs = zip(sums, self._leaves, strict=True)
        return self.hidden, *(None if total is None or leaf is None else total.to(leaf.dtype) for total, leaf in pairs)


class _HeadForm(NamedTuple):
    """How logits are made from the head's matrix product."""

    scale: float
    softcap: float | None
    exact: torch.dtype
    """Type of the values after the product."""


class _LogitTerms(NamedTuple):
    """Terms that are added to the head's matrix product (n, V)."""

    bias: Tensor | None
    """(V,) bias of the head."""
    shifts: Tensor | None = None
    """(B, V) logit biases of groups of tokens."""
    group: Tensor | None = None
    """(n,) group of each token."""

    def of(self, chunk: slice) -> _LogitTerms:
        """Return the terms of some of the tokens."""
        return self if self.group is None else self._replace(group=self.group[chunk])


# Functions of a chunk's (n, V) products with the head, in few passes over memory. On a CPU they work in place. Compiled
# by torch, each is one or two kernels.


def _kernel(function: Callable[P, R], compiled: bool) -> Callable[P, R]:
    """Return one of the functions below as it is, or compiled."""
    return _compiled(function) if compiled else function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Dynamic, because the last chunk has fewer tokens.
    return torch.compile(function, fullgraph=True, dynamic=True)


def _reduce(form: _HeadForm, product: Tensor, terms: _LogitTerms, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return each target's logit (n,) and the normalizer (n,)."""
    logits = _logits(product, terms, form)
    return logits.gather(1, targets[:, None])[:, 0], logits.logsumexp(-1)


def _reduce_with_probabilities(
    form: _HeadForm, product: Tensor, terms: _LogitTerms, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each target's logit (n,), the normalizer (n,) and the probabilities (n, V)."""
    logits = _logits(product, terms, form)
    at_target, normalizer = logits.gather(1, targets[:, None])[:, 0], logits.logsumexp(-1)
    return at_target, normalizer, logits.sub_(normalizer[:, None]).exp_()


def _reduce_with_gradient(
    form: _HeadForm, product: Tensor, terms: _LogitTerms, targets: Tensor, narrow: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return each target's log-probability (n,), and its gradient (n, V) with respect to the logits (`narrow`)."""
    logits = _logits(product, terms, form)
    normalizer = logits.logsumexp(-1)
    logps = logits.gather(1, targets[:, None])[:, 0] - normalizer
    return logps, _gradient_at(form, logits, targets, normalizer, torch.ones_like(normalizer), narrow)


def _probabilities(form: _HeadForm, product: Tensor, terms: _LogitTerms, normalizer: Tensor) -> Tensor:
    return _logits(product, terms, form).sub_(normalizer[:, None]).exp_()


def _logit_gradient(
    form: _HeadForm,
    product: Tensor,
    terms: _LogitTerms,
    targets: Tensor,
    normalizer: Tensor,
    upstream: Tensor,
    narrow: torch.dtype,
) -> Tensor:
    """Return the gradient (n, V) with respect to the logits before the soft cap.

    Args:
        form: Form of the head.
        product: (n, V) product of the states with the head.
        terms: Terms that are added to it.
        targets: (n,) token ids.
        normalizer: (n,) of the forward pass.
        upstream: (n,) gradient with respect to the log-probabilities.
        narrow: Type of the products that the gradient enters.
    """
    return _gradient_at(form, _logits(product, terms, form), targets, normalizer, upstream, narrow)


def _gradient_at(
    form: _HeadForm, logits: Tensor, targets: Tensor, normalizer: Tensor, upstream: Tensor, narrow: torch.dtype
) -> Tensor:
    """Compute `_logit_gradient` from logits (n, V), which are overwritten."""
    slope = None if form.softcap is None else 1 - (logits / form.softcap).square()
    gradient = logits.sub_(normalizer[:, None]).exp_().mul_(-upstream[:, None])
    gradient = _add_at_targets(gradient, targets, upstream)
    return _narrow(gradient if slope is None else gradient.mul_(slope), narrow)


def _mixed_logit_gradient(
    probabilities: Tensor, mixture: Tensor, targets: Tensor, upstream: Tensor, narrow: torch.dtype
) -> Tensor:
    """Return `_logit_gradient` for log-probabilities under every code.

    `mixture` (n, V) sums exp(b_k) over the codes with the weights of the gradient, and `upstream` (n,) is the
    gradient's sum over the codes.
    """
    weights = probabilities.clone() if torch.compiler.is_compiling() else probabilities
    return _narrow(_add_at_targets(weights.mul_(mixture).neg_(), targets, upstream), narrow)


def _narrow(gradient: Tensor, narrow: torch.dtype) -> Tensor:
    """Round to the type of the next products in the same kernel. On a CPU, sums over rows stay exact."""
    return gradient.to(narrow) if torch.compiler.is_compiling() else gradient


def _add_at_targets(values: Tensor, targets: Tensor, terms: Tensor) -> Tensor:
    """Add `terms` (n,) to the target's column in each row of `values` (n, V)."""
    if not torch.compiler.is_compiling():
        return values.scatter_add_(1, targets[:, None], terms[:, None])
    columns = torch.arange(values.shape[1], device=values.device)
    return values + torch.where(columns == targets[:, None], terms[:, None], 0.0)


def _types(hidden: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Return the type of the head's matrix product (autocast's, or that of the states) and of the values after it."""
    device = hidden.device.type
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return product, torch.float64 if hidden.dtype == torch.float64 else torch.float32


def chunk_size(tokens: int, vocabulary: int, on_gpu: bool) -> int:
    """Return the largest number of tokens in a chunk: as many as allowed on a CPU, equal chunks on a GPU."""
    most = max(1, (GPU_CHUNK_ELEMENTS if on_gpu else CHUNK_ELEMENTS) // vocabulary)
    return math.ceil(tokens / math.ceil(tokens / most)) if on_gpu and tokens else min(most, tokens)


def token_chunks(hidden: Tensor, vocabulary: int) -> list[slice]:
    """Cut N tokens into chunks (see `chunk_size`)."""
    size = chunk_size(len(hidden), vocabulary, hidden.is_cuda)
    return [slice(start, start + size) for start in range(0, len(hidden), max(1, size))]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices. A GPU sums and returns 16-bit products in float32. A CPU returns the type of the inputs."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


def _logits(product: Tensor, terms: _LogitTerms, form: _HeadForm) -> Tensor:
    """Compute logits from the head's matrix product. They may overwrite it."""
    # Compiled, in-place changes would also be written to the input.
    logits = product.to(form.exact).clone() if torch.compiler.is_compiling() else product.to(form.exact)
    if terms.bias is not None:
        logits += terms.bias
    if form.scale != 1.0:
        logits *= form.scale
    if terms.shifts is not None and terms.group is not None:
        logits = _add_rows(logits, terms.shifts.to(form.exact), terms.group)
    return logits if form.softcap is None else logits.div_(form.softcap).tanh_().mul_(form.softcap)


def _add_rows(logits: Tensor, shifts: Tensor, group: Tensor) -> Tensor:
    """Add to each row of logits (n, V) its group's row of `shifts` (B, V), without a second (n, V) tensor."""
    if torch.compiler.is_compiling():
        return logits + shifts[group]
    members = group[:, None] == torch.arange(len(shifts), device=group.device)
    return logits.addmm_(members.to(logits.dtype), shifts)


def _exp_biases(table: Tensor, exact: torch.dtype) -> Tensor:
    """Return exp(b_k - max b_k): (K, V), at most 1."""
    biases = table.to(exact)
    return (biases - biases.amax(-1, keepdim=True)).exp()
