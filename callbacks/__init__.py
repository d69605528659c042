"""Callbacks that run around training."""

from lpc_lightning.callbacks.adaptation import AnnotatorAdaptation
from lpc_lightning.callbacks.best_and_last import BestAndLast
from lpc_lightning.callbacks.chosen_reward import ChosenRewardWarning
from lpc_lightning.callbacks.code_explanations import CodeExplanations
from lpc_lightning.callbacks.codebook_monitor import CodebookMonitor
from lpc_lightning.callbacks.final_validation import FinalValidation
from lpc_lightning.callbacks.graceful_stop import GracefulStop
from lpc_lightning.callbacks.label_flip import LabelFlipNoise
from lpc_lightning.callbacks.lm_eval import LMEvaluation
from lpc_lightning.callbacks.predictions import WritePredictions
from lpc_lightning.callbacks.preference_accuracy import PreferenceAccuracy
from lpc_lightning.callbacks.progress import PreferenceProgressBar
from lpc_lightning.callbacks.resources import ResourceMonitor
from lpc_lightning.callbacks.run_summary import RunSummary
from lpc_lightning.callbacks.samples import AnswerSamples
from lpc_lightning.callbacks.step_profile import StepProfile

__all__ = [
    "AnnotatorAdaptation",
    "AnswerSamples",
    "BestAndLast",
    "ChosenRewardWarning",
    "CodeExplanations",
    "CodebookMonitor",
    "FinalValidation",
    "GracefulStop",
    "LMEvaluation",
    "LabelFlipNoise",
    "PreferenceAccuracy",
    "PreferenceProgressBar",
    "ResourceMonitor",
    "RunSummary",
    "StepProfile",
    "WritePredictions",
]
