"""Tests of numbers that Lightning takes, but cannot use: one line before any work."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from lpc_lightning.cli.machine import check_devices
from lpc_lightning.cli.number_ranges import RANGES, check_numbers
from lpc_lightning.errors import ConfigError
from tests.fixtures.commands import Command, assert_one_error

FROM_ONE, FROM_ZERO = "an integer from 1 on", "an integer from 0 on"
SEED, CLIPPING = "an integer from 0 to 4294967295.", "a number from 0 on, or null for no clipping."


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("seed_everything", -1, SEED),
        ("seed_everything", 2**32, SEED),
        ("trainer.accumulate_grad_batches", -1, FROM_ONE),
        ("trainer.check_val_every_n_epoch", 0, FROM_ONE),
        ("trainer.check_val_every_n_epoch", -1, FROM_ONE),
        ("trainer.val_check_interval", 0, "a share of an epoch above 0 and up to 1, a number of batches from 1 on"),
        ("trainer.val_check_interval", 0.0, "a share of an epoch above 0 and up to 1, a number of batches from 1 on"),
        ("trainer.num_sanity_val_steps", -2, "a number of batches from 0 on, or -1 for all."),
        ("trainer.log_every_n_steps", -1, FROM_ZERO),
        ("trainer.gradient_clip_val", math.nan, CLIPPING),
        ("trainer.min_epochs", -1, FROM_ZERO),
        ("trainer.min_steps", -1, FROM_ZERO),
    ],
)
def test_number_out_of_range_is_refused(name: str, value: float, expected: str) -> None:
    trainer = dict.fromkeys(RANGES)
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{name}: found {value}, expected {expected}')}"):
        check_numbers(
            SimpleNamespace(
                seed_everything=value if name == "seed_everything" else 0,
                trainer=trainer | {name.removeprefix("trainer."): value},
            )
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("seed_everything=-1", SEED),
        ("trainer.accumulate_grad_batches=0", FROM_ONE),
        ("trainer.gradient_clip_val=-1.0", CLIPPING),
        ("trainer.devices=-2", "a number of processes from 1 on, or auto: the accelerator is the CPU."),
    ],
)
def test_number_out_of_range_is_one_line(flag: str, expected: str, fit: Command, runs: Path) -> None:
    name, _, value = flag.partition("=")
    output = fit(f"--{flag}")
    assert_one_error(output, re.escape(f"{name}: found {value}, expected {expected}"))
    assert len(output.err.splitlines()) == 1
    assert not list(runs.glob("*"))


def test_seed_of_the_environment_is_checked(fit: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "99999999999")
    output = fit("--seed_everything=true")
    assert_one_error(output, r"PL_GLOBAL_SEED: found 99999999999, expected an integer from 0 to 4294967295\.\s*$")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag",
    [
        "seed_everything=4294967295",
        "trainer.check_val_every_n_epoch=null",
        "trainer.val_check_interval=00:00:00:01",
        "trainer.num_sanity_val_steps=-1",
        "trainer.log_every_n_steps=0",
        "trainer.gradient_clip_val=0",
        "trainer.devices=auto",
    ],
)
def test_number_at_the_end_of_its_range(flag: str, fit: Command) -> None:
    output = fit(f"--{flag}", "--trainer.max_steps=1")
    assert output.code == 0, output.err


@pytest.mark.parametrize("devices", ["-1", "nonsense", 1.5, [0]])
def test_devices_of_a_cpu_are_a_number(devices: object) -> None:
    with pytest.raises(ConfigError, match=rf"^trainer\.devices: found {re.escape(str(devices))}, expected a number of"):
        check_devices(devices, "cpu")


def test_devices_of_others_are_not_checked() -> None:
    check_devices([0, 3], "cuda")
    check_devices(-1, "gpu")
