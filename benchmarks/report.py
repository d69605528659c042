"""Results to tables in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from lpc_lightning.files.markdown import markdown_table

COMPARED = 8
"""Steps over which losses and margins are compared."""
DTYPES = {"bf16-mixed": "bfloat16", "bf16-true": "bfloat16", "32-true": "float32"}
TARGETS = {"bfloat16": 0.01, "float32": 1e-4}
"""How far the losses may be apart, as a mean absolute difference over the compared steps."""
BASE, PLAIN = "TRL", "ours"
LIKE_WITH_LIKE = (("ours, live reference", "TRL"), ("ours", "TRL precomputed"))
"""Sides that come by the reference's log-probabilities in the same way."""
SPLIT = "time split of "

Run = dict[str, Any]
Measure = Callable[[dict[str, Any], Run], list[float]]


def render(results: dict[str, Any]) -> str:
    """Return all tables: the machine, speed and memory, agreement step by step, and the time split."""
    parts = [_machine(results)]
    for cell in results["cells"]:
        sections = (_speed(cell, results["machine"]["peak_flops"]), _like_with_like(cell), _passes(cell))
        parts += [text for text in (*sections, _agreement(cell), _split(cell)) if text]
    return "\n\n".join(parts) + "\n"


def summary(cell: dict[str, Any], name: str, peaks: dict[str, float]) -> dict[str, float]:
    """Return a side's medians over the steps after warm-up of all its rounds, and its largest peak."""
    runs, pairs = cell["sides"][name], cell["batch_size"]
    wall, cpu, rates, tokens = [], [], [], []
    for run in runs:
        # Policy forward and backward, and the reference forward if a step runs it.
        passes = 4 if run["reference"]["in_step"] else 3
        for step, (seconds, cpu_seconds) in enumerate(zip(_steps(run, "ended"), _steps(run, "cpu"), strict=True), 1):
            if step < cell["warmup"]:
                continue
            work = cell["work"][step]
            wall.append(seconds)
            cpu.append(cpu_seconds)
            tokens.append(work["tokens"] / seconds)
            rates.append(passes * work["forward_flops"] / seconds / peaks[DTYPES[cell["precision"]]])
    return {
        "seconds": statistics.median(wall),
        "cpu_seconds": statistics.median(cpu),
        "pairs_per_second": pairs / statistics.median(wall),
        "tokens_per_second": statistics.median(tokens),
        "peak_gib": max(_peak(cell, run)[0] for run in runs),
        "utilization": statistics.median(rates),
        "load": max(max(run["load"]) for run in runs),
    }


def ratios(cell: dict[str, Any], over: str, under: str, measure: Measure) -> list[float]:
    """Return the ratio of a measure of two sides for each round: the median over the values of both, such as steps.

    Within a round the load of the machine is about the same for both, and a median leaves out the few slow steps.
    """
    sides = cell["sides"]
    if over not in sides or under not in sides:
        return []
    runs = zip(sides[over], sides[under], strict=True)
    return [
        statistics.median(mine / other for mine, other in zip(measure(cell, one), measure(cell, two), strict=True))
        for one, two in runs
    ]


def _time(cell: dict[str, Any], run: Run) -> list[float]:
    """Return the seconds of each step after warm-up."""
    return _steps(run, "ended")[cell["warmup"] - 1 :]  # the first one listed is step 1


def _peak(cell: dict[str, Any], run: Run) -> list[float]:
    """Return the peak memory in GiB."""
    return [float(run["facts"]["gpu_peak_bytes"] or run["facts"]["peak_bytes"]) / 2**30]


def _steps(run: Run, clock: str) -> list[float]:
    """Return the seconds of each step but the first, whose beginning is not known."""
    return [end - start for start, end in pairwise(run[clock])]


def _speed(cell: dict[str, Any], peaks: dict[str, float]) -> str:
    rows = []
    for name in _measured(cell):
        values = summary(cell, name, peaks)
        rows.append(
            [
                name,
                f"{values['seconds']:.2f}",
                f"{values['pairs_per_second']:.3f}",
                f"{values['tokens_per_second']:.0f}",
                f"{values['peak_gib']:.2f}",
                f"{100 * values['utilization']:.0f} %",
                _ratio(ratios(cell, BASE, name, _time)),
                _ratio(ratios(cell, name, BASE, _peak)),
                _ratio(ratios(cell, name, PLAIN, _time)),
                _ratio(ratios(cell, name, PLAIN, _peak)),
                f"{values['load']:.1f}",
            ]
        )
    steps, rounds = len(cell["work"]), max(len(runs) for runs in cell["sides"].values())
    tokens = sum(work["tokens"] for work in cell["work"]) / steps
    answers = sum(work["answers"] for work in cell["work"]) / steps
    title = (
        f"### {cell['data']}, {cell['precision']}\n\n{cell['batch_size']} pairs a step, {steps} steps (the first "
        f"{cell['warmup']} not counted), {rounds} {'round' if rounds == 1 else 'rounds'}; on average {tokens:.0f} "
        f"tokens a step (prompts once), {answers:.0f} of them in answers."
    )
    if rounds > 1:
        title += " Ratios: median over the rounds (smallest to largest)."
    head = ["side", "s/step", "pairs/s", "tokens/s", "peak GiB", "of matrix peak", f"speed vs {BASE}"]
    head += [f"memory vs {BASE}", f"time vs {PLAIN}", f"memory vs {PLAIN}", "load"]
    return title + "\n\n" + markdown_table(head, rows)


