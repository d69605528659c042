"""The DataModule that all algorithms share: examples to tokens to batches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lpc_lightning.data.batching.layouts import FixedShapesLayout, Layout, PaddedLayout, SharedPrefixLayout
from lpc_lightning.data.batching.loading import EvaluationBatches, PreferenceLoader, TrainingBatches, TrainingLoader
from lpc_lightning.data.batching.run_reads import evaluation_reads, micro_batches, training_reads
from lpc_lightning.data.label_noise import LabelNoise, MarkedSource
from lpc_lightning.data.sources.example_source import ExampleSource
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.sources.rows import DataError
from lpc_lightning.data.tokenization.lengths import LengthPolicy
from lpc_lightning.data.tokenization.templates import TemplateKind, make_template
from lpc_lightning.data.tokenization.token_cache import load_or_tokenize
from lpc_lightning.data.tokenization.tokens import TokenStore
from lpc_lightning.errors import ConfigError
from lpc_lightning.seeding import run_seed
from lpc_lightning.types import Ceiling

Stage = Literal["train", "validation", "test"]
STAGES: dict[str, tuple[Stage, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("test",),
}
"""What each command of the trainer reads."""
PLANNED_EPOCHS = 2
"""Epochs whose batches decide the shapes of all."""
ROW_TOKENS = 1024
"""Most tokens of a row where attention is worked out over whole rows."""


class RowReader(Protocol):
    """What the layout of batches depends on in a policy (a `CausalPolicy` has it)."""

    takes_block_mask: bool
    attends_by_segment: bool
    block_sparse: bool


class PreferenceDataModule(LightningDataModule):
    """Batches of preference pairs for the policy that is being trained; subclasses say where the examples come from."""

    def __init__(
        self,
        batch_size: int = 4,
        eval_batch_size: int | None = None,
        layout: Literal["auto", "padded", "shared_prefix"] = "auto",
        row_tokens: int | None = None,
        template: TemplateKind = "auto",
        max_length: int | None = 1024,
        max_prompt_length: int | None = None,
        too_long: Literal["drop", "truncate_prompt", "truncate_answer", "error"] = "drop",
        bad_rows: Literal["error", "skip"] = "error",
        length_window: int | None = None,
        pairs_per_annotator: int | None = None,
        balance_batches: bool | Literal["auto"] = "auto",
        num_workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        """Keep the settings.

        Args:
            batch_size: Pairs in a batch of one device. `trainer.accumulate_grad_batches` of them make a step.
            eval_batch_size: Pairs in a batch of validation and test. null: as many as in training.
            layout: `padded`, a row a sequence; `shared_prefix`, the prompt once with both answers behind it and several
                pairs in a row; `auto`, shared_prefix where the policy's attention kernel takes a mask.
            row_tokens: Most tokens that a row of `shared_prefix` may hold; the width that costs least is chosen below
                it. A longer pair widens the rows of its batch. null: one row a batch where attention costs no more for
                it (policy.attention segment, on a CPU; compiled flex_attention on a GPU), elsewhere 1024. On a GPU
                rows are padded, so that an epoch has at most four shapes of batches (see `shapes`).
            template: `chat`, the tokenizer's own; `plain`, User:/Assistant: text; `auto`, chat where there is one.
            max_length: Most tokens of a prompt with its longer answer. null: no limit.
            max_prompt_length: Most tokens of a prompt. null: no limit.
            too_long: What becomes of longer pairs: `drop`; `truncate_prompt`, keeping its end; `truncate_answer`, which
                loses the end-of-answer token; `error`. What is dropped or cut is counted in the log and as a metric.
            bad_rows: `error` stops at rows that cannot be used, naming them; `skip` goes on and counts them.
            length_window: Has training batches hold pairs of like length: pairs are shuffled, sorted by length within
                windows of so many batches (of all devices), and the batches shuffled again. Every pair still comes
                once an epoch, and the expected loss is the same (see `length_windows`). On HH in batches of 8, a window
                of 50 takes padding from 51 to 17 % of all tokens in `padded`, from 8 to 2 % in `shared_prefix` with
                row_tokens 1024 (one row a batch has none), and several devices wait less for each other; but the
                largest batches hold long pairs alone, 5768 tokens in place of 3480, and set the peak memory. null:
                plain shuffling.
            pairs_per_annotator: Has training batches hold so many pairs of one annotator together, a divisor of
                batch_size. They share what they say about the codes (MarginalSpace, annotators). Every pair still comes
                once an epoch (see `annotator_batches`). Not together with length_window. null: plain shuffling.
            balance_batches: Has training batches hold about as many tokens each: the pairs of 32 steps are dealt out
                among their batches by length. Every pair still comes once an epoch (see `balanced_batches`). Padding to
                four shapes then takes 2 to 4 % of the tokens, in place of 3 to 13 %. `auto`: on a GPU, for packed rows,
                where neither length_window nor pairs_per_annotator is set.
            num_workers: Processes that lay out batches ahead of time. 0 does it in the training process.
            cache_dir: Where tokens are kept. null: $LPC_LIGHTNING_CACHE, or ~/.cache/lpc_lightning.

        Raises:
            ValueError: A setting is out of range.
        """
        super().__init__()
        for name, value in (
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
            ("row_tokens", row_tokens),
            ("length_window", length_window),
            ("pairs_per_annotator", pairs_per_annotator),
        ):
            if value is not None and value < 1:
                raise ValueError(f"data.{name}: found {value}, expected at least 1.")
        if pairs_per_annotator is not None and batch_size % pairs_per_annotator:
            raise ValueError(
                f"data.pairs_per_annotator: found {pairs_per_annotator}, expected a divisor of data.batch_size "
                f"({batch_size})."
            )
        if pairs_per_annotator is not None and length_window is not None:
            raise ValueError(
                f"data.length_window: found {length_window} beside data.pairs_per_annotator, expected one of them: "
                f"a batch "
                "holds pairs of like length, or pairs of one annotator."
            )
        if balance_batches is True and (pairs_per_annotator is not None or length_window is not None):
            raise ValueError(
                "data.balance_batches: found true beside data.length_window or data.pairs_per_annotator, expected auto "
                "or false: each of the three decides which pairs share a batch."
            )
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.layout, self.row_tokens, self.template = layout, row_tokens, template
        self.lengths = LengthPolicy(max_length, max_prompt_length, too_long)
        self.bad_rows, self.num_workers = bad_rows, num_workers
        self.length_window, self.pairs_per_annotator = length_window, pairs_per_annotator
        self.balance_batches = balance_batches
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self.pairs: dict[Stage, TokenStore] = {}
        self.reports: dict[Stage, DataReport] = {}
        self._noise: LabelNoise | None = None
        self._swaps: np.ndarray | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._policy: RowReader | None = None

    @abstractmethod
    def source(self, stage: Stage) -> ExampleSource | None:
        """The examples of a stage, or None where there are none."""

    @property
    def ceiling(self) -> Ceiling | None:
        """The best accuracy that can be had on clean pairs, where it is known: of generated data it is."""
        return None

    # What a run hands over

    def set_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take the policy's tokenizer. The module hands it over before `prepare_data`."""
        self._tokenizer = tokenizer

    def set_policy(self, policy: RowReader) -> None:
        """Take the policy that will read the batches. The module hands it over once it is built."""
        self._policy = policy

    def set_label_noise(self, noise: LabelNoise) -> None:
        """Relabel the training pairs. A callback hands its noise over in its `setup`.

        Tokens and reference stay those of the clean pairs, unless the noise also marks the prompts.

        Raises:
            ConfigError: The run has label noise already.
        """
        if self._noise is not None:
            raise ConfigError(
                f"callbacks: found two kinds of label noise ({self._noise.key()}; {noise.key()}), expected one at most."
            )
        self._noise = noise
        source = self.source("train")
        if source is None:
            return
        if noise.marks_prompts:
            self.load("train", handed_over(self._tokenizer))
            self._report("train")
            return
        # Texts and scores are not kept with the tokens.
        examples = list(source.read(DataReport()))
        self._swaps = noise.flips(examples)[self.pairs["train"].indices]

    def prepare_data(self) -> None:
        """Fill the token cache, in one process of the machine."""
        assert self.trainer is not None
        for stage in STAGES[str(self.trainer.state.fn.value)]:  # type: ignore[union-attr]
            self.load(stage, handed_over(self._tokenizer))

    def setup(self, stage: str) -> None:
        """Open the tokens, and tell the log and the loggers what became of every row."""
        self._noise = self._swaps = None
        for name in STAGES[stage]:
            if self.load(name, handed_over(self._tokenizer)) is not None:
                self._report(name)

    def _report(self, stage: Stage) -> None:
        assert self.trainer is not None
        report = self.reports[stage]
        rank_zero_info(f"{stage}: {report}")
        metrics = {key.replace("data/", f"data/{stage}/", 1): value for key, value in report.metrics().items()}
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, 0)

    def load(self, stage: Stage, tokenizer: PreTrainedTokenizerBase) -> TokenStore | None:
        """The tokens of a stage and, in `reports`, how they came about. Needs no trainer.

        Raises:
            DataError: There is something wrong with the data; see `load_or_tokenize`.
        """
        source = self.source(stage)
        if source is None:
            return None
        if stage == "train" and self._noise is not None and self._noise.marks_prompts:
            source = MarkedSource(source, self._noise)
        template = make_template(tokenizer, self.template)
        self.pairs[stage], self.reports[stage] = load_or_tokenize(
            source,
            template,
            self.lengths,
            bad_rows=self.bad_rows,
            cache_dir=self.cache_dir,
        )
        return self.pairs[stage]

    @property
    def training_pairs(self) -> TokenStore:
        """The training pairs with the labels of this run."""
        return self.pairs["train"].relabelled(self._swaps, "" if self._noise is None else self._noise.key())

    # What the reference says of the pairs

    @property
    def stages(self) -> list[Stage]:
        """What this run of the trainer reads, of what there is."""
        assert self.trainer is not None
        return [stage for stage in STAGES[str(self.trainer.state.fn.value)] if stage in self.pairs]  # type: ignore[union-attr]

    def reads(self, stage: Stage) -> set[int]:
        """The pairs of a stage that this run will read, on all its devices."""
        if stage == "train":
            return training_reads(self._training_batches(), self.trainer)
        return evaluation_reads(len(self.pairs[stage]), self.eval_batch_size, self.trainer)

    def micro_batches(self) -> float:
        """Return how many training batches this run takes on a device, at most. 0: it does not train."""
        return micro_batches(self._training_batches(), self.trainer) if "train" in self.stages else 0

    def attach_reference(self, stage: Stage, logps: np.ndarray) -> None:
        """Have the batches of a stage carry `logps`; see `TokenStore.with_reference`."""
        self.pairs[stage] = self.pairs[stage].with_reference(logps)

    # Batches

    def train_dataloader(self) -> TrainingLoader:
        """Shuffled batches that a resumed run takes up where it stopped."""
        pairs, batches = self.training_pairs, self._training_batches()
        read = (batch for epoch in range(PLANNED_EPOCHS) for batch in batches.all_devices(epoch))
        layout = self._planned(pairs, read)
        return TrainingLoader(pairs, batches, layout, self.num_workers, self._on_gpu)

    def _training_batches(self) -> TrainingBatches:
        pairs = self.pairs["train"]
        return self.training_batches(pairs, run_seed(), *self._place, balance=self._balances)

    def training_batches(
        self, pairs: TokenStore, seed: int, rank: int = 0, devices: int = 1, balance: bool = False
    ) -> TrainingBatches:
        """The plan of a device, under these settings. Needs no trainer.

        Raises:
            DataError: Pairs are to be grouped by annotator, and none is known.
        """
        lengths = None if self.length_window is None else pairs.lengths
        annotators = None if self.pairs_per_annotator is None else pairs.annotators
        if annotators is not None and not any(annotators):
            raise DataError(
                f"data.pairs_per_annotator: found no annotator in {len(pairs)} training pairs, expected a column "
                f"`annotator` "
                "(or the name of another one, data.columns.annotator), or data.pairs_per_annotator null."
            )
        sizes = (len(pairs), self.batch_size, seed, rank, devices)
        balanced = pairs.piece_lengths if balance else None
        return TrainingBatches(*sizes, lengths, self.length_window, annotators, self.pairs_per_annotator, balanced)

    def val_dataloader(self) -> PreferenceLoader | list[PreferenceLoader]:
        """Each validation pair once."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> PreferenceLoader | list[PreferenceLoader]:
        """Each test pair once."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> PreferenceLoader | list[PreferenceLoader]:
        """Each test pair once."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, stage: Stage) -> PreferenceLoader | list[PreferenceLoader]:
        if stage not in self.pairs:
            return []
        rank, devices = self._place
        pairs, size = self.pairs[stage], self.eval_batch_size
        plans = [EvaluationBatches(len(pairs), size, each, devices) for each in range(devices)]
        read = (batch for plan in plans for batch in plan.batches)
        layout = self._planned(pairs, read)
        return PreferenceLoader(pairs, plans[rank], layout, self.num_workers, self._on_gpu)

    def _planned(self, pairs: TokenStore, batches: Iterable[list[int]]) -> Layout:
        piece_lengths = pairs.piece_lengths
        return self.make_layout().for_batches(piece_lengths[batch] for batch in batches)

    def make_layout(self) -> Layout:
        """What lays batches out for the policy that is being trained.

        Raises:
            DataError: The policy cannot read the layout that is set.
        """
        policy = handed_over(self._policy)
        takes_mask = policy.takes_block_mask
        if self.layout == "shared_prefix" and not takes_mask:
            raise DataError(
                "data.layout: found shared_prefix with a policy whose attention kernel or layers take no block mask. "
                "Expected padded (or auto), or policy.attention sdpa or eager."
            )
        pad_id = make_template(handed_over(self._tokenizer), self.template).pad_id
        if self.layout == "padded" or not takes_mask:
            return PaddedLayout(pad_id)
        if self._on_gpu:
            return FixedShapesLayout(pad_id, self.row_tokens or (None if policy.block_sparse else ROW_TOKENS))
        return SharedPrefixLayout(pad_id, self.row_tokens or (None if policy.attends_by_segment else ROW_TOKENS))

    @property
    def _balances(self) -> bool:
        if self.balance_batches != "auto":
            return self.balance_batches
        return (
            self._on_gpu and self.layout != "padded" and self.length_window is None and self.pairs_per_annotator is None
        )

    @property
    def _place(self) -> tuple[int, int]:
        assert self.trainer is not None
        return self.trainer.global_rank, self.trainer.world_size

    @property
    def _on_gpu(self) -> bool:
        assert self.trainer is not None
        return self.trainer.strategy.root_device.type == "cuda"


Part = TypeVar("Part")


def handed_over(part: Part | None) -> Part:
    """Return a part that the module hands to the DataModule at the beginning of a run.

    Raises:
        ConfigError: There is no such run.
    """
    if part is None:
        raise ConfigError(
            "data: found a DataModule without a tokenizer or a policy, expected a run of a PreferenceModule, which "
            "hands them over. Call `load(stage, tokenizer)` where there is no trainer."
        )
    return part
