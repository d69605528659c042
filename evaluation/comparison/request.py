"""Settings of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from lpc_lightning.data.sources.columns import Columns
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.accuracy.scored_pairs import TASK as PREFERENCES
from lpc_lightning.evaluation.accuracy.scored_pairs import PairsFile, check_unused
from lpc_lightning.evaluation.benchmarks.checks import check_counts, check_tasks
from lpc_lightning.evaluation.comparison.stored import local_data
from lpc_lightning.files.output_paths import number_repeated
from lpc_lightning.inference.fingerprint import model_identity
from lpc_lightning.latent import PriorMode

NOT_IN_KEY = {"in_key": False}
"""Mark of a setting that `EvalRequest.key` leaves out: it changes no score, each task's record has its effect, or the
key has a fingerprint of its files."""


@dataclass(frozen=True)
class EvalRequest:
    """Settings of an evaluation, shared by all models. See `evaluate` for their meaning."""

    tasks: tuple[str, ...] = field(metadata=NOT_IN_KEY)
    data_dir: str | None = field(default=None, metadata=NOT_IN_KEY)
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
            ConfigError: A setting is invalid or has no effect, a task is unknown, or a benchmark's file does not exist.
            DataError: The file of preference pairs does not exist, or has no rows.
        """
        check_counts(self.limit, self.num_fewshot)
        if self.tasks:
            check_tasks(self.tasks, self.data_dir)
        elif not self.preferences:
            raise ConfigError("tasks: found none, expected a task, or a file of preference pairs (--preferences).")
        if not self.preferences:
            settings = {name: getattr(self, name) for name in ("columns", "bad_rows", "max_length")}
            check_unused(settings, "Benchmarks do not use it.")
        elif self.prior_mode is not None:
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

        Stored results with an equal key can be used again, unless the file of a task has changed (see `missing_tasks`),
        or they are of other preference pairs (see `claim_folder`).
        """
        settings = {
            entry.name: getattr(self, entry.name) for entry in fields(self) if entry.metadata.get("in_key", True)
        }
        return {**settings, **model_identity(model), "data": local_data(self.data_dir)}


def _task_names(paths: Sequence[str]) -> list[str]:
    """Return the names of files of pairs in results: that of a single file, else one with the name of each file."""
    if len(paths) < 2:
        return [PREFERENCES] * len(paths)
    stems = [Path(path).name.split(".")[0] for path in paths]
    return [f"{PREFERENCES}-{stem}" for stem in number_repeated(stems)]
