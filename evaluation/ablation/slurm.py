"""The cells as a Slurm job array."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

SCRIPT = """#!/usr/bin/env bash
# One task a cell. Change what a cell is given, and how many run at once (behind %), as your cluster has it. Then hand
# this file to sbatch.
#SBATCH --job-name={name}
#SBATCH --array={cells}%16
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-task=1
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

# Two minutes before its time is up a cell writes a checkpoint and ends with code 143; put back, it goes on from there.
srun {command} --cell "$SLURM_ARRAY_TASK_ID"
code=$?
if [ "$code" -eq 143 ]; then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit "$code"
"""


def array_script(name: str, command: Sequence[str], cells: Sequence[int]) -> str:
    """A script for `sbatch`.

    Args:
        name: Of the job.
        command: `lpc-lightning ablate ...`, to which the cell's number is added.
        cells: Numbers of the cells that are to run.
    """
    return SCRIPT.format(name=name, cells=_ranges(cells), command=shlex.join(command))


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3,7`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
