"""What happens around training: one callback a file."""

from callbacks.final_validation import FinalValidation
from callbacks.graceful_stop import GracefulStop
from callbacks.predictions import WritePredictions
from callbacks.progress import PreferenceProgressBar
from callbacks.resources import ResourceMonitor
from callbacks.run_summary import RunSummary

__all__ = [
    "FinalValidation",
    "GracefulStop",
    "PreferenceProgressBar",
    "ResourceMonitor",
    "RunSummary",
    "WritePredictions",
]
