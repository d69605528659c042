"""Tokens that each code raises and lowers most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lpc_lightning.policy.logprobs import code_logits
from lpc_lightning.types import LogitHead


@dataclass(frozen=True, slots=True)
class TokenShift:
    """A token, and how a code moves its logit."""

    token: int
    """Token id."""
    text: str
    shift: float
    """Logit bias of the code minus the mean over codes, in nats."""


@torch.no_grad()
def code_tokens(
    head: LogitHead, codes: Tensor, tokenizer: PreTrainedTokenizerBase, most: int, among: Tensor | None = None
) -> list[tuple[list[TokenShift], list[TokenShift]]]:
    """Return the tokens whose logits each code raises and lowers most, compared with the mean over codes.

    The shift is LMHead(e_k) - mean_j LMHead(e_j), without the head's bias. A soft cap on the logits is left out.

    Args:
        head: The policy's head.
        codes: (K, d) the codebook.
        tokenizer: The policy's tokenizer.
        most: Tokens of each list at most.
        among: Ids of the tokens to choose from. None: all of the vocabulary.

    Returns:
        Raised and lowered tokens for each code, the largest shift first. Tokens that are not moved are left out.
    """
    exact = codes.to(torch.promote_types(codes.dtype, torch.float32))
    shifts = code_logits(head, exact - exact.mean(0))  # the head is linear: the mean is taken where it rounds least
    ids = torch.arange(shifts.shape[1], device=shifts.device) if among is None else among.to(shifts.device)
    # A head may have more rows than the tokenizer has tokens, as padding.
    ids = ids[ids < len(tokenizer)]
    return [(_largest(row[ids], ids, tokenizer, most), _largest(-row[ids], ids, tokenizer, most, -1)) for row in shifts]


def _largest(
    values: Tensor, ids: Tensor, tokenizer: PreTrainedTokenizerBase, most: int, sign: int = 1
) -> list[TokenShift]:
    top = values.topk(min(most, len(values)))
    tokens = ids[top.indices].tolist()
    return [
        TokenShift(token, str(tokenizer.decode([token])), sign * value)
        for token, value in zip(tokens, top.values.tolist(), strict=True)
        if value > 0
    ]
