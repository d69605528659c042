"""Files with the results of `predict`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class WritePredictions(Callback):
    """Callback that writes `predictions_RANK.jsonl` to the run folder: rewards, margin and prior, one line per pair."""

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
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        columns = {name: values.tolist() for name, values in outputs.items() if name != "ids" and values is not None}
        with (folder / f"predictions_{trainer.global_rank}.jsonl").open("a" if batch_idx else "w") as file:
            for row, name in enumerate(outputs["ids"]):
                pair = {"id": name, **{column: values[row] for column, values in columns.items()}}
                file.write(json.dumps(pair) + "\n")
