"""One model on everything that is asked, and its results on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.algorithms.checkpoint import CheckpointError
from lpc_lightning.data import DataError
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.accuracy.scored_pairs import TASK as PREFERENCES
from lpc_lightning.evaluation.accuracy.scored_pairs import PairsFile, score_pairs
from lpc_lightning.evaluation.benchmarks.checks import check_counts, check_tasks
from lpc_lightning.evaluation.benchmarks.results import BenchmarkResults, write_results
from lpc_lightning.evaluation.benchmarks.trial import reason
from lpc_lightning.evaluation.comparison.stored import (
    REQUEST,
    added,
    apart,
    holds_results,
    joined,
    local_data,
    missing_tasks,
    place_of,
    read,
)
from lpc_lightning.evaluation.provenance import provenance
from lpc_lightning.inference.fingerprint import weights_of
from lpc_lightning.inference.generation import trained_template
from lpc_lightning.inference.opening import OpenedPolicy, open_module, open_policy
from lpc_lightning.latent import PriorMode
from lpc_lightning.policy import UnsupportedPolicyError

TOLD = (ConfigError, DataError, CheckpointError, UnsupportedPolicyError)
"""Errors whose text names what was found and what to do."""


@dataclass(frozen=True)
class EvalRequest:
    """What is asked of every model; `evaluate` tells what each setting means."""

    tasks: tuple[str, ...]
    data_dir: str | None = None
    preferences: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    batch_size: int | Literal["auto"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    prior_mode: PriorMode | None = None
    share_contexts: bool = True
    device: str = "auto"
    seed: int = 1234

    def check(self) -> None:
        """Refuse what no model could be evaluated with.

        Raises:
            ConfigError: A setting that means nothing, an unknown task, or a benchmark's file that is not there.
            DataError: No file of preference pairs, or nothing in it.
        """
        check_counts(self.limit, self.num_fewshot)
        if self.tasks:
            check_tasks(self.tasks, self.data_dir)
        elif self.preferences is None:
            raise ConfigError("tasks: found none, expected some, or a file of preference pairs (--preferences).")
        if self.preferences is not None and self.prior_mode is not None:
            raise ConfigError(
                f"prior_mode: found {self.prior_mode!r} with a file of preference pairs, which are scored by the "
                "model's own setting alone. Score them in a run of their own."
            )
        self.pairs()

    def pairs(self) -> PairsFile | None:
        """The preference pairs to score."""
        if self.preferences is None:
            return None
        size = 8 if self.batch_size == "auto" else self.batch_size
        return PairsFile(self.preferences, limit=self.limit, batch_size=size)

    def request(self, model: str) -> dict[str, Any]:
        """What decides a model's scores on a task: results of the same request are results of the same thing."""
        settings = asdict(self)
        for other in ("tasks", "preferences", "batch_size", "device"):
            del settings[other]
        path = str(Path(model).resolve()) if Path(model).exists() else model
        return {**settings, "model": path, "weights": weights_of(model), "data": local_data(self.data_dir)}


def evaluate_model(
    model: str, name: str, wanted: EvalRequest, output: Path, again: bool = False
) -> tuple[BenchmarkResults, dict[str, str]]:
    """Run what has no results yet, and write them; each part as soon as it is done.

    Args:
        model: A checkpoint, an exported folder, a plain model, or a folder of results, which are read.
        name: What to call it.
        wanted: What to run.
        output: Folder of all models' folders.
        again: Run also what has results.

    Returns:
        All that is known of the model under these settings; and by task, why something that is wanted is missing there.

    Raises:
        CheckpointError, UnsupportedPolicyError, ConfigError: The model cannot be opened.
        DataError: There are results which cannot be read.
    """
    if holds_results(model):
        return (found := read(Path(model))), found.failures
    request, pairs = wanted.request(model), wanted.pairs()
    folder, stored = place_of(output, name, request)
    tasks = list(wanted.tasks) if again else missing_tasks(stored, wanted.tasks)
    if pairs is not None and not again and _are_scored(pairs, stored):
        pairs = None
    if stored is not None and not tasks and pairs is None:
        print(f"Read from {folder}, where these results are since {stored.record['date']}. --again runs them anew.")
        return stored, {}
    if stored is not None and not again:
        print(f"Goes on with the results in {folder}.")
    new: BenchmarkResults | None = None
    for part in _parts(model, name, wanted, request, tasks, pairs):
        new = joined(new, part)
        whole = added(stored, new)
        write_results(folder, whole, part.origin)
    assert new is not None
    print(f"Wrote {folder}.")
    return whole, new.failures


def _parts(
    model: str, name: str, wanted: EvalRequest, request: dict[str, Any], tasks: list[str], pairs: PairsFile | None
) -> Iterator[BenchmarkResults]:
    """The results of one benchmark after the other, then those of the pairs."""
    opened = open_policy(model, _dtype(wanted), wanted.device, name)
    origin, kind = {**opened.origin, "name": name, REQUEST: request}, opened.kind
    if tasks:
        run = _benchmarks(opened, wanted)
        for part in apart(tasks):
            yield replace(run(part), origin=origin)
        del run
    if pairs is None:
        return
    pairs.template = trained_template(opened.origin)
    scored: PreferenceModule | OpenedPolicy
    if kind == "checkpoint":
        del opened  # its module, with the reference, takes the place of the bare policy
        scored = open_module(model, wanted.device)
    else:
        scored = opened
    yield replace(_preferences(scored, pairs, wanted), origin=origin)


def describe(error: Exception) -> str:
    """What to say of an error: our own say all there is to say, of others it helps to know where they come from."""
    return str(error) if isinstance(error, TOLD) else reason(error)


def _dtype(wanted: EvalRequest) -> str:
    return "float32" if wanted.precision == "float32" else "auto"


def _are_scored(pairs: PairsFile, results: BenchmarkResults | None) -> bool:
    record = {} if results is None else results.record["tasks"].get(PREFERENCES, {})
    return bool(record.get("version") == pairs.content)


def _preferences(model: PreferenceModule | OpenedPolicy, pairs: PairsFile, wanted: EvalRequest) -> BenchmarkResults:
    try:
        return score_pairs(model, pairs, precision="bf16-mixed" if wanted.precision == "bfloat16" else None)
    except Exception as error:  # whatever it is, the benchmarks are worth having
        record = {"tasks": {}, "settings": {"tasks": [PREFERENCES]}, "seconds": 0.0, **provenance()}
        return BenchmarkResults({}, [], {PREFERENCES: describe(error)}, record)


def _benchmarks(opened: OpenedPolicy, wanted: EvalRequest) -> Callable[[list[str]], BenchmarkResults]:
    # lm-eval takes seconds to import: not for results that are only read.
    from lpc_lightning.evaluation.benchmarks.latent_lm import LatentLM
    from lpc_lightning.evaluation.benchmarks.runner import run_benchmarks

    lm = LatentLM(
        opened.policy,
        opened.tokenizer,
        opened.prior,
        prior_mode=wanted.prior_mode,
        share_contexts=wanted.share_contexts,
        batch_size=wanted.batch_size,
        mixed_precision_dtype=torch.bfloat16 if wanted.precision == "bfloat16" else None,
        seed=wanted.seed,
    )
    return partial(
        run_benchmarks,
        lm,
        data_dir=wanted.data_dir,
        limit=wanted.limit,
        num_fewshot=wanted.num_fewshot,
        apply_chat_template=wanted.apply_chat_template,
        seed=wanted.seed,
    )
