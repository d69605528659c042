"""A model and pairs for what is measured without a trainer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lpc_lightning.policy import TinyPolicy


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A model and 12 pairs."""
    monkeypatch.setenv("LPC_LIGHTNING_CACHE", str(tmp_path / "cache"))
    spec = TinyPolicy(width=16, layers=1, heads=2)
    spec.build().causal_lm.save_pretrained(tmp_path / "model")
    spec.load_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"id": str(n), "prompt": f"say {n}", "chosen": "yes " * n, "rejected": "no"} for n in range(1, 13)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "pairs.jsonl"), "--batch-size", "3"]