def _like_with_like(cell: dict[str, Any]) -> str:
    sentences = []
    for ours, theirs in LIKE_WITH_LIKE:
        if speed := ratios(cell, theirs, ours, _time):
            memory = _ratio(ratios(cell, ours, theirs, _peak))
            sentences.append(f"{ours} against {theirs}: {_ratio(speed)} times the speed, {memory} of the memory")
    return f"Like with like: {'; '.join(sentences)}." if sentences else ""


def _passes(cell: dict[str, Any]) -> str:
    """Return the time of the reference before the first step, in total and for each step of this run."""
    lines = []
    for name in _measured(cell):
        passes = [run["reference"] for run in cell["sides"][name]]
        if not passes[0]["pairs"]:
            continue
        pairs, seconds = passes[0]["pairs"], statistics.median(each["seconds"] for each in passes)
        lines.append(
            f"- {name}: {seconds:.1f} s over {pairs} pairs, {cell['batch_size'] * seconds / pairs:.2f} s for the "
            f"{cell['batch_size']} pairs of a step"
        )
    if not lines:
        return ""
    heading = (
        "The reference's pass, before the first step and not in the times above. Ours is kept for all runs to come:"
    )
    return "\n".join([heading, "", *lines])


def _agreement(cell: dict[str, Any]) -> str:
    verdicts = [_verdict(cell, *sides) for sides in ((PLAIN, BASE), *LIKE_WITH_LIKE)]
    lines = [verdict for verdict in verdicts if verdict]
    if not lines:
        return ""
    text = "\n".join(["Agreement with TRL, step by step:", "", *lines])
    if BASE not in cell["sides"] or PLAIN not in cell["sides"]:
        return text
    theirs, ours = cell["sides"][BASE][0], cell["sides"][PLAIN][0]
    rows = [
        [str(step), *(f"{run[name][step]:.5f}" for name in ("loss", "margin") for run in (theirs, ours))]
        for step in range(min(COMPARED, len(ours["loss"])))
    ]
    return text + "\n\n" + markdown_table(["step", "loss, TRL", "loss, ours", "margin, TRL", "margin, ours"], rows)


def _verdict(cell: dict[str, Any], ours: str, theirs: str) -> str:
    sides = cell["sides"]
    if ours not in sides or theirs not in sides:
        return ""
    one, other = sides[ours][0], sides[theirs][0]
    steps = range(min(COMPARED, len(one["loss"])))
    loss, margin = (statistics.mean(abs(one[name][n] - other[name][n]) for n in steps) for name in ("loss", "margin"))
    target = TARGETS[DTYPES[cell["precision"]]]
    return (
        f"- {'PASS' if loss <= target else 'FAIL'}: {ours} and {theirs} over {len(steps)} steps, mean absolute "
        f"difference of the loss {loss:.2g} (target: at most {target:g}), of the margin {margin:.2g}"
    )


def _split(cell: dict[str, Any]) -> str:
    split = {name: _medians(runs[0]["shares"][cell["warmup"] :]) for name, runs in cell["sides"].items() if _has(runs)}
    if not split:
        return ""
    rows = []
    for part in next(iter(split.values())):
        shares = [(medians[part], sum(medians.values())) for medians in split.values()]
        rows.append([part, *(f"{seconds:.2f} s ({100 * seconds / total:.0f} %)" for seconds, total in shares)])
    return markdown_table(["part of a step, median", *(name.removeprefix(SPLIT) for name in split)], rows)


def _has(runs: list[Run]) -> bool:
    return bool(runs[0]["shares"])


def _medians(steps: list[dict[str, float]]) -> dict[str, float]:
    return {part: statistics.median(step[part] for step in steps) for part in steps[0]}


def _measured(cell: dict[str, Any]) -> list[str]:
    return [name for name in cell["sides"] if not name.startswith(SPLIT)]


def _machine(results: dict[str, Any]) -> str:
    machine = results["machine"]
    peaks = ", ".join(f"{value / 1e12:.2f} TFLOP/s in {name}" for name, value in machine["peak_flops"].items())
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "lightning", "transformers", "trl", "python"))
    where = machine.get("gpu") or f"{machine['processor']}, {machine['cores']} cores ({', '.join(machine['features'])})"
    return f"{where}, {machine['memory_gib']} GiB. Matrix products: {peaks}. {versions}.\n\n`{results['command']}`"


def _ratio(rounds: list[float]) -> str:
    if not rounds:
        return "-"
    middle = f"{statistics.median(rounds):.2f}"
    return middle if len(rounds) == 1 else f"{middle} ({min(rounds):.2f} to {max(rounds):.2f})"
