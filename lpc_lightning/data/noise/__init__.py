"""Wrong training labels: which labels are flipped, and markers in the prompts of flipped pairs."""

from lpc_lightning.data.noise.flip_order import (
    ByAnnotator,
    FlipOrder,
    LongerWins,
    SmallMarginsFirst,
    Uniform,
    UnreliableAnnotators,
)
from lpc_lightning.data.noise.label_noise import LabelNoise

__all__ = [
    "ByAnnotator",
    "FlipOrder",
    "LabelNoise",
    "LongerWins",
    "SmallMarginsFirst",
    "Uniform",
    "UnreliableAnnotators",
]
