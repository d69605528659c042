"""The latent as a logits processor of whole batches, in the interface of vLLM V1."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lpc_lightning.inference.code_biases import CodeBiases, chosen_argument

if TYPE_CHECKING:
    Base = object
else:
    try:
        from vllm.v1.sample.logits_processor import LogitsProcessor as Base
    except ImportError:  # another engine with this interface, or a test
        Base = object

log = logging.getLogger(__name__)


class CodeBiasProcessor(Base):
    """Adds the bias of the request's latent to each row of the logits.

    The served model is an export with `code_biases.safetensors`. The arguments of a request (`extra_args`, over HTTP
    `vllm_xargs`) choose its latent; see `CodeBiases.weights`. Without one a request gets the plain policy. See
    docs/serving.md.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        """Read the table of the served model.

        Args:
            vllm_config: The engine's configuration. `model_config.model` is the folder.
            device: Device of the logits.
            is_pin_memory: Whether the engine pins memory. Not used: the table is copied once.

        Raises:
            ConfigError: The folder has no table.
        """
        biases = CodeBiases.read(Path(vllm_config.model_config.model))
        self._biases, self._table = biases, biases.table.to(device)
        self._weights: dict[int, Tensor] = {}
        """Weights over the codes of each row that has a latent."""
        self._rows, self._added = torch.empty(0, dtype=torch.long), torch.empty(0, self._table.shape[1])

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a request with several arguments for its latent.

        Raises:
            ValueError: There are several.
        """
        chosen_argument(sampling_params.extra_args)

    def is_argmax_invariant(self) -> bool:
        """Return False: a bias changes the likeliest token."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the requests that leave, join and move within the batch, in this order.

        Args:
            batch_update: `removed` rows, `added` (row, parameters, prompt, output) and `moved` (row, row, direction).
                None if nothing has changed.
        """
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._weights.pop(row, None)
        for row, parameters, *_ in batch_update.added:
            self._set(row, self._read(parameters))
        for source, target, direction in batch_update.moved:
            moved, replaced = self._weights.pop(source, None), self._weights.pop(target, None)
            self._set(target, moved)
            if direction.name == "SWAP":
                self._set(source, replaced)
        self._prepare(sorted(self._weights))

    def apply(self, logits: Tensor) -> Tensor:
        """Add the biases to the logits (rows, V or more), in place."""
        if len(self._rows):
            # An engine may pad the vocabulary.
            logits[:, : self._table.shape[1]].index_add_(0, self._rows, self._added.to(logits.dtype))
        return logits

    def _read(self, parameters: Any) -> Tensor | None:
        try:
            return self._biases.weights(parameters.extra_args)
        except ValueError as error:  # an error here would end the engine, with all other requests
            log.error("%s The request is answered by the plain policy.", error)
            return None

    def _set(self, row: int, weights: Tensor | None) -> None:
        if weights is None:
            self._weights.pop(row, None)
        else:
            self._weights[row] = weights

    def _prepare(self, rows: Sequence[int]) -> None:
        device = self._table.device
        self._rows = torch.tensor(rows, dtype=torch.long, device=device)
        if rows:
            self._added = torch.stack([self._weights[row] for row in rows]).to(device) @ self._table
