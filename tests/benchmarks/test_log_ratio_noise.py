"""Rounding in a log-ratio: none while the weights are the reference's, and in bfloat16 far more than in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.batches import first_batches
from benchmarks.log_ratio_noise import main, noise_of
from lpc_lightning.policy import CausalPolicy, PretrainedPolicy
from lpc_lightning.types import PreferenceBatch


@pytest.fixture
def spec(arguments: list[str]) -> PretrainedPolicy:
    return PretrainedPolicy(arguments[1])


@pytest.fixture
def policy(spec: PretrainedPolicy) -> CausalPolicy:
    """With logits as far apart as those of a policy that has learned something."""
    policy = spec.build().eval()
    for weight in policy.parameters():
        weight.data *= 10 if weight.dim() > 1 else 1
    return policy


@pytest.fixture
def batches(arguments: list[str], spec: PretrainedPolicy) -> list[PreferenceBatch]:
    return first_batches(Path(arguments[3]), spec, 3)


def test_no_noise_without_a_change(policy: CausalPolicy, batches: list[PreferenceBatch]) -> None:
    for noise in noise_of(policy, batches, 0.0).values():
        assert torch.equal(noise, torch.zeros(12, 2))


def test_a_small_change_is_rounding_in_bfloat16(policy: CausalPolicy, batches: list[PreferenceBatch]) -> None:
    """The change in float32 is right; the error of the other is many times that."""
    noise = noise_of(policy, batches, 1e-6)
    rounding = noise["bf16-mixed"] - noise["32-true"]
    assert 0 < noise["32-true"].square().mean() < rounding.square().mean() / 1000


def test_a_large_change_is_the_same_in_both(policy: CausalPolicy, batches: list[PreferenceBatch]) -> None:
    noise = noise_of(policy, batches, 0.02)
    torch.testing.assert_close(noise["bf16-mixed"], noise["32-true"], rtol=0.1, atol=0.1)


def test_the_command(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["log_ratio_noise.py", *arguments[:4], "--batches", "3"])
    main()
    output = capsys.readouterr().out
    assert output.startswith("3 batches of 4 pairs, ")
    assert [line.split(" | ")[0] for line in output.splitlines()[-2:]] == ["| bf16-mixed", "| 32-true"]


def test_too_few_pairs_are_refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["log_ratio_noise.py", *arguments[:4], "--batches", "4"])
    with pytest.raises(SystemExit, match="found 12 pairs to train on, expected 4 batches of 4"):
        main()
