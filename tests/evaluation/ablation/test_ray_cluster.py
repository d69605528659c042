"""The same cells on a Ray cluster of two nodes on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster
node = {"num_cpus": 1, "object_store_memory": 10**8}
cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
cluster.add_node(**node)
print("cluster at", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
ABLATE = """
import sys
from lpc_lightning.evaluation.ablation.command import main
if __name__ == "__main__":
    main(["ablate", *sys.argv[1:]])
"""


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A cluster of two nodes with a processor each, which goes when the test does."""
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with (tmp_path / "cluster.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", CLUSTER], stderr=log, **pipes)
    assert process.stdout is not None
    # Ray says some things of its own first.
    line = next((line for line in process.stdout if line.startswith("cluster at ")), None)
    assert line, (tmp_path / "cluster.log").read_text()
    yield line.removeprefix("cluster at ").strip()
    process.communicate("", timeout=60)


def test_ray_makes_the_same_cells(
    address: str, grid: Path, uninterrupted: Path, read_results: Callable[[Path], dict[str, bytes]]
) -> None:
    output, script = grid.parent / "out", grid.parent / "ablate.py"
    script.write_text(ABLATE)
    command = [sys.executable, str(script), str(grid), "noise=0.5"]
    command += [f"--output={output}", "--launcher=ray", "--threads=1"]
    environment = os.environ | {"RAY_ADDRESS": address}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr
    expected = {name: found for name, found in read_results(uninterrupted).items() if "noise=0.5" in name}
    assert read_results(output) == expected
    assert all(json.loads(path.read_text())["attempts"] == 1 for path in output.glob("cells/*/cell.json"))
