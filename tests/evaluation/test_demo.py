"""The command `demo`, with fits of a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import yaml

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation import demo as module
from lpc_lightning.evaluation.demo import STEPS, demo

SMALL = ["--data.train_pairs=24", "--data.validation_pairs=16", "--data.test_pairs=8", "--trainer.max_steps=2"]


@pytest.fixture
def small_grid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The shipped grid with few pairs and two steps."""
    write = module._grid

    def write_small(folder: Path) -> Path:
        path = write(folder)
        grid: dict[str, Any] = yaml.safe_load(path.read_text())
        grid["base"] += [*SMALL, f"--data.cache_dir={tmp_path / 'cache'}", "--trainer.val_check_interval=1.0"]
        grid["axes"]["latent"]["marginal"] += ["--latent.num_codes=2", "--latent.warm_start_pairs=16"]
        path.write_text(yaml.safe_dump(grid))
        return path

    monkeypatch.setattr(module, "_grid", write_small)
    monkeypatch.setattr(module, "INTERVAL", 0.2)


@pytest.mark.slow
def test_demo_writes_a_table_and_a_picture(
    small_grid: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # no path may depend on the checkout
    demo("out")
    printed = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")][2:]
    assert [row[0].strip() for row in rows] == list(module.ARMS.values())
    assert all(0 <= float(row[column]) <= 1 for row in rows for column in (1, 2))
    assert not rows[0][3].strip()
    assert 0 <= float(rows[1][3]) <= 1
    assert "DPO: starting" in printed
    assert "Not shown" in printed
    assert (tmp_path / "out" / "demo.md").read_text().splitlines()[0] in printed
    picture = matplotlib.image.imread(tmp_path / "out" / "demo.png")
    assert picture.std() > 0.05


def test_demo_steps_are_those_of_its_grid() -> None:
    grid = yaml.safe_load((module.CONFIGS / "ablation" / "demo.yaml").read_text())
    (pairs,) = (int(each.rpartition("=")[2]) for each in grid["base"] if each.startswith("--data.train_pairs="))
    data = yaml.safe_load((module.CONFIGS / "data" / "synthetic.yaml").read_text())
    assert pairs // data["init_args"]["batch_size"] == STEPS


def test_demo_names_a_failed_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ablate", lambda *_, **__: False)
    with pytest.raises(ConfigError, match=r"demo: found a failed fit in .*fits.*See its log\.txt"):
        demo(str(tmp_path))
