"""Evaluation of one model, with its results on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.cli.system_errors import explain_system_error
from lpc_lightning.data import DataError
from lpc_lightning.data.sources.columns import Columns
from lpc_lightning.data.tokenization.templates import make_template
from lpc_lightning.errors import CheckpointError, ConfigError, UnsupportedPolicyError
from lpc_lightning.evaluation.accuracy.scored_pairs import TASK as PREFERENCES
from lpc_lightning.evaluation.accuracy.scored_pairs import PairsFile, score_pairs
from lpc_lightning.evaluation.accuracy.training_overlap import training_pairs
from lpc_lightning.evaluation.benchmarks.checks import check_counts, check_tasks
from lpc_lightning.evaluation.benchmarks.results import BenchmarkResults, write_results
from lpc_lightning.evaluation.benchmarks.trial import failure_reason
from lpc_lightning.evaluation.comparison.score_tables import write_score_tables
from lpc_lightning.evaluation.comparison.stored import (
    REQUEST,
    add_run,
    claim_folder,
    holds_results,
    local_data,
    merge_parts,
    missing_tasks,
    read_stored,
    split_by_documents,
)
from lpc_lightning.evaluation.provenance import provenance
from lpc_lightning.inference.fingerprint import weights_of
from lpc_lightning.inference.opening import OpenedPolicy, open_module, open_policy
from lpc_lightning.latent import PriorMode

SELF_EXPLAINING_ERRORS = (ConfigError, DataError, CheckpointError, UnsupportedPolicyError)
"""Errors whose text has what was found and what to do. Their class and location are not shown."""
NOT_IN_KEY = {"in_key": False}
"""Mark of a setting that `EvalRequest.key` leaves out: it changes no score, or each task's record has its effect."""


@dataclass(frozen=True)
class EvalRequest:
    """Settings of an evaluation, shared by all models. See `evaluate` for their meaning."""

    tasks: tuple[str, ...] = field(metadata=NOT_IN_KEY)
    data_dir: str | None = None
    preferences: tuple[str, ...] = field(default=(), metadata=NOT_IN_KEY)
    columns: Columns = field(default_factory=Columns, metadata=NOT_IN_KEY)
    bad_rows: Literal["error", "skip"] = field(default="error", metadata=NOT_IN_KEY)
    max_length: int | None = field(default=1024, metadata=NOT_IN_KEY)
    limit: int | float | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    batch_size: int | Literal["auto"] = field(default="auto", metadata=NOT_IN_KEY)
    precision: Literal["float32", "bfloat16"] = "float32"
    prior_mode: PriorMode | None = None
    share_contexts: bool = True
    device: str = field(default="auto", metadata=NOT_IN_KEY)
    trust_remote_code: bool = field(default=False, metadata=NOT_IN_KEY)
    seed: int = 1234

    def check(self) -> None:
        """Check the settings that do not depend on a model.

        Raises:
            ConfigError: A setting is invalid, a task is unknown, or a benchmark's file does not exist.
            DataError: The file of preference pairs does not exist, or has no rows.
        """
        check_counts(self.limit, self.num_fewshot)
        if self.tasks:
            check_tasks(self.tasks, self.data_dir)
        elif not self.preferences:
            raise ConfigError("tasks: found none, expected a task, or a file of preference pairs (--preferences).")
        if self.preferences and self.prior_mode is not None:
            raise ConfigError(
                f"prior_mode: found {self.prior_mode!r} with a file of preference pairs, expected null: pairs are "
                "scored with the model's own setting. Score benchmarks and pairs in separate runs."
            )
        self.pairs()

    def pairs(self) -> list[PairsFile]:
        """Return the files of preference pairs to score. With several, each is a task named by its file."""
        size = 8 if self.batch_size == "auto" else self.batch_size
        return [
            PairsFile(
                path,
                limit=self.limit,
                columns=self.columns,
                batch_size=size,
                bad_rows=self.bad_rows,
                max_length=self.max_length,
                task=task,
            )
            for path, task in zip(self.preferences, _task_names(self.preferences), strict=True)
        ]

    def key(self, model: str) -> dict[str, Any]:
        """Return all settings and files that determine a model's score on any task.

        Stored results with an equal key can be used again, unless the file of a task has changed (see `missing_tasks`).
        """
        settings = {
            entry.name: getattr(self, entry.name) for entry in fields(self) if entry.metadata.get("in_key", True)
        }
        path = str(Path(model).resolve()) if Path(model).exists() else model
        return {**settings, "model": path, "weights": weights_of(model), "data": local_data(self.data_dir)}


def _task_names(paths: Sequence[str]) -> list[str]:
    """Return the names of files of pairs in results: that of a single file, else one with the name of each file."""
    if len(paths) < 2:
        return [PREFERENCES] * len(paths)
    stems = [Path(path).name.split(".")[0] for path in paths]
    numbers = [stems[:place].count(stem) for place, stem in enumerate(stems)]
    return [
        f"{PREFERENCES}-{stem}" + (f"-{number + 1}" if number else "")
        for stem, number in zip(stems, numbers, strict=True)
    ]


