"""What a latent costs: steps with and without it in turn, in one process, on the same batches.

A few percent are less than two runs of the same thing differ by on a shared machine. Step by step in turn, they show.

    python -m benchmarks.latent_cost --data $LPC_DATA_DIR/preferences/hh_helpful_harmless.jsonl

In bf16-mixed, or in float32 on a CPU without AVX512-BF16 and AMX.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.batches import batches_of, step_options
from benchmarks.live_memory import peak_bytes
from lpc_lightning.algorithms import DPO
from lpc_lightning.latent import GumbelSpace, LatentSpace, MarginalSpace
from lpc_lightning.policy import PolicySpec, PretrainedPolicy
from lpc_lightning.policy.precision import is_bfloat16_fast
from lpc_lightning.types import PreferenceBatch

LATENTS: dict[str, Callable[[], LatentSpace] | None] = {
    "no latent": None,
    "gumbel, K = 32": lambda: GumbelSpace(num_codes=32),
    "marginal, K = 32": lambda: MarginalSpace(num_codes=32),
    "marginal, K = 128": lambda: MarginalSpace(num_codes=128),
}
PLAIN = "no latent"


class Stepper:
    """A module and its optimizer, one step at a time."""

    def __init__(self, policy: PolicySpec, latent: LatentSpace | None) -> None:
        self.module = DPO(policy=policy, latent=latent)
        self.module.configure_model()
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-6, weight_decay=0.0, fused=True)

    def loss(self, batch: PreferenceBatch) -> Tensor:
        """As `PreferenceModule.training_step` has it, metrics included."""
        device = self.module.device.type
        with torch.autocast(device, torch.bfloat16, enabled=is_bfloat16_fast(device)):
            reading, score = self.module.score_batch(batch)
            terms = self.module.training_terms(reading.states, score, 0.5)
            self.module.train_metrics.update(terms, reading.states)
            return (terms.pairs.losses + terms.penalty).mean()

    def step(self, batch: PreferenceBatch) -> None:
        """Forward, backward, clip, step."""
        self.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.module.train_metrics.collect()


def main() -> None:
    """Measure and print a table."""
    options = step_options(__doc__, steps=12, batch_size=4).parse_args()
    policy = PretrainedPolicy(options.model)
    batches = batches_of(options, policy)

    sides = {name: Stepper(policy, latent and latent()) for name, latent in LATENTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number, batch in enumerate(batches):
        names = list(sides)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            sides[name].step(batch)
            seconds[name].append(time.perf_counter() - start)
    largest = max(batches, key=lambda batch: batch.input_ids.numel())
    peaks = {name: peak_bytes(partial(side.step, largest)) for name, side in sides.items()}
    print(table(seconds, peaks, {name: _state(side) for name, side in sides.items()}))


def _state(side: Stepper) -> int:
    """Bytes of weights and moments, which are there before a step."""
    return 3 * sum(parameter.numel() * parameter.element_size() for parameter in side.module.parameters())


def table(seconds: dict[str, list[float]], peaks: dict[str, int], states: dict[str, int]) -> str:
    """Medians over the steps but the first. A ratio of times is the median of the ratios of the same steps."""
    lines = ["| | s/step | time vs no latent | peak GiB of tensors | memory vs no latent |", "|---|---|---|---|---|"]
    for name, taken in seconds.items():
        ratio = statistics.median(mine / plain for mine, plain in zip(taken[1:], seconds[PLAIN][1:], strict=True))
        memory, plain_memory = peaks[name] + states[name], peaks[PLAIN] + states[PLAIN]
        median = statistics.median(taken[1:])
        cells = [f"{median:.2f}", f"{ratio:.3f}", f"{memory / 2**30:.3f}", f"{memory / plain_memory:.4f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
