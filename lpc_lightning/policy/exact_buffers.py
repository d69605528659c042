"""Buffers that stay in float32 when a model is converted to 16 bits, as they do when it is built in 16 bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

POSITIONS = ("inv_freq", "embed_positions", "pos_encoding")
"""Names of buffers that families make in float32 under every type of the weights: frequencies, and tables of positions.

In bfloat16, a frequency is off by up to 0.4 %, so that tokens that are far apart are turned by a wrong angle. Other
buffers, such as the factor of Gemma's embeddings, have the type of the weights.
"""


@contextmanager
def exact_buffers(model: PreTrainedModel) -> Iterator[None]:
    """Undo that the block converts these buffers to a type below float32. Moves between devices are kept.

    Besides positions, these are the buffers for which the family asks transformers to load them in float32, such as the
    biases that choose experts. Parameters have the type that is requested: FSDP2 needs one type in each layer.
    """
    names = (*POSITIONS, *(model._keep_in_fp32_modules_strict or ()))
    found = [
        (part, name, buffer)
        for part in model.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None and any(each in name for each in names)
    ]
    yield
    for part, name, before in found:
        after = part._buffers[name]
        if after is not None and _is_narrow(after) and before.is_floating_point():
            part._buffers[name] = before.to(after.device)


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.itemsize < torch.float32.itemsize
