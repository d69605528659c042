"""Choice of the pairs that a warm start holds out: one part to select on, and one part to decide on."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

SHARE = 0.1
"""Share of the pairs in each of the two parts."""
DECIDING_PROMPTS = 5
"""Number of prompts that the deciding part should have, if there are four times as many."""
FEWEST_PROMPTS = 2
"""Least number of prompts, or different pairs, of the deciding part: one has no standard error and decides nothing."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """An order of the pairs, in which those that are fitted come first, then the selection, then the decision."""

    order: list[int]
    """Numbers of all pairs. Pairs of a prompt follow its first pair, or copies of a pair the first of them."""
    selection: int
    """Number of pairs on which scales and epochs are selected."""
    decision: int
    """Number of pairs at the end, which decide whether the fitted space is used. Nothing else reads them."""
    whole_prompts: bool
    """True if no prompt has pairs in two parts. False: no pair has copies in two parts."""


def hold_out(prompts: Sequence[Hashable], contents: Sequence[Hashable]) -> HeldOut | None:
    """Hold out whole prompts, so that no answer is in two parts.

    Several annotators often label the same answers. Codes that are fitted to one annotator's label would be tested on
    another annotator's label for the same two answers, and the smallest scale would seem best.

    Each part has at least two pairs and at least a tenth of all pairs, and the deciding part at least two prompts. If
    whole prompts would be more than half of the pairs, there are too few prompts, and pairs are held out without regard
    to prompts. Copies of a pair are then held out together, in place of the pairs of a prompt: a code that is fitted to
    a label would be tested on the same label.

    Args:
        prompts: (N,) `TokenizedPair.prompt` of shuffled pairs, six or more.
        contents: (N,) `TokenizedPair.content` of the pairs.

    Returns:
        The parts. None if whole copies, too, would be more than half of the pairs.
    """
    count = len(set(prompts))
    return _hold_out(prompts, max(FEWEST_PROMPTS, min(DECIDING_PROMPTS, count // 4)), whole_prompts=True) or _hold_out(
        contents, FEWEST_PROMPTS, whole_prompts=False
    )


def _hold_out(groups: Sequence[Hashable], deciding: int, whole_prompts: bool) -> HeldOut | None:
    """Hold out whole groups, `deciding` or more of them for the decision. None if they are too large."""
    pairs_of: dict[Hashable, list[int]] = {}
    for number, group in enumerate(groups):
        pairs_of.setdefault(group, []).append(number)
    pairs, target = len(groups), max(2, round(SHARE * len(groups)))
    last = iter(reversed(pairs_of.values()))
    decision = _take(last, target, deciding)
    selection = _take(last, target, 1)
    if selection < target or selection + decision > max(2 * target, pairs // 2):
        return None
    order = [number for members in pairs_of.values() for number in members]
    return HeldOut(order, selection, decision, whole_prompts)


def _take(groups: Iterator[list[int]], target: int, fewest: int) -> int:
    """Take groups until they have `target` pairs and are at least `fewest`. Return their number of pairs."""
    taken = count = 0
    for members in groups:
        taken, count = taken + len(members), count + 1
        if taken >= target and count >= fewest:
            break
    return taken
