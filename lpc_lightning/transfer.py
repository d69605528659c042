"""Copy of numbers from the CPU to a device, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[int] | Sequence[float], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Create a tensor of plain numbers on a device.

    `torch.tensor(values, device=...)` waits until the device has done all work before the copy.

    Args:
        values: The numbers.
        device: Device of the tensor.
        dtype: Type of its elements.
    """
    # Only a copy from page-locked memory is asynchronous. CUDA does not free that memory before the copy is done.
    tensor = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=device.type not in ("cpu", "mps"))
