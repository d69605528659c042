"""Tables of evaluated pairs, with what adaptation to annotators needs of each pair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from lpc_lightning.algorithms.outputs import EvaluationOutput
from lpc_lightning.data import PreferenceDataModule
from lpc_lightning.data.batching.layouts import PaddedLayout
from lpc_lightning.data.batching.loading import EvaluationBatches
from lpc_lightning.data.datamodule import Stage
from lpc_lightning.evaluation.accuracy.accuracy_modes import Group
from lpc_lightning.evaluation.accuracy.pair_table import PairTable, Row, join_codes, pair_labels, split_codes
from lpc_lightning.evaluation.adaptation.inference import CodeTables, Table, single_code
from lpc_lightning.latent import LatentSpace
from lpc_lightning.types import PreferenceBatch


@dataclass(frozen=True)
class AnnotatedPairs:
    """Pairs that have an annotator, sorted by id, so that sums round equally for any batches and devices."""

    columns: Mapping[str, NDArray[np.float64]]
    """(n,) numbers of the pairs by name."""
    ids: Sequence[str]
    annotators: Sequence[str]
    prompts: Sequence[str]
    answers: Sequence[tuple[str, str]]
    """Hashes of the chosen and the rejected answer of each pair."""
    contents: Sequence[str]
    """`pair_content` of each pair."""

    @property
    def has_codes(self) -> bool:
        """True if the policy has a distribution over codes."""
        return "log_prior/0" in self.columns

    def tables(self, answers: Sequence[str] | None) -> CodeTables:
        """Return the tables of the pairs. A policy without codes has one code.

        Args:
            answers: The two answers that all pairs have (see `common_answers`). None: there are no such two.
        """
        signs = None if answers is None else np.array([[1.0 if a == answers[0] else -1.0] for a, _ in self.answers])
        if not self.has_codes:
            prior_means, posterior_means = self._joined("prior_mean"), self._joined("posterior_mean")
            tables = single_code(self.columns["prior"])
            return replace(tables, prior_means=prior_means, posterior_means=posterior_means, signs=signs)
        prior, losses, swapped = (join_codes(self.columns, name) for name in ("log_prior", "losses", "swapped"))
        return CodeTables(prior, losses, swapped, self._joined("log_posterior"), self._joined("evidence"), signs=signs)

    def _joined(self, name: str) -> Table | None:
        return join_codes(self.columns, name) if f"{name}/0" in self.columns else None


def common_answers(*parts: AnnotatedPairs) -> list[str] | None:
    """Return the two answers that all pairs have, such as "I agree." and "I disagree.". None: they have others."""
    answers = {answer for part in parts for pair in part.answers for answer in pair}
    return sorted(answers) if len(answers) == 2 else None


class AnnotatedPairsTable(nn.Module):
    """Collector of evaluated batches, over all devices."""

    def __init__(self, column: Group) -> None:
        """Start without pairs.

        Args:
            column: Label that identifies a pair's annotator. Pairs without this label are left out.
        """
        super().__init__()
        self.column, self.table = column, PairTable()

    def update(self, evaluated: EvaluationOutput, batch: PreferenceBatch, space: LatentSpace | None) -> None:
        """Add a batch.

        Args:
            evaluated: The result of `validation_step`, `test_step` or `scoring_step`.
            batch: The same batch.
            space: The module's latent space.
        """
        terms, states, score = evaluated["terms"], evaluated["states"], evaluated["score"]
        # The columns must be the same in every batch and on every device, including a batch without labelled pairs.
        numbers = {"prior": terms.pairs.margins}
        if terms.z is not None:
            numbers["no_latent"] = score.under(None)[0].margins
        if space is not None:
            preference = score.without_label_noise()
            for name, values in space.adaptation_values(states, score, preference, preference.swapped()).items():
                numbers |= split_codes(name, values)
        self.table.update(numbers, answer_rows(batch))

    def add_labels(self, batch: PreferenceBatch) -> None:
        """Add a batch of labelled pairs for a policy without a latent, which infers nothing from them.

        Their labels and numbers are counted. Their margin, which nothing uses, is 0.
        """
        self.table.update({"prior": torch.zeros(batch.pairs)}, answer_rows(batch))

    def reset(self) -> None:
        """Remove all pairs."""
        self.table.reset()

    def collect(self) -> AnnotatedPairs:
        """Return the pairs of all devices since the last call, and remove them."""
        numbers, rows = self.table.read()
        self.reset()
        order = sorted(
            (index for index, row in enumerate(rows) if row[self.column]), key=lambda index: str(rows[index]["id"])
        )

        def texts(name: str) -> list[str]:
            return [str(rows[index][name]) for index in order]

        return AnnotatedPairs(
            columns={name: values.numpy()[order] for name, values in numbers.items()},
            ids=texts("id"),
            annotators=texts(self.column),
            prompts=texts("prompt"),
            answers=[_pair(rows[index]) for index in order],
            contents=texts("content"),
        )


def label_batches(
    data: PreferenceDataModule, stage: Stage, tokenizer: PreTrainedTokenizerBase
) -> Iterator[PreferenceBatch]:
    """Yield the pairs of a stage for `AnnotatedPairsTable.add_labels`, in the order in which a run would score them.

    Raises:
        DataError: There are no such pairs, or the data is invalid.
    """
    pairs = data.load(stage, tokenizer)
    assert pairs is not None  # the stage has a source
    layout = PaddedLayout(pad_id=0)  # the tokens are not read
    for batch in EvaluationBatches(data.evaluation_order(stage), data.eval_batch_size):
        yield layout([pairs[index] for index in batch])


def _pair(row: Row) -> tuple[str, str]:
    chosen, rejected = row["answers"]
    return chosen, rejected


def answer_rows(batch: PreferenceBatch) -> list[Row]:
    """Return `pair_labels` of each pair, `answers`, hashes of the tokens of both answers, and `content`."""
    parts = zip(pair_labels(batch), batch.answers, batch.contents, strict=True)
    return [{**row, "answers": answers, "content": content} for row, answers, content in parts]
