"""Fit of a latent space to pairs under the linearized policy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, rms_norm

from lpc_lightning.algorithms.warm_start.clusters import cluster_pairs, prompt_canonical_variates
from lpc_lightning.algorithms.warm_start.linearized_policy import LinearizedPairs
from lpc_lightning.data.batch_order.runs import place_together
from lpc_lightning.latent import LatentSpace
from lpc_lightning.latent.networks import Codebook

BATCH = 32
"""Pairs in an optimizer step."""
EVAL_BATCH = 256
"""Pairs in a batch without gradient."""
EPOCHS = 8
"""Epochs of the imitation of the clusters, and again of the algorithm's own loss."""
NETWORK_LR_SHARE = 0.3
"""Learning rate of the networks after the imitation, as a share of `latent_lr`."""
SCALES = tuple(10.0 ** (power / 4) for power in range(-4, 11))
"""Candidate scales of the codebook: standard deviation, in nats, of log pi(y_w|x, e_k) - log pi(y_l|x, e_k) over codes
and pairs."""
CODE_STEP = 0.03
"""Learning rate of a codebook, as a share of its root mean square."""


def fit(
    space: LatentSpace, pairs: LinearizedPairs, held: int, latent_lr: float, pairs_per_annotator: int | None = None
) -> tuple[float, float]:
    """Fit a latent space in place.

    Args:
        space: The space, built and in float32.
        pairs: The pairs that do not decide, four or more, shuffled, the same on all devices.
        held: Number of pairs at the end that are held out (see `hold_out`).
        latent_lr: Learning rate of the networks.
        pairs_per_annotator: Number of consecutive pairs of one annotator in a batch (see `ByAnnotator`). None:
            pairs are not grouped.

    Returns:
        Mean losses of held-out pairs, in nats: without a latent, and under the fitted space.
    """
    fitted, held_out = torch.arange(len(pairs)).split([len(pairs) - held, held])
    batches = partial(batches_of, pairs.annotators, pairs_per_annotator)
    held_out_batches = batches(held_out)
    with torch.no_grad():
        space.train()
        for indices in fitted.split(EVAL_BATCH):
            space.training_terms(*pairs.select(indices), 0.0)
        space.update_moments(alike=True)
        space.eval()
        plain = float(pairs.select(held_out)[1].under(None)[0].objective.mean())

    def step(indices: Tensor, progress: float) -> Tensor:
        terms = space.training_terms(*pairs.select(indices), progress)
        return (terms.pairs.objective + terms.penalty).mean()

    if space.has_codes:
        clusters = _init_codes(space, pairs, len(fitted))

        def imitate(indices: Tensor, progress: float) -> Tensor:
            return space.imitation_loss(pairs.select(indices)[0], clusters[indices]).mean()

        networks = [parameter for parameter in space.parameters() if parameter is not space.codes]
        _minimize(space, [{"params": networks, "lr": latent_lr}], imitate, fitted, held_out_batches, batches)
        _set_scale(space, pairs, held_out)
    return plain, _minimize(
        space, _groups(space, NETWORK_LR_SHARE * latent_lr), step, fitted, held_out_batches, batches
    )


def _init_codes(space: LatentSpace, pairs: LinearizedPairs, fitted: int) -> Tensor:
    """Set the codes to the directions of clusters of the first `fitted` pairs. Return (N,) clusters of all pairs."""
    if space.annotators and any(pairs.annotators):
        names = {name: number for number, name in enumerate(dict.fromkeys(pairs.annotators))}
        features = one_hot(torch.tensor([names[name] for name in pairs.annotators])).float()
    else:
        prompts = rms_norm(pairs.prompt, pairs.prompt.shape[-1:])
        features = prompt_canonical_variates(
            (prompts - prompts.mean(0)) / prompts.std(0).clamp_min(1e-6), pairs.z_gradients.sum(1)
        ).cpu()
    codes, clusters = cluster_pairs(features, pairs.z_gradient_difference[:fitted].cpu(), space.num_codes)
    space.codes.data.copy_(codes)
    return clusters.to(pairs.prompt.device)


