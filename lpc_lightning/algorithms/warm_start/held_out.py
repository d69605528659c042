"""Which pairs of a warm start are held out: scales and epochs are chosen by them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

SHARE = 0.1
"""Share of the pairs."""


def hold_out(prompts: Sequence[Hashable]) -> tuple[list[int], int]:
    """Hold out whole prompts, so that no answer is in both parts.

    Several annotators often label the same answers. Codes fitted to one annotator's label would be blamed for another's
    on the same two answers, and the smallest scale would seem the best.

    Args:
        prompts: (N,) of shuffled pairs, two or more.

    Returns:
        The order in which the pairs of a prompt stand together, where its first one stood, and how many at its end are
        held out: two and a tenth of the pairs at least. Where whole prompts would be more than half of the pairs, there
        are too few of them, and pairs are held out without regard to prompts.
    """
    of: dict[Hashable, list[int]] = {}
    for number, prompt in enumerate(prompts):
        of.setdefault(prompt, []).append(number)
    wanted, held = max(2, round(SHARE * len(prompts))), 0
    for pairs in reversed(of.values()):
        if held >= wanted:
            break
        held += len(pairs)
    if held > max(wanted, len(prompts) // 2):
        return list(range(len(prompts))), wanted
    return [number for pairs in of.values() for number in pairs], held
