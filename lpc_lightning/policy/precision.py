"""Fast number formats of a device."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn

Precision = Literal["auto", "float32", "bfloat16"]
"""Values of `--precision` of `evaluate`, `adapt` and `explain`."""
WEIGHTS_TYPE: dict[str, Literal["auto", "float32"]] = {"float32": "float32", "bfloat16": "auto"}
"""Type of the weights at each precision; see `open_module`."""
TRAINER_PRECISION = {"float32": "32-true", "bfloat16": "bf16-mixed"}
"""Each precision as `trainer.precision`."""
INSTRUCTIONS = {"bfloat16": ("avx512_bf16", "amx_bf16"), "float16": ("avx512_fp16", "amx_fp16")}
"""Instructions of x86 processors that multiply each type fast, by the names of `torch.cpu.get_capabilities`."""
PRECISION_ADVICE = (
    "Set the precision to float32: `trainer.precision` to 32-true (evaluate, adapt and explain: --precision float32)."
)
WEIGHTS_ADVICE = "Set the type of the weights to float32: `policy.dtype` (generate, alpaca: --dtype) to float32."


def is_bfloat16_fast(device: str) -> bool:
    """Return whether bfloat16 products are fast: on most GPUs, and on CPUs with AMX or AVX512-BF16."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return device == "cpu" and _has_instructions("bfloat16")


def resolve_precision(precision: Precision, device: str) -> Literal["float32", "bfloat16"]:
    """Choose the precision of `auto`: bfloat16 if the device multiplies it fast, else float32.

    Args:
        precision: The setting.
        device: `auto`, `cpu`, `cuda`, `cuda:1` ...
    """
    if precision == "auto":
        return "bfloat16" if is_bfloat16_fast(device_type(device)) else "float32"
    return precision


def device_type(device: str) -> str:
    """Return the type of a device, `cpu` or `cuda`. `auto` is a GPU if there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device.partition(":")[0]


def warn_of_slow_products(device: str, dtype: str, advice: str) -> None:
    """Warn if an x86 processor has no instructions for the products of a 16-bit type.

    Other processors are not known to be slow.

    Args:
        device: Type of the device that computes.
        dtype: The type of the products, such as `bfloat16`.
        advice: What to do.
    """
    is_x86 = torch.cpu.get_capabilities().get("architecture") == "x86_64"
    if device == "cpu" and is_x86 and dtype in INSTRUCTIONS and not _has_instructions(dtype):
        names = " nor ".join(name.upper().replace("_", "-") for name in INSTRUCTIONS[dtype])
        rank_zero_warn(
            f"{dtype} is slow on this processor, which has neither {names}: training takes about ten times as long as "
            f"in float32. {advice}"
        )


def _has_instructions(dtype: str) -> bool:
    features = torch.cpu.get_capabilities()
    return any(features.get(name) for name in INSTRUCTIONS[dtype])
