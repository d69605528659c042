"""What happens around training: one callback a file."""

from callbacks.codebook_monitor import CodebookMonitor
from callbacks.final_validation import FinalValidation
from callbacks.graceful_stop import GracefulStop
from callbacks.lm_eval import LMEvaluation
from callbacks.predictions import WritePredictions
from callbacks.preference_accuracy import PreferenceAccuracy
from callbacks.progress import PreferenceProgressBar
from callbacks.resources import ResourceMonitor
from callbacks.run_summary import RunSummary

__all__ = [
    "CodebookMonitor",
    "FinalValidation",
    "GracefulStop",
    "LMEvaluation",
    "PreferenceAccuracy",
    "PreferenceProgressBar",
    "ResourceMonitor",
    "RunSummary",
    "WritePredictions",
]
