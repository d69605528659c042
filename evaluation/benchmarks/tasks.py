"""Loading of lm-eval tasks by name, with data from the hub or from local files."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import huggingface_hub
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng

from lpc_lightning.data.sources.progress_bars import hidden_progress_bars
from lpc_lightning.evaluation.named_files import file_digests, names_and_digests
from lpc_lightning.seeding import seed_draws

# lm-eval and datasets take a second each to import. Importing the callbacks must not import them.
if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

PAPER_TASKS = ("arc_easy", "arc_challenge", "gsm8k", "truthfulqa_mc1", "truthfulqa_mc2")
"""The benchmarks of the paper."""
DOCUMENT_SEEDS = {"python": 0, "numpy": 1234, "torch": 1234}
"""lm-eval's default seeds. Some tasks, such as GPQA, shuffle the choices of their documents while they are loaded."""


class LocalData(NamedTuple):
    """Files of a task's data set: `FOLDER/SPLIT.jsonl`, one document per line, in the schema of the hub data set."""

    folder: str
    splits: tuple[str, ...]
    hub: str
    """Name of the hub data set, and its configuration."""

    def files(self, data_dir: Path) -> dict[str, Path]:
        """Return the file of each split."""
        return {split: data_dir / self.folder / f"{split}.jsonl" for split in self.splits}


ARC_EASY = LocalData("arc/ARC-Easy", ("train", "validation", "test"), "allenai/ai2_arc, ARC-Easy")
ARC_CHALLENGE = LocalData("arc/ARC-Challenge", ("train", "validation", "test"), "allenai/ai2_arc, ARC-Challenge")
GSM8K = LocalData("gsm8k", ("train", "test"), "openai/gsm8k, main")
TRUTHFULQA = LocalData("truthfulqa/multiple_choice", ("validation",), "truthfulqa/truthful_qa, multiple_choice")
TRUTHFULQA_TEXT = LocalData("truthfulqa/generation", ("validation",), "truthfulqa/truthful_qa, generation")

LOCAL_DATA = {
    "arc_easy": ARC_EASY,
    "arc_challenge": ARC_CHALLENGE,
    "arc_challenge_chat": ARC_CHALLENGE,
    "gsm8k": GSM8K,
    "gsm8k_cot": GSM8K,
    "truthfulqa_mc1": TRUTHFULQA,
    "truthfulqa_mc2": TRUTHFULQA,
    "truthfulqa_gen": TRUTHFULQA_TEXT,
}
"""Tasks that can read local files. To support another task, add an entry, and its folder below."""
FOLDERS = ("arc", "gsm8k", "truthfulqa")
"""Folders of lm-eval that define these tasks."""


def task_manager(index: bool = True) -> TaskManager:
    """Return the process's task manager. Building the index of lm-eval's tasks takes seconds, so it is built once.

    Args:
        index: Whether to build the index. A task file can be loaded without it.
    """
    return _build_manager(index)


@functools.cache
def _build_manager(index: bool) -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=index)


@functools.cache
def local_task_manager() -> TaskManager:
    """Return the process's manager of the tasks in `LOCAL_DATA`. Its index takes milliseconds to build."""
    from lm_eval import tasks

    folders = [Path(tasks.__file__).with_name(name) for name in FOLDERS]
    return tasks.TaskManager(include_path=folders, include_defaults=False)


def is_task_file(name: str) -> bool:
    """Return True if a task's name is the path of a task file."""
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def task_file_version(name: str) -> str:
    """Return a text that changes with a task file, and with the templates, functions and data files that it names."""
    return hashlib.sha256(json.dumps(names_and_digests(file_digests([Path(name).resolve()]))).encode()).hexdigest()[:16]


def load_tasks(name: str, data_dir: str | None = None, manager: TaskManager | None = None) -> TaskDict:
    """Load the tasks of a name, with their data.

    With `data_dir`, the task is lm-eval's own: prompts, few-shot examples, metrics and version are unchanged. Only the
    data comes from another place, and the network is not used.

    Random draws of a task have the seeds `DOCUMENT_SEEDS`, so that its documents are the same in every run. `datasets`
    stores these documents: they are other ones if lm-eval has stored them before under other seeds. The caller's random
    state does not change.

    Args:
        name: Name of an lm-eval task, group or tag, or path of a task file (.yaml). Call `check_tasks` before.
        data_dir: Folder of local data, with the files of `LOCAL_DATA`. None: data comes from the hub.
        manager: Task manager with the task names. None: `local_task_manager()` with `data_dir`, else `task_manager()`,
            each with the index if needed.

    Returns:
        lm-eval's tasks and groups, each by name.

    Raises:
        DataUnreachableError: The data is on the hub, and the hub cannot be reached.
    """
    if manager is None:
        is_local = data_dir is not None and not is_task_file(name)
        manager = local_task_manager() if is_local else task_manager(index=not is_task_file(name))
    with _document_seeds():
        return _load(name, data_dir, manager)


@contextmanager
def _document_seeds() -> Iterator[None]:
    with isolate_rng(include_cuda=False):
        random.seed(DOCUMENT_SEEDS["python"])
        np.random.seed(DOCUMENT_SEEDS["numpy"])
        seed_draws(DOCUMENT_SEEDS["torch"], torch.device("cpu"))
        yield


def _load(name: str, data_dir: str | None, manager: TaskManager) -> TaskDict:
    if data_dir is None:
        return _load_from_hub(name, manager)
    if is_task_file(name):
        with no_network():
            return manager.load([name])
    files = {split: str(file.absolute()) for split, file in LOCAL_DATA[name].files(Path(data_dir)).items()}
    # `datasets` would reuse cached data of a changed file with the same path and time. An empty cache prevents this.
    with tempfile.TemporaryDirectory() as cache, no_network(), hidden_progress_bars():
        options = {"data_files": files, "cache_dir": cache, "keep_in_memory": True}
        data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": options}
        # Inside a group, lm-eval merges these settings into its own task. Outside, they would define a new task.
        loaded = manager.load([{"group": "local", "task": [{"task": name, **data}]}])
    return {"tasks": loaded["tasks"], "groups": {}}


def local_file_names(name: str) -> str:
    """Return a task's files, relative to the data folder, separated by commas."""
    return ", ".join(map(str, LOCAL_DATA[name].files(Path()).values()))


class DataUnreachableError(OSError):
    """Raised when data is on the hub only, and the hub cannot be reached."""


def _load_from_hub(name: str, manager: TaskManager) -> TaskDict:
    with nullcontext() if _is_hub_reachable() else no_network():
        try:
            return manager.load([name])
        except ConnectionError as error:
            is_local = name in LOCAL_DATA
            hub_name = f" ({LOCAL_DATA[name].hub})" if is_local else ""
            solution = (
                f"Use --data_dir FOLDER, where FOLDER contains {local_file_names(name)}."
                if is_local
                else "Copy the Hugging Face cache (HF_HOME) of a machine that has loaded the data set."
            )
            raise DataUnreachableError(
                f"tasks: found no data of {name}{hub_name} on this machine and no connection to the hub ({error}), "
                f"expected one of the two. {solution}"
            ) from error


def _is_hub_reachable() -> bool:
    """Return True if the hub responds. Without this check, `datasets` would retry for 30 s before using its cache."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # the exception class depends on the HTTP client of huggingface_hub
        return False
    return True


@contextmanager
def no_network() -> Iterator[None]:
    """Make requests to the hub fail at once, like `HF_HUB_OFFLINE=1` does. Files and caches can be read."""
    import datasets

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value
