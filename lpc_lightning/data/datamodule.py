"""DataModule for all algorithms: reads examples, tokenizes them and builds batches."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lpc_lightning.data.batch_order import Balanced, BatchOrder, Shuffled
from lpc_lightning.data.batching.layouts import FixedShapesLayout, Layout, PaddedLayout, SharedPrefixLayout
from lpc_lightning.data.batching.loading import (
    EvaluationBatches,
    PreferenceLoader,
    TrainingBatches,
    TrainingLoader,
    next_to_each_other,
)
from lpc_lightning.data.batching.run_reads import evaluation_reads, micro_batches, training_reads
from lpc_lightning.data.noise.label_noise import LabelNoise, MarkedSource
from lpc_lightning.data.rendered_pair import RENDERED_PAIR, render_pair
from lpc_lightning.data.sources.example_source import ExampleSource
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.sources.rows import DataError
from lpc_lightning.data.tokenization.lengths import LengthPolicy
from lpc_lightning.data.tokenization.system_turns import SystemTurns
from lpc_lightning.data.tokenization.template_argument import TemplateArgument
from lpc_lightning.data.tokenization.templates import TemplateKind, TemplateSettings, make_template
from lpc_lightning.data.tokenization.token_cache import load_or_tokenize
from lpc_lightning.data.tokenization.tokens import TokenStore
from lpc_lightning.errors import ConfigError
from lpc_lightning.seeding import run_seed
from lpc_lightning.types import Ceiling, PreferenceExample, TokenizedPair

Stage = Literal["train", "validation", "test"]
STAGES: dict[str, tuple[Stage, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("test",),
}
"""Stages that each trainer command reads."""
PLANNED_EPOCHS = 2
"""Number of epochs whose batches are used to choose the batch shapes."""
ROW_TOKENS = 1024
"""Default row limit, in tokens, for kernels that compute attention over whole rows."""


class RowReader(Protocol):
    """Properties of a policy that determine the layout of batches and their rows. `CausalPolicy` has them."""

    takes_block_mask: bool
    attends_by_segment: bool

    @property
    def block_sparse(self) -> bool:
        """True if long packed rows cost no more."""

    def check_longest(self, longest: int | None) -> None:
        """Raise an error if log-probabilities of pairs of so many tokens would depend on their batch."""

    def check_context(self, longest: int) -> None:
        """Raise an error or warn if the policy was not made for pairs of so many tokens."""


class PreferenceDataModule(LightningDataModule):
    """Batches of preference pairs for a policy. Subclasses define the source of the examples."""

    def __init__(
        self,
        batch_size: int = 4,
        eval_batch_size: int | None = None,
        layout: Literal["auto", "padded", "shared_prefix"] = "auto",
        row_tokens: int | None = None,
        template: TemplateKind = "auto",
        template_kwargs: dict[str, TemplateArgument] | None = None,
        system_turns: SystemTurns = "auto",
        max_length: int | None = 1024,
        max_prompt_length: int | None = None,
        too_long: Literal["drop", "truncate_prompt", "truncate_answer", "error"] = "drop",
        bad_rows: Literal["error", "skip"] = "error",
        batch_order: BatchOrder | None = None,
        num_workers: int = 0,
        cache_dir: str | None = None,
        print_pair: bool = True,
    ) -> None:
        """Check and store the settings.

        Args:
            batch_size: Number of pairs in a training batch of one device. An optimizer step uses
                `trainer.accumulate_grad_batches` batches.
            eval_batch_size: Number of pairs in a validation or test batch. null: the same as batch_size.
            layout: Layout of a batch. `padded`: one row for each prompt with one answer. `shared_prefix`: the prompt
                once, followed by both answers, with several pairs in a row. `auto`: shared_prefix if the policy's
                attention kernel accepts a mask, otherwise padded.
            row_tokens: Maximum number of tokens in a row of `shared_prefix`. The cheapest width up to this limit is
                used. A longer pair widens the rows of its batch. null: one row for a batch if attention does not cost
                more in one row (policy.attention segment on a CPU, compiled flex_attention on a GPU), otherwise 1024.
                On a GPU, rows are padded, so that an epoch has at most four batch shapes (see `shapes`).
            template: Template that converts a conversation to text. `chat`: the tokenizer's chat template. `plain`:
                text with User: and Assistant:. `auto`: chat if the tokenizer has a chat template, otherwise plain.
            template_kwargs: Arguments of the chat template, such as `{enable_thinking: false}`. Evaluation and
                generation use the same ones. A text in quotes in a file is a text. A value of
                `--data.template_kwargs.NAME` is read as YAML: false, 12 and [a, b] are no texts, but `'12'` in these
                quotes is one, as is `Role: critic`. null: none.
            system_turns: Treatment of system turns. `keep`: the template renders them; a row is bad if it does not.
                `fold`: put their text in front of the next user turn. `drop`: leave them out. `auto`: keep if the
                template renders system turns, otherwise fold. Changed pairs are counted in the log and in a metric.
            max_length: Maximum number of tokens of a prompt and its longer answer. null: no limit.
            max_prompt_length: Maximum number of tokens of a prompt. null: no limit.
            too_long: Treatment of longer pairs. `drop`: leave the pair out. `truncate_prompt`: keep the end of the
                prompt; a prompt with a name (`columns.named_in_prompt`) or a marker (`LabelFlipNoise.marker`) stops
                the command instead. `truncate_answer`: keep the start of each answer, without the end-of-answer token.
                `error`: stop. Dropped and cut pairs are counted in the log and in a metric.
            bad_rows: Treatment of invalid rows. `error`: stop and list them. `skip`: leave them out and count them.
            batch_order: Order of the training pairs, which decides the pairs that share a batch. `Shuffled`: plain
                shuffling. `ByLength`: pairs of similar length, which reduces padding. `ByAnnotator`: several pairs of
                the same annotator, for evidence that they share. `ByPrompt`: several pairs of the same prompt, which
                are read together. `Balanced`: similar numbers of tokens in all batches.
                With every order, each pair is used once in an epoch. null: Balanced on a GPU with packed rows,
                otherwise Shuffled.
            num_workers: Number of processes that prepare batches in advance. 0: the training process prepares them.
            cache_dir: Folder of the token cache. null: $LPC_LIGHTNING_CACHE, or ~/.cache/lpc_lightning if it is unset.
            print_pair: Whether to print the first training pair at the start of a fit, as text with marks around the
                trained tokens. It is also written to `rendered_pair.txt` in the run folder.

        Raises:
            ValueError: A setting is out of range.
        """
        super().__init__()
        for name, value in (
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
            ("row_tokens", row_tokens),
        ):
            if value is not None and value < 1:
                raise ValueError(f"data.{name}: found {value}, expected at least 1.")
        if num_workers < 0:
            raise ValueError(f"data.num_workers: found {num_workers}, expected at least 0.")
        if batch_order is not None:
            batch_order.check_batch_size(batch_size)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.layout, self.row_tokens = layout, row_tokens
        self.template_settings = TemplateSettings(template, template_kwargs, system_turns)
        self.lengths = LengthPolicy(max_length, max_prompt_length, too_long)
        self.bad_rows, self.num_workers = bad_rows, num_workers
        self.batch_order = batch_order
        self.print_pair = print_pair
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self.pairs: dict[Stage, TokenStore] = {}
        self.reports: dict[Stage, DataReport] = {}
        self.folder = ""
        """Working directory of the run, from which relative paths were read. Empty before a run."""
        self._noise: LabelNoise | None = None
        self._swaps: np.ndarray | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._policy: RowReader | None = None

    @abstractmethod
    def source(self, stage: Stage) -> ExampleSource | None:
        """Return the examples of a stage, or None if the stage has no examples."""

    @property
    def source_names(self) -> tuple[str, ...]:
        """Sources for which validation and test report metrics of their own. Empty unless the data is a mixture."""
        return ()

    @property
    def ceiling(self) -> Ceiling | None:
        """Best possible accuracy on clean pairs. None if unknown; it is known for generated data."""
        return None

    # Parts that a run provides

    def set_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Set the policy's tokenizer. The module calls this before `prepare_data`."""
        self._tokenizer = tokenizer

    def set_policy(self, policy: RowReader) -> None:
        """Set the policy that reads the batches. The module calls this after it has built the policy.

        Raises:
            UnsupportedPolicyError: Log-probabilities of pairs of `max_length` would depend on their batch, or the
                policy cannot read the longest pair.
        """
        self.check_lengths(policy)
        self._policy = policy

    def check_lengths(self, policy: RowReader) -> None:
        """Check the lengths of the pairs for a policy or a reference. See `set_policy`."""
        policy.check_longest(self.lengths.max_length)
        pieces = (pairs.piece_lengths for pairs in self.pairs.values())
        longest = (int((each[:, 0] + each[:, 1:].max(axis=1)).max(initial=0)) for each in pieces)
        policy.check_context(max(longest, default=0))

    def set_label_noise(self, noise: LabelNoise) -> None:
        """Relabel the training pairs. A callback calls this in its `setup`.

        Tokens and reference values are those of the clean pairs, except if the noise also marks the prompts.

        Raises:
            ConfigError: The run already has label noise.
        """
        if self._noise is not None:
            raise ConfigError(
                f"callbacks: found two kinds of label noise ({self._noise.key()}; {noise.key()}), "
                "expected one at most. Remove one of the callbacks."
            )
        self._noise = noise
        if self.source("train") is None:
            return
        if noise.marks_prompts:
            self.load("train", require_part(self._tokenizer))
            self._report("train")
            return
        self._swaps = self.flips_of(noise)

    def flips_of(self, noise: LabelNoise) -> np.ndarray:
        """Return (pairs,) bool, True for the training pairs whose label the noise reverses."""
        source = self.source("train")
        assert source is not None
        # The token cache does not hold texts and scores, so the examples are read again.
        return noise.flips(list(source.read(DataReport())))[self.pairs["train"].indices]

    def prepare_data(self) -> None:
        """Fill the token cache. Lightning calls this in one process per machine.

        Raises:
            ConfigError: A fit has no training pairs.
            DataError: The data is invalid (see `load`).
        """
        assert self.trainer is not None
        for stage in STAGES[str(self.trainer.state.fn.value)]:  # type: ignore[union-attr]
            if self.load(stage, require_part(self._tokenizer)) is None and stage == "train":
                raise ConfigError(
                    "fit: found no training pairs, expected at least one. Set data.train_pairs for built-in pairs, or "
                    "data.train_split to the split to use."
                )

    def setup(self, stage: str) -> None:
        """Open the tokens, and report to the log and the loggers how many rows were kept, dropped or cut."""
        if stage == "fit":  # a validation after the fit may score training pairs with their labels
            self._noise = self._swaps = None
        self.folder = os.getcwd()
        for name in STAGES[stage]:
            if self.load(name, require_part(self._tokenizer)) is not None:
                self._report(name)

    @property
    def rows(self) -> dict[Stage, dict[str, int | str]]:
        """Number and digest of the pairs of each stage that has been loaded, if its source counts them."""
        return {stage: report.rows for stage, report in self.reports.items() if report.selected}

    def _report(self, stage: Stage) -> None:
        assert self.trainer is not None
        rank_zero_info(f"{stage}: {self._describe(stage)}")
        metrics = {key.replace("data/", f"data/{stage}/", 1): value for key, value in self._counts(stage).items()}
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, 0)
        if shared := self._in_training(stage):
            rank_zero_warn(
                f"{stage}: found {shared} of {len(self.pairs[stage])} pairs with the prompt of a training pair, "
                "expected none. Their metrics are those of prompts that are trained on. Prompts are compared as token "
                "ids: a template that leaves out text (data.system_turns) can make two prompts equal. Remove these "
                "rows from the files of one stage, or set another data.validation_split."
            )

    def _describe(self, stage: Stage) -> str:
        """Return the text of the log on the rows of a stage."""
        return str(self.reports[stage])

    def _counts(self, stage: Stage) -> dict[str, float]:
        """Return the numbers of rows of a stage by name, `data/...` (see `DataReport.metrics`)."""
        shared = self._in_training(stage)
        return self.reports[stage].metrics() | ({"data/prompts_in_training": float(shared)} if shared else {})

    def _in_training(self, stage: Stage) -> int:
        """Return how many validation pairs have the prompt of a training pair. 0 if they are meant to."""
        if stage != "validation" or "train" not in self.pairs:
            return 0
        return self.pairs[stage].count_prompts_of(self.pairs["train"])

    def load(self, stage: Stage, tokenizer: PreTrainedTokenizerBase) -> TokenStore | None:
        """Load the tokens of a stage, and store the report on its rows in `reports`. Needs no trainer.

        Raises:
            DataError: The data is invalid (see `load_or_tokenize`).
        """
        source = self.source(stage)
        if source is None:
            return None
        self.pairs[stage], self.reports[stage] = self._tokens(stage, source, tokenizer)
        return self.pairs[stage]

    def _tokens(
        self, stage: Stage, source: ExampleSource, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[TokenStore, DataReport]:
        """Return the tokens of a source, with marked prompts if the run's noise marks them."""
        if stage == "train" and self._noise is not None and self._noise.marks_prompts:
            source = MarkedSource(source, self._noise)
        template = make_template(tokenizer, *self.template_settings)
        pairs, report = load_or_tokenize(
            source, template, self.lengths, bad_rows=self.bad_rows, cache_dir=self.cache_dir
        )
        if stage == "train" and report.absent:
            raise DataError(
                f"data.columns: found no value in any row for {', '.join(report.absent)}, expected columns of the "
                f"rows, or entries of them such as meta.worker.\n{report}\nCorrect the names, or leave them out."
            )
        return pairs, report

    def kept_examples(self, stage: Stage) -> Iterator[PreferenceExample]:
        """Yield the examples of a stage whose pairs are used, as text, with the labels of the data.

        The tokens of the stage have been loaded before. A pair that was dropped for its length is left out.
        """
        if (source := self.source(stage)) is not None:
            yield from kept_of(source, self.pairs[stage])

    @property
    def training_pairs(self) -> TokenStore:
        """Training pairs with the labels of this run."""
        return self.pairs["train"].relabelled(self._swaps, "" if self._noise is None else self._noise.key())

    @property
    def has_margins(self) -> bool:
        """True if pairs of a stage that this run reads have margins."""
        return any(self.pairs[stage].margins is not None for stage in self.stages)

    # Values of the reference

    @property
    def stages(self) -> list[Stage]:
        """Stages that this run reads and that have pairs."""
        assert self.trainer is not None
        return [stage for stage in STAGES[str(self.trainer.state.fn.value)] if stage in self.pairs]  # type: ignore[union-attr]

    def reads(self, stage: Stage) -> set[int]:
        """Return the pairs of a stage that this run reads, on all devices."""
        if stage == "train":
            return training_reads(self._training_batches(), self.trainer)
        return evaluation_reads(self._evaluation_plans(stage), self.trainer)

    def micro_batches(self) -> float:
        """Return the maximum number of training batches of this run on one device. 0 if the run does not train."""
        return micro_batches(self._training_batches(), self.trainer) if "train" in self.stages else 0

    def attach_reference(self, stage: Stage, logps: np.ndarray) -> None:
        """Add `logps` to the batches of a stage (see `TokenStore.with_reference`)."""
        self.pairs[stage] = self.pairs[stage].with_reference(logps)

    # Batches

    def train_dataloader(self) -> TrainingLoader:
        """Build the loader of shuffled training batches. A resumed run continues after its last batch."""
        pairs, batches = self.training_pairs, self._training_batches()
        if self.print_pair:
            self._print_pair(pairs[0])
        read = (batch for epoch in range(PLANNED_EPOCHS) for batch in batches.all_devices(epoch))
        layout = self._planned(pairs, read)
        return TrainingLoader(pairs, batches, layout, self.num_workers, self._on_gpu)

    def _print_pair(self, pair: TokenizedPair) -> None:
        assert self.trainer is not None
        folder = self.trainer.log_dir  # a collective call: all devices must make it
        text = render_pair(pair, require_part(self._tokenizer))
        rank_zero_info(f"Training {text}")
        keep = self.trainer.loggers and not self.trainer.fast_dev_run  # type: ignore[attr-defined]  # set by Lightning
        if folder is not None and keep and self.trainer.is_global_zero:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / RENDERED_PAIR).write_text(text + "\n", encoding="utf-8")

    def _training_batches(self) -> TrainingBatches:
        default = Balanced() if self._on_gpu and self.layout != "padded" else Shuffled()
        assert self.trainer is not None
        repeats = self.trainer.overfit_batches > 0  # type: ignore[attr-defined]  # set by Lightning
        return self.training_batches(self.pairs["train"], run_seed(), *self._place, default, repeats)

    def training_batches(
        self,
        pairs: TokenStore,
        seed: int,
        rank: int = 0,
        devices: int = 1,
        default: BatchOrder | None = None,
        repeats: bool = False,
    ) -> TrainingBatches:
        """Plan the training batches of a device. Needs no trainer.

        Args:
            pairs: The training pairs.
            seed: Seed of the order.
            rank: Index of the device.
            devices: Number of devices.
            default: Order if `data.batch_order` is null. None: `Shuffled`.
            repeats: See `TrainingBatches`.

        Raises:
            DataError: The pairs lack what the order needs, such as annotators.
        """
        order = self.batch_order or default or Shuffled()
        order.check_pairs(pairs)
        return TrainingBatches(pairs, self.batch_size, seed, rank, devices, order, repeats)

    @property
    def pairs_per_annotator(self) -> int | None:
        """Number of pairs of the same annotator that `data.batch_order` places together. None: it does not."""
        return None if self.batch_order is None else self.batch_order.pairs_per_annotator

    def val_dataloader(self) -> PreferenceLoader | list[PreferenceLoader]:
        """Build the loader of the validation pairs, each of them once."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> PreferenceLoader | list[PreferenceLoader]:
        """Build the loader of the test pairs, each of them once."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> PreferenceLoader | list[PreferenceLoader]:
        """Build the loader of the test pairs for prediction."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, stage: Stage) -> PreferenceLoader | list[PreferenceLoader]:
        if stage not in self.pairs:
            return []
        pairs, plans = self.pairs[stage], self._evaluation_plans(stage)
        layout = self._planned(pairs, (batch for plan in plans for batch in plan.batches))
        return PreferenceLoader(pairs, plans[self._place[0]], layout, self.num_workers, self._on_gpu)

    def evaluation_order(self, stage: Stage) -> Sequence[int]:
        """Return the order in which validation and test read the pairs of a stage. Needs no trainer.

        Pairs of a prompt share a batch, whose prompt is read once. Not if training places pairs of an annotator
        together, who share evidence: the order of the data often does so.
        """
        pairs = self.pairs[stage]
        return range(len(pairs)) if self.pairs_per_annotator else next_to_each_other(pairs.piece_ids[:, 0].tolist())

    def _evaluation_plans(self, stage: Stage) -> list[EvaluationBatches]:
        """Plan the batches of each device."""
        order, devices = self.evaluation_order(stage), self._place[1]
        return [EvaluationBatches(order, self.eval_batch_size, rank, devices) for rank in range(devices)]

    def training_sample(self, indices: Sequence[int]) -> PreferenceLoader:
        """Build a loader of some training pairs, each of them once, with the labels of this run.

        Args:
            indices: Indices of the pairs, at least one for each device.
        """
        pairs, (rank, devices) = self.training_pairs, self._place
        places = range(len(indices))
        plans = [EvaluationBatches(places, self.eval_batch_size, each, devices) for each in range(devices)]
        read = ([indices[place] for place in batch] for plan in plans for batch in plan.batches)
        layout = self._planned(pairs, read)
        return PreferenceLoader([pairs[index] for index in indices], plans[rank], layout, 0, self._on_gpu)

    def _planned(self, pairs: TokenStore, batches: Iterable[list[int]]) -> Layout:
        return self.make_layout().for_batches(pairs.pieces[batch] for batch in batches)

    def packs(self, policy: RowReader) -> bool:
        """Return True if rows of batches for a policy hold several pieces of text."""
        return self.layout != "padded" and policy.takes_block_mask

    def make_layout(self) -> Layout:
        """Make the layout of batches for the policy.

        Raises:
            DataError: The policy cannot read the configured layout.
        """
        policy = require_part(self._policy)
        if self.layout == "shared_prefix" and not policy.takes_block_mask:
            raise DataError(
                "data.layout: found shared_prefix with a policy whose attention kernel or layers take no block mask, "
                "expected padded or auto. Change data.layout, or set policy.attention to sdpa or eager."
            )
        pad_id = make_template(require_part(self._tokenizer), *self.template_settings).pad_id
        if not self.packs(policy):
            return PaddedLayout(pad_id)
        if self._on_gpu:
            return FixedShapesLayout(pad_id, self.row_tokens or (None if policy.block_sparse else ROW_TOKENS))
        return SharedPrefixLayout(pad_id, self.row_tokens or (None if policy.attends_by_segment else ROW_TOKENS))

    @property
    def _place(self) -> tuple[int, int]:
        assert self.trainer is not None
        return self.trainer.global_rank, self.trainer.world_size

    @property
    def _on_gpu(self) -> bool:
        assert self.trainer is not None
        return self.trainer.strategy.root_device.type == "cuda"


def kept_of(source: ExampleSource, pairs: TokenStore) -> Iterator[PreferenceExample]:
    """Yield the examples of a source that became the pairs of a store."""
    kept = set(pairs.indices.tolist())
    return (example for index, example in enumerate(source.read(DataReport())) if index in kept)


Part = TypeVar("Part")


def require_part(part: Part | None) -> Part:
    """Return the tokenizer or the policy.

    Raises:
        ConfigError: The module has not set it.
    """
    if part is None:
        raise ConfigError(
            "data: found a DataModule without a tokenizer or a policy, expected a run of a PreferenceModule, which "
            "sets both. Call `load(stage, tokenizer)` if there is no trainer."
        )
    return part
