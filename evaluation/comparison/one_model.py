"""Evaluation of one model, with its results on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.cli.system_errors import explain_system_error
from lpc_lightning.data import DataError
from lpc_lightning.data.tokenization.templates import make_template
from lpc_lightning.errors import CheckpointError, ConfigError, UnsupportedPolicyError
from lpc_lightning.evaluation.accuracy.scored_pairs import PairsFile, score_pairs
from lpc_lightning.evaluation.accuracy.training_overlap import training_pairs
from lpc_lightning.evaluation.benchmarks.results import BenchmarkResults, write_results
from lpc_lightning.evaluation.benchmarks.trial import failure_reason
from lpc_lightning.evaluation.comparison.request import EvalRequest
from lpc_lightning.evaluation.comparison.score_tables import write_score_tables
from lpc_lightning.evaluation.comparison.stored import (
    REQUEST,
    add_run,
    claim_folder,
    holds_results,
    merge_parts,
    missing_tasks,
    read_stored,
    split_by_documents,
)
from lpc_lightning.evaluation.provenance import provenance
from lpc_lightning.inference.opening import OpenedPolicy, open_module, open_policy
from lpc_lightning.policy.precision import TRAINER_PRECISION, WEIGHTS_TYPE

SELF_EXPLAINING_ERRORS = (ConfigError, DataError, CheckpointError, UnsupportedPolicyError)
"""Errors whose text has what was found and what to do. Their class and location are not shown."""


def evaluate_model(
    model: str, name: str, request: EvalRequest, output: Path, again: bool = False
) -> tuple[Path, BenchmarkResults, dict[str, str]]:
    """Compute missing results of a model. Each part is written as soon as it is computed.

    Args:
        model: A checkpoint, an exported folder, or a plain model. For a folder of results, the results are read.
        name: Name of the model.
        request: What to compute.
        output: Folder with one subfolder per model.
        again: Compute results again even if they exist.

    Returns:
        The folder of the results; all results of the model under these settings, including earlier ones; and by task,
        the reason for each missing result.

    Raises:
        CheckpointError, UnsupportedPolicyError, ConfigError: The model cannot be opened.
        DataError: The stored results cannot be read.
    """
    if holds_results(model):
        stored_results = read_stored(Path(model))
        return Path(model), stored_results, stored_results.failures
    evaluation = _Evaluation(model, name, request, request.key(model))
    output.mkdir(parents=True, exist_ok=True)
    versions = {each.task: each.content for each in request.pairs()}
    with claim_folder(output, name, evaluation.key, versions) as (folder, stored):
        return folder, *evaluation.complete(folder, stored, again)


@dataclass(frozen=True)
class _Evaluation:
    """Evaluation of one model."""

    model: str
    name: str
    request: EvalRequest
    key: dict[str, Any]
    """Key of the request for this model."""

    def complete(
        self, folder: Path, stored: BenchmarkResults | None, again: bool
    ) -> tuple[BenchmarkResults, dict[str, str]]:
        """Compute what is missing in the stored results, or everything `again`, and write it part by part."""
        tasks = list(self.request.tasks) if again else missing_tasks(stored, self.request.tasks)
        scored = {} if stored is None else stored.record["tasks"]  # of pairs of the same version, see `claim_folder`
        pairs = [each for each in self.request.pairs() if again or each.task not in scored]
        if stored is not None and not tasks and not pairs:
            print(f"Read from {folder}, written {stored.record['date']}. Use --again to compute the results again.")
            return stored, {}
        if stored is not None and not again:
            print(f"Continuing with the results in {folder}.")
        new: BenchmarkResults | None = None
        for part in self._parts(tasks, pairs):
            new = merge_parts(new, part)
            combined = add_run(stored, new)
            write_results(folder, combined, part.origin)
            write_score_tables(folder, combined.record["tasks"])
        assert new is not None
        print(f"Wrote {folder}.")
        return combined, new.failures

    def _parts(self, tasks: list[str], pairs: list[PairsFile]) -> Iterator[BenchmarkResults]:
        """Yield the results of one benchmark after the other, then those of the pairs."""
        request = self.request
        dtype = WEIGHTS_TYPE[request.precision]
        opened = open_policy(self.model, dtype, request.device, self.name, request.trust_remote_code)
        origin, kind = {**opened.origin, "name": self.name, REQUEST: self.key}, opened.kind
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
            scored = open_module(self.model, request.device, request.trust_remote_code, dtype)
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


def _preferences(
    model: PreferenceModule | OpenedPolicy, pairs: PairsFile, request: EvalRequest, trained: frozenset[int] | None
) -> BenchmarkResults:
    try:
        return score_pairs(model, pairs, TRAINER_PRECISION[request.precision], trained, request.seed)
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
