"""RE-PO: expectation-maximization over whether each label is correct, with reliabilities of annotators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lpc_lightning.errors import ConfigError
from lpc_lightning.robust.base import PreferenceLoss, RobustLoss, swap_answers
from lpc_lightning.robust.reliability import Reliabilities
from lpc_lightning.types import PairLogps, PairLosses

LEAST = 1e-6
"""Smallest reliability, and smallest distance from 1, in a loss. Its logarithm stays finite."""


def re_po_losses(observed: PairLosses, opposite: PairLosses, reliability: Tensor) -> PairLosses:
    """Compute the losses of RE-PO (Cao et al., 2025, arXiv 2509.24159, eq. 2 to 5).

    With l the loss of the label, l' that of the opposite label, and eta the reliability:

    - p = sigmoid(l' - l) is the probability that the label agrees with the preference. For DPO it is sigmoid(beta D).
    - w = eta p / (eta p + (1 - eta) (1 - p)) is the posterior probability that the label is correct, without gradient.
    - The loss is `-w log p - (1 - w) log(1 - p)`. For DPO this is w l + (1 - w) l'.

    IPO's loss is not a log-likelihood. There p is a surrogate, sigmoid(2 D / beta), as in the paper.

    The log-likelihood of the label is log(eta p + (1 - eta) (1 - p)). Its gradient is that of the loss with the
    opposite sign. So the exact marginal of a mixture of codes, `-log sum_k p_k [eta s(m_k) + (1 - eta) s(-m_k)]`, sums
    out the code and the correctness of the label together.

    Args:
        observed: Losses of the labels.
        opposite: Losses of the opposite labels.
        reliability: eta, the probability that a label of the annotator is correct. It broadcasts to the losses.
    """
    log_odds = opposite.losses - observed.losses
    eta = reliability.to(log_odds.dtype).clamp(LEAST, 1 - LEAST)
    log_p, log_not_p = logsigmoid(log_odds), logsigmoid(-log_odds)
    likelihood = torch.logaddexp(eta.log() + log_p, (-eta).log1p() + log_not_p)
    correct = (eta.log() + log_p - likelihood).exp().detach()
    losses = -(correct * log_p + (1 - correct) * log_not_p)
    return PairLosses(losses, observed.chosen_rewards, observed.rejected_rewards, likelihood, label_correct=correct)


class REPO(RobustLoss):
    """RE-PO (arXiv 2509.24159) of any algorithm's loss: see `re_po_losses`.

    The reliabilities are updated once for each optimizer step, from all its pairs on all devices (see
    `Reliabilities`). With `MarginalSpace` the loss is the exact marginal over codes and over the correctness of labels.
    """

    def __init__(self, initial: float = 0.9, rate: float = 0.1, by_annotator: bool = True) -> None:
        """Store the settings.

        Args:
            initial: Reliability before the first step: the assumed share of correct labels.
            rate: Weight of an optimizer step in the moving average of a reliability.
            by_annotator: True: a reliability for each annotator of the training pairs. Pairs without an annotator share
                one. False: one for all pairs, for data whose annotators have few pairs each.

        Raises:
            ValueError: A setting is out of range.
        """
        if not 0 < initial < 1:
            raise ValueError(f"robust_loss.initial: found {initial}, expected a share above 0 and below 1.")
        if not 0 <= rate <= 1:
            raise ValueError(f"robust_loss.rate: found {rate}, expected a share from 0 to 1.")
        self.initial, self.rate, self.by_annotator = initial, rate, by_annotator
        self.learned = Reliabilities(initial, rate)

    def pair_losses(self, loss: PreferenceLoss, logps: PairLogps, reliability: Tensor | None = None) -> PairLosses:
        """Compute `re_po_losses`. Without reliabilities, the initial one is used.

        Raises:
            ValueError: The loss has several terms.
        """
        if reliability is None:
            reliability = logps.policy_chosen.new_tensor([self.initial])
        observed = loss(logps)
        if len(observed.parts) > 1:
            raise ValueError(
                "robust_loss: found REPO with a loss of several terms (KTO, ORPO), expected DPO, IPO or SimPO, whose "
                "loss gives the probability of a label."
            )
        eta = reliability[:, None] if logps.policy_chosen.dim() == 2 else reliability
        return re_po_losses(observed, loss(swap_answers(logps)), eta)

    def start(self, annotators: Sequence[str], device: torch.device) -> None:
        """Add the annotators of the run, and move the reliabilities to its device, before the first step."""
        self.learned.add_names(self._names(annotators))
        self.learned.values = self.learned.values.to(device)

    def reset(self) -> None:
        """Forget all reliabilities."""
        self.learned = Reliabilities(self.initial, self.rate)

    def reliabilities(self, annotators: Sequence[str], device: torch.device) -> Tensor:
        """Return (B,) the current reliability of each pair's annotator."""
        return self.learned.of(self._names(annotators), device)

    def observe(self, annotators: Sequence[str], label_correct: Tensor) -> None:
        """Add the posterior probabilities that labels are correct.

        Raises:
            ConfigError: An annotator was not known when the fit started, and has no reliability.
        """
        if unknown := sorted(set(self._names(annotators)) - set(self.learned.names)):
            raise ConfigError(
                f"robust_loss.by_annotator: found true, and the annotator {unknown[0]!r} in a training pair. Expected "
                "annotators that are known when the fit starts, and loaders without a PreferenceDataModule name none. "
                "Use one, such as PreferenceData, or set false."
            )
        self.learned.observe(self._names(annotators), label_correct)

    def update(self) -> None:
        """Update the reliabilities."""
        self.learned.update()

    def metrics(self) -> dict[str, Tensor]:
        """Return mean, smallest and largest reliability."""
        values = self.learned.values
        if not self.learned.names:
            return {}
        return {"reliability/mean": values.mean(), "reliability/min": values.min(), "reliability/max": values.max()}

    def state_dict(self) -> dict[str, Any]:
        """Return the reliabilities."""
        return self.learned.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the reliabilities."""
        self.learned.load_state_dict(state)

    def _names(self, annotators: Sequence[str]) -> Sequence[str]:
        return annotators if self.by_annotator else [""] * len(annotators)
