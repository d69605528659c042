"""Latent spaces: a preference representation z for each pair, with several estimators and controls."""

from lpc_lightning.latent.controls import GaussianSpace, MLPSpace, PosteriorOnlySpace, PriorOnlySpace, VectorSpace
from lpc_lightning.latent.discrete import DiscreteSpace
from lpc_lightning.latent.estimators import ExpectedSpace, GumbelSpace, MarginalSpace
from lpc_lightning.latent.schedules import Constant, Cosine, Exponential, Linear, Schedule, WarmUp
from lpc_lightning.latent.space import InferenceForm, LatentSpace, LatentTerms, PairScorer, PriorMode

__all__ = [
    "Constant",
    "Cosine",
    "DiscreteSpace",
    "ExpectedSpace",
    "Exponential",
    "GaussianSpace",
    "GumbelSpace",
    "InferenceForm",
    "LatentSpace",
    "LatentTerms",
    "Linear",
    "MLPSpace",
    "MarginalSpace",
    "PairScorer",
    "PosteriorOnlySpace",
    "PriorMode",
    "PriorOnlySpace",
    "Schedule",
    "VectorSpace",
    "WarmUp",
]
