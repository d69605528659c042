"""Treatment of pairs that are too long."""

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


class FitResult(NamedTuple):
    """Result of applying a length policy to a pair."""

    pair: TokenizedPair | None
    """The pair, possibly shortened. None if it was dropped."""
    dropped: str = ""
    """Reason why the pair was dropped. Empty if it was kept."""
    cut: str = ""
    """Shortened part: `prompt` or `answers`. Empty if the pair is unchanged."""


@dataclass(frozen=True)
class LengthPolicy:
    """Length limits of a pair, and the treatment of longer pairs.

    A pair is too long if its prompt is longer than `max_prompt_length`. It is also too long if its prompt and the
    longer of the two answers, including the end-of-answer token, are together longer than `max_length`.
    """

    max_length: int | None = None
    """Maximum number of tokens of a prompt and its longer answer. None: no limit."""
    max_prompt_length: int | None = None
    """Maximum number of tokens of a prompt. None: no limit."""
    too_long: Literal["drop", "truncate_prompt", "truncate_answer", "error"] = "drop"
    """Treatment of pairs that are too long. `drop`: leave the pair out. `truncate_prompt`: keep the end of the prompt,
    and the beginning-of-sequence token at its start unless this token also marks turns; stop at a prompt into which a
    name or a marker was written. `truncate_answer`: keep the start of each answer, so that a shortened answer has no
    end-of-answer token. `error`: stop at the first such pair. Dropped and shortened pairs are counted."""

    def __post_init__(self) -> None:
        for name, limit in (("max_length", self.max_length), ("max_prompt_length", self.max_prompt_length)):
            if limit is not None and limit < 1:
                raise ValueError(
                    f"data.{name}: found {limit}, expected a number of tokens from 1 on, or null for no limit."
                )
        if self.too_long not in _ACTIONS:
            raise ValueError(f"data.too_long: found {self.too_long!r}, expected one of {', '.join(_ACTIONS)}.")

    def __call__(self, pair: TokenizedPair, bos_id: int | None = None) -> FitResult:
        """Apply the limits to a pair.

        Args:
            pair: A pair from the template.
            bos_id: Beginning-of-sequence token of the tokenizer, which `truncate_prompt` keeps.

        Raises:
            DataError: The pair is too long and `too_long` is `error`, or a prompt with a name or a marker would be cut.
        """
        fault = self._fault(pair)
        return _ACTIONS[self.too_long](self, pair, fault, bos_id) if fault else FitResult(pair)

    def _fault(self, pair: TokenizedPair) -> str:
        if self.max_prompt_length is not None and len(pair.prompt_ids) > self.max_prompt_length:
            return PROMPT_TOO_LONG
        if self.max_length is not None and len(pair.prompt_ids) + _longer_answer(pair) > self.max_length:
            return PAIR_TOO_LONG
        return ""


def _longer_answer(pair: TokenizedPair) -> int:
    return max(len(pair.chosen_ids), len(pair.rejected_ids))


def _drop(policy: LengthPolicy, pair: TokenizedPair, fault: str, bos_id: int | None) -> FitResult:
    return FitResult(None, dropped=fault)


def _truncate_prompt(policy: LengthPolicy, pair: TokenizedPair, fault: str, bos_id: int | None) -> FitResult:
    rooms = [policy.max_prompt_length] if policy.max_prompt_length is not None else []
    if policy.max_length is not None:
        rooms.append(policy.max_length - _longer_answer(pair))
    # A token that occurs only at the start begins the sequence. If it occurs again, it begins turns (the bos token of
    # SmolLM2 is <|im_start|>). A single one at the start would then begin a turn without a role.
    ids = pair.prompt_ids
    lead = ids[:1] if ids[0] == bos_id and bos_id not in ids[1:] else []
    room = min(rooms) - len(lead)
    if room < 1:
        return FitResult(None, dropped=NO_ROOM_FOR_PROMPT)
    if pair.question:
        raise DataError(
            f"Pair {pair.id!r}: data.too_long: truncate_prompt would cut {len(ids) - len(lead) - room} of "
            f"{len(ids)} tokens of a prompt with a name (data.columns.named_in_prompt) or a marker "
            "(LabelFlipNoise.marker), expected a prompt that is short enough, because the cut could remove the name or "
            "the marker. Set data.too_long to drop or truncate_answer, or raise data.max_length and "
            "data.max_prompt_length."
        )
    # Longer answers leave less of the same prompt. All its pairs stay together by the hash of the whole prompt.
    return FitResult(replace(pair, prompt_ids=lead + ids[-room:], question=pair.prompt), cut="prompt")


def _truncate_answer(policy: LengthPolicy, pair: TokenizedPair, fault: str, bos_id: int | None) -> FitResult:
    if fault == PROMPT_TOO_LONG or policy.max_length is None:
        return FitResult(None, dropped=PROMPT_TOO_LONG)
    room = policy.max_length - len(pair.prompt_ids)
    if room < 1:
        return FitResult(None, dropped=NO_ROOM_FOR_ANSWERS)
    chosen, rejected = pair.chosen_ids[:room], pair.rejected_ids[:room]
    if chosen == rejected:
        return FitResult(None, dropped=EQUAL_AFTER_CUT)
    return FitResult(replace(pair, chosen_ids=chosen, rejected_ids=rejected), cut="answers")


def _error(policy: LengthPolicy, pair: TokenizedPair, fault: str, bos_id: int | None) -> FitResult:
    raise DataError(
        f"Pair {pair.id!r}: {fault}. It has {len(pair.prompt_ids)} prompt tokens and answers of "
        f"{len(pair.chosen_ids)} and {len(pair.rejected_ids)}; max_length={policy.max_length}, "
        f"max_prompt_length={policy.max_prompt_length}. Raise the limit, or choose another `too_long`: "
        f"{', '.join(_ACTIONS)}."
    )


_ACTIONS: dict[str, Callable[[LengthPolicy, TokenizedPair, str, int | None], FitResult]] = {
    "drop": _drop,
    "truncate_prompt": _truncate_prompt,
    "truncate_answer": _truncate_answer,
    "error": _error,
}
