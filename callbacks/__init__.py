"""What happens around training: one callback a file."""

from callbacks.codebook_monitor import CodebookMonitor
from callbacks.few_shot import FewShotAnnotators
from callbacks.final_validation import FinalValidation
from callbacks.flip_order import ByAnnotator, FlipOrder, LongerWins, SmallMarginsFirst, Uniform
from callbacks.graceful_stop import GracefulStop
from callbacks.label_flip import LabelFlipNoise
from callbacks.lm_eval import LMEvaluation
from callbacks.predictions import WritePredictions
from callbacks.preference_accuracy import PreferenceAccuracy
from callbacks.progress import PreferenceProgressBar
from callbacks.resources import ResourceMonitor
from callbacks.run_summary import RunSummary

__all__ = [
    "ByAnnotator",
    "CodebookMonitor",
    "FewShotAnnotators",
    "FinalValidation",
    "FlipOrder",
    "GracefulStop",
    "LMEvaluation",
    "LabelFlipNoise",
    "LongerWins",
    "PreferenceAccuracy",
    "PreferenceProgressBar",
    "ResourceMonitor",
    "RunSummary",
    "SmallMarginsFirst",
    "Uniform",
    "WritePredictions",
]
