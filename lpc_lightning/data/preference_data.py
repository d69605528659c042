"""DataModule for preference pairs from files or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lpc_lightning.data.datamodule import PreferenceDataModule, Stage
from lpc_lightning.data.sources.columns import Columns
from lpc_lightning.data.sources.example_source import RowSource
from lpc_lightning.paths import expand_path


class PreferenceData(PreferenceDataModule):
    """Preference pairs from a JSON lines, JSON, CSV or Parquet file, or from a Hugging Face data set.

    The rows may have any of the supported formats.
    """

    def __init__(
        self,
        path: str | dict[str, str],
        config: str | None = None,
        train_split: str = "train",
        validation_split: str | None = None,
        test_split: str | None = "test",
        validation_share: float = 0.05,
        split_column: str = "split",
        columns: Columns | None = None,
        **data: Any,
    ) -> None:
        """Check and store the settings.

        Args:
            path: A local file, a folder written by `datasets`, or the name of a data set on the hub. Alternatively a
                mapping of `train`, `validation` and `test` to one file each. Environment variables are replaced:
                `${LPC_DATA_DIR}/preferences/pairs.jsonl`.
            config: Configuration of a hub data set. null: its default.
            train_split: Split for training: a hub split, or a value of the file's split column.
            validation_split: Split for validation. null: hold out a share of the training prompts.
            test_split: Split for testing. null: no test.
            validation_share: Share of the training prompts that is held out if validation_split is null, from 0 to
                below 1. A hash of the prompt decides, so that training and validation have no prompt in common. 0: no
                validation.
            split_column: Column of a file that holds the split of each row. Rows without it belong to `train`.
            columns: Names of the columns. null: the defaults of `Columns`.
            data: Settings of `PreferenceDataModule`.

        Raises:
            ValueError: A setting is out of range.
        """
        super().__init__(**data)
        known = ("train", "validation", "test")
        if isinstance(path, dict) and not ({"train"} <= set(path) <= set(known)):
            raise ValueError(f"data.path: found files for {sorted(path)}, expected train and optionally {known[1:]}.")
        if not 0 <= validation_share < 1:
            raise ValueError(f"data.validation_share: found {validation_share}, expected a share from 0 to below 1.")
        self.path: str | dict[str, str] = (
            {stage: expand_path(each, f"data.path.{stage}") for stage, each in path.items()}
            if isinstance(path, dict)
            else expand_path(path, "data.path")
        )
        self.config, self.split_column = config, split_column
        self.columns = columns or Columns()
        self.splits = {"train": train_split, "validation": validation_split, "test": test_split}
        self.validation_share = validation_share

    def source(self, stage: Stage) -> RowSource | None:
        """Return the rows of a stage: its file, its split, or the held-out training rows. None if it has no rows."""
        if self._has_own_rows(stage):
            held_out = False if stage == "train" and self._holds_out else None
            return self._rows(stage, held_out)
        if stage == "validation" and self._holds_out:
            return self._rows("train", held_out=True)
        return None

    @property
    def _holds_out(self) -> bool:
        return self.validation_share > 0 and not self._has_own_rows("validation")

    def _has_own_rows(self, stage: Stage) -> bool:
        return stage in self.path if isinstance(self.path, dict) else self.splits[stage] is not None

    def _rows(self, stage: Stage, held_out: bool | None) -> RowSource:
        shared: dict[str, Any] = {
            "columns": self.columns,
            "held_out": held_out,
            "held_out_share": 0.0 if held_out is None else self.validation_share,
        }
        if isinstance(self.path, dict):
            return RowSource(self.path[stage], **shared)
        if Path(self.path).is_file():
            return RowSource(self.path, split=self.splits[stage], split_column=self.split_column, **shared)
        return RowSource(self.path, config=self.config, dataset_split=self.splits[stage], **shared)
