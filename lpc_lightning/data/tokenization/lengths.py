"""What happens to pairs that are too long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from lpc_lightning.data.sources.rows import DataError
from lpc_lightning.types import TokenizedPair

PROMPT_TOO_LONG = "prompt longer than max_prompt_length"
PAIR_TOO_LONG = "pair longer than max_length"
NO_ROOM_FOR_PROMPT = "no room for the prompt beside the answers"
NO_ROOM_FOR_ANSWERS = "no room for the answers beside the prompt"
EQUAL_AFTER_CUT = "answers equal after the cut"


class Fitted(NamedTuple):
    """What the policy made of one pair: `pair` is None where it was left out, and `dropped` then says why."""

    pair: TokenizedPair | None
    dropped: str = ""
    cut: str = ""
    """What was shortened: `prompt`, `answers` or nothing."""


@dataclass(frozen=True)
class LengthPolicy:
    """How many tokens a pair may have, and what becomes of longer ones.

    A pair is too long where its prompt is longer than `max_prompt_length`, or where the prompt with the longer of the
    two answers (end-of-answer token included) is longer than `max_length`.
    """

    max_length: int | None = None
    """Most tokens of a prompt with its longer answer. None: no limit."""
    max_prompt_length: int | None = None
    """Most tokens of a prompt. None: no limit."""
    too_long: Literal["drop", "truncate_prompt", "truncate_answer", "error"] = "drop"
    """`drop` leaves the pair out. `truncate_prompt` keeps the end of the prompt, and a beginning-of-sequence token at
    its start unless that token also marks turns. `truncate_answer` keeps the start of each answer, so that a cut one
    has no end-of-answer token. `error` stops at the first such pair. Whatever is dropped or cut is counted."""

    def __post_init__(self) -> None:
        for name, limit in (("max_length", self.max_length), ("max_prompt_length", self.max_prompt_length)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name}={limit}: expected a number of tokens from 1 on, or null for no limit")
        if self.too_long not in _ACTIONS:
            raise ValueError(f"too_long={self.too_long!r}: expected one of {', '.join(_ACTIONS)}")

    def __call__(self, pair: TokenizedPair, bos_id: int | None = None) -> Fitted:
        """Fit one pair.

        Args:
            pair: The pair as the template made it.
            bos_id: The tokenizer's beginning-of-sequence token, which `truncate_prompt` keeps.

        Raises:
            DataError: The pair is too long and `too_long` is `error`.
        """
        fault = self._fault(pair)
        return _ACTIONS[self.too_long](self, pair, fault, bos_id) if fault else Fitted(pair)

    def _fault(self, pair: TokenizedPair) -> str:
        if self.max_prompt_length is not None and len(pair.prompt_ids) > self.max_prompt_length:
            return PROMPT_TOO_LONG
        if self.max_length is not None and len(pair.prompt_ids) + _longer_answer(pair) > self.max_length:
            return PAIR_TOO_LONG
        return ""


def _longer_answer(pair: TokenizedPair) -> int:
    return max(len(pair.chosen_ids), len(pair.rejected_ids))


def _drop(policy: LengthPolicy, pair: TokenizedPair, fault: str, bos_id: int | None) -> Fitted:
    return Fitted(None, dropped=fault)


def _truncate_prompt(policy: LengthPolicy, pair: TokenizedPair, fault: str, bos_id: int | None) -> Fitted:
    rooms = [policy.max_prompt_length] if policy.max_prompt_length is not None else []
    if policy.max_length is not None:
        rooms.append(policy.max_length - _longer_answer(pair))
    # A token that stands at the start and nowhere else opens the sequence. Where it comes again (SmolLM2's bos is
    # <|im_start|>) it opens turns, and kept alone it would open a turn without a role.
    ids = pair.prompt_ids
    lead = ids[:1] if ids[0] == bos_id and bos_id not in ids[1:] else []
    room = min(rooms) - len(lead)
    if room < 1:
        return Fitted(None, dropped=NO_ROOM_FOR_PROMPT)
    return Fitted(replace(pair, prompt_ids=lead + ids[-room:]), cut="prompt")


def _truncate_answer(policy: LengthPolicy, pair: TokenizedPair, fault: str, bos_id: int | None) -> Fitted:
    if fault == PROMPT_TOO_LONG or policy.max_length is None:
        return Fitted(None, dropped=PROMPT_TOO_LONG)
    room = policy.max_length - len(pair.prompt_ids)
    if room < 1:
        return Fitted(None, dropped=NO_ROOM_FOR_ANSWERS)
    chosen, rejected = pair.chosen_ids[:room], pair.rejected_ids[:room]
    if chosen == rejected:
        return Fitted(None, dropped=EQUAL_AFTER_CUT)
    return Fitted(replace(pair, chosen_ids=chosen, rejected_ids=rejected), cut="answers")


def _error(policy: LengthPolicy, pair: TokenizedPair, fault: str, bos_id: int | None) -> Fitted:
    raise DataError(
        f"Pair {pair.id!r}: {fault}. It has {len(pair.prompt_ids)} prompt tokens and answers of "
        f"{len(pair.chosen_ids)} and {len(pair.rejected_ids)}; max_length={policy.max_length}, "
        f"max_prompt_length={policy.max_prompt_length}. Raise the limit, or choose another `too_long`: "
        f"{', '.join(_ACTIONS)}."
    )


_ACTIONS: dict[str, Callable[[LengthPolicy, TokenizedPair, str, int | None], Fitted]] = {
    "drop": _drop,
    "truncate_prompt": _truncate_prompt,
    "truncate_answer": _truncate_answer,
    "error": _error,
}
