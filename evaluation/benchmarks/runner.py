"""lm-eval's tasks on a model: scores with standard errors, every item, and how it was done.

Each task runs apart, so that it can fail apart and be timed, except for those that ask about the same documents:
TruthfulQA's mc1 and mc2 put other choices to the same prompts, which a model that shares contexts reads once where it
is handed both. Should such a set fail, its tasks are run again one by one.
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
from lpc_lightning.evaluation.benchmarks.results import BenchmarkResults, plain
from lpc_lightning.evaluation.benchmarks.shared_requests import SharedRequests
from lpc_lightning.evaluation.benchmarks.tasks import PAPER_TASKS, load_tasks
from lpc_lightning.evaluation.benchmarks.trial import Trial
from lpc_lightning.evaluation.provenance import provenance

log = logging.getLogger(__name__)

LM_SETTINGS = ("prior_mode", "share_contexts", "batch_size", "max_length", "mixed_precision_dtype", "device")
"""Attributes of a model that go into the record, where it has them."""


def run_benchmarks(
    lm: LM,
    tasks: Sequence[str] = PAPER_TASKS,
    *,
    data_dir: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    seed: int = 1234,
    bootstrap_iters: int = 1000,
    manager: TaskManager | None = None,
) -> BenchmarkResults:
    """Score a model on tasks. A task that raises is reported among the failures, and the others go on.

    Under torch.distributed all processes have to call it. A model that knows of them (`world_size`) has its requests
    shared among them (see `SharedRequests`); all get all results, and agree on what failed.

    Args:
        lm: The model.
        tasks: Names of lm-eval tasks, groups or tags, or paths of task files (.yaml).
        data_dir: Folder of local data, in the layout of `benchmarks.LOCAL_DATA`. None: data comes from the hub.
        limit: Documents of each task, from its start. None: all of them.
        num_fewshot: Examples in front of each question. None: the task's own number, which also stays where it is 0.
        apply_chat_template: Put prompts as conversations, in the chat template of the model's tokenizer.
        seed: Seed of the few-shot examples and of everything else that is drawn. 1234 is lm-eval's own.
        bootstrap_iters: Draws for standard errors that have no closed form. 0: no standard errors at all.
        manager: Knows the tasks. None: the one of this process.

    Raises:
        ConfigError: Settings or files that no task could run with; told before anything runs.
    """
    check_counts(limit=limit, num_fewshot=num_fewshot)
    if apply_chat_template:
        check_chat_template(getattr(lm, "tokenizer", None))
    check_tasks(tasks, data_dir, manager)
    start = time.perf_counter()
    shared = SharedRequests(lm) if lm.world_size > 1 else lm
    run = _Run(shared, limit, num_fewshot, apply_chat_template, seed, bootstrap_iters)
    with _quiet(lm.rank == 0):
        for unit in _units(run.load(tasks, data_dir, manager)):
            run.score(unit)
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
        "model": _describe(lm),
        "seconds": round(time.perf_counter() - start, 3),
        **provenance(),
    }
    items = [item for found in run.items.values() for item in found]
    return BenchmarkResults(run.metrics, items, run.failures, plain(record))


@dataclass
class _Run:
    """What was asked for, and what has been found so far."""

    lm: LM
    limit: int | None
    num_fewshot: int | None
    apply_chat_template: bool
    seed: int
    bootstrap_iters: int
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    items: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def load(self, names: Sequence[str], data_dir: str | None, manager: TaskManager | None) -> list[TaskDict]:
        """What can be loaded; the rest is among the failures."""
        loaded = []
        for name in dict.fromkeys(names):
            with Trial() as trial:
                found = load_tasks(name, data_dir, manager)
            if trial.failure:
                self.failures[name] = trial.failure
            else:
                loaded.append(found)
        return loaded

    def score(self, unit: TaskDict) -> None:
        """Run tasks together; where that fails, each of them alone."""
        tqdm.write(f"Benchmark: {', '.join(unit['tasks'])}", file=sys.stderr)
        started = time.perf_counter()
        with Trial() as trial:
            metrics, items, records = self._outcome(unit, self._evaluate(unit), started)
        if trial.failure is None:
            self.metrics |= metrics
            self.items |= items
            self.tasks |= records
            return
        if len(unit["tasks"]) == 1:
            self.failures.update(dict.fromkeys(unit["tasks"], trial.failure))
        else:
            log.info("%s failed together (%s) and run one by one.", ", ".join(unit["tasks"]), trial.failure)
            for name, task in unit["tasks"].items():
                self.score({"tasks": {name: task}})

    def _evaluate(self, unit: TaskDict) -> Mapping[str, Any]:
        """lm-eval's results.

        `simple_evaluate` does the same but for its look at the whole environment, two seconds a call; the tests hold
        this to its results.
        """
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)
        for task in unit["tasks"].values():
            own = task.get_config("num_fewshot")
            if own is None or (self.num_fewshot is not None and own != 0):
                task.set_config("num_fewshot", self.num_fewshot or 0)
            task.set_fewshot_seed(self.seed)
        results: Mapping[str, Any] = evaluate(
            lm=self.lm,
            task_dict=unit,
            limit=self.limit,
            bootstrap_iters=self.bootstrap_iters,
            apply_chat_template=self.apply_chat_template,
            fewshot_as_multiturn=True,
        )
        return results

    def _outcome(self, unit: TaskDict, results: Mapping[str, Any], started: float) -> tuple[dict, dict, dict]:
        """Scores by task or group; items and what is recorded by task."""
        seconds = time.perf_counter() - started
        requests = sum(len(task.instances) for task in unit["tasks"].values())
        metrics = {name: scores_of_task(found) for name, found in results["results"].items()}
        items = {name: items_of_task(name, results["samples"][name]) for name in unit["tasks"]}
        records = {
            name: {
                "version": results["versions"][name],
                "num_fewshot": results["n-shot"][name],
                "limit": self.limit,
                "items": len(items[name]),
                "documents": results["n-samples"][name]["original"],
                "higher_is_better": results["higher_is_better"][name],
                # Tasks that run together share the time by their requests.
                "seconds": round(seconds * len(task.instances) / requests, 3),
            }
            for name, task in unit["tasks"].items()
        }
        return {name: found for name, found in metrics.items() if found}, items, records


def _units(loaded: Sequence[TaskDict]) -> list[TaskDict]:
    """What runs together: groups, whose scores lm-eval makes of their tasks', and tasks about the same documents."""
    units: dict[Any, TaskDict] = {}
    for found in loaded:
        if groups := found.get("groups"):
            units[tuple(groups)] = found
            continue
        for name, task in found["tasks"].items():
            units.setdefault(_documents(task), {"tasks": {}})["tasks"][name] = task
    return list(units.values())


def _documents(task: Task) -> str:
    """Equal for tasks that read the same data and put the same kind of request."""
    files = (task.get_config("dataset_kwargs") or {}).get("data_files")
    return repr((task.DATASET_PATH or id(task), task.DATASET_NAME, files, task.OUTPUT_TYPE))


def _describe(lm: LM) -> dict[str, Any]:
    settings = {name: getattr(lm, name) for name in LM_SETTINGS if hasattr(lm, name)}
    parameters = getattr(getattr(lm, "model", None), "parameters", None)
    dtype = {"dtype": next(parameters()).dtype} if parameters else {}
    return {"class": type(lm).__name__, **settings, **dtype}


@contextmanager
def _quiet(first: bool) -> Iterator[None]:
    """lm-eval says warnings only, and other processes than the first nothing at all.

    It also forks no processes for its bootstrap, which CUDA and threads would not survive.
    """
    logger = logging.getLogger("lm_eval")
    level, single = logger.level, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(max(level, logging.WARNING))
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with ExitStack() as stack:
            if not first:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
            yield
    finally:
        logger.setLevel(level)
        os.environ.pop("DISABLE_MULTIPROC")
        if single is not None:
            os.environ["DISABLE_MULTIPROC"] = single
