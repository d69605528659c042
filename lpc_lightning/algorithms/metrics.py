"""Metrics of a run over pairs, batches and devices, and the check of its losses. No step waits for a value.

Metrics have TRL's names if TRL has the metric.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

from lpc_lightning.latent import LatentTerms
from lpc_lightning.types import PairStates

MAX_UNREAD = 1024
"""Largest number of unread losses. They are then checked even if no step is logged."""

REMEDIES = (
    "Lower the learning rates (model.optimizer, model.latent_lr) or latent.init_logit_std, set "
    "trainer.gradient_clip_val, or use a wider trainer.precision."
)
"""What to do about losses that are not finite."""


def accuracies(margins: Tensor) -> Tensor:
    """Return 1 for a positive margin, 0 for a negative one, and 1/2 for a tie.

    At the first step of DPO all margins are exactly 0, and the untrained policy is counted as right in half of the
    pairs. TRL counts ties as wrong.
    """
    return torch.where(margins.isnan(), margins, (margins.sign() + 1) / 2)  # the sign of NaN is 0, a tie


def pair_values(terms: LatentTerms) -> dict[str, Tensor]:
    """Return the values (B,) whose means over pairs are metrics."""
    pairs, logps = terms.pairs, terms.logps
    return {
        "loss": (pairs.losses + terms.penalty).detach(),
        "rewards/chosen": pairs.chosen_rewards,
        "rewards/rejected": pairs.rejected_rewards,
        "rewards/margins": pairs.margins,
        "rewards/accuracies": accuracies(pairs.margins),
        "logps/chosen": logps.policy_chosen.detach(),
        "logps/rejected": logps.policy_rejected.detach(),
    }


def latent_values(terms: LatentTerms, states: PairStates) -> dict[str, Tensor]:
    """Return the latent's values (B,) whose means over pairs are metrics. Values that the space lacks are left out."""
    values: dict[str, Tensor] = {}
    if terms.z is not None:
        values["z_norm_ratio"] = terms.z.detach().float().norm(dim=-1) / states.prompt.detach().float().norm(dim=-1)
    if terms.kl is not None:
        values["kl"] = terms.kl.detach()
    if terms.weighted_kl is not None:
        values["kl_weighted"] = terms.weighted_kl.detach()
    if terms.prior is not None:
        values["prior_entropy"] = entropy(terms.prior)
    if terms.posterior is not None:
        values["posterior_entropy"] = entropy(terms.posterior)
    if terms.prior is not None and terms.posterior is not None:
        values["agreement"] = (terms.prior.argmax(-1) == terms.posterior.argmax(-1)).float()
    return {f"latent/{name}": value for name, value in values.items()}


def fetch(values: Mapping[str, float | Tensor]) -> dict[str, Tensor]:
    """Copy numbers from a device to the CPU in one transfer.

    Args:
        values: Numbers by name. Each is a tensor of one element, all on one device, or a plain number.

    Returns:
        The same names, in the same order, with float64 tensors on the CPU.
    """
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    fetched = torch.stack([value.double() for value in tensors.values()]).cpu() if tensors else torch.zeros(0)
    on_cpu = dict(zip(tensors, fetched, strict=True))
    return {
        name: on_cpu[name] if name in on_cpu else torch.tensor(value, dtype=torch.float64, device="cpu")
        for name, value in values.items()
    }


def entropy(log_probabilities: Tensor) -> Tensor:
    """Compute the entropy (B,) in nats from log-probabilities (B, K), without gradient."""
    logs = log_probabilities.detach()
    return -(logs.exp() * logs).sum(-1)


