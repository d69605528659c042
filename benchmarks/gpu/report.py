"""The results so far, as JSON and as tables in Markdown; written after every part."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from lpc_lightning.files.markdown import code_span, markdown_table

Row = dict[str, Any]
TARGETS = {
    "mfu": ("1.17B, ultrafeedback: MFU", "at least 0.35, goal 0.45"),
    "speed": ("1.17B, ultrafeedback: pairs/s against TRL", "at least 2.5, goal 3.5"),
    "small_step": ("135M, hh: step", "at most 75 ms, goal 40 ms"),
    "best_batch_speed": ("1.17B, hh at the best batches: pairs/s against TRL", "at least 1.7, goal 2"),
    "memory": ("1.17B, ultrafeedback: peak memory against TRL", "at most 0.45"),
    "small_memory": ("135M, hh: peak memory against TRL", "at most 0.35"),
    "latent_time": ("1.17B, ultrafeedback: marginal K=32 against no latent, time", "at most 1.10, goal 1.05"),
}
"""Title and target of each value."""


class Results:
    """Everything measured so far."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        """Keep the settings.

        Args:
            folder: For results.json and results.md.
            facts: Device, versions and peak.
        """
        self.folder = folder
        self.content: dict[str, Any] = {"facts": facts, "smoke": [], "steps": [], "profiles": [], "agreement": []}

    def add(self, part: str, row: Row) -> None:
        """Add one result and write both files."""
        self.content[part].append(row)
        self.write()

    def write(self) -> None:
        """Write both files."""
        (self.folder / "results.json").write_text(json.dumps(self.content, indent=1))
        (self.folder / "results.md").write_text(render(self.content))


def render(content: dict[str, Any]) -> str:
    """Return all tables."""
    facts = ", ".join(f"{name} {value}" for name, value in content["facts"].items())
    parts = [facts, _targets(content["steps"]), _steps(content["steps"]), _profiles(content["profiles"])]
    parts += [_agreement(content["agreement"]), _smoke(content["smoke"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def targets(steps: list[Row]) -> dict[str, float]:
    """Return the value reached for each of `TARGETS` that was measured."""
    done = [row for row in steps if row["status"] == "ok"]
    large = _at(done, "1.17B", "ultrafeedback", 8)
    small = _at(done, "135M", "hh", 16)
    hh = [row for row in done if row["case"]["shape"] == "1.17B" and row["case"]["data"] == "hh"]
    marginal = [row for row in large if row["case"]["latent"] == "marginal"]
    ours, trl = _best(large, "ours"), _best(large, "TRL")
    small_ours, small_trl = _best(small, "ours"), _best(small, "TRL")
    reached = {
        "mfu": None if ours is None else ours["mfu"],
        "speed": _ratio(ours, trl, "pairs_per_s"),
        "small_step": None if small_ours is None else 1e3 * small_ours["median_s"],
        "best_batch_speed": _ratio(_best(hh, "ours"), _best(hh, "TRL"), "pairs_per_s"),
        "memory": _ratio(ours, trl, "peak_gib"),
        "small_memory": _ratio(small_ours, small_trl, "peak_gib"),
        "latent_time": _ratio(marginal[0] if marginal else None, ours, "median_s"),
    }
    return {name: value for name, value in reached.items() if value is not None}


def _at(rows: list[Row], shape: str, data: str, pairs: int) -> list[Row]:
    wanted = {"shape": shape, "data": data, "pairs": pairs}
    return [row for row in rows if wanted.items() <= row["case"].items()]


def _best(rows: list[Row], side: str) -> Row | None:
    """Return the fastest case of a side without a latent."""
    mine = [row for row in rows if row["case"]["side"] == side and row["case"]["latent"] is None]
    return max(mine, key=lambda row: row["pairs_per_s"], default=None)


def _ratio(over: Row | None, under: Row | None, name: str) -> float | None:
    if not over or not under or not over[name] or not under[name]:
        return None
    return over[name] / under[name]


def _targets(steps: list[Row]) -> str:
    reached = targets(steps)
    if not reached:
        return ""
    lines = [[TARGETS[name][0], f"{value:.3g}", TARGETS[name][1]] for name, value in reached.items()]
    return "### Targets\n\n" + markdown_table(["", "measured", "target"], lines)


def _steps(steps: list[Row]) -> str:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in steps:
        groups[row["work"]].append(row)
    return "\n\n".join(f"### {work}\n\n{_group(rows)}" for work, rows in groups.items())


def _group(rows: list[Row]) -> str:
    head = ["", "step, median", "mean", "slowest", "pairs/s", "tokens/s", "MFU", "peak GiB", "speed vs TRL"]
    head += ["memory vs TRL", "time vs ours", "padding", "shapes", "graphs", "breaks", "first steps of new shapes"]
    head += ["reference"]
    done = [row for row in rows if row["status"] == "ok"]
    trl, ours = _best(done, "TRL"), _best(done, "ours")
    lines = []
    for row in rows:
        if row["status"] != "ok":
            lines.append([row["method"], row["status"], *[""] * (len(head) - 2)])
            continue
        mine = row["case"]["side"] == "ours"
        firsts = list(row["first_of_shape_s"].values())
        first = " + ".join(f"{seconds:.2f}" for seconds in firsts[:4]) + (" + ..." if len(firsts) > 4 else "")
        lines.append(
            [
                row["method"],
                f"{1e3 * row['median_s']:.1f} ms",
                f"{1e3 * row['mean_s']:.1f} ms",
                f"{1e3 * row['slowest_s']:.0f} ms",
                f"{row['pairs_per_s']:.1f}",
                f"{row['tokens_per_s']:.0f}",
                _percent(row["mfu"]),
                _number(row["peak_gib"]),
                _number(_ratio(row, trl, "pairs_per_s")),
                _number(_ratio(row, trl, "peak_gib")),
                _number(_ratio(row, ours, "median_s")) if mine else "",
                _percent(row["padding"]),
                str(row["shapes"]),
                str(row["graphs"]),
                str(sum(row["graph_breaks"].values())),
                f"{first} s",
                f"{row['reference_s']:.1f} s",
            ]
        )
    return "\n\n".join(part for part in (markdown_table(head, lines), _first_step(ours, trl)) if part)


def _first_step(ours: Row | None, trl: Row | None) -> str:
    """Compare the first step of both sides, on the same tokens with the same weights."""
    if ours is None or trl is None or ours["first_pairs"] != trl["first_pairs"]:
        return ""
    metrics = [name for name, value in ours["first_step"].items() if None not in (value, trl["first_step"][name])]
    values = [f"{name} {ours['first_step'][name]:.4f} and {trl['first_step'][name]:.4f}" for name in metrics]
    return f"First step, ours and TRL: {', '.join(values)}." if values else ""


def _profiles(profiles: list[Row]) -> str:
    if not profiles:
        return ""
    names = ("wall_ms", "busy_ms", "busy_share", "kernels", "launches", "graph_launches", "synchronizations", "copies")
    head = ["a step", *names, "pageable_copies", "reads", "operations"]
    lines, tops = [], []
    for row in profiles:
        if row["status"] != "ok":
            lines.append([row["name"], row["status"], *[""] * (len(head) - 2)])
            continue
        reads = ", ".join(f"{name.removeprefix('aten::')} {count:.1f}" for name, count in row["reads"].items() if count)
        values = [f"{row[name]:.3g}" for name in (*names, "pageable_copies")]
        lines.append([row["name"], *values, reads or "none", f"{row['operations']:.0f}"])
        for title, key in (("kernels", "top_kernels"), ("CPU operations, own time", "top_operations")):
            top = [[code_span(each["name"]), f"{each['ms']:.3f}", f"{each['calls']:.1f}"] for each in row[key]]
            if top:
                longest = markdown_table(["", "ms a step", "calls a step"], top, escape=str)
                tops.append(f"{row['name']}, longest {title}:\n\n{longest}")
    return "\n\n".join(["### Profile\n\n" + markdown_table(head, lines), *tops])


def _agreement(rows: list[Row]) -> str:
    if not rows:
        return ""
    lines = []
    for row in rows:
        differences = [f"{name} {row[name]:.3g}" for name in VALUES if name in row]
        lines.append([row["name"], row["status"], ", ".join(differences)])
    return "### Agreement\n\n" + markdown_table(["", "", "differences"], lines)


VALUES = ("loss_largest", "loss_mean", "mean_loss_apart", "nats_a_token_largest", "nats_a_token_mean")


def _smoke(rows: list[Row]) -> str:
    if not rows:
        return ""
    lines = [[row["name"], row.get("left_out") or row["status"], f"{row['seconds']:.1f} s"] for row in rows]
    failed = sum(row["status"] != "ok" for row in rows)
    return f"### Commands\n\n{len(rows)} run, {failed} failed.\n\n" + markdown_table(["", "outcome", ""], lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
