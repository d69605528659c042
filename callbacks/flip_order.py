"""Which labels go wrong first: the kinds of label noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lpc_lightning.data import DataError
from lpc_lightning.errors import ConfigError
from lpc_lightning.types import PreferenceExample


class FlipOrder(ABC):
    """Gives each pair the rate from which on it is flipped: what is flipped at a rate is so at any higher one."""

    @abstractmethod
    def thresholds(self, examples: Sequence[PreferenceExample], draws: np.ndarray) -> np.ndarray:
        """The rate above which each pair is flipped.

        Args:
            examples: The pairs that may be flipped.
            draws: (examples,) a number in [0, 1) for each, drawn by its content.

        Returns:
            (examples,) thresholds; infinity for pairs that are never flipped.
        """

    def key(self) -> str:
        """Name and settings in one line."""
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"


class Uniform(FlipOrder):
    """Symmetric noise: every pair is flipped with probability `rate`."""

    def thresholds(self, examples: Sequence[PreferenceExample], draws: np.ndarray) -> np.ndarray:
        """The draws themselves."""
        return draws


class LongerWins(FlipOrder):
    """A bias for length: where the shorter answer (in characters) was chosen, the longer one wins with probability
    `rate`."""

    def thresholds(self, examples: Sequence[PreferenceExample], draws: np.ndarray) -> np.ndarray:
        """The draws where the shorter answer was chosen."""
        shorter_won = np.array([len(each.chosen) < len(each.rejected) for each in examples], dtype=bool)
        return np.where(shorter_won, draws, np.inf)


class SmallMarginsFirst(FlipOrder):
    """Doubtful pairs go wrong first: the share `rate` of pairs whose scores differ least; ties are drawn."""

    def __init__(self, chosen: str = "score_chosen", rejected: str | None = "score_rejected") -> None:
        """Say where the scores are.

        Args:
            chosen: Column with the chosen answer's score, or with the margin itself; `meta.score_chosen` is the entry
                `score_chosen` of the column `meta`.
            rejected: Column with the rejected answer's score. null: `chosen` holds the margin.
        """
        self.chosen, self.rejected = chosen, rejected

    def thresholds(self, examples: Sequence[PreferenceExample], draws: np.ndarray) -> np.ndarray:
        """Each pair's rank by margin, as a share of all.

        Raises:
            DataError: A pair has no such score.
        """
        margins = np.array([self._margin(each) for each in examples])
        ranks = np.empty(len(margins))
        ranks[np.lexsort((draws, margins))] = np.arange(len(margins))
        return ranks / max(1, len(margins))

    def _margin(self, example: PreferenceExample) -> float:
        other = 0.0 if self.rejected is None else _score(example, self.rejected)
        return abs(_score(example, self.chosen) - other)


class ByAnnotator(FlipOrder):
    """Some annotators err more than others: a pair is flipped with probability `rate` times its annotator's share."""

    def __init__(self, shares: dict[str, float], others: float = 0.0) -> None:
        """Say how much each annotator errs.

        Args:
            shares: By annotator, in [0, 1]: the probability of a wrong label at rate 1.
            others: The same for all annotators not named.
        """
        for name, share in (*shares.items(), ("others", others)):
            if not 0 <= share <= 1:
                raise ConfigError(f"order.shares: found {share} for {name}, expected a probability from 0 to 1.")
        self.shares, self.others = shares, others

    def thresholds(self, examples: Sequence[PreferenceExample], draws: np.ndarray) -> np.ndarray:
        """The draws, the larger the less an annotator errs."""
        shares = np.array([self.shares.get(each.annotator, self.others) for each in examples], dtype=float)
        return np.divide(draws, shares, out=np.full(len(shares), np.inf), where=shares > 0)


def _score(example: PreferenceExample, column: str) -> float:
    found: Any = example.meta
    for name in column.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    try:
        return float(found)  # a CSV file holds texts
    except (TypeError, ValueError):
        raise DataError(
            f"label noise: found {found!r} in column {column!r} of pair {example.id!r}, expected a number. It has "
            f"the columns {', '.join(map(str, example.meta)) or 'of text and labels alone'}; set callbacks.order."
        ) from None
