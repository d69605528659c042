"""DataModule for a mixture of data sets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lpc_lightning.data.datamodule import PreferenceDataModule, Stage, kept_of
from lpc_lightning.data.noise.label_noise import LabelNoise
from lpc_lightning.data.preference_data import StageRows
from lpc_lightning.data.sources.example_source import ChainedSource, ExampleSource, NamedSource
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.sources.rows import DataError
from lpc_lightning.data.tokenization.token_mixture import TokenMixture
from lpc_lightning.data.tokenization.tokens import TokenStore
from lpc_lightning.seeding import derive
from lpc_lightning.types import PreferenceExample

TAKEN_NAMES = ("prior", "posterior", "marginal", "no_latent", "shuffled", "clean", "flipped", "length_matched")
"""Names that metrics such as `val/accuracy/NAME` and `val/pairs/NAME` have for other groups."""


class MixtureSource(StageRows):
    """One data set of a mixture: its files and splits, and how often training uses its pairs."""

    _group = "data.sources"

    def __init__(self, name: str | None = None, weight: float = 1.0, count: int | None = None, **files: Any) -> None:
        """Check and store the settings.

        Args:
            name: Name in metrics, in the log and as the `source` of each pair, in place of the rows' own source. null:
                the last part of the path, without its ending.
            weight: Number of times that an epoch uses each training pair of this data set. 2: each pair twice. 0.25: a
                quarter of the pairs. 1.5: each pair once, and half of the pairs a second time. The choice is the same
                in every epoch and run.
            count: Number of training pairs of this data set in an epoch, in place of a weight. They are a random
                choice, the same in every epoch and run. It cannot exceed the number of pairs; a weight above 1 repeats
                pairs. null: the weight decides.
            files: Settings of `StageRows`.

        Raises:
            ValueError: A setting is out of range.
        """
        super().__init__(**files)
        if not 0 < weight < math.inf:
            raise ValueError(f"data.sources.weight: found {weight}, expected a number above 0.")
        if count is not None and count < 1:
            raise ValueError(f"data.sources.count: found {count}, expected at least 1.")
        if count is not None and weight != 1.0:
            raise ValueError(
                f"data.sources: found weight {weight} together with count {count}, expected only one of them."
            )
        self.name = self._last_part() if name is None else name
        self.weight, self.count = weight, count

    def _last_part(self) -> str:
        path = self.path["train"] if isinstance(self.path, dict) else self.path
        parts = PurePath(path if isinstance(path, str) else path[0])
        return parts.name.split(".")[0]

    def choose(self, pairs: int) -> np.ndarray:
        """Return (n,) the rows of training in an epoch, in order. A row occurs several times if it is repeated.

        Args:
            pairs: Number of training pairs of this data set.

        Raises:
            DataError: `count` exceeds the number of pairs.
        """
        if self.count is not None and self.count > pairs:
            raise DataError(
                f"data.sources: found count {self.count} for {self.name!r}, which has {pairs} training pairs, expected "
                f"at most {pairs}. Lower the count, or repeat pairs: weight {self.count / pairs:.4g}."
            )
        total = max(1, round(self.weight * pairs)) if self.count is None else self.count
        repeats, rest = divmod(total, pairs)
        # Chosen by the name: the choice does not depend on the other data sets, their order or the run's seed.
        shuffled = np.random.default_rng(derive("mixture", self.name)).permutation(pairs)
        return np.sort(np.concatenate([np.tile(np.arange(pairs), repeats), shuffled[:rest]]))


class PreferenceMixture(PreferenceDataModule):
    """Preference pairs from several data sets.

    Each data set has its own files, columns and splits, and is tokenized and cached by itself, as if it were used
    alone. Training pairs of all data sets are shuffled together; each epoch uses each data set by its weight or
    count. Validation and test use all pairs of these stages once, and report metrics for each data set, too.
    Label noise decides for each data set by itself, so that a repeated pair has one label.
    """

    def __init__(self, sources: list[MixtureSource], **data: Any) -> None:
        """Check and store the settings.

        Args:
            sources: The data sets, such as `[{path: hh.jsonl, weight: 2}, {name: uf, path: uf.jsonl, count: 5000}]`.
                Each has `name`, `weight`, `count` and the settings of `PreferenceData` for files (path, config, splits,
                columns). Streaming is not supported: the tokens of all data sets must fit on the disk of
                data.cache_dir.
            data: Settings of `PreferenceDataModule`.

        Raises:
            ValueError: There is no data set, or a name is not allowed.
        """
        super().__init__(**data)
        if not sources:
            raise ValueError("data.sources: found no data set, expected at least one.")
        for name, number in Counter(source.name for source in sources).items():
            if number > 1:
                raise ValueError(f"data.sources: found {number} data sets named {name!r}, expected one. Set name.")
            if not name or name in TAKEN_NAMES:
                raise ValueError(
                    f"data.sources: found a data set named {name!r}, expected another name than those of other metrics "
                    f"({', '.join(TAKEN_NAMES)}). Set name."
                )
        self.sources = {source.name: source for source in sources}
        self._source_reports: dict[Stage, dict[str, DataReport]] = {}

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the data sets."""
        return tuple(self.sources)

    def source(self, stage: Stage) -> ChainedSource | None:
        """Return the examples of a stage, each once: those of all data sets, one after another."""
        named = [NamedSource(source, name) for name, source in self._sources(stage)]
        return ChainedSource(named) if named else None

    def _sources(self, stage: Stage) -> Iterator[tuple[str, ExampleSource]]:
        """Yield the data sets that have a stage, by name."""
        for name, files in self.sources.items():
            if (source := files.source(stage)) is not None:
                yield name, source

    def load(self, stage: Stage, tokenizer: PreTrainedTokenizerBase) -> TokenStore | None:
        """Load the tokens of all data sets, and choose the training pairs of an epoch.

        Raises:
            DataError: The data of a data set is invalid, or its count exceeds its pairs.
        """
        stores: dict[str, TokenStore] = {}
        reports: dict[str, DataReport] = {}
        marked = self._noise is not None and self._noise.marks_prompts
        for name, source in self._sources(stage):
            # Marked prompts depend on the name, which label noise may use. Other tokens are shared between names.
            rows = NamedSource(source, name) if marked else source
            try:
                stores[name], reports[name] = self._tokens(stage, rows, tokenizer)
            except DataError as error:
                raise DataError(
                    f"data.sources, {name!r}, {stage}: {error} Settings of files, splits, hold-out and columns are "
                    f"those of {name!r} in data.sources."
                ) from error
        if not stores:
            return None
        chosen = [
            self.sources[name].choose(len(store)) if stage == "train" else np.arange(len(store))
            for name, store in stores.items()
        ]
        self.pairs[stage] = TokenMixture(stores, chosen)
        self._source_reports[stage] = reports
        merged = DataReport()
        for report in reports.values():
            merged = merged.merged(report)
        self.reports[stage] = merged
        return self.pairs[stage]

    def kept_examples(self, stage: Stage) -> Iterator[PreferenceExample]:
        """See `PreferenceDataModule.kept_examples`. Each example is read once, whatever the weight of its data set."""
        for name, source in self._sources(stage):
            yield from kept_of(NamedSource(source, name), self._mixture(stage).stores[name])

    def flips_of(self, noise: LabelNoise) -> np.ndarray:
        """See `PreferenceDataModule.flips_of`."""
        flips = {}
        for name, source in self._sources("train"):
            examples = list(NamedSource(source, name).read(DataReport()))
            flips[name] = noise.flips(examples)[self._mixture("train").stores[name].indices]
        return self._mixture("train").gather(flips)

    def _mixture(self, stage: Stage) -> TokenMixture:
        pairs = self.pairs[stage]
        assert isinstance(pairs, TokenMixture)
        return pairs

    def _describe(self, stage: Stage) -> str:
        mixture = self._mixture(stage)
        lines = [f"{len(mixture)} pairs of {len(mixture.stores)} data sets"]
        for name, report in self._source_reports[stage].items():
            first, *more = str(report).split("\n")
            lines += [f"  {name}: {first}", *(f"  {line}" for line in more)]
            if stage == "train":
                lines.append(f"    {_describe_use(mixture.uses(name))}")
            if shared := self._in_training(stage, name):
                lines.append(f"    {shared} pairs have a prompt that is in training, perhaps of another data set")
        return "\n".join(lines)

    def _counts(self, stage: Stage) -> dict[str, float]:
        mixture, counts = self._mixture(stage), super()._counts(stage)
        for name, report in self._source_reports[stage].items():
            counts |= {key.replace("data/", f"data/{name}/", 1): count for key, count in report.metrics().items()}
            counts[f"data/{name}/pairs"] = float(mixture.uses(name).sum())
            if shared := self._in_training(stage, name):
                counts[f"data/{name}/prompts_in_training"] = float(shared)
        return counts

    def _in_training(self, stage: Stage, name: str | None = None) -> int:
        """Return how many validation pairs of a data set have the prompt of a training pair of any data set.

        None: the sum over all data sets.
        """
        if stage != "validation" or "train" not in self.pairs:
            return 0
        stores = self._mixture(stage).stores
        names = [each for each in (stores if name is None else [name]) if not self.sources[each].holds_out_pairs]
        return sum(stores[each].count_prompts_of(self.pairs["train"]) for each in names)


def _describe_use(uses: np.ndarray) -> str:
    """Return how often an epoch uses the pairs of a data set, in one line.

    Args:
        uses: (pairs,) number of times that an epoch uses each pair.
    """
    times = {0: "left out", 1: "once", 2: "twice"}
    groups = [f"{(uses == n).sum()} pairs {times.get(n, f'{n} times')}" for n in np.unique(uses).tolist()]
    repeats = ", so that it repeats pairs" if uses.max() > 1 else ""
    return f"an epoch uses {uses.sum()} pairs{repeats}: {', '.join(groups)}"
