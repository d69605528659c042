"""Count the files of the package that run in a training step, and compare them with the list in CONTRIBUTING.md."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import lpc_lightning
from lpc_lightning.algorithms import DPO, IPO, KTO, ORPO, PreferenceModule, SimPO
from lpc_lightning.latent import MarginalSpace

PACKAGE = lpc_lightning.__file__.removesuffix("__init__.py")
LAYERS = {f"policy/{name}.py" for name in ("segment_attention", "rotary_attention", "memory_efficient_layers")}
"""Files that transformers calls inside the backbone. They are part of the model."""


@pytest.fixture
def step_files(fit_run: Any) -> Any:
    """Return a function that trains two steps and returns the files that the second one passes, in order."""

    def record(module: PreferenceModule) -> list[str]:
        step, files = module.training_step, dict[str, None]()

        def profile(frame: FrameType, event: str, argument: Any) -> None:
            if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
                files[frame.f_code.co_filename.removeprefix(PACKAGE)] = None

        def recorded(*inputs: Any) -> Any:
            files.clear()
            before = sys.getprofile()
            sys.setprofile(profile)
            try:
                return step(*inputs)
            finally:
                sys.setprofile(before)

        module.training_step = recorded  # type: ignore[method-assign]
        fit_run(module, max_steps=2, limit_val_batches=0)
        return [file for file in files if file not in LAYERS]

    return record


def documented(latent: bool) -> list[str]:
    """Return the files of a step of DPO as CONTRIBUTING.md lists them. Those of a latent are in `latent/`."""
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = re.findall(r"^\| `(\S+\.py)` \|", text, flags=re.MULTILINE)
    return [file for file in files if latent or not file.startswith("latent/")]


@pytest.mark.parametrize(("latent", "most"), [(False, 8), (True, 11)])
def test_step_passes_documented_files(latent: bool, most: int, small_policy: Any, step_files: Any) -> None:
    files = step_files(DPO(policy=small_policy(), latent=MarginalSpace(num_codes=3) if latent else None))
    assert files == documented(latent)
    assert len(files) <= most


@pytest.mark.parametrize("algorithm", [DPO, IPO, SimPO, KTO, ORPO])
def test_step_without_cache_passes_eight_files(algorithm: Any, small_policy: Any, step_files: Any) -> None:
    reference = {"reference": "live"} if algorithm.needs_reference else {}
    assert len(step_files(algorithm(policy=small_policy(), **reference))) <= 8
