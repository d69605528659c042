"""Callbacks that are refused.

They are callbacks of Lightning that do not work with a module whose models are built after the setup of the callbacks,
a second callback of one class of this package, and averages of weights in 16 bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging, WeightAveraging

from lpc_lightning.errors import ConfigError

REASONS: dict[type[Callback], str] = {
    BatchSizeFinder: (
        "which tries batch sizes in turn from one checkpoint, expected none, because a checkpoint has the batch size "
        "of its run. Set data.batch_size and trainer.accumulate_grad_batches."
    ),
    LearningRateFinder: (
        "which needs a module with a single learning rate, expected none. Set model.optimizer.lr and model.latent_lr, "
        "or choose them with `tune` of a grid (lpc-lightning ablate)."
    ),
    StochasticWeightAveraging: (
        "which copies the module before its weights exist, so that it averages none, expected another callback: "
        "EMAWeightAveraging or WeightAveraging of lightning.pytorch.callbacks."
    ),
}
"""Why a callback is refused, and what to do."""


PACKAGE = "lpc_lightning.callbacks."
"""Start of the names of the modules with this package's callbacks."""


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Refuse callbacks that would fail later, do nothing, or undo what another callback does.

    Two callbacks of one class of this package would log different values by the same names, which Lightning averages,
    and write the same files.

    Raises:
        ConfigError: One of the callbacks is refused.
    """
    own = Counter(kind.__name__ for callback in callbacks if (kind := _own_class(callback)) is not None)
    for name, count in own.items():
        if count > 1:
            raise ConfigError(
                f"callbacks: found {count} of {name}, expected one, because they log the same names and write the same "
                "files. `--callbacks+=` adds a callback to those of the config. To change one of these, give the whole "
                "list in a file: --callbacks FILE."
            )
    for callback in callbacks:
        for refused, reason in REASONS.items():
            if isinstance(callback, refused):
                raise ConfigError(f"callbacks: found {type(callback).__name__}, {reason}")


def check_averages(callbacks: Sequence[Callback], precision: str, dtype: str) -> None:
    """Refuse averages of the weights in a fit whose policy has weights of 16 bits.

    Lightning keeps the average in the type of the weights, and the steps of an average are often smaller than half the
    distance of two numbers in bfloat16. Weights that are not trained are averaged as well, and rounded in each step.

    Args:
        callbacks: The callbacks of the run.
        precision: The precision of the trainer.
        dtype: The type of the policy's weights (`policy.dtype`), unless the precision converts them.

    Raises:
        ConfigError: There is such a callback.
    """
    average = next((callback for callback in callbacks if isinstance(callback, WeightAveraging)), None)
    if average is None:
        return
    consequence = f"with {type(average).__name__}, whose average would be rounded to 16 bits in each step, expected"
    if precision in ("bf16-true", "16-true"):
        mixed = precision.replace("true", "mixed")
        raise ConfigError(f"trainer.precision: found {precision} {consequence} {mixed} or 32-true.")
    if dtype in ("bfloat16", "float16") and precision != "64-true":
        raise ConfigError(f"policy.dtype: found {dtype} {consequence} float32.")


def _own_class(callback: Callback) -> type | None:
    """Return the class of this package that a callback has or extends."""
    return next((kind for kind in type(callback).__mro__ if kind.__module__.startswith(PACKAGE)), None)
