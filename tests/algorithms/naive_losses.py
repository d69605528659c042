"""Every algorithm with its loss, and with the loss of one pair as written in its paper."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lpc_lightning.algorithms import DPO, IPO, KTO, ORPO, PreferenceModule, SimPO
from lpc_lightning.losses import dpo_loss, ipo_loss, kto_loss, orpo_loss, simpo_loss
from lpc_lightning.robust import ConservativeLoss, UnbiasedLoss


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log(1 + torch.exp(-x))


def odds(probability: Tensor) -> Tensor:
    return probability / (1 - probability)


# Each algorithm: the module, its settings, our loss, and the loss of one pair from the log-probabilities of policy and
# reference on winner and loser, and from their lengths.
ALGORITHMS: dict[str, tuple[type[PreferenceModule], dict[str, Any], Callable[..., Any], Callable[..., Tensor]]] = {
    "dpo": (
        DPO,
        {"beta": 0.3},
        lambda logps: dpo_loss(logps, 0.3),
        lambda pw, pl, rw, rl, nw, nl: -log_sigmoid(0.3 * (pw - rw - pl + rl)),
    ),
    "cdpo": (
        DPO,
        {"beta": 0.3, "robust_loss": ConservativeLoss(0.2)},
        partial(ConservativeLoss(0.2).pair_losses, partial(dpo_loss, beta=0.3)),
        lambda pw, pl, rw, rl, nw, nl: (
            -0.8 * log_sigmoid(0.3 * (pw - rw - pl + rl)) - 0.2 * log_sigmoid(0.3 * (pl - rl - pw + rw))
        ),
    ),
    "rdpo": (
        DPO,
        {"beta": 0.3, "robust_loss": UnbiasedLoss(0.2)},
        partial(UnbiasedLoss(0.2).pair_losses, partial(dpo_loss, beta=0.3)),
        lambda pw, pl, rw, rl, nw, nl: (
            (-0.8 * log_sigmoid(0.3 * (pw - rw - pl + rl)) + 0.2 * log_sigmoid(0.3 * (pl - rl - pw + rw))) / 0.6
        ),
    ),
    "ipo": (
        IPO,
        {"beta": 0.2},
        lambda logps: ipo_loss(logps, 0.2),
        lambda pw, pl, rw, rl, nw, nl: (pw - rw - pl + rl - 2.5) ** 2,
    ),
    "averaged ipo": (
        IPO,
        {"beta": 0.2, "length_average": True},
        lambda logps: ipo_loss(logps, 0.2, length_average=True),
        lambda pw, pl, rw, rl, nw, nl: ((pw - rw) / nw - (pl - rl) / nl - 2.5) ** 2,
    ),
    "simpo": (
        SimPO,
        {"beta": 2.5, "gamma_beta_ratio": 0.4},
        lambda logps: simpo_loss(logps, 2.5, 0.4),
        lambda pw, pl, rw, rl, nw, nl: -log_sigmoid(2.5 * (pw / nw - pl / nl - 0.4)),
    ),
    "kto": (
        KTO,
        {"beta": 0.3, "desirable_weight": 0.8, "reference_point": 0.6},
        lambda logps: kto_loss(logps, 0.3, 0.8, reference_point=0.6),
        lambda pw, pl, rw, rl, nw, nl: (
            0.4 * (1 - torch.exp(log_sigmoid(0.3 * (pw - rw - 0.6))))
            + 0.5 * (1 - torch.exp(log_sigmoid(0.3 * (0.6 - pl + rl))))
        ),
    ),
    "orpo": (
        ORPO,
        {"beta": 0.4},
        lambda logps: orpo_loss(logps, 0.4),
        lambda pw, pl, rw, rl, nw, nl: (
            -pw / nw + 0.4 * torch.log(1 + odds(torch.exp(pl / nl)) / odds(torch.exp(pw / nw)))
        ),
    ),
}
every_algorithm = pytest.mark.parametrize("algorithm", list(ALGORITHMS))
