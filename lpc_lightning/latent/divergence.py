"""KL between posterior and prior, and its weight in the loss."""

from __future__ import annotations

from torch import Tensor

from lpc_lightning.latent.schedules import Schedule, as_schedule


def categorical_kl(posterior: Tensor, prior: Tensor) -> Tensor:
    """Compute the KL between categorical distributions, sum_k q_k (log q_k - log p_k).

    Args:
        posterior: (B, K) log-probabilities log q.
        prior: (B, K) log-probabilities log p.

    Returns:
        (B,) in nats.
    """
    return (posterior.exp() * (posterior - prior)).sum(-1)


def gaussian_kl(mean_q: Tensor, log_std_q: Tensor, mean_p: Tensor, log_std_p: Tensor) -> Tensor:
    """Compute the KL between normal distributions with diagonal covariance. Each argument is (B, M).

    Returns:
        (B,) in nats.
    """
    ratio = (2 * (log_std_q - log_std_p)).exp()
    shift = ((mean_q - mean_p) / log_std_p.exp()).square()
    return 0.5 * (ratio + shift - 1 - 2 * (log_std_q - log_std_p)).sum(-1)


class WeightedKL:
    """Penalty that a latent adds to the loss of each pair: lambda max(KL, free bits)."""

    def __init__(self, weight: float | Schedule, free_bits: float) -> None:
        """Store the settings.

        Args:
            weight: lambda, or its schedule.
            free_bits: KL in nats below which the penalty is constant (Kingma et al., 2016, arXiv 1606.04934, app. C.8).
        """
        self.weight, self.free_bits = as_schedule(weight), free_bits

    def __call__(self, kl: Tensor, progress: float) -> Tensor:
        """Compute the penalty (B,) from the KL (B,) in nats, at training progress `progress`."""
        return self.weight(progress) * kl.clamp_min(self.free_bits)
