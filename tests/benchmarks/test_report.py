"""The tables of the benchmark, from numbers made up by hand."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.report import render, summary

PEAKS = {"bfloat16": 1e12, "float32": 1e11}
IN_STEP = {"in_step": True, "pairs": 0, "seconds": 0.0}


def run(ended: list[float], loss: list[float], peak: float, **more: Any) -> dict[str, Any]:
    return {
        "ended": ended,
        "cpu": [2 * moment for moment in ended],
        "loss": loss,
        "margin": [0.0] * len(loss),
        "facts": {"peak_bytes": peak * 2**30, "gpu_peak_bytes": None},
        "reference": {"in_step": False, "pairs": 20, "seconds": 6.0},
        "shares": [],
        "load": [0.1, 0.2],
        **more,
    }


@pytest.fixture
def cell() -> dict[str, Any]:
    split = [{"data": 9.0, "backbone backward": 9.0}] * 2
    split += [{"data": data, "backbone backward": 3.0} for data in (0.5, 1.0, 7.0)]
    trl = [0.7, 0.6, 0.5, 0.4, 0.3]
    return {
        "data": "hh",
        "precision": "bf16-mixed",
        "batch_size": 4,
        "warmup": 2,
        "work": [{"tokens": 100, "answers": 10, "forward_flops": 0.5e11}] * 5,
        "sides": {
            "TRL": [
                run([0, 50, 60, 72, 80], trl, 10.0, reference=IN_STEP),
                run([0, 50, 60, 72, 86], trl, 10.0, reference=IN_STEP),
            ],
            "ours, live reference": [run([0, 9, 14, 19, 24], trl, 5.0, reference=IN_STEP) for _ in range(2)],
            "ours": [
                run([0, 9, 11, 13, 16], [0.7, 0.6, 0.5, 0.4, 0.31], 4.0),
                run([0, 9, 11, 13, 15], [0.7, 0.6, 0.5, 0.4, 0.31], 3.0, load=[0.1, 1.5]),
            ],
            "time split of ours": [run([0, 1, 2, 3, 4], [0.7] * 5, 4.0, shares=split)],
        },
    }


@pytest.fixture
def machine() -> dict[str, Any]:
    facts = {"processor": "P", "cores": 2, "features": ["f"], "memory_gib": 8, "peak_flops": PEAKS}
    return facts | dict.fromkeys(("torch", "lightning", "transformers", "trl", "python"), "1")


def test_medians_cover_all_rounds_after_warm_up(cell: dict[str, Any]) -> None:
    found = summary(cell, "ours", PEAKS)
    # Steps 2, 3 and 4 of each round: 2, 2, 3 and 2, 2, 2 seconds.
    assert found["seconds"] == 2
    assert found["cpu_seconds"] == 4
    assert found["pairs_per_second"] == 2
    assert found["tokens_per_second"] == 50
    assert found["peak_gib"] == 4.0
    assert found["load"] == 1.5


def test_the_reference_is_work_of_a_step_that_asks_it(cell: dict[str, Any]) -> None:
    # Forward once and backward twice, in 2 s; the reference forward as well, in 5 s.
    assert summary(cell, "ours", PEAKS)["utilization"] == pytest.approx(3 * 0.5e11 / 2 / 1e12)
    assert summary(cell, "ours, live reference", PEAKS)["utilization"] == pytest.approx(4 * 0.5e11 / 5 / 1e12)


def test_the_tables_say_how_far_the_sides_are_apart(cell: dict[str, Any], machine: dict[str, Any]) -> None:
    text = render({"command": "run", "machine": machine, "cells": [cell]})
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    head = [title.strip() for title in rows["side"].split("|")]
    ours = dict(zip(head, (value.strip() for value in rows["ours"].split("|")), strict=True))
    # Steps 2 to 4 took TRL 10, 12 and 8 s and ours 2, 2 and 3, and in the second round 10, 12 and 14 s and 2, 2 and 2.
    assert ours["speed vs TRL"] == "5.50 (5.00 to 6.00)"
    assert ours["memory vs TRL"] == "0.35 (0.30 to 0.40)"
    assert ours["time vs ours"] == "1.00 (1.00 to 1.00)"
    assert "ours, live reference against TRL: 2.20 (2.00 to 2.40) times the speed, 0.50" in text
    assert "- ours: 6.0 s over 20 pairs, 1.20 s for the 4 pairs of a step" in text
    assert "- ours, live reference:" not in text
    assert (
        "- PASS: ours and TRL over 5 steps, mean absolute difference of the loss 0.002 (target: at most 0.01)" in text
    )
    # Medians of steps 2 to 4.
    assert rows["backbone backward"].strip().endswith("| 3.00 s (75 %) |")


def test_losses_too_far_apart_are_reported(cell: dict[str, Any], machine: dict[str, Any]) -> None:
    cell["sides"]["ours"][0]["loss"][0] += 0.05
    text = render({"command": "run", "machine": machine, "cells": [cell]})
    assert "- FAIL: ours and TRL over 5 steps, mean absolute difference of the loss 0.012 (target: at most" in text
    assert "- PASS: ours, live reference and TRL over 5 steps" in text
    cell["precision"] = "32-true"
    assert "at most 0.0001" in render({"command": "run", "machine": machine, "cells": [cell]})
