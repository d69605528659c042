"""Shapes of packed batches for a GPU: few of them, so that a program is compiled once for each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MOST_SHAPES = 4
"""Shapes that a plan chooses at most."""
SPARE_SHAPES = 0.04
"""Share of the work that padding may add before another shape is worth its compilation."""
STEPS = (128, 64, 32)
"""Widths and read positions are multiples of one of these: 128 is the side of a block of `flex_attention`."""
STEPS_OF_BATCH = 20
"""Rounding to a step adds at most a step to a batch; the largest is taken that is this many times in a mean batch."""
READ_COST = 0.25
"""Work of a read position, in the head, relative to a token's in the layers: 0.35 for SmolLM2-135M, 0.12 for 1.2B."""


@dataclass(frozen=True, slots=True, order=True)
class BatchShape:
    """Size of a packed batch, or the least that its pairs need."""

    rows: int
    """R."""
    width: int
    """T."""
    reads: int
    """N."""

    @property
    def tokens(self) -> int:
        """Places for tokens."""
        return self.rows * self.width

    @property
    def work(self) -> float:
        """Cost of a step at this shape, in tokens."""
        return self.tokens + READ_COST * self.reads

    def holds(self, needed: BatchShape) -> bool:
        """Return whether a batch that needs `needed` fits."""
        return self.rows >= needed.rows and self.width >= needed.width and self.reads >= needed.reads

    def rounded(self, step: int) -> BatchShape:
        """Round width and reads up to multiples of `step`."""
        return BatchShape(self.rows, _up(self.width, step), _up(self.reads, step))


@dataclass(frozen=True, slots=True)
class ShapePlan:
    """The shapes of a run's batches."""

    shapes: tuple[BatchShape, ...] = ()
    step: int = STEPS[0]
    """What a shape of its own is rounded to, for a batch that no shape of the plan holds."""

    def fit(self, needed: BatchShape) -> BatchShape:
        """Return the cheapest shape that holds a batch; one of its own, rounded, for a batch that no shape holds."""
        fitting = [shape for shape in self.shapes if shape.holds(needed)]
        return min(fitting, key=lambda shape: shape.work) if fitting else needed.rounded(self.step)


def plan_shapes(needed: Iterable[BatchShape], most: int = MOST_SHAPES) -> ShapePlan:
    """Choose the shapes that cost least in padding, over given batches.

    The batches are sorted by their tokens and cut into at most `most` runs; the shape of a run holds all its batches.
    The best cuts are found by dynamic programming. Where fewer shapes come within `SPARE_SHAPES` of no padding at all,
    fewer are taken.

    Args:
        needed: What each batch needs.
        most: Shapes at most.
    """
    batches = list(needed)
    if not batches:
        return ShapePlan()
    mean = sum(batch.tokens for batch in batches) / len(batches)
    step = next((step for step in STEPS if step * STEPS_OF_BATCH <= mean), STEPS[-1])
    groups = Counter(batch.rounded(step) for batch in batches)
    sizes = sorted(groups, key=lambda shape: (shape.tokens, shape.reads))
    counts = [groups[size] for size in sizes]
    least = sum(batch.work for batch in batches)
    plans = _best_cuts(sizes, counts, most)
    _, shapes = next((plan for plan in plans if plan[0] <= (1 + SPARE_SHAPES) * least), plans[-1])
    return ShapePlan(tuple(shapes), step)


def _best_cuts(sizes: Sequence[BatchShape], counts: Sequence[int], most: int) -> list[tuple[float, list[BatchShape]]]:
    """Work and shapes of the best partition into 1, 2, ... `most` runs of sizes in their order."""
    best: list[tuple[float, list[BatchShape]]] = [(0.0, []), *((math.inf, []) for _ in sizes)]
    plans = []
    for _ in range(min(most, len(sizes))):
        longer: list[tuple[float, list[BatchShape]]] = [(math.inf, [])] * (len(sizes) + 1)
        for end in range(1, len(sizes) + 1):
            shape, number = sizes[end - 1], 0
            for start in range(end - 1, -1, -1):
                shape, number = _union(shape, sizes[start]), number + counts[start]
                work = best[start][0] + number * shape.work
                if work < longer[end][0]:
                    longer[end] = (work, [*best[start][1], shape])
        best = longer
        plans.append(best[-1])
    return plans


def _union(one: BatchShape, other: BatchShape) -> BatchShape:
    return BatchShape(max(one.rows, other.rows), max(one.width, other.width), max(one.reads, other.reads))


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
