"""From a trained latent space to what is left of it at inference."""

from __future__ import annotations

from lpc_lightning.inference.modeling_lpc import InferencePrior
from lpc_lightning.latent import LatentSpace


def inference_prior(space: LatentSpace) -> InferencePrior:
    """The prior of a built space, with tensors of its own: later training does not change it."""
    form = space.inference_form()
    return InferencePrior.of({"kind": form.kind, **form.settings}, form.tensors)
