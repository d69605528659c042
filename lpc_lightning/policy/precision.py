"""Fast number formats of a device."""

from __future__ import annotations

import torch


def is_bfloat16_fast(device: str) -> bool:
    """Return whether bfloat16 products are fast: on most GPUs, and on CPUs with AMX or AVX512-BF16."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    features = torch.cpu.get_capabilities() if device == "cpu" else {}
    return bool(features.get("amx_bf16") or features.get("avx512_bf16"))
