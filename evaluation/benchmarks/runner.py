"""lm-eval's tasks on a model: scores with standard errors, every item, and a record of the run.

Each task runs separately, so that its failures and its time are separate. The exception are tasks about the same
documents, which run together. TruthfulQA's mc1 and mc2, for example, have the same prompts and different choices. A
model that shares contexts then reads each prompt once. If such a set fails, its tasks run again one by one.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict
from tqdm import tqdm

from lpc_lightning.evaluation.benchmarks.checks import check_chat_template, check_counts, check_tasks
from lpc_lightning.evaluation.benchmarks.items import items_of_task, scores_of_task
from lpc_lightning.evaluation.benchmarks.results import BenchmarkResults, to_json_value
from lpc_lightning.evaluation.benchmarks.shared_requests import SharedRequests
from lpc_lightning.evaluation.benchmarks.tasks import (
    DOCUMENT_SEEDS,
    PAPER_TASKS,
    is_task_file,
    load_tasks,
    task_file_version,
)
from lpc_lightning.evaluation.benchmarks.trial import Trial
from lpc_lightning.evaluation.provenance import provenance, short_hash

log = logging.getLogger(__name__)

LM_SETTINGS = (
    "prior_mode",
    "share_contexts",
    "batch_size",
    "max_length",
    "mixed_precision_dtype",
    "device",
    "chat_template_args",
)
"""Attributes of a model that go into the record, if the model has them."""


def run_benchmarks(
    lm: LM,
    tasks: Sequence[str] = PAPER_TASKS,
    *,
    data_dir: str | None = None,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    seed: int = 1234,
    bootstrap_iters: int = 1000,
    manager: TaskManager | None = None,
) -> BenchmarkResults:
    """Score a model on tasks. If a task raises, its error is recorded as a failure, and the other tasks run.

    Under torch.distributed, all processes must call this function. If the model's `world_size` is above 1, the
    processes share the requests (see `SharedRequests`). All processes return the same results and failures.

    Args:
        lm: The model.
        tasks: Names of lm-eval tasks, groups or tags, or paths of task files (.yaml).
        data_dir: Folder of local data, with the files of `LOCAL_DATA`. None: data comes from the hub.
        limit: Number of documents per task, taken from the start; below 1: a share of them. None: all documents.
        num_fewshot: Number of examples before each question. None: each task's own number. A task whose own number is 0
            always has no examples, and a line names it.
        apply_chat_template: Format prompts as conversations, with the chat template of the model's tokenizer.
        seed: Seed of the few-shot examples and of all other random draws. 1234 is lm-eval's default. A task that
            shuffles its documents while they are loaded uses `DOCUMENT_SEEDS` instead.
        bootstrap_iters: Number of resamples for standard errors without a closed form. 0: no standard errors.
        manager: Task manager with the task names. None: a shared manager of this process.

    Raises:
        ConfigError: A setting or a file is invalid for every task. Raised before anything runs.
    """
    check_counts(limit=limit, num_fewshot=num_fewshot)
    if apply_chat_template:
        check_chat_template(getattr(lm, "tokenizer", None))
    check_tasks(tasks, data_dir, manager)
    start = time.perf_counter()
    shared = SharedRequests(lm) if lm.world_size > 1 else lm
    template = _template_hash(lm) if apply_chat_template else None
    run = _Run(shared, limit, num_fewshot, apply_chat_template, template, seed, bootstrap_iters)
    with _quiet(is_first=lm.rank == 0):
        loaded = run.load(tasks, data_dir, manager)
        if num_fewshot:
            _report_own_fewshot(loaded, num_fewshot)
        for task_set in _task_sets(loaded):
            run.score(task_set)
    settings = {
        "tasks": tasks,
        "data_dir": None if data_dir is None else Path(data_dir).resolve(),
        "limit": limit,
        "num_fewshot": num_fewshot,
        "apply_chat_template": apply_chat_template,
        "bootstrap_iters": bootstrap_iters,
    }
    record = {
        "tasks": run.tasks,
        "settings": settings,
        "seeds": dict.fromkeys(("python", "numpy", "torch", "fewshot"), seed),
        "document_seeds": DOCUMENT_SEEDS,
        "model": _describe(lm),
        "seconds": round(time.perf_counter() - start, 3),
        **provenance(),
    }
    items = [item for task_items in run.items.values() for item in task_items]
    return BenchmarkResults(run.metrics, items, run.failures, to_json_value(record))


@dataclass
class _Run:
    """Settings of a run, and its results so far."""

    lm: LM
    limit: int | float | None
    num_fewshot: int | None
    apply_chat_template: bool
    template: str | None
    """Hash of the chat template and its arguments. None: it is not applied."""
    seed: int
    bootstrap_iters: int
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    items: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    task_files: dict[str, str] = field(default_factory=dict)
    """Versions of the files of tasks that are defined in a file."""

    def load(self, names: Sequence[str], data_dir: str | None, manager: TaskManager | None) -> list[TaskDict]:
        """Load tasks. Tasks that cannot be loaded are recorded as failures."""
        loaded = []
        for name in dict.fromkeys(names):
            version = task_file_version(name) if is_task_file(name) else None
            with Trial() as trial:
                task_dict = load_tasks(name, data_dir, manager)
            if trial.failure:
                self.failures[name] = trial.failure
            else:
                loaded.append(task_dict)
                self.task_files |= {} if version is None else dict.fromkeys(task_dict["tasks"], version)
        return loaded

    def score(self, task_set: TaskDict) -> None:
        """Run tasks together. If that fails, run each of them separately."""
        tqdm.write(f"Benchmark: {', '.join(task_set['tasks'])}", file=sys.stderr)
        started = time.perf_counter()
        with Trial() as trial:
            metrics, items, records = self._outcome(task_set, self._evaluate(task_set), started)
        if trial.failure is None:
            self.metrics |= metrics
            self.items |= items
            self.tasks |= records
            return
        if len(task_set["tasks"]) == 1:
            self.failures.update(dict.fromkeys(task_set["tasks"], trial.failure))
        else:
            log.info("%s failed together (%s). Running them one by one.", ", ".join(task_set["tasks"]), trial.failure)
            for name, task in task_set["tasks"].items():
                self.score({"tasks": {name: task}})

    def _evaluate(self, task_set: TaskDict) -> Mapping[str, Any]:
        """Return lm-eval's results.

        `simple_evaluate` gives the same results, which is tested. It also collects information about the environment,
        which takes two seconds per call.
        """
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)
        for task in task_set["tasks"].values():
            default_fewshot = task.get_config("num_fewshot")
            if default_fewshot is None or (self.num_fewshot is not None and default_fewshot != 0):
                task.set_config("num_fewshot", self.num_fewshot or 0)
            task.set_fewshot_seed(self.seed)
        results: Mapping[str, Any] = evaluate(
            lm=self.lm,
            task_dict=task_set,
            limit=self.limit,
            bootstrap_iters=self.bootstrap_iters,
            apply_chat_template=self.apply_chat_template,
            fewshot_as_multiturn=True,
        )
        return results

    def _outcome(self, task_set: TaskDict, results: Mapping[str, Any], started: float) -> tuple[dict, dict, dict]:
        """Return the scores by task or group, the items by task, and the records by task."""
        seconds = time.perf_counter() - started
        requests = sum(len(task.instances) for task in task_set["tasks"].values())
        metrics = {name: scores_of_task(task_results) for name, task_results in results["results"].items()}
        items = {name: items_of_task(name, results["samples"][name]) for name in task_set["tasks"]}
        records = {
            name: {
                "version": results["versions"][name],
                **({"task_file": self.task_files[name]} if name in self.task_files else {}),
                **({} if self.template is None else {"template": self.template}),
                "num_fewshot": results["n-shot"][name],
                "limit": self.limit,
                "items": len(items[name]),
                "documents": results["n-samples"][name]["original"],
                "higher_is_better": results["higher_is_better"][name],
                # The time of tasks that run together is divided in proportion to their requests.
                "seconds": round(seconds * len(task.instances) / requests, 3),
            }
            for name, task in task_set["tasks"].items()
        }
        return {name: task_metrics for name, task_metrics in metrics.items() if task_metrics}, items, records


def _report_own_fewshot(loaded: Sequence[TaskDict], num_fewshot: int) -> None:
    """Print the tasks whose own number of examples is 0, which lm-eval never replaces."""
    tasks = {name: task for task_dict in loaded for name, task in task_dict["tasks"].items()}
    if names := [name for name, task in tasks.items() if task.get_config("num_fewshot") == 0]:
        line = f"num_fewshot: found {num_fewshot}, not used for {', '.join(names)}: their own number is 0."
        tqdm.write(line, file=sys.stderr)


def _task_sets(loaded: Sequence[TaskDict]) -> list[TaskDict]:
    """Return sets of tasks that run together.

    A group is one set, because lm-eval computes its score from its tasks. Tasks about the same documents are one set.
    """
    task_sets: dict[Any, TaskDict] = {}
    for task_dict in loaded:
        if groups := task_dict.get("groups"):
            task_sets[tuple(groups)] = task_dict
            continue
        for name, task in task_dict["tasks"].items():
            task_sets.setdefault(_documents_key(task), {"tasks": {}})["tasks"][name] = task
    return list(task_sets.values())


def _documents_key(task: Task) -> str:
    """Return a key that is equal for tasks with the same data and the same kind of request."""
    files = (task.get_config("dataset_kwargs") or {}).get("data_files")
    return repr((task.DATASET_PATH or id(task), task.DATASET_NAME, files, task.OUTPUT_TYPE))


def _template_hash(lm: LM) -> str | None:
    tokenizer = getattr(lm, "tokenizer", None)
    if tokenizer is None:
        return None
    return short_hash(tokenizer.chat_template, getattr(lm, "chat_template_args", {}))


def _describe(lm: LM) -> dict[str, Any]:
    settings = {name: getattr(lm, name) for name in LM_SETTINGS if hasattr(lm, name)}
    parameters = getattr(getattr(lm, "model", None), "parameters", None)
    dtype = {"dtype": next(parameters()).dtype} if parameters else {}
    return {"class": type(lm).__name__, **settings, **dtype}


@contextmanager
def _quiet(is_first: bool) -> Iterator[None]:
    """Limit lm-eval's log to warnings. Processes other than the first print nothing.

    lm-eval is also kept from forking processes for its bootstrap. Forking is unsafe with CUDA and with threads.
    """
    logger = logging.getLogger("lm_eval")
    level, multiprocessing_setting = logger.level, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(max(level, logging.WARNING))
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with ExitStack() as stack:
            if not is_first:
                null_device = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(redirect_stdout(null_device))
                stack.enter_context(redirect_stderr(null_device))
            yield
    finally:
        logger.setLevel(level)
        os.environ.pop("DISABLE_MULTIPROC")
        if multiprocessing_setting is not None:
            os.environ["DISABLE_MULTIPROC"] = multiprocessing_setting
