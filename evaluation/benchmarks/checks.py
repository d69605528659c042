"""Refuses what no benchmark could run with, before anything runs."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.benchmarks.tasks import LOCAL_DATA, PAPER_TASKS, is_task_file, layout, task_manager

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def check_counts(limit: int | None, num_fewshot: int | None) -> None:
    """Refuse numbers that mean nothing.

    Raises:
        ConfigError: Says which.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: found {limit}, expected at least one document, or null for all of them.")
    if num_fewshot is not None and num_fewshot < 0:
        raise ConfigError(f"num_fewshot: found {num_fewshot}, expected 0 or more, or null for each task's own number.")


def check_chat_template(tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot put prompts as conversations.

    Raises:
        ConfigError: It has no chat template.
    """
    if tokenizer is not None and not getattr(tokenizer, "chat_template", None):
        raise ConfigError("apply_chat_template: the model's tokenizer has no chat template; leave the setting out.")


def check_tasks(tasks: Sequence[str], data_dir: str | None = None, manager: TaskManager | None = None) -> None:
    """Refuse what could not run, before anything does.

    Args:
        tasks: Names of lm-eval tasks, groups or tags, or paths of task files (.yaml).
        data_dir: Folder of local data, in the layout of `LOCAL_DATA`; None: data comes from the hub.
        manager: Knows the names; None: `task_manager()`, where names have to be looked up at all.

    Raises:
        ConfigError: No tasks, an unknown one, or a file that is not there.
    """
    if not tasks:
        raise ConfigError(f"tasks: found none, expected lm-eval task names such as {', '.join(PAPER_TASKS)}.")
    names = [name for name in dict.fromkeys(tasks) if not is_task_file(name)]
    if data_dir is not None:
        _check_local(names, Path(data_dir))
    elif names:
        known = (manager or task_manager()).all_tasks
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"tasks: found {name!r}, which lm-eval does not know, expected {_near(name, known)}. "
                    "`lm-eval ls tasks` lists all of them."
                )


def _check_local(names: Sequence[str], data_dir: Path) -> None:
    for name in names:
        if name not in LOCAL_DATA:
            raise ConfigError(
                f"tasks: found {name!r} with data_dir, expected {_near(name, list(LOCAL_DATA))}: these are the tasks "
                "whose local files are known. Leave data_dir out to read its data from the hub, or give a task file "
                "(.yaml) that says where its data is."
            )
        missing = [file for file in LOCAL_DATA[name].files(data_dir).values() if not file.is_file()]
        if missing:
            raise ConfigError(
                f"data_dir: found no file {missing[0].relative_to(data_dir)} for task {name} in {data_dir.absolute()}, "
                f"expected {layout(name)}: JSON lines with the columns of the hub data set {LOCAL_DATA[name].hub}."
            )


def _near(name: str, known: Sequence[str]) -> str:
    return " or ".join(difflib.get_close_matches(name, known, n=3)) or f"a task name such as {', '.join(PAPER_TASKS)}"