class ExactMetric(Metric):
    """A metric whose sums stay in float64.

    A trainer of `bf16-true` calls `module.to(torch.bfloat16)`, and torchmetrics guards its states from `.half()` and
    `.bfloat16()` alone. Counts and sums would end at 256 and at 1.0.
    """

    full_state_update = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        """Move the states to the device that `fn` moves tensors to, and leave their types as they are."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)


class CodeUse(ExactMetric):
    """Use of the codebook by the prior: perplexity and dead codes.

    `codebook_perplexity` is exp of the entropy of the prior's mean over prompts, from 1 (one code) to K (all equal). A
    prior that is uniform for every prompt has a high perplexity too, so compare it with `prior_entropy`. A dead code is
    the most probable code of no prompt.
    """

    def __init__(self, num_codes: int) -> None:
        """Create empty sums.

        Args:
            num_codes: Number of codes, K.
        """
        super().__init__()
        self.add_state("mass", torch.zeros(num_codes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("top_counts", torch.zeros(num_codes, dtype=torch.long), dist_reduce_fx="sum")
        self.mass: Tensor
        self.top_counts: Tensor

    def update(self, log_prior: Tensor) -> None:
        """Add prior log-probabilities (B, K)."""
        self.mass += log_prior.detach().double().exp().sum(0)
        # Not `bincount`: on a GPU it makes the CPU wait for the largest number.
        codes = torch.arange(self.top_counts.shape[0], device=log_prior.device)
        self.top_counts += (log_prior.argmax(-1, keepdim=True) == codes).sum(0)

    def compute(self) -> dict[str, Tensor]:
        """Return the perplexity and the number of dead codes."""
        share = self.mass / self.mass.sum()
        return {
            "latent/codebook_perplexity": torch.special.entr(share).sum().exp(),
            "latent/dead_codes": (self.top_counts == 0).sum().double(),
        }


class PairMeans(ExactMetric):
    """Means of named values over all pairs. Each pair counts once."""

    def __init__(self) -> None:
        """Create empty sums."""
        super().__init__()
        self.add_state("sums", torch.zeros(0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pairs", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.names: tuple[str, ...] = ()
        self.sums: Tensor
        self.pairs: Tensor

    def update(self, values: dict[str, Tensor]) -> None:
        """Add values (B,) by name. Every update has the same names."""
        self.names = tuple(values)
        sums = torch.stack([value.double().sum() for value in values.values()])
        self.sums = sums if self.sums.numel() == 0 else self.sums + sums
        self.pairs += next(iter(values.values())).shape[0]

    def compute(self) -> dict[str, Tensor]:
        """Return the means by name."""
        return dict(zip(self.names, self.sums / self.pairs, strict=True))


def ratio_of_sums(losses: Tensor, weights: Tensor) -> Tensor:
    """Divide sums () of weighted losses by sums () of their weights. 0 if all weights are 0, as in `weighted_mean`."""
    return losses / weights.where(weights > 0, 1.0)


class SourceMeans(ExactMetric):
    """Accuracy, mean loss and number of pairs of each data set of a mixture."""

    def __init__(self, names: Sequence[str]) -> None:
        """Create empty sums.

        Args:
            names: Names of the data sets, the same on all devices.
        """
        super().__init__()
        self.names = tuple(names)
        self.add_state("sums", torch.zeros(len(names), 4, dtype=torch.float64), dist_reduce_fx="sum")
        self.sums: Tensor

    def update(self, sources: Sequence[str], values: Mapping[str, Tensor]) -> None:
        """Add a batch.

        Args:
            sources: (B,) data set of each pair.
            values: Values (B,) by name (see `pair_values`). With a `weight`, the losses are multiplied by it.
        """
        losses, correct = values["loss"].double(), values["rewards/accuracies"].double()
        weights = values["weight"] if "weight" in values else torch.ones_like(losses)
        numbers = torch.tensor([self.names.index(source) for source in sources])
        members = (torch.arange(len(self.names))[:, None] == numbers).to(losses.device)
        columns = torch.stack([torch.ones_like(losses), weights, losses, correct], dim=1)
        # Not a product: 0 times the NaN of a pair would make all other data sets NaN.
        self.sums += columns.where(members[..., None], 0.0).sum(1)

    def compute(self) -> dict[str, Tensor]:
        """Return `accuracy/NAME`, `loss/NAME` and `pairs/NAME`. Data sets without pairs are left out."""
        values: dict[str, Tensor] = {}
        known = (self.sums[:, 0] > 0).tolist()
        for name, has_pairs, (pairs, weights, losses, correct) in zip(self.names, known, self.sums, strict=True):
            if has_pairs:
                values |= {
                    f"accuracy/{name}": correct / pairs,
                    f"loss/{name}": ratio_of_sums(losses, weights),
                    f"pairs/{name}": pairs,
                }
        return values


class PreferenceMetrics(torch.nn.Module):
    """All metrics of one stage (training, validation or test)."""

    def __init__(self, num_codes: int | None) -> None:
        """Create empty metrics.

        Args:
            num_codes: Number of codes of a discrete latent space, or None.
        """
        super().__init__()
        self.means = PairMeans()
        self.use = None if num_codes is None else CodeUse(num_codes)
        self.by_source: SourceMeans | None = None
        self.settings: dict[str, float] = {}

    def split_by_source(self, names: Sequence[str]) -> None:
        """Compute metrics for each of these sources, too. They are the sources of all pairs. Empty: not by source."""
        self.by_source = SourceMeans(names).to(self.means.device) if names else None

    def update(
        self, terms: LatentTerms, states: PairStates, sources: Sequence[str] = (), weights: Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            terms: Losses and rewards.
            states: Hidden states.
            sources: (B,) sources of the pairs. Needed after `split_by_source`.
            weights: (B,) weights of the pairs in the loss, in every batch or in none. Other metrics are plain means.
        """
        values = pair_values(terms)
        if weights is not None:
            values = values | {"loss": values["loss"] * weights, "weight": weights}
        self.means.update(values | latent_values(terms, states))
        if self.by_source is not None:
            self.by_source.update(sources, values)
        if self.use is not None and terms.prior is not None:
            self.use.update(terms.prior)
        self.settings = {f"latent/{name}": value for name, value in terms.settings.items()}

    def collect(self) -> dict[str, float | Tensor]:
        """Return all metrics since the last call, over all devices, and reset them."""
        means = self.means.compute()
        if "weight" in means:
            means["loss"] = ratio_of_sums(means["loss"], means["weight"])
        values: dict[str, float | Tensor] = {**means, **self.settings}
        if self.use is not None:
            values |= self.use.compute()
        if self.by_source is not None:
            values |= self.by_source.compute()
        self.reset()
        return values

    def reset(self) -> None:
        """Remove all batches."""
        for metric in (self.means, self.use, self.by_source):
            if metric is not None:
                metric.reset()


