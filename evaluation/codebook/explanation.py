"""What each code stands for: its tokens, the prompts that choose it, the pairs that it decides, and a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from transformers import PreTrainedTokenizerBase

from lpc_lightning.algorithms.outputs import EvaluationOutput
from lpc_lightning.evaluation.accuracy.pair_table import PairTable, Row, join_codes, split_codes
from lpc_lightning.evaluation.codebook.code_labels import CodeLabel, ColumnMatch, label_codes, match_columns
from lpc_lightning.evaluation.codebook.code_tokens import TokenShift, code_tokens
from lpc_lightning.evaluation.codebook.pair_keys import PairKey, keyed_labels, pair_key
from lpc_lightning.latent import LatentSpace
from lpc_lightning.types import LogitHead, PreferenceBatch, PreferenceExample

COLUMNS = ("factor", "annotator", "source")
"""Columns that may name the codes. If several match equally well, the first one does."""


@dataclass(frozen=True, slots=True)
class CodePrompt:
    """A prompt for which a code is likely."""

    pair: PairKey
    probability: float
    """Prior probability of the code."""
    prompt: str = ""


@dataclass(frozen=True, slots=True)
class DecidedPair:
    """A pair whose reward margin a code changes much. Margins are rewards of the chosen minus the rejected answer."""

    pair: PairKey
    margin: float
    """Margin under the code."""
    prior_margin: float
    """Margin under the prior's z."""
    prompt: str = ""
    chosen: str = ""
    rejected: str = ""


@dataclass(frozen=True, slots=True)
class CodeExplanation:
    """What one code stands for."""

    code: int
    share: float
    """Mean prior probability over all pairs."""
    likeliest: int
    """Number of pairs for which the code is the likeliest one under the prior."""
    label: CodeLabel | None
    """None if no column matches the codes."""
    raised: Sequence[TokenShift]
    lowered: Sequence[TokenShift]
    prompts: Sequence[CodePrompt]
    """Prompts for which the code is likeliest, from the highest probability on."""
    decided: Sequence[DecidedPair]
    """Pairs by the size of the change of their margin, the largest first."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What the codes stand for, over a set of pairs."""

    pairs: int
    codes: Sequence[CodeExplanation]
    columns: Sequence[ColumnMatch]
    """Match of the codes with each column of the data, the best one first."""
    whole_vocabulary: bool = False
    """False: the tokens of the codes are among those of the pairs' answers."""

    def with_texts(self, examples: Mapping[PairKey, PreferenceExample]) -> Explanation:
        """Return the same with the texts of the pairs. Pairs that are not among `examples` keep empty texts."""
        prompts: dict[PairKey, dict[str, Any]] = {
            key: {"prompt": each.prompt[-1]["content"]} for key, each in examples.items()
        }
        texts = {
            key: {**prompts[key], "chosen": each.chosen, "rejected": each.rejected} for key, each in examples.items()
        }
        codes = [
            replace(
                code,
                prompts=[replace(each, **prompts.get(each.pair, {})) for each in code.prompts],
                decided=[replace(each, **texts.get(each.pair, {})) for each in code.decided],
            )
            for code in self.codes
        ]
        return replace(self, codes=codes)

    @property
    def shown_pairs(self) -> set[PairKey]:
        """Pairs whose texts are shown."""
        prompts = {each.pair for code in self.codes for each in code.prompts}
        return prompts | {each.pair for code in self.codes for each in code.decided}


