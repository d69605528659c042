"""Orders in which labels are flipped: the kinds of label noise."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

import numpy as np

from lpc_lightning.data.sources.rows import DataError, entry_of, label_text
from lpc_lightning.errors import ConfigError
from lpc_lightning.types import PreferenceExample


class FlipOrder(ABC):
    """Rule that gives each pair a threshold. A pair is flipped at every noise rate above its threshold."""

    @abstractmethod
    def thresholds(self, examples: Sequence[PreferenceExample], draws: np.ndarray, seed: int = 0) -> np.ndarray:
        """Compute the noise rate above which each pair is flipped.

        Args:
            examples: The pairs that may be flipped.
            draws: (examples,) a random number in [0, 1) for each pair, which depends only on its content.
            seed: Seed of further random numbers.

        Returns:
            (examples,) thresholds. Infinity: the pair is never flipped.
        """

    @property
    def annotators(self) -> Collection[str]:
        """Annotators that the settings name. Each of them must have a training pair."""
        return ()

    def unreliable(self, examples: Sequence[PreferenceExample], rate: float, seed: int = 0) -> set[str] | None:
        """Return the annotators whose pairs may be flipped at a rate. None if the rate chooses pairs, not annotators.

        Args:
            examples: The pairs that may be flipped.
            rate: The noise rate.
            seed: Seed of further random numbers.
        """
        return None

    def key(self) -> str:
        """Return name and settings in one line."""
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"


class Uniform(FlipOrder):
    """Symmetric noise. Every pair is flipped with probability `rate`."""

    def thresholds(self, examples: Sequence[PreferenceExample], draws: np.ndarray, seed: int = 0) -> np.ndarray:
        """Return the random numbers."""
        return draws


class LongerWins(FlipOrder):
    """Length bias. A pair whose chosen answer is the shorter one, in characters, is flipped with probability `rate`."""

    def thresholds(self, examples: Sequence[PreferenceExample], draws: np.ndarray, seed: int = 0) -> np.ndarray:
        """Return the random numbers of pairs whose chosen answer is the shorter one, and infinity for the others."""
        shorter_chosen = np.array([len(pair.chosen) < len(pair.rejected) for pair in examples], dtype=bool)
        return np.where(shorter_chosen, draws, np.inf)


class SmallMarginsFirst(FlipOrder):
    """Noise on uncertain pairs. The share `rate` with the smallest score margins is flipped, with ties at random."""

    def __init__(self, chosen: str = "score_chosen", rejected: str | None = "score_rejected") -> None:
        """Set the columns of the scores.

        Args:
            chosen: Column with the chosen answer's score, or with the margin. `meta.score_chosen` is the entry
                `score_chosen` of the column `meta`.
            rejected: Column with the rejected answer's score. null: the column `chosen` contains the margin.
        """
        self.chosen, self.rejected = chosen, rejected

    def thresholds(self, examples: Sequence[PreferenceExample], draws: np.ndarray, seed: int = 0) -> np.ndarray:
        """Return each pair's rank by margin, divided by the number of pairs.

        Raises:
            DataError: A pair has no finite score in the column.
        """
        margins = np.array([self._margin(pair) for pair in examples])
        ranks = np.empty(len(margins))
        ranks[np.lexsort((draws, margins))] = np.arange(len(margins))
        return ranks / max(1, len(margins))

    def _margin(self, example: PreferenceExample) -> float:
        rejected = 0.0 if self.rejected is None else _read_score(example, self.rejected)
        return abs(_read_score(example, self.chosen) - rejected)


class ByAnnotator(FlipOrder):
    """Noise by annotator. A pair is flipped with probability `rate` times the share of its annotator."""

    def __init__(self, shares: dict[str, float], others: float = 0.0) -> None:
        """Set the share of each annotator.

        Args:
            shares: Probability of a flip at rate 1, in [0, 1], by annotator. Each annotator must have a training pair.
            others: The same for all annotators that are not in `shares`.
        """
        for name, share in (*shares.items(), ("others", others)):
            if not 0 <= share <= 1:
                raise ConfigError(f"order.shares: found {share} for {name}, expected a probability between 0 and 1.")
        # YAML has numbers as keys. Cells of the column `annotator` are texts.
        self.shares, self.others = {label_text(name): share for name, share in shares.items()}, others

    @property
    def annotators(self) -> Collection[str]:
        """See `FlipOrder.annotators`."""
        return self.shares

    def thresholds(self, examples: Sequence[PreferenceExample], draws: np.ndarray, seed: int = 0) -> np.ndarray:
        """Return the random numbers divided by the shares, and infinity for a share of 0."""
        shares = np.array([self.shares.get(pair.annotator, self.others) for pair in examples], dtype=float)
        return np.divide(draws, shares, out=np.full(len(shares), np.inf), where=shares > 0)


class UnreliableAnnotators(FlipOrder):
    """Whole annotators are unreliable. `rate` is the share of annotators whose labels are wrong or random.

    The number of these annotators is rounded up: 2 of 4 at rate 0.3. Each annotator's place in a random order depends
    only on the seed and the annotator's name. An annotator who is unreliable at one rate is also unreliable at every
    higher rate. Pairs without an annotator are never flipped.
    """

    def __init__(self, wrong: float = 0.5) -> None:
        """Set how unreliable these annotators are.

        Args:
            wrong: Probability, from 0 to 1, that a label of an unreliable annotator is wrong. 0.5: the labels are
                random. 1: all labels are the opposite of the right ones.
        """
        if not 0 <= wrong <= 1:
            raise ConfigError(f"order.wrong: found {wrong}, expected a probability between 0 and 1.")
        self.wrong = wrong

    def thresholds(self, examples: Sequence[PreferenceExample], draws: np.ndarray, seed: int = 0) -> np.ndarray:
        """Return the annotator's rank divided by the number of annotators, and infinity for labels that stay right.

        Raises:
            DataError: No pair has an annotator.
        """
        rank = self._ranks(examples, seed)
        ranks = np.array([rank.get(pair.annotator, np.inf) for pair in examples])
        return np.where(draws < self.wrong, ranks, np.inf)

    def unreliable(self, examples: Sequence[PreferenceExample], rate: float, seed: int = 0) -> set[str]:
        """See `FlipOrder.unreliable`."""
        return {name for name, rank in self._ranks(examples, seed).items() if rank < rate}

    def _ranks(self, examples: Sequence[PreferenceExample], seed: int) -> dict[str, float]:
        """Return the place of each annotator in a random order, divided by their number."""
        names = sorted({pair.annotator for pair in examples if pair.annotator})
        if not names:
            raise DataError(
                f"callbacks.order: found no annotator in {len(examples)} training pairs, expected a column `annotator`."
                " Set data.columns.annotator to its name, or choose another order."
            )
        order = sorted(names, key=lambda name: hashlib.sha256(json.dumps([seed, name]).encode()).digest())
        return {name: place / len(names) for place, name in enumerate(order)}


def _read_score(example: PreferenceExample, column: str) -> float:
    value = entry_of(example.meta, column)
    try:
        score = float(value)  # values of a CSV file are texts
    except (TypeError, ValueError, OverflowError):  # overflow: an integer beyond 1e308
        score = math.nan
    if not math.isfinite(score):
        columns = ", ".join(map(str, example.meta)) or "none besides texts and labels"
        raise DataError(
            f"callbacks.order: found {repr(value)[:40]} in column {column!r} of pair {example.id!r}, expected a finite "
            f"number. Columns of the pair: {columns}. Choose one of them in the settings of callbacks.order."
        )
    return score


def draw(seed: int, example: PreferenceExample) -> float:
    """Return a number in [0, 1) that depends only on seed and pair, and is uniform over both.

    Ids need not be unique, so that the texts are used, too.
    """
    prompt = [[turn["role"], turn["content"]] for turn in example.question or example.prompt]
    text = json.dumps([seed, example.id, prompt, example.chosen, example.rejected])
    digest = hashlib.sha256(text.encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53
