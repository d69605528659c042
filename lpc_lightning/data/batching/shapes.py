"""Shapes of packed batches for a GPU. There are few of them, and a program is compiled once for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

MOST_SHAPES = 4
"""Maximum number of shapes of a plan."""
SPARE_SHAPES = 0.04
"""Accepted share of work for padding. If padding needs more, another shape is added."""
STEPS = (128, 64, 32)
"""Widths and numbers of read positions are multiples of one of these. `flex_attention` has blocks of 128."""
STEPS_OF_BATCH = 20
"""Minimum ratio of the mean batch size to the step. The largest step with this ratio is used."""
READ_COST = 0.25
"""Work of a read position in the head, relative to a token in the layers: 0.35 for SmolLM2-135M, 0.12 for 1.2B."""


@dataclass(frozen=True, slots=True, order=True)
class BatchShape:
    """Size of a packed batch, or the minimum size for its pairs."""

    rows: int
    """Number of rows R."""
    width: int
    """Number of tokens in a row T."""
    reads: int
    """Number of read positions N."""

    @property
    def tokens(self) -> int:
        """Number of tokens, with padding."""
        return self.rows * self.width

    @property
    def work(self) -> float:
        """Cost of a step at this shape, in tokens."""
        return self.tokens + READ_COST * self.reads

    def holds(self, needed: BatchShape) -> bool:
        """Return whether a batch of the minimum shape `needed` fits into this shape."""
        return self.rows >= needed.rows and self.width >= needed.width and self.reads >= needed.reads

    def rounded(self, step: int) -> BatchShape:
        """Round width and reads up to multiples of `step`."""
        return BatchShape(self.rows, _up(self.width, step), _up(self.reads, step))


@dataclass(frozen=True, slots=True)
class ShapePlan:
    """Batch shapes of a run."""

    shapes: tuple[BatchShape, ...] = ()
    step: int = STEPS[0]
    """Rounding step for a batch that does not fit into any shape of the plan."""

    def fit(self, needed: BatchShape) -> BatchShape:
        """Return the cheapest shape into which a batch fits. If none fits, return its rounded shape."""
        fitting = [shape for shape in self.shapes if shape.holds(needed)]
        return min(fitting, key=lambda shape: shape.work) if fitting else needed.rounded(self.step)


def plan_shapes(needed: Iterable[BatchShape], most: int = MOST_SHAPES) -> ShapePlan:
    """Choose the shapes that need the least padding for the given batches.

    The batches are sorted by number of tokens and split into at most `most` groups. All batches of a group fit into its
    shape. Dynamic programming computes the best split. The smallest number of shapes is used whose padding adds at most
    the share `SPARE_SHAPES` to the work.

    Args:
        needed: Minimum shape of each batch.
        most: Maximum number of shapes.
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
    """Return work and shapes of the best split of the ordered sizes into 1, 2, ... `most` groups."""
    parts = np.array([(size.rows, size.width, size.reads) for size in sizes])
    batches = np.concatenate([[0], np.cumsum(counts)])
    groups, total = min(most, len(sizes)), len(sizes)
    # The first `end` sizes in k groups: their least work, and where the last group begins.
    best = np.full((groups + 1, total + 1), np.inf)
    best[0, 0] = 0
    starts = np.zeros((groups + 1, total + 1), dtype=int)
    for end in range(1, total + 1):
        rows, width, reads = np.maximum.accumulate(parts[end - 1 :: -1]).T  # shapes of the last group, from every start
        work = (batches[end] - batches[end - 1 :: -1]) * (rows * width + READ_COST * reads)
        sums = best[:-1, end - 1 :: -1] + work
        chosen = sums.argmin(axis=1)
        best[1:, end] = sums[range(groups), chosen]
        starts[1:, end] = end - 1 - chosen
    plans = []
    for number in range(1, groups + 1):
        shapes: list[BatchShape] = []
        end = total
        for group in range(number, 0, -1):
            start = starts[group, end]
            shapes.insert(0, BatchShape(*parts[start:end].max(axis=0).tolist()))
            end = start
        plans.append((float(best[number, total]), shapes))
    return plans


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