@torch.no_grad()
def _set_scale(space: LatentSpace, pairs: LinearizedPairs, held_out: Tensor) -> None:
    """Scale the codebook so that the held-out labels have the highest evidence.

    If the space pools an annotator's pairs, each pair is scored given the annotator's earlier pairs. Two opposite codes
    with weight 1/2 each predict nothing about single pairs, whatever the scale.
    """
    states, score = pairs.select(held_out)
    log_prior = space.log_prior(states.prompt)
    assert log_prior is not None  # the space has codes
    directions = space.codes / (pairs.z_gradient_difference[held_out] @ space.codes.T).std().clamp_min(1e-12)

    def evidence(scale: float) -> Tensor:
        likelihood = score.under_codes(scale * directions)[0].label_log_likelihood
        log_weights = space.updated_log_prior(log_prior, likelihood, states)
        return (log_weights + likelihood).logsumexp(-1).mean()

    best = int(torch.stack([evidence(scale) for scale in SCALES]).argmax())
    space.codes.copy_(SCALES[best] * directions)


def _groups(space: LatentSpace, latent_lr: float) -> list[dict[str, object]]:
    """Return parameter groups.

    Codebooks learn at a share of their size. Networks learn at `latent_lr`, and so does a codebook of zeros.
    """
    books = [part.weight for part in space.modules() if isinstance(part, Codebook)]
    others = [p for p in space.parameters() if not any(p is weight for weight in books)]
    groups: list[dict[str, object]] = [{"params": others, "lr": latent_lr}] if others else []
    sizes = [float(weight.detach().square().mean().sqrt()) for weight in books]
    return groups + [{"params": [w], "lr": CODE_STEP * size or latent_lr} for w, size in zip(books, sizes, strict=True)]


def _minimize(
    space: nn.Module,
    groups: list[dict[str, object]],
    loss_of: Callable[[Tensor, float], Tensor],
    fitted: Tensor,
    held_out_batches: Sequence[Tensor],
    batches: Callable[[Tensor], Sequence[Tensor]],
) -> float:
    """Run Adam for `EPOCHS` with a rate that falls to 0. Keep the start or the epoch with the lowest held-out loss."""
    optimizer = torch.optim.Adam(groups)
    steps = EPOCHS * max(1, len(fitted) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    best, best_state = _mean_loss(loss_of, held_out_batches), copy.deepcopy(space.state_dict())
    for epoch in range(EPOCHS):
        for number, indices in enumerate(batches(fitted[torch.randperm(len(fitted))])[: steps // EPOCHS]):
            optimizer.zero_grad()
            loss_of(indices, (epoch * (steps // EPOCHS) + number) / steps).backward()
            optimizer.step()
            schedule.step()
        if (now := _mean_loss(loss_of, held_out_batches)) < best:
            best, best_state = now, copy.deepcopy(space.state_dict())
    space.load_state_dict(best_state)
    return best


@torch.no_grad()
def _mean_loss(loss_of: Callable[[Tensor, float], Tensor], batches: Sequence[Tensor]) -> float:
    """Compute the mean loss of a pair at progress 1, the end of training."""
    return sum(float(loss_of(batch, 1.0)) * len(batch) for batch in batches) / sum(map(len, batches))


def batches_of(annotators: Sequence[str], pairs_per_annotator: int | None, indices: Tensor) -> Sequence[Tensor]:
    """Split shuffled pairs at `indices` into batches like those of training."""
    if pairs_per_annotator is not None:
        generator = torch.default_generator
        indices = torch.tensor(place_together(indices.tolist(), annotators, BATCH, 1, pairs_per_annotator, generator))
    return indices.split(BATCH)
