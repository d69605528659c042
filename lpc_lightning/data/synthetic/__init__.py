"""The built-in preference generator: pairs whose deciding factor is known with every row."""

from lpc_lightning.data.synthetic.generator import PreferenceGenerator
from lpc_lightning.data.synthetic.truth import Truth

__all__ = ["PreferenceGenerator", "Truth"]
