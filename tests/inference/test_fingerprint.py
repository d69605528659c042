"""Files that are the same, and files that are not."""

from __future__ import annotations

from pathlib import Path

from lpc_lightning.inference.fingerprint import files_fingerprint, weights_fingerprint


def test_model_fingerprint_covers_its_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"12")
    (tmp_path / "runs").mkdir()
    before = weights_fingerprint(str(tmp_path))
    assert before == weights_fingerprint(str(tmp_path)) == files_fingerprint([tmp_path / "model.safetensors"])
    (tmp_path / "runs" / "results.json").write_text("{}")
    assert weights_fingerprint(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_bytes(b"123")
    assert weights_fingerprint(str(tmp_path)) != before
    assert weights_fingerprint("org/model") is None
