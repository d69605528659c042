"""Files with the results of `predict`."""

from __future__ import annotations

import json
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lpc_lightning.loggers import run_folder


class WritePredictions(Callback):
    """Callback that writes `predictions_RANK.jsonl` to the run folder: rewards, margin and prior, one line per pair."""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the folder, and remove the files of an earlier run on more devices. Other files stay."""
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        rank = trainer.world_size
        while trainer.is_global_zero and (path := folder / f"predictions_{rank}.jsonl").exists():
            path.unlink()
            rank += 1
        self._path = folder / f"predictions_{trainer.global_rank}.jsonl"

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the batch. The first batch replaces an existing file."""
        columns = {name: values.tolist() for name, values in outputs.items() if name != "ids" and values is not None}
        with self._path.open("a" if batch_idx else "w") as file:
            for row, name in enumerate(outputs["ids"]):
                pair = {"id": name, **{column: values[row] for column, values in columns.items()}}
                file.write(json.dumps(pair) + "\n")
