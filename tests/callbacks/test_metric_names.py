"""Test that docs/metrics.md names every metric that a run logs."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor

from lpc_lightning.callbacks import (
    AnnotatorAdaptation,
    CodebookMonitor,
    LabelFlipNoise,
    PreferenceAccuracy,
    ResourceMonitor,
)
from lpc_lightning.latent import GumbelSpace, LatentSpace, MarginalSpace
from tests.fixtures.commands import logged

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
WORDS = r"[A-Z_]{2,}|\bN\b|\.\.\."
"""What stands for any text in a name: words in capitals, and dots."""


def patterns() -> list[re.Pattern[str]]:
    """Return the names in the first column of the page's tables as patterns, with any stage and group around them."""
    cells = re.findall(r"^\| (`.*?`) \|", PAGE.read_text(), re.MULTILINE)
    names = [name for cell in cells for code in re.findall(r"`([^`]+)`", cell) for name in alternatives(code)]
    texts = [".+".join(map(re.escape, re.split(WORDS, name))) for name in names]
    return [
        re.compile(rf"((train|val|test)/)?{text}(/(source|factor|clean|flipped)(/.+)?|/length_matched)?")
        for text in texts
    ]


def alternatives(name: str) -> list[str]:
    """Return the names that `{a,b}` stands for."""
    parts = re.split(r"\{([^}]*)\}", name)
    return ["".join(choice) for choice in product(*(p.split(",") if i % 2 else [p] for i, p in enumerate(parts)))]


@pytest.mark.slow
@pytest.mark.parametrize("space", [GumbelSpace, MarginalSpace])
def test_page_names_every_metric(
    space: Callable[..., LatentSpace], fitted: Callable[..., Trainer], tmp_path: Path
) -> None:
    callbacks = [
        LearningRateMonitor(),
        PreferenceAccuracy(),
        CodebookMonitor(),
        ResourceMonitor(),
        AnnotatorAdaptation(shots=[0, 1], rounds=1),
        LabelFlipNoise(rate=0.5),
    ]
    fitted(*callbacks, latent=space(num_codes=4))
    known = patterns()
    names = set(logged(tmp_path / "run")) - {"step", "epoch"}
    assert len(names) > 50
    assert [name for name in sorted(names) if not any(pattern.fullmatch(name) for pattern in known)] == []