@dataclass(frozen=True, slots=True)
class _Loss:
    value: Tensor
    step: int
    epoch: int
    batch: int
    ids: Sequence[str]


class RecentLosses:
    """Losses since the last check, with the position of each in the run.

    They are checked when a step is logged, and those of all devices before a validation, before a checkpoint is written
    and at the end of training. So no checkpoint holds weights that a non-finite loss has damaged.
    """

    def __init__(self) -> None:
        """Create an empty list."""
        self._losses: list[_Loss] = []

    def add(self, value: Tensor, step: int, epoch: int, batch: int, ids: Sequence[str]) -> None:
        """Add the loss of a micro-batch. It stays on its device."""
        self._losses.append(_Loss(value.detach(), step, epoch, batch, ids))
        if len(self._losses) >= MAX_UNREAD:
            self.check()

    def unread(self) -> dict[str, Tensor]:
        """Return all losses since the last check, by the names that `check` expects."""
        return {f"unread/{number}": loss.value for number, loss in enumerate(self._losses)}

    def check(self, values: Mapping[str, Tensor] | None = None) -> None:
        """Check that all losses since the last check are finite.

        Args:
            values: The losses of `unread`, copied to the CPU. None: they are copied now.

        Raises:
            FloatingPointError: A loss is not finite. Later checks raise the same error.
        """
        if values is None:
            values = fetch(self.unread())
        for loss, value in zip(self._losses, values.values(), strict=True):
            if not value.isfinite():
                raise FloatingPointError(
                    f"train/loss: found {value.item()} at step {loss.step} (epoch {loss.epoch}, batch {loss.batch}, "
                    f"pairs {', '.join(loss.ids)}), expected a finite number. {REMEDIES} The last checkpoint is valid."
                )
        self._losses.clear()

    def check_all_devices(self, device: torch.device) -> None:
        """Check that all losses since the last check are finite, on every device. All devices must call it.

        The gradient of a loss on one device is in the weights of all devices.

        Args:
            device: This process's device.

        Raises:
            FloatingPointError: A loss of any device is not finite.
        """
        values = fetch(self.unread())
        found = torch.tensor(float(not all(value.isfinite() for value in values.values())), device=device)
        if dist.is_initialized():
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        self.check(values)
        if found:
            raise FloatingPointError(
                "train/loss: another device found a loss that is not finite, and its error names the pairs. "
                f"{REMEDIES} The last checkpoint is valid."
            )