def evaluate_model(
    model: str, name: str, request: EvalRequest, output: Path, again: bool = False
) -> tuple[BenchmarkResults, dict[str, str]]:
    """Compute missing results of a model. Each part is written as soon as it is computed.

    Args:
        model: A checkpoint, an exported folder, or a plain model. For a folder of results, the results are read.
        name: Name of the model.
        request: What to compute.
        output: Folder with one subfolder per model.
        again: Compute results again even if they exist.

    Returns:
        All results of the model under these settings, including earlier ones; and by task, the reason for each missing
        result.

    Raises:
        CheckpointError, UnsupportedPolicyError, ConfigError: The model cannot be opened.
        DataError: The stored results cannot be read.
    """
    if holds_results(model):
        stored_results = read_stored(Path(model))
        return stored_results, stored_results.failures
    key, pairs = request.key(model), request.pairs()
    output.mkdir(parents=True, exist_ok=True)
    with claim_folder(output, name, key) as (folder, stored):
        return _complete(model, name, request, key, pairs, folder, stored, again)


def _complete(
    model: str,
    name: str,
    request: EvalRequest,
    key: dict[str, Any],
    pairs: list[PairsFile],
    folder: Path,
    stored: BenchmarkResults | None,
    again: bool,
) -> tuple[BenchmarkResults, dict[str, str]]:
    tasks = list(request.tasks) if again else missing_tasks(stored, request.tasks)
    pairs = [each for each in pairs if again or not _are_scored(each, stored)]
    if stored is not None and not tasks and not pairs:
        print(f"Read from {folder}, written {stored.record['date']}. Use --again to compute the results again.")
        return stored, {}
    if stored is not None and not again:
        print(f"Continuing with the results in {folder}.")
    new: BenchmarkResults | None = None
    for part in _parts(model, name, request, key, tasks, pairs):
        new = merge_parts(new, part)
        combined = add_run(stored, new)
        write_results(folder, combined, part.origin)
        write_score_tables(folder, combined.record["tasks"])
    assert new is not None
    print(f"Wrote {folder}.")
    return combined, new.failures


def _parts(
    model: str, name: str, request: EvalRequest, key: dict[str, Any], tasks: list[str], pairs: list[PairsFile]
) -> Iterator[BenchmarkResults]:
    """Yield the results of one benchmark after the other, then those of the pairs."""
    opened = open_policy(model, _dtype(request), request.device, name, request.trust_remote_code)
    origin, kind = {**opened.origin, "name": name, REQUEST: key}, opened.kind
    if tasks:
        run = _benchmarks(opened, request)
        for part in split_by_documents(tasks):
            yield replace(run(part), origin=origin)
        del run
    if not pairs:
        return
    for each in pairs:
        each.template_settings = opened.template
    scored: PreferenceModule | OpenedPolicy
    if kind == "checkpoint":
        del opened  # free the policy before its module is opened, which has a reference as well
        scored = open_module(model, request.device, request.trust_remote_code)
    else:
        scored = opened
    trained = training_pairs(origin)
    for each in pairs:
        yield replace(_preferences(scored, each, request, trained), origin=origin)


def describe(error: Exception) -> str:
    """Return the text of an error. For errors of other libraries, class, causes and location are added."""
    if isinstance(error, SELF_EXPLAINING_ERRORS):
        return str(error)
    return explain_system_error(error) or failure_reason(error)


def _dtype(request: EvalRequest) -> str:
    return "float32" if request.precision == "float32" else "auto"


def _are_scored(pairs: PairsFile, results: BenchmarkResults | None) -> bool:
    record = {} if results is None else results.record["tasks"].get(pairs.task, {})
    return bool(record.get("version") == pairs.content)


def _preferences(
    model: PreferenceModule | OpenedPolicy, pairs: PairsFile, request: EvalRequest, trained: frozenset[int] | None
) -> BenchmarkResults:
    try:
        return score_pairs(model, pairs, "bf16-mixed" if request.precision == "bfloat16" else None, trained)
    except Exception as error:  # any error: the results of the benchmarks must not be lost
        record = {"tasks": {}, "settings": {"tasks": [pairs.task]}, "seconds": 0.0, **provenance()}
        return BenchmarkResults({}, [], {pairs.task: describe(error)}, record)


def _benchmarks(opened: OpenedPolicy, request: EvalRequest) -> Callable[[list[str]], BenchmarkResults]:
    # Imported here: lm-eval takes seconds to import, and is not needed to read results.
    from lpc_lightning.evaluation.benchmarks.latent_lm import LatentLM
    from lpc_lightning.evaluation.benchmarks.runner import run_benchmarks

    lm = LatentLM(
        opened.policy,
        opened.tokenizer,
        opened.prior,
        prior_mode=request.prior_mode,
        share_contexts=request.share_contexts,
        batch_size=request.batch_size,
        mixed_precision_dtype=torch.bfloat16 if request.precision == "bfloat16" else None,
        seed=request.seed,
        template=make_template(opened.tokenizer, *opened.template) if request.apply_chat_template else None,
    )
    return partial(
        run_benchmarks,
        lm,
        data_dir=request.data_dir,
        limit=request.limit,
        num_fewshot=request.num_fewshot,
        apply_chat_template=request.apply_chat_template,
        seed=request.seed,
    )
