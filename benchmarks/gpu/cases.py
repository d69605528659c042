"""What is measured: models, data, sides and batches, the most important first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

GRAPHS = {"auto": None, True: "with CUDA graphs", False: "without CUDA graphs"}


@dataclass(frozen=True)
class Case:
    """One training run of one side."""

    shape: str
    """Model, one of `models.SHAPES`."""
    data: str
    """Lengths of the pairs, one of `lengths.FITTED`."""
    pairs: int
    """Pairs in a batch."""
    precision: Literal["bf16-mixed", "bf16-true", "32-true"]
    side: Literal["ours", "TRL"]
    latent: str | None = None
    """Name of a file in `configs/latent`; ours only."""
    attention: str = "auto"
    """Kernel, as `policy.attention` names it; ours only."""
    compiled: bool = True
    """True compiles the decoder layers; ours only."""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """True replays the compiled backbone from CUDA graphs; ours only."""
    checkpointing: bool = False
    """True computes the activations of each layer again in the backward pass."""
    steps: int = 24
    warmup: int = 8
    """First steps that no median counts."""
    limit: float = 75.0
    """Seconds after which the run stops at the next step."""

    @property
    def work(self) -> str:
        """What both sides have in common."""
        return f"{self.shape} {self.precision}, {self.data}, {self.pairs} pairs"

    @property
    def method(self) -> str:
        """Side and options."""
        parts = [self.side, self.latent, "checkpointing" if self.checkpointing else None]
        if self.side == "ours":
            parts.append("eager" if not self.compiled else GRAPHS[self.cuda_graphs])
        return ", ".join(part for part in parts if part)

    @property
    def name(self) -> str:
        """Name in the tables."""
        return f"{self.work}: {self.method}"


ULTRAFEEDBACK = Case("1.17B", "ultrafeedback", 8, "bf16-true", "ours")
HH_SMALL = Case("135M", "hh", 16, "bf16-mixed", "ours")
HH_LARGE = Case("1.17B", "hh", 16, "bf16-true", "ours")
TINY = Case("tiny", "hh", 4, "32-true", "ours", compiled=False, steps=3, warmup=1)


def main_cases(tiny: bool) -> list[Case]:
    """Return the cases of part b but the search for the best batch, in order of importance."""
    if tiny:
        return [TINY, _trl(TINY), replace(TINY, latent="marginal"), _trl(TINY, checkpointing=True)]
    large, small = ULTRAFEEDBACK, HH_SMALL
    return [
        large,
        _trl(large),
        small,
        _trl(small),
        replace(large, latent="marginal"),
        replace(large, latent="gumbel"),
        replace(small, latent="marginal"),
        replace(small, latent="gumbel"),
    ]


def further_cases(tiny: bool) -> list[Case]:
    """Return the cases of part b that come after the profile: other settings of both sides."""
    if tiny:
        return []
    large, small = ULTRAFEEDBACK, HH_SMALL
    return [
        HH_LARGE,
        _trl(HH_LARGE),
        replace(small, cuda_graphs=False),
        replace(large, cuda_graphs=True),
        replace(small, compiled=False, steps=16, warmup=6),
        replace(large, compiled=False, steps=16, warmup=6),
        _trl(large, checkpointing=True, steps=12, warmup=4),
        _trl(small, checkpointing=True, steps=12, warmup=4),
    ]


def profiled_cases(tiny: bool) -> list[Case]:
    """Return the cases of part c."""
    if tiny:
        return [replace(TINY, steps=5, warmup=2)]
    short = {"steps": 14, "warmup": 8}
    cases = (HH_SMALL, ULTRAFEEDBACK, replace(HH_SMALL, latent="marginal"))
    return [replace(each, **short) for each in cases]  # type: ignore[arg-type]  # fields by name


def best_batch_cases(tiny: bool) -> Iterator[Case]:
    """Yield the cases of the search for each side's best batch, without and with checkpointing.

    Checkpointing allows larger batches where memory runs out without it.
    """
    if tiny:
        return
    short = replace(HH_LARGE, steps=12, warmup=5, limit=40.0)
    yield _trl(short, pairs=32)
    yield from (replace(short, pairs=pairs) for pairs in (32, 64, 128))
    yield _trl(short, pairs=64)
    yield _trl(short, pairs=64, checkpointing=True)
    yield replace(short, pairs=128, checkpointing=True)


def _trl(case: Case, **changes: object) -> Case:
    return replace(case, side="TRL", compiled=False, **changes)  # type: ignore[arg-type]  # fields by name
