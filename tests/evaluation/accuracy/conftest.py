"""Modules with random latents in float64, and the report of their accuracy on batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lpc_lightning.algorithms import DPO, IPO, PreferenceModule, SimPO
from lpc_lightning.algorithms.outputs import EvaluationOutput
from lpc_lightning.evaluation.accuracy.accuracy_modes import AccuracyModes, AccuracyReport
from lpc_lightning.latent import LatentSpace
from lpc_lightning.robust import ConservativeLoss
from lpc_lightning.types import PreferenceBatch

LENGTHS = [(5, 3, 7), (11, 9, 1), (1, 1, 4), (3, 13, 5), (2, 2, 2)]
CODES: dict[str, Any] = {"num_codes": 3, "init_logit_std": 3.0, "hidden": 8}
ALGORITHMS: dict[str, Callable[..., PreferenceModule]] = {
    "dpo": lambda **module: DPO(beta=0.3, reference="live", **module),
    "cdpo": lambda **module: DPO(beta=0.3, robust_loss=ConservativeLoss(0.2), reference="live", **module),
    "ipo": lambda **module: IPO(beta=0.2, reference="live", **module),
    "simpo": lambda **module: SimPO(beta=2.5, gamma_beta_ratio=0.4, **module),
}
Build = Callable[..., PreferenceModule]


@pytest.fixture
def build(tiny_spec: Callable[..., Any], perturb: Callable[..., None], exact: Callable[..., Any]) -> Build:
    """Function that builds a float64 module. Its policy differs from its reference, and its latent is random."""

    def build_module(algorithm: str, space: LatentSpace | None) -> PreferenceModule:
        module = ALGORITHMS[algorithm](policy=tiny_spec(), latent=space)
        module.configure_model()
        exact(module.policy)
        if module.reference is not None:
            exact(module.reference.policy)
        perturb(module.policy, deviation=0.1)
        if space is not None:
            space.double()
            perturb(space, deviation=0.5, seed=3)
        return module.requires_grad_(False)

    return build_module


def evaluated(module: PreferenceModule, batch: PreferenceBatch) -> EvaluationOutput:
    return module.validation_step(batch, 0)


def report_of(module: PreferenceModule, batches: list[PreferenceBatch], **options: Any) -> AccuracyReport:
    modes = AccuracyModes(**options)
    for batch in batches:
        modes.update(evaluated(module, batch), batch, module.latent)
    return modes.collect()
