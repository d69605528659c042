"""What rounding adds to log pi(y|x) / pi_ref(y|x), and so to a preference pair's margin.

While a policy has the reference's weights, both round alike, and the ratio is exactly 1. Once any weight has moved,
however little, its activations round differently, and the ratio carries the difference of two roundings:

    python -m benchmarks.log_ratio_noise --data $LPC_DATA_DIR/preferences/dsp_domain_pairs.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.batches import first_batches
from lpc_lightning.data import DataError
from lpc_lightning.policy import CausalPolicy, PretrainedPolicy
from lpc_lightning.types import PreferenceBatch

PRECISIONS = {"bf16-mixed": True, "32-true": False}
"""Whether autocast has matrix products done in bfloat16."""


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="folder of the policy")
    parser.add_argument("--data", type=Path, required=True, help="file of preference pairs")
    parser.add_argument("--batches", type=int, default=8, help="of four pairs")
    parser.add_argument("--change", type=float, default=1e-8, help="how far each weight moves, up or down by chance")
    options = parser.parse_args()
    spec = PretrainedPolicy(options.model)
    try:
        batches = first_batches(options.data, spec, options.batches)
    except DataError as error:
        sys.exit(str(error))
    tokens = torch.cat([batch.lengths for batch in batches]).float().mean()
    print(f"{len(batches)} batches of 4 pairs, {tokens:.0f} tokens an answer; each weight moved by {options.change}\n")
    print("| | answers, nats | margins, nats |\n|---|---|---|")
    policy = spec.build().eval()
    for name, noise in noise_of(policy, batches, options.change).items():
        margins = noise[:, 0] - noise[:, 1]
        print(f"| {name} | {_root_mean_square(noise):.5f} | {_root_mean_square(margins):.5f} |")


def noise_of(policy: CausalPolicy, batches: Sequence[PreferenceBatch], change: float) -> dict[str, Tensor]:
    """By precision: (pairs, 2) nats by which log-probabilities change when each weight moves by `change`.

    The weights stay moved.
    """
    before = {name: _logps(policy, batches, autocast) for name, autocast in PRECISIONS.items()}
    generator = torch.Generator().manual_seed(0)
    for weight in policy.parameters():
        up = torch.rand(weight.shape, generator=generator) < 0.5
        weight.data += torch.where(up, change, -change).to(weight)
    return {name: _logps(policy, batches, autocast) - before[name] for name, autocast in PRECISIONS.items()}


@torch.no_grad()
def _logps(policy: CausalPolicy, batches: Sequence[PreferenceBatch], autocast: bool) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return torch.cat([policy.reference_logps(batch).view(2, -1).T for batch in batches])


def _root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


if __name__ == "__main__":
    main()
