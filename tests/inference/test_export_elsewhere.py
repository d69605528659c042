"""Tests of exports in a process that does not know this project, with stock transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lpc_lightning.inference.opening import open_policy
from tests.inference.conftest import CASES, LATENT_FILES, batch

pytestmark = pytest.mark.slow
PROMPT = "Which plant needs little water?"


@pytest.fixture(scope="module")
def elsewhere(exported: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh process without the project finds; one of the cases as a repository of the hub's cache, too."""
    root = tmp_path_factory.mktemp("elsewhere")
    snapshot = root / "hub" / "models--somebody--tiny-lpc" / "snapshots" / ("0" * 40)
    shutil.copytree(exported["codes"], snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    requested = {
        "cases": {name: name for name in exported} | {"hub": "somebody/tiny-lpc"},
        "prompt": PROMPT,
        "tokens": batch()["input_ids"].tolist(),
        "mask": batch()["attention_mask"].tolist(),
    }
    (root / "requested.json").write_text(json.dumps(requested))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "HF_HOME": str(root),
        "HF_HUB_CACHE": str(root / "hub"),
        "HF_MODULES_CACHE": str(root / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).with_name("elsewhere.py")
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(root / "requested.json"), str(root / "outputs.pt")],
        cwd=exported["codes"].parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {"stderr": done.stderr, **torch.load(root / "outputs.pt")}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_elsewhere_it_is_the_policy_with_its_latent(
    case: str, elsewhere: dict[str, Any], fitted: Callable[..., Path]
) -> None:
    """The same logits and the same text, batched and sampled too, as the checkpoint in this project."""
    found = elsewhere[case]["latent"]
    opened = open_policy(str(fitted(*CASES[case])))
    tokens, mine = batch(), opened.causal_lm
    close(found["logits"], mine(**tokens).logits)
    close(found["again"], mine(**tokens).logits)
    assert torch.equal(found["batch"], mine.generate(**tokens, max_new_tokens=6, do_sample=False))
    torch.manual_seed(7)
    assert torch.equal(found["sampled"], mine.generate(**tokens, max_new_tokens=6, do_sample=True))
    text = opened.tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = mine.generate(**text, max_new_tokens=8, do_sample=False)
    assert found["text"] == opened.tokenizer.decode(answer[0, text["input_ids"].shape[1] :])
    name = type(opened.policy.causal_lm).__name__
    assert found["class"] == elsewhere[case]["half"] == (name if case == "plain" else f"Latent{name}")
    assert found["dtype"] == ("torch.bfloat16" if case == "bf16" else "torch.float32")


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_stock_transformers_opens_the_plain_policy(
    case: str, elsewhere: dict[str, Any], fitted: Callable[..., Path]
) -> None:
    found = elsewhere[case]["stock"]
    plain = open_policy(str(fitted(*CASES[case]))).policy.causal_lm
    assert found["class"] == type(plain).__name__
    close(found["logits"], plain(**batch()).logits)
    close(found["again"], plain(**batch()).logits)
    if case != "plain":
        assert (found["logits"] - elsewhere[case]["latent"]["logits"]).abs().max() > 1e-3


def test_from_the_hub_as_from_a_folder(elsewhere: dict[str, Any]) -> None:
    for way in ("stock", "latent"):
        assert torch.equal(elsewhere["hub"][way]["logits"], elsewhere["codes"][way]["logits"])


def test_elsewhere_is_elsewhere_and_quiet(elsewhere: dict[str, Any]) -> None:
    assert elsewhere["imported"] == []
    # Stock transformers finds no weight too many or too few, and nothing else to complain about.
    lines = [line for line in elsewhere["stderr"].splitlines() if line.strip()]
    assert [line for line in lines if "offline" not in line.lower()] == []


@pytest.mark.parametrize("case", CASES)
def test_model_card_code_runs(case: str, elsewhere: dict[str, Any]) -> None:
    steered = {"answer", "plain", "steer"}
    expected = {"plain": {"answer"}, "soft-cap": {"answer"}, "gaussian": steered}
    assert set(elsewhere[case]["card"]) == expected.get(case, {*steered, "table"})


def test_saving_again_writes_the_same_files(elsewhere: dict[str, Any]) -> None:
    kept = {"config.json", "generation_config.json", "model.safetensors"}
    for case in CASES:
        assert set(elsewhere[case]["files again"]) == (kept if case == "plain" else kept | LATENT_FILES)
