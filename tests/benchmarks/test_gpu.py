"""The benchmark for a short GPU lease: in miniature on a CPU, and its arithmetic against numbers found by hand."""

from __future__ import annotations

import io
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu.cases import TINY
from benchmarks.gpu.guard import OUT_OF_TIME, attempt
from benchmarks.gpu.lengths import FITTED, measure, read
from benchmarks.gpu.measure import Bench, padded_shape, rates, shape_costs
from benchmarks.gpu.report import TARGETS, render, targets
from benchmarks.gpu.trace import summarize
from lpc_lightning.policy import TinyPolicy
from lpc_lightning.types import TokenizedPair
from tests.fixtures.processes import ForkedProcess, run_module

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `--tiny` wrote."""
    output = tmp_path_factory.mktemp("bench")
    arguments = ["--tiny", "--peak-seconds", "0.05", "--output", str(output)]
    run = ForkedProcess(run_module, "benchmarks.gpu", arguments, log=output / "stdout")
    assert run.wait(timeout=600) == 0, run.output.read_text()
    content: dict[str, Any] = json.loads((output / "results.json").read_text())
    assert (output / "results.md").read_text() == render(content)
    return content


def pair(prompt: int, chosen: int, rejected: int) -> TokenizedPair:
    ids = [list(range(count)) for count in (prompt, chosen, rejected)]
    return TokenizedPair("pair", *ids)


def test_tiny_run_has_no_failure(results: dict[str, Any]) -> None:
    rows = [row for part in ("smoke", "steps", "profiles", "agreement") for row in results[part]]
    assert {row["name"]: row["status"] for row in rows} == {row["name"]: "ok" for row in rows}
    commands = {row["name"] for row in results["smoke"]}
    assert {"validate", "test", "predict", "fit, resumed", "generate", "export"} <= commands
    assert len(results["steps"]) == 4
    assert all(len(row["step_s"]) == 3 and min(row["step_s"]) > 0 for row in results["steps"])


def test_tiny_sides_agree_in_the_first_step(results: dict[str, Any]) -> None:
    """Both sides read the same tokens with the same weights."""
    ours, trl = results["steps"][:2]
    assert (ours["method"], trl["method"]) == ("ours, eager", "TRL")
    assert ours["first_pairs"] == trl["first_pairs"]
    for name in ("logps/chosen", "logps/rejected"):
        assert ours["first_step"][name] == pytest.approx(trl["first_step"][name], rel=1e-6)


def test_tiny_agreement_is_rounding(results: dict[str, Any]) -> None:
    compiled, paths = results["agreement"]
    assert compiled["pairs"] == 12
    assert compiled["loss_largest"] < 1e-4
    assert paths["nats_a_token_largest"] < 1e-4


def test_batches_hold_the_drawn_lengths(tmp_path: Path) -> None:
    """Every pair of the lengths file comes once, and answers fit behind their prompt."""
    bench = Bench("cpu", 1.0, tmp_path)
    case = replace(TINY, steps=2)
    lengths = json.loads(bench.lengths_file(case).read_text())
    batches = bench.trl_batches(case)
    pairs = [each for batch in batches for each in batch]
    found = [(len(each.prompt_ids), len(each.chosen_ids), len(each.rejected_ids)) for each in pairs]
    assert [len(batch) for batch in batches] == [4, 4]
    assert sorted(found) == sorted(map(tuple, lengths))
    assert max(prompt + max(answers) for prompt, *answers in found) <= 512
    assert all(token < 1536 for each in pairs for token in each.prompt_ids)


def test_rates_by_hand() -> None:
    """One pair of 3 + 2 + 1 tokens through the tiny model."""
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128  # q, k and v, o, and the three of the MLP
    scores = (1 + 2 + 3) + (4 + 5) + 4  # what each token of prompt, chosen and rejected answer attends to
    forward = 2 * 2 * (layer * 6 + 2 * 64 * scores) + 2 * 64 * 1536 * 3
    found = rates(replace(TINY, pairs=1, warmup=1), [9.0, 0.5, 0.25, 0.5], [[pair(3, 2, 1)]] * 4, peak=1e9)
    assert found["median_s"] == 0.5
    assert found["mean_s"] == pytest.approx(1.25 / 3)
    assert found["pairs_per_s"] == 2
    assert found["tokens_per_s"] == 12
    assert found["mfu"] == pytest.approx(3 * forward / 0.5 / 1e9)


def test_padding_by_hand() -> None:
    batches = [[pair(3, 2, 1), pair(5, 1, 4)], [pair(1, 1, 1), pair(1, 1, 1)]]
    shapes = [padded_shape(batch) for batch in batches]
    assert shapes == [(4, 9), (4, 2)]
    found = shape_costs([0.0, 2.0, 2.5], shapes, batches)
    assert found["padding"] == pytest.approx(1 - (6 + 10 + 3 + 3) / (36 + 8))
    assert found["first_of_shape_s"] == {"4x9": 2.0, "4x2": 0.5}


def test_trace_by_hand() -> None:
    def event(kind: str, name: str, start: float, length: float, thread: int = 1) -> dict[str, Any]:
        return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": length, "tid": thread}

    events = [
        event("user_annotation", "measured steps", 100, 1000),
        event("cpu_op", "aten::mm", 110, 100),
        event("cpu_op", "aten::empty", 120, 30),
        event("cpu_op", "aten::item", 300, 50),
        event("cpu_op", "aten::_local_scalar_dense", 310, 30),
        event("cpu_op", "aten::item", 2000, 50),  # behind the window
        event("cuda_runtime", "cudaLaunchKernel", 130, 5),
        event("cuda_driver", "cuLaunchKernelEx", 140, 5),
        event("cuda_runtime", "cudaGraphLaunch", 150, 5),
        event("cuda_runtime", "cudaMemcpyAsync", 160, 5),
        event("cuda_runtime", "cudaStreamSynchronize", 320, 10),
        event("cuda_runtime", "cudaDeviceSynchronize", 1200, 10),  # behind the window: the profiler's own
        event("kernel", "gemm", 200, 300, thread=7),
        event("kernel", "norm", 400, 200, thread=8),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 700, 10, thread=7),
        {"ph": "M", "name": "process_name"},
    ]
    found = summarize(events, steps=2, wall=0.001)
    assert found["launches"] == 1.5
    assert (found["graph_launches"], found["synchronizations"], found["kernels"]) == (0.5, 0.5, 1)
    assert (found["copies"], found["pageable_copies"]) == (0.5, 0.5)
    assert found["reads"]["aten::item"] == found["reads"]["aten::_local_scalar_dense"] == 0.5
    assert found["busy_share"] == pytest.approx(400 / 1000)  # from 200 to 600
    assert found["top_kernels"][0] == {"name": "gemm", "ms": 0.15, "calls": 0.5}
    own = {each["name"]: each["ms"] for each in found["top_operations"]}
    assert own["aten::mm"] == pytest.approx(0.035)


def test_attempt_survives_failures_and_endless_parts() -> None:
    log = io.StringIO()

    def fail() -> dict[str, Any]:
        raise ValueError("found 3, expected 4\nmore")

    def leave() -> dict[str, Any]:
        sys.exit(1)

    def stall() -> dict[str, Any]:
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                continue

    failed = attempt(fail, 5.0, log)["status"]
    assert failed.startswith("error: ValueError: found 3, expected 4 (tests/benchmarks/test_gpu.py:")
    assert "Traceback" in log.getvalue()
    assert attempt(leave, 5.0, log)["status"].startswith("error: SystemExit: 1")
    assert attempt(stall, 0.1, log)["status"] == OUT_OF_TIME
    assert attempt(lambda: {"value": 1}, 5.0, log)["value"] == 1


@pytest.mark.parametrize(("name", "tokens"), [("hh", 242), ("ultrafeedback", 706)])
def test_drawn_lengths_are_like_the_real_ones(name: str, tokens: int) -> None:
    drawn = np.array(FITTED[name].draw(4000))
    assert drawn.min() >= 1
    assert (drawn[:, 0] + drawn[:, 1:].max(axis=1)).max() <= FITTED[name].max_length
    assert drawn.sum(axis=1).mean() == pytest.approx(tokens, rel=0.1)
    assert FITTED[name].draw(5) == FITTED[name].draw(5)


def test_lengths_of_a_file_are_its_tokens(arguments: list[str], tmp_path: Path) -> None:
    tokenizer = TinyPolicy().load_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    found = measure(Path(arguments[3]), str(tmp_path / "tokenizer"), max_length=64)
    messages = [{"role": "user", "content": "say 3"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert found[2][0] == len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    path = tmp_path / "lengths.json"
    path.write_text(json.dumps(found))
    assert read(path) == found
    path.write_text("[[1, 2]]")
    with pytest.raises(ValueError, match="found other values than triples"):
        read(path)


def test_targets_are_ratios_of_the_best_cases() -> None:
    def row(side: str, rate: float, **changes: Any) -> dict[str, Any]:
        case = {"shape": "1.17B", "data": "ultrafeedback", "pairs": 8, "latent": None, "side": side, **changes}
        return {"status": "ok", "case": case, "pairs_per_s": rate, "median_s": 8 / rate, "mfu": 0.4, "peak_gib": rate}

    rows = [row("ours", 60.0), row("ours", 40.0), row("TRL", 20.0), row("TRL", 10.0), {"status": "error: no memory"}]
    rows += [row("ours", 50.0, latent="marginal"), row("ours", 9.0, data="hh"), row("TRL", 3.0, data="hh", pairs=64)]
    assert targets(rows) == {
        "mfu": 0.4,
        "speed": 3,
        "best_batch_speed": 3,
        "memory": 3,
        "latent_time": pytest.approx(60 / 50),
    }
    assert set(targets(rows)) < set(TARGETS)
