"""Tests of what loggers receive besides metrics, read back from the files that each logger writes."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from markdown_it import MarkdownIt
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lpc_lightning.cli.run_loggers import build_logger
from lpc_lightning.loggers import log_picture, log_table, log_text, viewers

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
COLUMNS = ("prompt", "answer", "reward")
ROWS = (("a | b", "one\ntwo", 0.5), ("<b>x</b>", None, 2))
TEXT = "**two**\n\nlines"


def write(logger: Logger) -> Trainer:
    """Write settings, a metric, a picture, a text and a table to a logger."""
    trainer = Trainer(logger=logger, accelerator="cpu", enable_progress_bar=False)
    logger.log_hyperparams({"data": {"rows": 7}})
    logger.log_metrics({"val/accuracy": 0.25, "val/accuracy/books": 0.75}, 3)
    log_picture(trainer, "codebook/use", PIXELS, 0)
    log_text(trainer, "samples/text", TEXT, 0)
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
    assert texts["samples/text"] == TEXT
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(texts["samples/table"])
    cells = ["".join(child.content for child in token.children or ()) for token in tokens if token.type == "inline"]
    assert cells == [*COLUMNS, "a | b", "one two", "0.5000", "<b>x</b>", "", "2"]
    assert viewers(trainer)[0].endswith(f"tensorboard --logdir {tmp_path / 'run'}")


def test_csv_gets_no_pictures(tmp_path: Path) -> None:
    trainer = write(CSVLogger(tmp_path, name="", version="run"))
    assert viewers(trainer) == []
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.slow
def test_wandb_keeps_all_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write(build_logger(tmp_path, WandbLogger, save_dir=str(tmp_path), offline=True))
    assert wandb.run is not None
    assert wandb.run.config["data"] == {"rows": 7}
    assert wandb.run.summary["val/accuracy/books"] == 0.75
    wandb.finish()
    (folder,) = tmp_path.glob("wandb/offline-run-*/files/media")
    (picture,) = folder.glob("images/codebook/use*.png")
    assert np.array_equal(np.asarray(Image.open(picture)), PIXELS)
    (text,) = folder.glob("table/samples/text*.json")
    assert json.loads(text.read_text())["data"] == [[TEXT]]
    (table,) = folder.glob("table/samples/table*.json")
    written = json.loads(table.read_text())
    assert (written["columns"], written["data"]) == (list(COLUMNS), [list(row) for row in ROWS])


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:For backward compatibility, 'str' dtypes:DeprecationWarning"
)  # MLflow with pandas 3
def test_mlflow_keeps_all_in_files(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    artifacts = tmp_path / "mlruns"
    store = {"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db", "artifact_location": str(artifacts)}
    trainer = write(build_logger(tmp_path, MLFlowLogger, **store))
    (picture,) = artifacts.glob("*/artifacts/codebook/use_step_000000.png")
    assert np.array_equal(np.asarray(Image.open(picture)), PIXELS)
    (text,) = artifacts.glob("*/artifacts/samples/text_step_000000.md")
    assert text.read_text() == TEXT
    (table,) = artifacts.glob("*/artifacts/samples/table_step_000000.json")
    assert json.loads(table.read_text()) == {"columns": list(COLUMNS), "data": [list(row) for row in ROWS]}
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert set(database.execute("select key, value, step from metrics")) == {
            ("val/accuracy", 0.25, 3), ("val/accuracy/books", 0.75, 3),
        }  # fmt: skip
        assert list(database.execute("select key, value from params")) == [("data/rows", "7")]
    assert viewers(trainer)[0].endswith(f"mlflow ui --backend-store-uri {store['tracking_uri']}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")  # by Comet
def test_comet_keeps_all_in_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("comet_ml")
    # Without a network, Comet's look-up of the machine's address leaves a socket open.
    machine = [f"COMET_AUTO_LOG_ENV_{part}" for part in ("DETAILS", "HOST", "NETWORK")]
    for name in ("COMET_START_ONLINE", "COMET_ERROR_TRACKING_ENABLE", *machine):
        monkeypatch.setenv(name, "false")  # restored after the test
    logger: Any = build_logger(tmp_path / "version_0", CometLogger, project="p", online=False)
    write(logger)
    logger.experiment.end()
    (path,) = tmp_path.glob("comet/*.zip")
    with zipfile.ZipFile(path) as archive:
        sent = [json.loads(line) for line in archive.read("messages.json").splitlines()]
        uploads = {
            message["payload"]["upload_type"]: (message["payload"], archive.read(message["payload"]["file_path"]))
            for message in sent
            if message["type"] == "file_upload"
        }
    metrics = [message["payload"]["metric"] for message in sent if message["type"] == "metric_msg"]
    assert {(each["metricName"], each["metricValue"], each["step"]) for each in metrics} >= {
        ("val/accuracy", 0.25, 3), ("val/accuracy/books", 0.75, 3),
    }  # fmt: skip
    stated, picture = uploads["visualization"]
    assert stated["additional_params"]["figName"] == "codebook/use"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")), PIXELS)
    stated, text = uploads["text-sample"]
    assert (stated["metadata"], text.decode()) == ({"name": "samples/text"}, TEXT)
    stated, table = uploads["asset"]
    assert stated["additional_params"]["fileName"] == "samples/table_step_000000.csv"
    assert list(csv.reader(io.StringIO(table.decode()))) == [
        list(COLUMNS), *([str(cell or "") for cell in row] for row in ROWS),
    ]  # fmt: skip
