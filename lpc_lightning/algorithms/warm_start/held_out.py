"""Choice of the pairs that a warm start holds out. Scales and epochs are selected on them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

HELD_OUT_SHARE = 0.1
"""Share of the pairs that is held out."""


def hold_out(prompts: Sequence[Hashable]) -> tuple[list[int], int]:
    """Hold out whole prompts, so that no answer is in both parts.

    Several annotators often label the same answers. Codes that are fitted to one annotator's label would be tested on
    another annotator's label for the same two answers, and the smallest scale would seem best.

    Args:
        prompts: (N,) prompts of shuffled pairs, two or more.

    Returns:
        The order of the pairs and the number of held-out pairs at its end. In this order the pairs of a prompt follow
        its first pair. At least two pairs and at least a tenth of all pairs are held out. If whole prompts would be
        more than half of the pairs, there are too few prompts, and pairs are held out without regard to prompts.
    """
    pairs_of: dict[Hashable, list[int]] = {}
    for number, prompt in enumerate(prompts):
        pairs_of.setdefault(prompt, []).append(number)
    target, held = max(2, round(HELD_OUT_SHARE * len(prompts))), 0
    for pairs in reversed(pairs_of.values()):
        if held >= target:
            break
        held += len(pairs)
    if held > max(target, len(prompts) // 2):
        return list(range(len(prompts))), target
    return [number for pairs in pairs_of.values() for number in pairs], held
