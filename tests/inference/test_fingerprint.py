"""Files that are the same, and files that are not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from lpc_lightning.inference.fingerprint import files_fingerprint, model_identity, weights_fingerprint


def test_model_fingerprint_covers_its_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"12")
    (tmp_path / "runs").mkdir()
    before = weights_fingerprint(str(tmp_path))
    assert before == weights_fingerprint(str(tmp_path)) == files_fingerprint([tmp_path / "model.safetensors"], tmp_path)
    (tmp_path / "runs" / "results.json").write_text("{}")
    assert weights_fingerprint(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_bytes(b"123")
    assert weights_fingerprint(str(tmp_path)) != before
    assert weights_fingerprint("org/model") is None


@pytest.mark.parametrize("model", ["model", "best.ckpt"])
def test_model_has_one_fingerprint_by_any_path(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    for file in ("model/model.safetensors", "best.ckpt"):
        (tmp_path / file).write_bytes(b"12")
    (tmp_path / "link").symlink_to(tmp_path / model)
    monkeypatch.chdir(tmp_path / "model")
    spellings = [str(tmp_path / model), f"../{model}", str(tmp_path / "link"), f"{tmp_path}/model/../{model}"]
    assert len({weights_fingerprint(spelling) for spelling in spellings}) == 1
    assert len({str(model_identity(spelling)) for spelling in spellings}) == 1


def test_model_identity_of_other_models(tmp_path: Path) -> None:
    """A folder that was moved has its files' fingerprint. Another folder with the same files is another model."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "model.safetensors").write_bytes(b"12")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    one, two = (model_identity(str(tmp_path / name)) for name in ("one", "two"))
    assert one["weights"] == two["weights"]
    assert (one["model"], two["model"]) == (str(tmp_path / "one"), str(tmp_path / "two"))
    os.utime(tmp_path / "two" / "model.safetensors", (1, 1))
    assert model_identity(str(tmp_path / "two"))["weights"] != one["weights"]
    assert model_identity("org/model") == {"model": "org/model", "weights": None}
