"""Test of cells on a Ray cluster with two nodes on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lpc_lightning.evaluation.ablation.command import main
from tests.fixtures.processes import ForkedProcess

pytestmark = pytest.mark.distributed

# Nothing that only watches a cluster is started, and cells have the priority of other processes: by default they wait
# until no test of another process needs a processor.
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_metrics_collection": "0", "RAY_worker_niceness": "0"}
CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster
node = {"num_cpus": 1, "object_store_memory": 10**8}
head = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
cluster = Cluster(initialize_head=True, head_node_args={**node, **head})
cluster.add_node(**node)
print("cluster at", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Address of a cluster of two nodes with one processor each. It is stopped after the test."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (tmp_path / "cluster.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", CLUSTER], stderr=log, env=os.environ | SETTINGS, **pipes)
    assert process.stdout is not None
    # Ray prints other lines first.
    line = next((line for line in process.stdout if line.startswith("cluster at ")), None)
    assert line, (tmp_path / "cluster.log").read_text()
    yield line.removeprefix("cluster at ").strip()
    process.communicate("", timeout=60)


def test_ray_results_equal_local_results(
    address: str, grid: Path, uninterrupted: Path, read_results: Callable[[Path], dict[str, bytes]]
) -> None:
    output, log = grid.parent / "out", grid.parent / "log"
    arguments = ["ablate", str(grid), "noise=0.5", f"--output={output}", "--launcher=ray", "--threads=1"]
    process = ForkedProcess(main, arguments, log=log, RAY_ADDRESS=address)
    assert process.wait(timeout=300) == 0, log.read_text() + process.errors
    assert "Warning" not in process.errors
    expected = {name: content for name, content in read_results(uninterrupted).items() if "noise=0.5" in name}
    assert read_results(output) == expected
    assert all(json.loads(path.read_text())["attempts"] == 1 for path in output.glob("cells/*/cell.json"))
