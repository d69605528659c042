"""Tests that `float32` means arithmetic in float32 for checkpoints whose weights are in bfloat16."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from lpc_lightning.evaluation.accuracy.scored_pairs import PairsFile
from lpc_lightning.evaluation.adaptation.annotated_pairs import AnnotatedPairsTable
from lpc_lightning.evaluation.adaptation.command import adapt
from lpc_lightning.evaluation.codebook.command import explain
from lpc_lightning.evaluation.comparison.command import evaluate
from lpc_lightning.inference.opening import open_module, open_policy
from lpc_lightning.types import TokenizedPair
from tests.fixtures.commands import checkpoint_of

FIT = ["--model.beta=1", "--data.train_pairs=4", "--data.validation_pairs=2", "--data.batch_size=4"]
FIT += ["--trainer.max_steps=1", "--trainer.num_sanity_val_steps=0"]
TYPES = {
    "weights": ["--policy.dtype=bfloat16", "--trainer.precision=32-true"],
    "trainer": ["--policy.dtype=float32", "--trainer.precision=bf16-true"],
}


@pytest.fixture(scope="module")
def checkpoints(tiny_fit: Callable[..., Path]) -> Callable[..., str]:
    """Function that fits one step and returns the checkpoint."""
    return lambda kind, lr: str(checkpoint_of(tiny_fit(*FIT, *TYPES[kind], f"--model.optimizer.lr={lr}")))


@pytest.fixture
def file(tmp_path: Path) -> str:
    rows = [{"prompt": f"Why {number}?", "chosen": "yes " * (2 + number), "rejected": "no no"} for number in range(4)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def margins_of(checkpoint: str, file: str, folder: Path) -> list[float]:
    flags: dict[str, Any] = {"tasks": ["none"], "output": str(folder), "names": ["m"], "device": "cpu"}
    assert evaluate([checkpoint], preferences=[file], precision="float32", **flags)
    items = [json.loads(line) for line in (folder / "m" / "items.jsonl").read_text().splitlines()]
    return [item["response"]["prior"] for item in items]


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_untrained_policy_equals_its_reference(kind: str, checkpoints: Any, file: str, tmp_path: Path) -> None:
    """The reference has the rounded weights, from which training started."""
    assert margins_of(checkpoints(kind, 0.0), file, tmp_path) == [0.0] * 4


@pytest.mark.slow
@torch.no_grad()
def test_float32_scores_bfloat16_weights_exactly(
    checkpoints: Any, file: str, tmp_path: Path, naive_logps: Callable[..., torch.Tensor]
) -> None:
    """The oracle computes one sequence at a time, in float64, with the weights in the file and those of the start."""
    checkpoint = checkpoints("weights", 0.01)
    found = margins_of(checkpoint, file, tmp_path)
    trained = open_policy(checkpoint, "float64", "cpu")
    start = open_module(checkpoint, "cpu").policy_spec.build().causal_lm
    assert start.dtype == torch.bfloat16
    pairs: list[TokenizedPair] = list(PairsFile(file).load("test", trained.tokenizer) or ())
    ratios = naive_logps(trained.policy.causal_lm, pairs) - naive_logps(start.double(), pairs)
    chosen, rejected = ratios.view(2, -1)
    assert found == pytest.approx((chosen - rejected).tolist(), abs=1e-4)
    assert max(map(abs, found)) > 0.1


def test_commands_name_precisions_alike() -> None:
    for command in (evaluate, adapt, explain):
        assert get_args(get_type_hints(command)["precision"]) == ("auto", "float32", "bfloat16")
    helps = [inspect.getdoc(command) or "" for command in (evaluate, adapt, explain)]
    (shared,) = {
        text[text.index("    precision: ") : text.index("    ", text.index("else float32."))] for text in helps
    }
    assert shared.startswith("    precision: `float32`, weights of any type")


@pytest.mark.slow
def test_adapt_computes_in_float32(
    tiny_fit: Callable[..., Path], file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The types of the states that the weights are computed from, of weights in bfloat16."""
    latent = ["--latent=MarginalSpace", "--latent.num_codes=2", "--latent.hidden=4"]
    checkpoint = checkpoint_of(tiny_fit(*FIT, *TYPES["weights"], *latent))
    rows = [{**json.loads(line), "annotator": "anna"} for line in Path(file).read_text().splitlines()]
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    types: set[torch.dtype] = set()
    update = AnnotatedPairsTable.update

    def record(table: AnnotatedPairsTable, evaluated: Any, batch: Any, space: Any) -> None:
        types.add(evaluated["states"].prompt.dtype)
        update(table, evaluated, batch, space)

    monkeypatch.setattr(AnnotatedPairsTable, "update", record)
    adapt([str(checkpoint)], file, output=str(tmp_path / "out"), shots=[0, 1], under_z=False, device="cpu")
    assert types == {torch.float32}
