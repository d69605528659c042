"""Derived seeds: the same on every machine, and different for different parts."""

from __future__ import annotations

import itertools

import pytest
import torch

from lpc_lightning.seeding import derive, run_seed, seed_draws


# The first 16 hex digits of `printf 'step/0/1/2/3' | sha256sum`, without the last bit.
@pytest.mark.parametrize(
    ("parts", "digits"),
    [
        (("step", 0, 1, 2, 3), "6272cbcf2035280b"),
        (("evaluation", 7, 0, 0), "3d1cd3f9912e276b"),
        (("order",), "3eeb7e96e59ce40f"),
    ],
)
def test_derive_is_63_bits_of_sha256(parts: tuple[object, ...], digits: str) -> None:
    assert derive(*parts) == int(digits, 16) // 2
    assert 0 <= derive(*parts) < 2**63


def test_derive_depends_on_parts_and_order() -> None:
    parts = list(itertools.product(["step", "evaluation"], range(3), range(11), range(12)))
    assert len({derive(*part) for part in parts}) == len(parts)
    assert derive("step", 1, 2) != derive("step", 2, 1)
    assert derive("step", 1, 11) != derive("step", 11, 1)


def test_seed_on_cpu_is_not_queued_for_gpus() -> None:
    queued = len(torch.cuda._queued_calls)
    for seed in (5, 2**63 - 1):
        seed_draws(seed, torch.device("cpu"))
        assert torch.equal(torch.rand(4), torch.rand(4, generator=torch.Generator().manual_seed(seed)))
    assert len(torch.cuda._queued_calls) == queued


def test_seed_on_cuda_leaves_other_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expect the seed of `torch.manual_seed` on the CPU and on CUDA. Seeds of unused GPUs would cost a stack trace."""
    seeds: list[tuple[str, int]] = []
    for kind in ("cuda", "xpu", "mtia"):
        monkeypatch.setattr(getattr(torch, kind), "manual_seed_all", lambda seed, kind=kind: seeds.append((kind, seed)))
    seed_draws(5, torch.device("cuda", 0))
    assert torch.equal(torch.rand(4), torch.rand(4, generator=torch.Generator().manual_seed(5)))
    assert seeds == [("cuda", 5)]


@pytest.mark.parametrize(("setting", "seed"), [(None, 0), ("", 0), ("0", 0), ("41", 41)])
def test_run_seed_from_lightning(monkeypatch: pytest.MonkeyPatch, setting: str | None, seed: int) -> None:
    if setting is None:
        monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    else:
        monkeypatch.setenv("PL_GLOBAL_SEED", setting)
    assert run_seed() == seed
