"""Compiled against eager training on the same batches, and one code's log-probabilities by both ways of computing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from benchmarks.gpu import ours
from benchmarks.gpu.cases import HH_SMALL, TINY, Case
from benchmarks.gpu.measure import Bench


def compare_compiled(bench: Bench, case: Case) -> dict[str, Any]:
    """Train twice, compiled and eager, and compare the losses of the same pairs."""
    losses = []
    for compiled in (True, False):
        run = replace(case, compiled=compiled)
        recorder = ours.fit(run, bench.lengths_file(run), bench.scratch, bench.device)
        losses.append(torch.cat([each.float().cpu() for each in recorder.losses]))
        torch.compiler.reset()
    apart = (losses[0] - losses[1]).abs()
    return {
        "pairs": len(apart),
        "loss_largest": float(apart.max()),
        "loss_mean": float(apart.mean()),
        "mean_loss_apart": float((losses[0].mean() - losses[1].mean()).abs()),
    }


class CodePaths(Callback):
    """Computes log-probabilities under some codes once as z of every pair and once by the pass for all codes."""

    CODES = 4

    def __init__(self) -> None:
        """Start without a result."""
        self.apart: torch.Tensor | None = None

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Compare on the first batch."""
        if self.apart is not None:
            return
        with trainer.precision_plugin.forward_context():
            reading = pl_module.policy(batch)
            codes = pl_module.latent.codebook.weight.detach()
            each = [reading.logps(code.expand(batch.pairs, -1)) for code in codes[: self.CODES]]
            at_once = reading.logps_per_code(codes)[:, : self.CODES]
        self.apart = (torch.stack(each, dim=1) - at_once).abs() / batch.lengths.to(at_once.device)[:, None]


def compare_paths(bench: Bench, case: Case) -> dict[str, Any]:
    """Compare both ways, in nats a token."""
    paths = CodePaths()
    ours.fit(case, bench.lengths_file(case), bench.scratch, bench.device, extra=paths)
    assert paths.apart is not None
    return {"nats_a_token_largest": float(paths.apart.max()), "nats_a_token_mean": float(paths.apart.mean())}


def agreement_cases(tiny: bool) -> tuple[Case, Case]:
    """Return the case that is trained compiled and eager, and the one with codes.

    The tiny one has whole programs of layers, as on a GPU: the default attention of a CPU is not compiled. Its batches
    have several rows each, since a batch of one row would be compiled on its own.
    """
    compiled = replace(TINY, attention="sdpa", pairs=6, steps=2) if tiny else replace(HH_SMALL, steps=8)
    codes = replace(TINY if tiny else HH_SMALL, latent="marginal", steps=1)
    return replace(compiled, warmup=1), replace(codes, warmup=1)
