"""A Slurm job array with one task per cell."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

SCRIPT = """#!/usr/bin/env bash
# One task per cell. Adjust the resources of a cell, and the number of cells at a time (after %), to your cluster. Then
# submit this file with sbatch.
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

# Two minutes before the time limit, a cell writes a checkpoint and ends with code 143. After requeueing, it resumes.
srun {command} --cell "$SLURM_ARRAY_TASK_ID"
code=$?
if [ "$code" -eq 143 ]; then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit "$code"
"""


def array_script(name: str, command: Sequence[str], cells: Sequence[int]) -> str:
    """Return a script for `sbatch`.

    Args:
        name: Name of the job.
        command: The command `lpc-lightning ablate ...`. The script adds the cell's number.
        cells: Numbers of the cells to run.
    """
    return SCRIPT.format(name=name, cells=_ranges(cells), command=shlex.join(command))


def _ranges(numbers: Sequence[int]) -> str:
    """Format sorted numbers as ranges, such as `0-3,7`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
