"""Names of lm-eval tasks to tasks that can run, their data from the hub or from local files."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import huggingface_hub

# lm-eval and datasets take a second each to import: who only imports the callbacks should not pay for them.
if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

PAPER_TASKS = ("arc_easy", "arc_challenge", "gsm8k", "truthfulqa_mc1", "truthfulqa_mc2")
"""The benchmarks of the paper."""


class LocalData(NamedTuple):
    """Files that hold a task's data set: `FOLDER/SPLIT.jsonl`, a document a line in the hub data set's own schema."""

    folder: str
    splits: tuple[str, ...]
    hub: str
    """The hub data set, and its configuration."""

    def files(self, data_dir: Path) -> dict[str, Path]:
        """The file of each split."""
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
"""Tasks that run from local files. A line here is all that another one needs."""


@functools.cache
def task_manager(index: bool = True) -> TaskManager:
    """What loads lm-eval's tasks. Its index of them takes seconds to build, so that a process builds it once.

    Args:
        index: Whether lm-eval's own tasks are known; a task file can do without.
    """
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=index)


def is_task_file(name: str) -> bool:
    """Whether a task's name is the path of a file that defines it."""
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def load_tasks(name: str, data_dir: str | None = None, manager: TaskManager | None = None) -> TaskDict:
    """Load what a name stands for, with its data.

    With `data_dir` the task is lm-eval's own in prompts, few-shot examples, metrics and version; only its data is
    other, and the network is not touched.

    Args:
        name: Name of an lm-eval task, group or tag, or path of a task file (.yaml); `check_tasks` should have seen it.
        data_dir: Folder of local data, in the layout of `LOCAL_DATA`; None: data comes from the hub.
        manager: Knows the names; None: `task_manager()`, with the index if it is needed.

    Returns:
        lm-eval's tasks and groups, each by name.

    Raises:
        DataUnreachableError: The data is on the hub, and the hub is out of reach.
    """
    manager = manager or task_manager(index=not is_task_file(name))
    if data_dir is None:
        return _load_from_hub(name, manager)
    if is_task_file(name):
        with no_network():
            return manager.load([name])
    files = {split: str(file.absolute()) for split, file in LOCAL_DATA[name].files(Path(data_dir)).items()}
    # The cache of `datasets` takes a file for unchanged that has the same path and time; a cache of our own is empty.
    with tempfile.TemporaryDirectory() as cache, no_network(), _no_bars():
        options = {"data_files": files, "cache_dir": cache, "keep_in_memory": True}
        data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": options}
        # Within a group, lm-eval merges what is given into the task that it knows; alone, it would be a new task.
        loaded = manager.load([{"group": "local", "task": [{"task": name, **data}]}])
    return {"tasks": loaded["tasks"], "groups": {}}


def layout(name: str) -> str:
    """The files of a task, within a data folder."""
    return ", ".join(map(str, LOCAL_DATA[name].files(Path()).values()))


class DataUnreachableError(OSError):
    """Data that is on the hub only, on a machine that does not reach it."""


def _load_from_hub(name: str, manager: TaskManager) -> TaskDict:
    with nullcontext() if _hub_answers() else no_network():
        try:
            return manager.load([name])
        except ConnectionError as error:
            local = (
                f"take --data-dir FOLDER, where FOLDER holds {layout(name)}"
                if name in LOCAL_DATA
                else "copy the Hugging Face cache (HF_HOME) of a machine that has loaded it"
            )
            known = f" ({LOCAL_DATA[name].hub})" if name in LOCAL_DATA else ""
            raise DataUnreachableError(
                f"the data set of {name}{known} is not on this machine and the hub is out of reach ({error}): {local}."
            ) from error


def _hub_answers() -> bool:
    """Asked once for each task: `datasets` itself would try for half a minute before it looks into its cache."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # of whatever HTTP client huggingface_hub has chosen
        return False
    return True


@contextmanager
def no_network() -> Iterator[None]:
    """What asks the hub fails at once; files and caches work. As `HF_HUB_OFFLINE=1` before the start."""
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


@contextmanager
def _no_bars() -> Iterator[None]:
    """Local files are read in no time: three progress bars a task would only push the others off the screen."""
    import datasets

    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()
