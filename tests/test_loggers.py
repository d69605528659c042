"""Tests of what loggers receive besides metrics, read back from the files that each logger writes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from markdown_it import MarkdownIt
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lpc_lightning.loggers import log_picture, log_table, log_text, markdown_table, viewers

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
COLUMNS = ("prompt", "answer", "reward")
ROWS = (("a | b", "one\ntwo", 0.5), ("<b>x</b>", None, 2))
TEXT = "**two**\n\nlines"


def write(*loggers: Logger) -> Trainer:
    """Write one picture, text and table to loggers."""
    trainer = Trainer(logger=list(loggers), accelerator="cpu", enable_progress_bar=False)
    log_picture(trainer, "codebook/use", PIXELS)
    log_text(trainer, "samples/text", TEXT)
    log_table(trainer, "samples/table", COLUMNS, ROWS)
    return trainer


def test_tensorboard_shows_all_three(tmp_path: Path) -> None:
    trainer = write(TensorBoardLogger(tmp_path, name="", version="run"))
    (logger,) = trainer.loggers
    logger.finalize("success")
    board = EventAccumulator(str(tmp_path / "run")).Reload()
    (image,) = board.Images("codebook/use")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(image.encoded_image_string))), PIXELS)
    texts = {name: board.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode() for name in
             ("samples/text", "samples/table")}  # fmt: skip
    assert texts == {"samples/text": TEXT, "samples/table": markdown_table(COLUMNS, ROWS)}
    assert viewers(trainer)[0].endswith(f"tensorboard --logdir {tmp_path / 'run'}")


def test_csv_gets_no_pictures(tmp_path: Path) -> None:
    trainer = write(CSVLogger(tmp_path, name="", version="run"))
    assert viewers(trainer) == []
    assert not list(tmp_path.rglob("*.*"))


def test_markdown_table_shows_cells_as_they_are() -> None:
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(markdown_table(COLUMNS, ROWS))
    inline = [token for token in tokens if token.type == "inline"]
    texts: list[Any] = ["".join(_shown(child) for child in token.children or ()) for token in inline]
    assert texts == [*COLUMNS, "a | b", "one\ntwo", "0.5000", "<b>x</b>", "", "2"]


def _shown(token: Any) -> str:
    return "\n" if token.content == "<br>" else token.content
