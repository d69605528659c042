"""What each code adds to the logits, for engines that serve the plain policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lpc_lightning.errors import ConfigError, DamagedFileError
from lpc_lightning.files.integrity import check_listed
from lpc_lightning.files.json_files import read_json_object

BIASES = "code_biases.safetensors"
"""File with the table in an export."""
CODE, WEIGHTS, ANNOTATOR = "latent_code", "latent_weights", "latent_annotator"
ARGUMENTS = (CODE, WEIGHTS, ANNOTATOR)
"""Arguments of a request that choose its latent. A request has at most one of them."""
ANNOTATORS = "code_weights.json"
"""File with the weights of annotators, as `lpc-lightning adapt` writes it, beside the table."""


@dataclass(frozen=True)
class CodeBiases:
    """The table of an export made with `--code_biases true`, and the weights of annotators."""

    table: Tensor
    """(K, V) what each code adds to the logits."""
    annotators: Mapping[str, list[float]] = field(default_factory=dict)
    """Weights over the codes (K), by name."""

    @classmethod
    def read(cls, folder: Path) -> CodeBiases:
        """Read `code_biases.safetensors` and, if it is there, `code_weights.json`.

        Raises:
            ConfigError: The folder has no table or not the one that was written with its weights, or the weights of
                annotators cannot be read.
        """
        if not (folder / BIASES).is_file():
            raise ConfigError(
                f"{folder}: found no {BIASES}, expected a local folder that `lpc-lightning export --code_biases true` "
                "has written."
            )
        try:
            check_listed(folder / BIASES)
        except DamagedFileError as error:
            raise ConfigError(
                f"{error}, expected the table that was exported with these weights. Export the checkpoint again."
            ) from error
        names = folder / ANNOTATORS
        try:
            annotators = read_json_object(names) if names.is_file() else {}
        except DamagedFileError as error:
            raise ConfigError(f"{error} Write it again with `lpc-lightning adapt`.") from error
        return cls(load_file(folder / BIASES)["code_biases"].float(), annotators)

    def weights(self, arguments: Mapping[str, Any] | None) -> Tensor | None:
        """Return the weights over the codes (K) that the arguments of a request choose. None: the plain policy.

        Args:
            arguments: Further arguments of a request: `latent_code`, the number of a code; or `latent_weights`, K
                numbers, also as a text with commas; or `latent_annotator`, a name. Other arguments are not read.

        Raises:
            ValueError: The arguments contradict each other, or do not fit the table.
        """
        name, value = chosen_argument(arguments)
        return None if name is None else READERS[name](self, value)

    def bias(self, weights: Tensor) -> Tensor:
        """Return (V,) what the weights over the codes (K) add to the logits."""
        return weights.to(self.table) @ self.table

    def logit_bias(self, weights: Tensor, most: int | None = None) -> list[tuple[int, float]]:
        """Return pairs of a token and its bias, largest first, for engines that take a bias of single tokens.

        The mean over the vocabulary is subtracted, which changes no probability. A limit is an approximation: the
        other tokens then have no bias.

        Args:
            weights: (K,) weights over the codes.
            most: Number of tokens, those with the largest absolute bias. None: the whole vocabulary.
        """
        bias = self.bias(weights)
        bias = bias - bias.mean()
        largest = bias.abs().argsort(descending=True, stable=True)[:most]
        return [(int(token), float(bias[token])) for token in largest]

    def _of_code(self, value: Any) -> Tensor:
        count = len(self.table)
        try:
            code = int(str(value))
        except ValueError:
            code = -1
        if not 0 <= code < count:
            raise ValueError(f"{CODE}: found {value!r}, expected the number of a code, 0 to {count - 1}.")
        return torch.nn.functional.one_hot(torch.tensor(code), count).float()

    def _of_weights(self, value: Any) -> Tensor:
        entries = value.split(",") if isinstance(value, str) else value
        try:
            weights = torch.tensor([float(entry) for entry in entries])
        except (TypeError, ValueError, OverflowError):
            weights = torch.empty(0)
        if len(weights) != len(self.table) or not weights.isfinite().all():
            expected = f"{len(self.table)} finite numbers, one for each code"
            raise ValueError(f"{WEIGHTS}: found {value!r}, expected {expected}.")
        return weights

    def _of_annotator(self, value: Any) -> Tensor:
        if not isinstance(value, str) or value not in self.annotators:
            raise ValueError(
                f"{ANNOTATOR}: found {value!r}, expected one of the {len(self.annotators)} names in {ANNOTATORS}."
            )
        return self._of_weights(self.annotators[value])


READERS = {CODE: CodeBiases._of_code, WEIGHTS: CodeBiases._of_weights, ANNOTATOR: CodeBiases._of_annotator}


def chosen_argument(arguments: Mapping[str, Any] | None) -> tuple[str | None, Any]:
    """Return the argument of a request that chooses its latent, with its value. (None, None) if there is none.

    Raises:
        ValueError: There are several.
    """
    given = {name: arguments[name] for name in ARGUMENTS if arguments and arguments.get(name) is not None}
    if len(given) > 1:
        raise ValueError(f"extra_args: found {' and '.join(given)}, expected at most one of {', '.join(ARGUMENTS)}.")
    return next(iter(given.items()), (None, None))
