"""Data pipeline from rows in any supported format to batches of preference pairs."""

from lpc_lightning.data.batch_order import Balanced, BatchOrder, ByAnnotator, ByLength, ByPrompt, Shuffled
from lpc_lightning.data.batching.layouts import Layout, PaddedLayout, SharedPrefixLayout
from lpc_lightning.data.datamodule import PreferenceDataModule
from lpc_lightning.data.mixture import MixtureSource, PreferenceMixture
from lpc_lightning.data.noise.label_noise import LabelNoise
from lpc_lightning.data.preference_data import PreferenceData
from lpc_lightning.data.sources.columns import Columns
from lpc_lightning.data.sources.rows import DataError
from lpc_lightning.data.synthetic_data import SyntheticPreferences

__all__ = [
    "Balanced",
    "BatchOrder",
    "ByAnnotator",
    "ByLength",
    "ByPrompt",
    "Columns",
    "DataError",
    "LabelNoise",
    "Layout",
    "MixtureSource",
    "PaddedLayout",
    "PreferenceData",
    "PreferenceDataModule",
    "PreferenceMixture",
    "SharedPrefixLayout",
    "Shuffled",
    "SyntheticPreferences",
]
