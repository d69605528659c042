"""Rows of the three stages from files or the hub, and their DataModule."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any, TypeAlias

from lpc_lightning.data.datamodule import PreferenceDataModule, Stage
from lpc_lightning.data.sources.columns import Columns
from lpc_lightning.data.sources.example_source import RowSource
from lpc_lightning.data.sources.locations import open_location
from lpc_lightning.data.sources.rows import DataError
from lpc_lightning.data.sources.splits import (
    RANKS,
    SPLIT_COLUMN,
    VALIDATION_NAMES,
    HoldOut,
    check_split_column,
    find_split,
    split_names,
)
from lpc_lightning.errors import ConfigError
from lpc_lightning.files.path_variables import expand_path

Place: TypeAlias = str | tuple[str, ...]
"""A file, a pattern, a folder or a hub name, or a list of files and patterns."""

TEST_SPLIT = "test"
"""Default split for testing."""


class StageRows:
    """Rows for training, validation and testing, from files or a hub data set.

    It is a base class of classes with further settings, which are passed on.
    """

    _group = "data"
    """Settings group that errors name."""

    def __init__(
        self,
        path: str | list[str] | dict[str, str | list[str]],
        config: str | None = None,
        train_split: str = "train",
        validation_split: str | None = None,
        test_split: str | None = TEST_SPLIT,
        validation_share: float = 0.05,
        validation_by: HoldOut = "prompt",
        split_column: str = SPLIT_COLUMN,
        columns: Columns | None = None,
        **others: Any,
    ) -> None:
        """Check and store the settings.

        Args:
            path: A local file, a pattern such as `data/*.jsonl`, a list of files and patterns, a folder of files, a
                folder written by `datasets`, or the name of a data set on the hub. Alternatively a mapping of `train`,
                `validation` and `test` to one of these each. A stage then reads its split of its own path, or the only
                split that the path has. Environment variables are replaced: `${LPC_DATA_DIR}/preferences/pairs.jsonl`.
            config: Configuration of a hub data set, or of a folder in its layout. null: its default. Other paths have
                none, and it is refused.
            train_split: Split for training: a split of the folder, JSON file or hub data set, or a value of the split
                column.
            validation_split: Split for validation. null: `validation`, `valid`, `val` or `dev`, if the file, folder
                or hub data set has it, otherwise hold out a share of the training prompts. If `path` is a mapping, it
                must have `validation`.
            test_split: Split for testing. null: no test, and none either if it is the default and the folder, JSON file
                or hub data set has other splits only. If `path` is a mapping, null is the same as `test`, and another
                name needs an entry `test` there.
            validation_share: Share of the training prompts that is held out if there is no validation split, from 0 to
                below 1. A hash of the prompt decides, so that training and validation have no prompt in common. At
                least one prompt is held out if there are two or more. 0: no prompt is held out.
            validation_by: `prompt`, or `pair` to hold out a share of the training pairs, for data with one prompt or
                few. Other pairs of the same prompt, and with the same answers, then stay in training.
            split_column: Column that holds the split of each row, if files have no splits of their own. Rows without it
                belong to `train`. Another name than the default one is refused if no row has a value there.
            columns: Names of the columns, and how their cells are read. null: the defaults of `Columns`.
            others: Settings of the next base class.

        Raises:
            ValueError: A setting is out of range, `path` is something else, or a split is set for a stage without a
                path.
        """
        super().__init__(**others)
        self.splits = {"train": train_split, "validation": validation_split, "test": test_split}
        if isinstance(path, dict):
            self._check_mapping(path)
        if not 0 <= validation_share < 1:
            raise ValueError(
                f"{self._group}.validation_share: found {validation_share}, expected a share from 0 to below 1."
            )
        if validation_by not in RANKS:
            raise ValueError(f"{self._group}.validation_by: found {validation_by!r}, expected {' or '.join(RANKS)}.")
        self.path: Place | dict[str, Place] = (
            {stage: _expanded(each, f"{self._group}.path.{stage}") for stage, each in path.items()}
            if isinstance(path, dict)
            else _expanded(path, f"{self._group}.path")
        )
        self.config, self.split_column = config, split_column
        self.columns = columns or Columns()
        self.validation_share, self.validation_by = validation_share, validation_by
        self._mapped_splits: dict[Stage, str | None] = {}
        self._split_column_checked = False

    def place(self, stage: Stage) -> Place:
        """Return the path that a stage reads: its own, or that of training, from which its rows are held out."""
        return self.path.get(stage, self.path["train"]) if isinstance(self.path, dict) else self.path

    def read_from(self, folder: str) -> None:
        """Make relative paths those of another working directory if there are files. Nothing has been read yet."""
        self.path = (
            {stage: _moved(place, folder) for stage, place in self.path.items()}
            if isinstance(self.path, dict)
            else _moved(self.path, folder)
        )

    def _check_mapping(self, paths: Mapping[str, Any]) -> None:
        known = ("train", "validation", "test")
        if not {"train"} <= set(paths) <= set(known):
            raise ValueError(
                f"{self._group}.path: found files for {sorted(paths)}, expected train and optionally {known[1:]}."
            )
        for stage, default in (("validation", None), ("test", TEST_SPLIT)):
            if stage not in paths and (split := self.splits[stage]) not in (None, default):
                raise ValueError(
                    f"{self._group}.{stage}_split: found {split!r} beside {self._group}.path for "
                    f"{' and '.join(paths)} only, expected a path for {stage}, too: each stage reads its split of its "
                    f"own path. Add {stage} to {self._group}.path, which may be the path of train again, or leave "
                    f"{self._group}.{stage}_split out."
                )

    def source(self, stage: Stage) -> RowSource | None:
        """Return the rows of a stage: its file, its split, or the held-out training rows. None if it has no rows.

        Raises:
            DataError: No row has a value in the split column, no row has the split that `test_split` names, or a
                location cannot be read.
        """
        self._check_split_column()
        if self._has_own_rows(stage):
            held_out = False if stage == "train" and self._holds_out else None
            return self._rows(stage, held_out)
        if stage == "validation" and self._holds_out:
            return self._rows("train", held_out=True)
        return None

    @property
    def holds_out_pairs(self) -> bool:
        """True if training pairs are held out for validation, and other pairs of their prompts stay in training."""
        return self._holds_out and self.validation_by == "pair"

    @property
    def _holds_out(self) -> bool:
        return self.validation_share > 0 and not self._has_own_rows("validation")

    def _has_own_rows(self, stage: Stage) -> bool:
        return stage in self.path if isinstance(self.path, dict) else self._split(stage) is not None

    def _split(self, stage: Stage) -> str | None:
        """Return the split of a stage, or None if it has none."""
        if isinstance(self.path, dict):
            return self._mapped_split(stage, self.path[stage])
        if stage == "validation" and self.splits["validation"] is None:
            return self._unnamed_validation_split
        return self._test_split if stage == "test" else self.splits[stage]

    def _check_split_column(self) -> None:
        """Check once that rows have the split column, if its name is set."""
        if not self._split_column_checked:
            paths = self.path.values() if isinstance(self.path, dict) else [self.path]
            locations = (open_location(path, self.config) for path in paths)
            check_split_column(locations, self.split_column, f"{self._group}.split_column")
            self._split_column_checked = True

    @cached_property
    def _unnamed_validation_split(self) -> str | None:
        """Validation split that the data has, although no setting names it. Reads the split column of a file once."""
        assert not isinstance(self.path, dict)
        names = split_names(open_location(self.path, self.config), self.split_column)
        used = (self.splits["train"], self.splits["test"])
        return next((name for name in VALIDATION_NAMES if name in names and name not in used), None)

    @cached_property
    def _test_split(self) -> str | None:
        """Split for testing. None if no setting names one and the data has other splits of its own."""
        assert not isinstance(self.path, dict)
        split = self.splits["test"]
        if split is None:
            return None
        location = open_location(self.path, self.config)
        if split == TEST_SPLIT:
            return None if location.has_splits and split not in location.own_splits() else split
        if not location.has_splits and split not in {*(names := split_names(location, self.split_column)), "train"}:
            raise DataError(
                f"{self._group}.test_split: found {split!r}, expected a value of the column {self.split_column!r}, "
                f"which has {', '.join(sorted(names)) or 'none'}. Correct it, or set it to null for no test."
            )
        return split

    def _mapped_split(self, stage: Stage, path: Place) -> str | None:
        """Return the split that a stage reads of the path that a mapping gives it."""
        if stage not in self._mapped_splits:
            named = self.splits[stage]
            wanted = (VALIDATION_NAMES if stage == "validation" else (stage,)) if named is None else (named,)
            location, setting = open_location(path, self.config), f"{self._group}.{stage}_split"
            self._mapped_splits[stage] = find_split(location, wanted, self.split_column, setting)
        return self._mapped_splits[stage]

    def _rows(self, stage: Stage, held_out: bool | None) -> RowSource:
        return RowSource(
            self.path[stage] if isinstance(self.path, dict) else self.path,
            config=self.config,
            columns=self.columns,
            split=self._split(stage),
            split_column=self.split_column,
            held_out=held_out,
            held_out_by=self.validation_by,
            held_out_share=0.0 if held_out is None else self.validation_share,
        )


class PreferenceData(StageRows, PreferenceDataModule):
    """Preference pairs from JSON lines, JSON, CSV or Parquet files, or from a Hugging Face data set.

    The rows may have any of the supported formats.
    """

    def _in_training(self, stage: Stage) -> int:
        return 0 if self.holds_out_pairs else super()._in_training(stage)


def _expanded(path: str | list[str], setting: str) -> Place:
    if isinstance(path, list | tuple):
        return tuple(expand_path(_text(each, setting), setting) for each in path)
    return expand_path(_text(path, setting), setting)


def _moved(place: Place, folder: str) -> Place:
    """Return files and patterns of a folder, those that exist there."""
    if isinstance(place, tuple):
        return tuple(str(_moved(each, folder)) for each in place)
    moved = os.path.join(folder, os.path.expanduser(place))
    return moved if os.path.exists(moved) or (glob.has_magic(place) and glob.glob(moved, recursive=True)) else place


def _text(path: Any, setting: str) -> str:
    """Return a path as text. Python code may give a `pathlib.Path`, which the parser would also make of a list."""
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(
            f"{setting}: found a {type(path).__name__}, expected a path, a pattern or a hub name. Write a data set in "
            "memory to a folder first: `dataset.save_to_disk(FOLDER)`."
        )
    return os.fspath(path)
