"""Names for codes: the value of a column of the data that the pairs of a code have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lpc_lightning.evaluation.codebook.mutual_information import normalized_information, shuffled_mean
from lpc_lightning.evaluation.codebook.recovery import purity
from lpc_lightning.seeding import derive

LEAST_INFORMATION = 0.2
"""Smallest normalized mutual information, above that of shuffled values, at which a column names the codes."""
LEAST_SHARE = 0.5
"""Smallest share of a code's pairs that has the value of its label."""


@dataclass(frozen=True, slots=True)
class ColumnMatch:
    """How well the codes of the pairs match the values of a column."""

    column: str
    codes_by: str
    """Choice of a pair's code: `prior` or `exact posterior`, which uses the label."""
    nmi: float
    """Normalized mutual information, 0 to 1."""
    nmi_shuffled: float
    """Its value for values that are exchanged between prompts: chance."""
    purity: float
    """Share of pairs that have the most frequent value of their code."""

    @property
    def names_codes(self) -> bool:
        """True if the column matches the codes better than chance."""
        return self.nmi - self.nmi_shuffled >= LEAST_INFORMATION


@dataclass(frozen=True, slots=True)
class CodeLabel:
    """Most frequent value of a column among the pairs of a code."""

    column: str
    value: str
    pairs: int
    """Pairs of the code with this value."""
    of: int
    """Pairs of the code with any value."""


def match_columns(
    codes: Mapping[str, NDArray[np.int64]], columns: Mapping[str, Sequence[str]], prompts: Sequence[str]
) -> list[ColumnMatch]:
    """Compare codes with columns, the best match first, ties as given. Columns of fewer than two values are left out.

    Args:
        codes: (n,) code of each pair, by the way of choosing it.
        columns: (n,) value of each pair, by column. Pairs with an empty value are left out.
        prompts: (n,) prompt of each pair.
    """
    matches = []
    for column, values in columns.items():
        labels = np.array(values)
        members = labels != ""
        if len(np.unique(labels[members])) < 2:
            continue
        for codes_by, chosen in codes.items():
            pair = chosen[members], labels[members]
            # One seed for all columns, so that two columns with the same groups of pairs match equally well.
            chance = shuffled_mean(normalized_information, *pair, np.array(prompts)[members], seed=derive("label"))
            matches.append(ColumnMatch(column, codes_by, normalized_information(*pair), chance, purity(*pair)))
    return sorted(matches, key=lambda match: -round(match.nmi - match.nmi_shuffled, 9))  # sums round in some order


def label_codes(codes: NDArray[np.int64], values: Sequence[str], column: str) -> dict[int, CodeLabel]:
    """Return a label for each code that has one: a value of at least half of its pairs, more frequent than overall.

    Args:
        codes: (n,) code of each pair.
        values: (n,) value of each pair. Pairs with an empty value are left out.
        column: Name of the column.
    """
    pairs = [(int(code), value) for code, value in zip(codes, values, strict=True) if value]
    overall = Counter(value for _, value in pairs)
    by_code: dict[int, Counter[str]] = {}
    for code, value in pairs:
        by_code.setdefault(code, Counter())[value] += 1
    labels = {}
    for code, counts in sorted(by_code.items()):
        ((value, count),) = counts.most_common(1)
        share = count / counts.total()
        if share >= LEAST_SHARE and share > overall[value] / overall.total():
            labels[code] = CodeLabel(column, value, count, counts.total())
    return labels
