"""Generator of preference pairs. The factor that decides the label is known for every pair."""

from lpc_lightning.data.synthetic.generator import PreferenceGenerator
from lpc_lightning.data.synthetic.truth import Truth

__all__ = ["PreferenceGenerator", "Truth"]