class _AnswerTokens(Metric):
    """Ids of the tokens of all answers."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("tokens", [], dist_reduce_fx="cat")
        self.tokens: list[Tensor]

    def update(self, batch: PreferenceBatch) -> None:
        """Add the answers of a batch."""
        self.tokens.append(batch.targets[batch.owner < 2 * batch.pairs].unique())

    def compute(self) -> Tensor:
        """Return the ids in rising order."""
        return dim_zero_cat(self.tokens).unique()


class ExplanationPairs(nn.Module):
    """Collector of evaluated batches: prior and margins under each code, over all devices."""

    def __init__(self) -> None:
        """Start without pairs."""
        super().__init__()
        self.table, self.tokens = PairTable(), _AnswerTokens()

    def update(self, evaluated: EvaluationOutput, batch: PreferenceBatch, space: LatentSpace | None) -> None:
        """Add a batch.

        Args:
            evaluated: The result of `validation_step` or `test_step`.
            batch: The same batch.
            space: The module's latent space. Nothing is added if it has no codes.
        """
        if space is None or not space.has_codes:
            return
        states, score = evaluated["states"], evaluated["score"]
        prior, posterior = space.log_prior(states.prompt), space.log_exact_posterior(states, score)
        assert prior is not None  # the space has codes
        assert posterior is not None
        numbers = {"margin": evaluated["terms"].pairs.margins, "exact_code": posterior.argmax(-1)}
        numbers |= split_codes("log_prior", prior)
        numbers |= split_codes("margin", score.under_codes(space.codes)[0].margins)
        self.table.update(numbers, keyed_labels(batch))
        self.tokens.update(batch)

    def reset(self) -> None:
        """Remove all pairs."""
        self.table.reset()
        self.tokens.reset()

    def explain(
        self,
        codes: Tensor,
        head: LogitHead,
        tokenizer: PreTrainedTokenizerBase,
        tokens: int = 10,
        examples: int = 3,
        whole_vocabulary: bool = False,
    ) -> Explanation | None:
        """Explain the codes by all pairs since the last call, from all devices, and remove the pairs.

        Args:
            codes: (K, d) the codes of the latent space.
            head: The policy's head.
            tokenizer: The policy's tokenizer.
            tokens: Tokens that a code raises, and tokens that it lowers, at most.
            examples: Prompts and pairs of each code at most.
            whole_vocabulary: Choose the tokens from the whole vocabulary, not only from those of the answers.

        Returns:
            The explanation, without the texts of the pairs. None without pairs.
        """
        numbers, rows = self.table.read()
        if not rows:
            return None
        among = None if whole_vocabulary else self.tokens.compute()
        self.reset()
        columns = {name: values.numpy() for name, values in numbers.items()}
        prior, margins = np.exp(join_codes(columns, "log_prior")), join_codes(columns, "margin")
        likeliest = prior.argmax(1)
        by_choice = {"prior": likeliest, "exact posterior": columns["exact_code"].astype(np.int64)}
        columns_of_pairs = {name: [row[name] for row in rows] for name in COLUMNS}
        matches = match_columns(by_choice, columns_of_pairs, [row["prompt"] for row in rows])
        labels: dict[int, CodeLabel] = {}
        if matches and matches[0].names_codes:
            best = matches[0]
            labels = label_codes(by_choice[best.codes_by], [row[best.column] for row in rows], best.column)
        shifts = code_tokens(head, codes, tokenizer, tokens, among)
        explained = [
            CodeExplanation(
                code=code,
                share=float(prior[:, code].mean()),
                likeliest=int((likeliest == code).sum()),
                label=labels.get(code),
                raised=raised,
                lowered=lowered,
                prompts=_likeliest_prompts(prior[:, code], rows, examples),
                decided=_decided_pairs(margins[:, code], columns["margin"], rows, examples),
            )
            for code, (raised, lowered) in enumerate(shifts)
        ]
        return Explanation(len(rows), explained, matches, whole_vocabulary)


def _likeliest_prompts(probabilities: NDArray[np.float64], rows: Sequence[Row], most: int) -> list[CodePrompt]:
    """Return different prompts from the highest probability on."""
    chosen: dict[str, CodePrompt] = {}
    for index in _ranked(probabilities, rows):
        if len(chosen) == most:
            break
        chosen.setdefault(rows[index]["prompt"], CodePrompt(pair_key(rows[index]), float(probabilities[index])))
    return list(chosen.values())


def _decided_pairs(
    margins: NDArray[np.float64], prior_margins: NDArray[np.float64], rows: Sequence[Row], most: int
) -> list[DecidedPair]:
    ranked = _ranked(np.abs(margins - prior_margins), rows)[:most]
    return [DecidedPair(pair_key(rows[index]), float(margins[index]), float(prior_margins[index])) for index in ranked]


def _ranked(values: NDArray[np.float64], rows: Sequence[Row]) -> list[int]:
    """Return indices from the highest value on. Equal values are ordered by id, for any batches and devices."""
    return sorted(range(len(rows)), key=lambda index: (-values[index], pair_key(rows[index])))
