"""States after the lower layers that are not trained, kept in memory, so that a known sequence skips these layers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lpc_lightning.errors import ConfigError, UnsupportedPolicyError
from lpc_lightning.policy.attention_kernel import differences, rounding
from lpc_lightning.policy.state_store import StateStore
from lpc_lightning.types import PIECES, PreferenceBatch

if TYPE_CHECKING:
    from lpc_lightning.policy.causal import CausalPolicy


class _Piece(NamedTuple):
    """Prompt, completion or whole sequence in a row of a batch."""

    row: int
    columns: slice
    ids: np.ndarray
    """(n,) tokens of the sequence up to the end of the piece."""


class FrozenStates:
    """States of sequences after the layers below the first trained one.

    They are a function of the tokens, so that they are looked up by the tokens. Each sequence is computed alone. So its
    states do not depend on its batch or on what was computed before, and a resumed run has equal bits.
    """

    def __init__(self, policy: CausalPolicy, gib: float) -> None:
        """Find the layers that are not trained, and check that their states are enough for the others.

        Args:
            policy: The policy. What is trained does not change from now on.
            gib: Most memory for states. Sequences beyond it are computed each time.

        Raises:
            ConfigError: The first layer or the embeddings are trained.
            UnsupportedPolicyError: The layers return more than their states, or read more of the lower ones.
        """
        self._policy = policy
        self.store = StateStore(gib)
        """The states, by a hash of the tokens."""
        self._weights: tuple[Any, ...] | None = None
        layers = policy.layers
        trained = [any(weight.requires_grad for weight in layer.parameters()) for layer in layers]
        self.depth = trained.index(True) if True in trained else len(layers)
        """Number of layers below the first trained one."""
        self._lower, self._upper = layers[: self.depth], layers[self.depth :]
        if layers and (not self.depth or any(weight.requires_grad for weight in self._frozen_weights())):
            raise ConfigError(
                f"policy.frozen_states_gib: found {gib:g}, and a first layer or embeddings that are trained. Expected "
                "policy.lora with policy.lora.target_modules in upper layers alone, or policy.trainable false. Set "
                "policy.frozen_states_gib to 0 for other policies."
            )
        self._check(gib)

    def share(self, folder: Path) -> None:
        """Share the states with other runs whose policy and precision are the same.

        Args:
            folder: Folder of this policy and precision.
        """
        self.store.clear()  # another run may have had another precision
        self.store.share(folder)
        self._weights = None  # a trainer converts them before the first batch

    @contextmanager
    def of(self, batch: PreferenceBatch) -> Iterator[None]:
        """Have the policy use the kept states of a batch in place of its lower layers."""
        states = self._states(batch)
        with _replaced(self._lower, lambda *_, **__: states):
            yield

    @torch.no_grad()
    def _states(self, batch: PreferenceBatch) -> Tensor:
        """Return (R, T, d) states after the lower layers, 0 at padding."""
        self._forget_other_weights()
        states: Tensor | None = None
        for piece in _pieces(batch):
            own = self._look_up(piece)
            if states is None:
                states = own.new_zeros(*batch.input_ids.shape, own.shape[-1])
            states[piece.row, piece.columns] = own
        assert states is not None
        return states

    def _look_up(self, piece: _Piece) -> Tensor:
        """Return (n, d) states of the tokens of a piece, from memory or computed."""
        count = piece.columns.stop - piece.columns.start
        # Under autocast, states have other values.
        mixed = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        key = hashlib.blake2b(f"{count} {mixed} ".encode() + piece.ids.tobytes(), digest_size=16).hexdigest()
        if (states := self.store.get(key)) is None:
            states = self._compute(torch.from_numpy(piece.ids)[None])[0, -count:].clone()
            self.store.add(key, states)
        return states

    def _compute(self, ids: Tensor) -> Tensor:
        """Return (1, T, d) states of a sequence (1, T) after the lower layers."""
        found: list[Tensor] = []
        handle = self._lower[-1].register_forward_hook(lambda _module, _args, output: found.append(output))
        try:
            with _replaced(self._upper, _first_argument):
                self._policy.states(*_alone(ids))
        finally:
            handle.remove()
        if not isinstance(found[0], Tensor) or found[0].shape[:-1] != ids.shape:
            raise TypeError(f"found {type(found[0]).__name__} as a layer's output, expected (1, T, d) states")
        return found[0]

    def _frozen_weights(self) -> list[Tensor]:
        """Return the weights of the backbone outside the upper layers."""
        upper = {id(weight) for layer in self._upper for weight in layer.parameters()}
        return [weight for weight in self._policy.backbone.parameters() if id(weight) not in upper]

    def _forget_other_weights(self) -> None:
        """Forget the states if weights of the lower layers have been loaded or converted since."""
        weights = tuple((weight.data_ptr(), weight._version) for weight in self._frozen_weights())
        if self._weights not in (None, weights):
            self.store.clear()
        self._weights = weights

    @torch.no_grad()
    def _check(self, gib: float) -> None:
        """Compare the last states of a few tokens with those that are computed from the kept states."""
        device = self._policy.model.device
        ids = torch.arange(1, 9, device=device)[None] * (self._policy.head.weight.shape[0] // 16)
        whole = self._policy.states(*_alone(ids))
        try:
            states = self._compute(ids)
            self._compute(ids.flip(1))  # what the lower layers leave elsewhere is now that of other tokens
            with _replaced(self._lower, lambda *_, **__: states):
                again = self._policy.states(*_alone(ids))
            equal = again.shape == whole.shape and bool(differences(again, whole).max() <= rounding(whole))
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            equal = False
        if not equal:
            name = type(self._policy.causal_lm).__name__
            raise UnsupportedPolicyError(
                f"policy.frozen_states_gib: found {gib:g} for {name}, whose layers do not pass on "
                "states alone, expected 0."
            )


def _pieces(batch: PreferenceBatch) -> Iterator[_Piece]:
    """Yield prompts and completions of packed rows, or the whole sequences of plain rows."""
    rows = batch.input_ids.numpy()
    if batch.segments is None:
        for row, length in enumerate(batch.attention_mask.sum(1).tolist()):
            yield _Piece(row, slice(0, length), rows[row, :length])
        return
    for row, segments in enumerate(batch.segments.numpy()):
        starts = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), len(segments)]
        prompt = rows[row, :0]
        for start, stop in pairwise(starts):
            if segments[start] < 0:  # padding
                continue
            own = rows[row, start:stop]
            is_prompt = segments[start] % PIECES == 0
            yield _Piece(row, slice(start, stop), own if is_prompt else np.concatenate([prompt, own]))
            prompt = own if is_prompt else prompt


def _alone(ids: Tensor) -> tuple[Tensor, Tensor, None, Tensor]:
    """Return the inputs of `CausalPolicy.states` for a sequence (1, T)."""
    return ids, torch.ones_like(ids), None, torch.arange(ids.shape[1], device=ids.device)[None]


def _first_argument(*args: Any, **options: Any) -> Any:
    """Return the states that a layer is called with."""
    return args[0] if args else options["hidden_states"]


@contextmanager
def _replaced(layers: Iterable[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the `forward` of layers."""
    layers = list(layers)
    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            if before is None:
                del layer.forward
            else:
                layer.forward = before
