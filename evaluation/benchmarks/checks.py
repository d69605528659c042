"""Checks of benchmark settings, made before anything runs."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.benchmarks.tasks import (
    LOCAL_DATA,
    PAPER_TASKS,
    is_task_file,
    local_file_names,
    task_manager,
)

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def check_counts(limit: int | float | None, num_fewshot: int | None) -> None:
    """Check that `limit` and `num_fewshot` are in range.

    Raises:
        ConfigError: `limit` is neither a whole number above 0 nor a share below 1, or `num_fewshot` is below 0.
    """
    if limit is not None and (not 0 < limit < math.inf or (limit > 1 and limit != int(limit))):
        raise ConfigError(
            f"limit: found {limit}, expected a number of documents, at least 1, or a share of them below 1, or null "
            "for all of them."
        )
    if num_fewshot is not None and num_fewshot < 0:
        raise ConfigError(f"num_fewshot: found {num_fewshot}, expected 0 or more, or null for each task's own number.")


def check_chat_template(tokenizer: Any) -> None:
    """Check that a tokenizer can format prompts as conversations.

    Raises:
        ConfigError: The tokenizer has no chat template.
    """
    if tokenizer is not None and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "apply_chat_template: found a tokenizer with no chat template, expected one with a template. Use another "
            "model, or leave the setting out."
        )


def check_tasks(tasks: Sequence[str], data_dir: str | None = None, manager: TaskManager | None = None) -> None:
    """Check that all tasks exist, and that their local data exists.

    Args:
        tasks: Names of lm-eval tasks, groups or tags, or paths of task files (.yaml).
        data_dir: Folder of local data, with the files of `LOCAL_DATA`. None: data comes from the hub.
        manager: Task manager with the task names. None: `task_manager()`, if there are names to look up.

    Raises:
        ConfigError: There are no tasks, a task is unknown, or a file does not exist.
    """
    if not tasks:
        raise ConfigError(f"tasks: found none, expected lm-eval task names such as {', '.join(PAPER_TASKS)}.")
    names = [name for name in dict.fromkeys(tasks) if not is_task_file(name)]
    if data_dir is not None:
        _check_local(names, Path(data_dir))
    elif names:
        task_names = (manager or task_manager()).all_tasks
        for name in names:
            if name not in task_names:
                raise ConfigError(
                    f"tasks: found {name!r}, which is not an lm-eval task, expected {_similar(name, task_names)}. "
                    "Run `lm-eval ls tasks` for a list of all tasks."
                )


def _check_local(names: Sequence[str], data_dir: Path) -> None:
    for name in names:
        if name not in LOCAL_DATA:
            raise ConfigError(
                f"tasks: found {name!r} with data_dir, expected {_similar(name, list(LOCAL_DATA))}: only these tasks "
                "can read local files. Leave data_dir out to load the data from the hub, or use a task file (.yaml) "
                "that contains the path of its data."
            )
        missing = [file for file in LOCAL_DATA[name].files(data_dir).values() if not file.is_file()]
        if missing:
            raise ConfigError(
                f"data_dir: found no file {missing[0].relative_to(data_dir)} for task {name} in {data_dir.absolute()}, "
                f"expected {local_file_names(name)}: JSON lines with the columns of the hub data set "
                f"{LOCAL_DATA[name].hub}."
            )


def _similar(name: str, candidates: Sequence[str]) -> str:
    """Return the most similar names as text, or an example if none is similar."""
    matches = difflib.get_close_matches(name, candidates, n=3)
    return " or ".join(matches) or f"a task name such as {', '.join(PAPER_TASKS)}"
