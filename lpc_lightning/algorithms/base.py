"""The LightningModule that all algorithms share: training step, evaluation, metrics and checkpoints."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from lpc_lightning.algorithms.checkpoint import is_plain, report_left_out, without_defaults
from lpc_lightning.algorithms.latent_mixin import BatchScorer
from lpc_lightning.algorithms.metrics import PreferenceMetrics, RecentLosses, fetch
from lpc_lightning.algorithms.outputs import EvaluationOutput, TrainingOutput
from lpc_lightning.algorithms.policy_module import REFERENCES, WEIGHTS, PolicyModule
from lpc_lightning.algorithms.position import restore_position, store_position
from lpc_lightning.algorithms.run_length import (
    check_windows,
    compare_run_length,
    restore_early_stop,
    run_length,
    set_accumulation,
    warn_of_no_step,
)
from lpc_lightning.data.batching.loading import TrainingLoader
from lpc_lightning.data.trainer_data import preference_data
from lpc_lightning.errors import ConfigError
from lpc_lightning.files.plain_values import plain
from lpc_lightning.latent import LatentSpace, LatentTerms
from lpc_lightning.losses import add_nll, weighted_mean
from lpc_lightning.policy import PolicySpec
from lpc_lightning.policy.causal import BatchForward
from lpc_lightning.policy.logprobs import code_range
from lpc_lightning.robust import RobustLoss
from lpc_lightning.seeding import derive, run_seed, seed_draws
from lpc_lightning.types import PairLogps, PairLosses, PreferenceBatch

PROGRESS_BAR = ("loss", "rewards/accuracies", "rewards/margins", "latent/codebook_perplexity")
"""Metrics that the progress bar shows."""
OF_STEP = ("train/", "resources/")
"""Start of the names of metrics that a logged step has."""
RESUMED = ("training_data", "run_length", "warm_start", "code_range")
"""Entries of a checkpoint that `on_train_start` reads."""


class PreferenceModule(PolicyModule):
    """Training of a policy on preference pairs. A subclass defines the loss and `needs_reference`."""

    _left_out: Sequence[str] = ()
    """Names of the objects that a checkpoint does not hold, without those that are defaults."""

    def __init__(
        self,
        policy: PolicySpec,
        latent: LatentSpace | None = None,
        reference: Literal["cached", "live"] = "cached",
        reference_path: str | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=5e-7, weight_decay=0.0, fused=True),
        latent_lr: float = 1e-3,
        lr_schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine",
        warmup_ratio: float = 0.1,
        nll_weight: float = 0.0,
        robust_loss: RobustLoss | None = None,
    ) -> None:
        """Keep the settings. Models are built in `configure_model`.

        Args:
            policy: The model to train, as a spec.
            latent: The latent space of Latent Preference Coding. null: the plain algorithm.
            reference: `cached` computes the reference's log-probabilities of all pairs of a run before its first step.
                They are stored on disk for other runs (data.cache_dir), and no reference is in memory. `live` runs the
                reference at every batch. It is a frozen copy of the policy. With LoRA it is the policy without the
                adapter in training, and with policy.trainable false the policy itself.
            reference_path: Another model as the reference: a hub name, a folder (also an adapter or an export, at
                z = 0) or a GGUF file. It needs the policy's vocabulary. null: the policy as it is before training,
                with the adapter that it starts from (policy.adapter), and without its latent.
            optimizer: Optimizer of both parameter groups. Its learning rate is that of the policy.
            latent_lr: Learning rate of the latent space. New networks need a larger one than a pretrained backbone.
            lr_schedule: Schedule of the learning rates after warm-up. `cosine` and `linear` fall to 0.
            warmup_ratio: Share of the optimizer steps over which the learning rates rise from 0.
            nll_weight: Weight of an SFT term, the mean negative log-likelihood per token of the chosen answers under
                the same z (RPO, arXiv 2404.19733, uses 1). It keeps chosen answers likely. 0: no such term.
            robust_loss: Loss for labels that may be wrong, made from the algorithm's loss: ConservativeLoss (cDPO),
                UnbiasedLoss (rDPO), DrDPO, REPO or HolderDPO (see docs/robust_losses.md). null: the algorithm's loss.

        Raises:
            ConfigError: `reference` is neither `cached` nor `live`, `nll_weight` or `latent_lr` is negative, or
                `warmup_ratio` is no share; or an object is of another class.
        """
        super().__init__()
        objects: tuple[tuple[str, Any, Any, str], ...] = (
            ("policy", policy, PolicySpec, "PretrainedPolicy(PATH)"),
            ("latent", latent, LatentSpace | None, "MarginalSpace(), or None"),
            ("robust_loss", robust_loss, RobustLoss | None, "REPO(), or None"),
        )
        for name, value, kind, example in objects:
            if not isinstance(value, kind):  # in Python code; the command line makes the objects itself
                found = repr(value).partition("\n")[0][:80]
                raise ConfigError(f"{name}: found {found}, expected an object such as {example}.")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is an instance of `nn.Module`")
            self.save_hyperparameters()
        if "_class_path" not in self.hparams:
            # The module was built in code, not by the command line. Its objects cannot be settings in a checkpoint.
            objects_of_code = {name: value for name, value in self.hparams.items() if not is_plain(value)}
            self._left_out = without_defaults(objects_of_code, PreferenceModule.__init__)
            self.remove_ignored_hparams([*objects_of_code, "latent", "robust_loss"])
        if not self.needs_reference:
            self.remove_ignored_hparams(["reference", "reference_path"])
        if reference not in REFERENCES:
            raise ConfigError(f"model.reference: found {reference!r}, expected {' or '.join(REFERENCES)}.")
        if not 0 <= nll_weight < math.inf:
            raise ConfigError(f"model.nll_weight: found {nll_weight}, expected a number of at least 0.")
        if not 0 <= latent_lr < math.inf:  # an optimizer does not check the rates of its groups
            raise ConfigError(f"model.latent_lr: found {latent_lr}, expected a number of at least 0.")
        if not 0 <= warmup_ratio <= 1:
            raise ConfigError(f"model.warmup_ratio: found {warmup_ratio}, expected a share from 0 to 1.")
        if not policy.trainable and latent is None:
            raise ConfigError("policy.trainable: found false and no latent space, expected true or a latent to train.")
        self.policy_spec, self.latent, self.make_optimizer = policy, latent, optimizer
        self.latent_lr, self.lr_schedule, self.warmup_ratio = latent_lr, lr_schedule, warmup_ratio
        self.nll_weight, self.robust_loss = nll_weight, robust_loss
        self.strict_loading = False  # a checkpoint holds no frozen weights; `on_load_checkpoint` checks the others
        self.reference_kind, self.reference_path = reference, reference_path
        self.warm_start_result: dict[str, Any] | None = None
        """Decision of the warm start (see `algorithms.warm_start.decision`). None: there was no warm start."""
        self._losses = RecentLosses()
        self._code_range: float | None = None
        self._resumed: dict[str, Any] = {}
        self._loaded_step = 0

    @abstractmethod
    def preference_loss(self, logps: PairLogps) -> PairLosses:
        """Compute the algorithm's loss and rewards of each pair."""

    def label_loss(self, logps: PairLogps, reliability: Tensor | None = None) -> PairLosses:
        """Compute `preference_loss`, or the robust loss that is made from it.

        Args:
            logps: Log-probabilities of the pairs.
            reliability: (B,) see `RobustLoss.pair_losses`.
        """
        if self.robust_loss is None:
            return self.preference_loss(logps)
        return self.robust_loss.pair_losses(self.preference_loss, logps, reliability)

    def pair_loss(self, logps: PairLogps, reliability: Tensor | None = None) -> PairLosses:
        """Compute the loss of each pair in training and validation: `label_loss`, and the SFT term if it is on."""
        pairs = self.label_loss(logps, reliability)
        return add_nll(pairs, logps, self.nll_weight) if self.nll_weight else pairs

    def check_settings(self, target_margins: Tensor | None = None) -> None:
        """Compute the loss of one pair, so that invalid settings raise an error before the first step.

        Args:
            target_margins: (1,) a margin. None: the pair has none.

        Raises:
            ValueError: A setting of the loss is out of range, or the loss takes no margins.
        """
        logps = PairLogps(*torch.zeros(6, 1, device="cpu"))
        self.label_loss(replace(logps, target_margins=target_margins))

    def setup(self, stage: str) -> None:
        """Prepare for a run. Forget the progress in a checkpoint that was loaded before the run, for its weights.

        Also forget the half-filled sums of an earlier run that was interrupted.

        Raises:
            ConfigError: Pairs have margins, and the loss takes none.
        """
        super().setup(stage)
        data = preference_data(self.trainer)
        if data is not None and data.has_margins:
            try:
                self.check_settings(torch.zeros(1, device="cpu"))
            except ValueError as error:
                raise ConfigError(f"model: {error}") from error
        self._resumed, self.warm_start_result = {}, None
        self._losses, self._code_range = RecentLosses(), None
        self._forget_unfinished_run()
        if stage == "fit":
            if self._left_out and self.trainer.checkpoint_callbacks:
                report_left_out(type(self), self._left_out)
            self.train()  # an interrupted validation leaves the module in evaluation mode
            if self.robust_loss is not None:
                self.robust_loss.reset()

    def _forget_unfinished_run(self) -> None:
        if self._built:
            for metrics in (self.train_metrics, self.val_metrics, self.test_metrics):
                metrics.reset()
        if self.latent is not None:
            self.latent.forget_unread()

    # The step

    def score_batch(self, batch: PreferenceBatch, code_range: float | None = None) -> tuple[BatchForward, BatchScorer]:
        """Run the backbone once on a batch, and the reference if the algorithm has one.

        Args:
            batch: The pairs.
            code_range: See `token_logps_per_code`.

        Returns:
            The policy's forward pass, and the algorithm's loss as a function of the latent.
        """
        forward: BatchForward = self.policy(batch)
        reference = None if self.reference is None else self.reference.logps(batch)
        loss = self.pair_loss
        if self.robust_loss is not None:
            reliability = self.robust_loss.reliabilities(batch.annotators, batch.lengths.device)
            loss = partial(self.pair_loss, reliability=reliability)
        scorer = BatchScorer(
            forward, batch.lengths, reference, loss, code_range, batch.margins, preference_loss=self.preference_loss
        )
        return forward, scorer

    def on_fit_start(self) -> None:
        """Stop a resumed run that had stopped early."""
        if self._resumed:
            restore_early_stop(self.trainer)

    def on_train_start(self) -> None:
        """Restore the position in the data of a resumed run, compare its length, and run the warm start.

        Lightning can restore the state of a loader, but not in two cases. One is a loader that exists before the loops
        are restored, which is ours because of `estimated_stepping_batches`. The other is a resume after a whole epoch,
        where order and data must match too.

        Raises:
            ConfigError: The run accumulates other steps than the checkpoint, its epochs end within a step that
                DeepSpeed accumulates, or the latent space needs annotators and the data has none.
        """
        loader = self.trainer.train_dataloader
        if "training_data" in self._resumed and isinstance(loader, TrainingLoader):
            loader.load_state_dict(self._resumed["training_data"])
        if "run_length" in self._resumed:
            compare_run_length(self.trainer, self._resumed["run_length"])
        set_accumulation(self.trainer)
        check_windows(self.trainer)
        # A checkpoint of step 0 can come from before the warm start, or from within the first step, after it.
        self.warm_start_result = self._resumed.get("warm_start")
        self._code_range = self._resumed.get("code_range")
        self._resumed = {}
        self._check_batches()
        if self.robust_loss is not None:
            data = preference_data(self.trainer)
            names = [""] if data is None else data.training_pairs.annotators
            self.robust_loss.start(names, self.device)
        if (
            self.latent is not None
            and self.latent.warm_start_pairs
            and self.trainer.global_step == 0
            and self.warm_start_result is None
        ):
            # Imported only if needed: scikit-learn is slow to import.
            from lpc_lightning.algorithms.warm_start.warm_start import warm_start

            self.warm_start_result = warm_start(self, self.latent).record()

    def _check_batches(self) -> None:
        """Refuse settings that would have no effect: those of annotators and of several pairs, without them."""
        data = preference_data(self.trainer)
        if data is None:
            return
        of_batch = [] if self.latent is None else self.latent.settings_of_batch()
        if self.robust_loss is not None and self.robust_loss.of_batch:
            of_batch.append(f"model.robust_loss {type(self.robust_loss).__name__}")
        if data.batch_size == 1 and of_batch:
            raise ConfigError(
                f"data.batch_size: found 1 with {' and '.join(of_batch)}, for which the pairs of a batch are compared, "
                "expected at least 2. trainer.accumulate_grad_batches does not add pairs to a batch. Set "
                "data.batch_size, or leave the other setting out."
            )
        if self.latent is not None and self.latent.annotators and not any(data.training_pairs.annotators):
            raise ConfigError(
                f"latent.annotators: found true, and no annotator in {len(data.training_pairs)} training pairs, "
                "expected a column `annotator`. Set data.columns.annotator to its name, or latent.annotators to false."
            )

    def on_train_batch_start(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Seed the step's random draws by its position in the run (see `seeding`)."""
        seed_draws(derive("step", run_seed(), self.current_epoch, batch_idx, self.global_rank), self.device)

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> TrainingOutput:
        """Compute the mean over pairs of the preference loss plus the latent's penalty, with the weights of the pairs.

        The output also holds each pair's loss and margin, for callbacks.
        """
        forward, score = self.score_batch(batch, self._latest_code_range())
        terms = self.training_terms(forward.states, score, self.progress)
        losses = terms.pairs.losses + terms.penalty
        loss = self._robust_batch_loss(terms, batch) if self.robust_loss else weighted_mean(losses, batch.weights)
        self._losses.add(loss, self.trainer.global_step, self.current_epoch, batch_idx, batch.ids)
        logged = is_logged(self.trainer, batch_idx)
        if logged:
            self.train_metrics.update(terms, forward.states, weights=batch.weights)
            if is_optimizer_step(self.trainer, batch_idx):
                self._log_training()
        weight = window_weight(self.trainer, batch.pairs, batch_idx, batch.weights)
        loss = (loss * weight).to(loss.dtype)
        return {"loss": loss, "losses": losses.detach(), "margins": terms.pairs.margins, "logged": logged}

    def _robust_batch_loss(self, terms: LatentTerms, batch: PreferenceBatch) -> Tensor:
        """Compute the loss of a batch, and give the posteriors of its labels to the robust loss."""
        assert self.robust_loss is not None
        pairs, others = terms.pairs, terms.penalty
        if pairs.label_correct is not None:
            self.robust_loss.observe(batch.annotators, pairs.label_correct)
        if pairs.label_losses is not None:  # a text does not show whether a label is wrong
            others = others + (pairs.losses - pairs.label_losses)
        if isinstance(others, Tensor):
            others = weighted_mean(others, batch.weights)
        return self.robust_loss.batch_loss(pairs.label_part.losses, batch.weights) + others

    @property
    def weights_step(self) -> int:
        """Number of optimizer steps behind the weights: those of the fit, or of a checkpoint to validate or test."""
        trainer = self.trainer
        is_loaded = trainer.state.fn != TrainerFn.FITTING and trainer.ckpt_path is not None
        return self._loaded_step if is_loaded else trainer.global_step

    @property
    def progress(self) -> float:
        """Progress of training: 0 at the first optimizer step, 1 at the last."""
        return min(1.0, self.trainer.global_step / max(1, self._steps - 1))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Update the running moments of the latent space and the reliabilities, once for each optimizer step.

        DeepSpeed accumulates by itself. Lightning then calls this hook after every micro-batch.
        """
        if not is_optimizer_step(self.trainer, self.trainer.fit_loop.batch_idx):
            return
        if self.latent is not None:
            self.latent.update_moments()
        if self.robust_loss is not None:
            self.robust_loss.update()

    def on_validation_start(self) -> None:
        """Check the losses so far. A run that has diverged is not validated."""
        self._losses.check_all_devices(self.device)

    def on_train_end(self) -> None:
        """Check the last losses."""
        self._losses.check_all_devices(self.device)

    def on_fit_end(self) -> None:
        """Warn if a resumed run was at its end already."""
        if self._resumed:
            warn_of_no_step(self.trainer)

    def on_train_batch_end(self, outputs: Any, batch: PreferenceBatch, batch_idx: int) -> None:
        """Free the gradients after a step. Lightning would keep them in memory during the next forward pass.

        If the run stops after a step that is not logged, Lightning would write the values of an earlier step as those
        of this one. It gets NaN, an empty value, in their place.
        """
        if is_optimizer_step(self.trainer, batch_idx):
            for optimizer in self.trainer.optimizers:
                optimizer.zero_grad()
        if self.trainer.should_stop and not outputs["logged"]:
            names = [name for name in self.trainer.logged_metrics if name.startswith(OF_STEP)]
            self.log_dict(dict.fromkeys(names, torch.tensor(torch.nan, device="cpu")), batch_size=1)

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> EvaluationOutput:
        """Score the pairs under the prior, as at inference. Callbacks get the forward pass to score other z."""
        return self._evaluate(batch, batch_idx, self.val_metrics)

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> EvaluationOutput:
        """Score test pairs like validation pairs."""
        return self._evaluate(batch, batch_idx, self.test_metrics)

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Any]:
        """Return the ids, rewards, margins and prior of the pairs."""
        terms = self._infer(batch, batch_idx)["terms"]
        pairs = terms.pairs
        return {
            "ids": batch.ids,
            "rewards/chosen": pairs.chosen_rewards,
            "rewards/rejected": pairs.rejected_rewards,
            "rewards/margins": pairs.margins,
            "prior": None if terms.prior is None else terms.prior.exp(),
        }

    def on_validation_epoch_end(self) -> None:
        """Log the means over all validation pairs of all devices."""
        self._report("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the means over all test pairs of all devices."""
        self._report("test", self.test_metrics)

    def scoring_step(self, batch: PreferenceBatch, batch_idx: int) -> EvaluationOutput:
        """Score pairs under the prior, without metrics. For callbacks that score other pairs."""
        return self._infer(batch, batch_idx)

    def _infer(self, batch: PreferenceBatch, batch_idx: int) -> EvaluationOutput:
        seed_draws(derive("evaluation", run_seed(), batch_idx, self.global_rank), self.device)
        forward, score = self.score_batch(batch)
        return {"terms": self.inference_terms(forward.states, score), "states": forward.states, "score": score}

    def _evaluate(self, batch: PreferenceBatch, batch_idx: int, metrics: PreferenceMetrics) -> EvaluationOutput:
        evaluated = self._infer(batch, batch_idx)
        metrics.update(evaluated["terms"], evaluated["states"], batch.sources, batch.weights)
        return evaluated

    def _log_training(self) -> None:
        """Log the window that ends here. All its values are copied from the device in one transfer."""
        losses, ranges = self._losses.unread(), self._measure_code_range()
        reliability = {} if self.robust_loss is None else self.robust_loss.metrics()
        values = fetch({**self.train_metrics.collect(), **losses, **ranges, **reliability})
        self._losses.check({name: values.pop(name) for name in losses})
        for name in ranges:
            self._code_range = float(values.pop(name))
        for name, value in values.items():
            self.log(f"train/{name}", value, prog_bar=name in PROGRESS_BAR, batch_size=1)

    def _measure_code_range(self) -> dict[str, Tensor]:
        """Compute the current range of the codes' logits, on the device. Empty if training does not use it."""
        if self.latent is None or not self.latent.scores_codes:
            return {}
        return {"code_range": code_range(self.policy.head, self.latent.codes)}

    def _latest_code_range(self) -> float | None:
        """Return the range of the last logged step. The first step of a run computes it and waits for the device."""
        if self._code_range is None:
            for value in self._measure_code_range().values():
                self._code_range = float(value)
        return self._code_range

    def _report(self, stage: str, metrics: PreferenceMetrics) -> None:
        for name, value in metrics.collect().items():
            # All devices already hold the same value. Without sync_dist, Lightning warns that they may not.
            self.log(f"{stage}/{name}", value, prog_bar=name in PROGRESS_BAR, batch_size=1, sync_dist=True)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the trained weights, the template, a record of the data, and the state of the run."""
        self._losses.check_all_devices(self.device)
        super().on_save_checkpoint(checkpoint)
        store_position(self.trainer, checkpoint)
        if (data := preference_data(self.trainer)) is not None:
            checkpoint["template"] = data.template_settings._asdict()
            checkpoint |= {"data_folder": data.folder, "data_rows": data.rows}
        checkpoint["run_length"] = run_length(self.trainer)
        if self.warm_start_result is not None:
            checkpoint["warm_start"] = self.warm_start_result
        if self._code_range is not None:
            checkpoint["code_range"] = self._code_range
        if self.robust_loss is not None and (state := self.robust_loss.state_dict()):
            checkpoint["robust_loss"] = state
        checkpoint |= {name: plain(value) for name, value in checkpoint.items() if name not in WEIGHTS}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture, and restore the state of the run.

        Raises:
            CheckpointError: Names or shapes of the weights differ.
        """
        super().on_load_checkpoint(checkpoint)
        self._resumed = {name: checkpoint[name] for name in RESUMED if name in checkpoint}
        self._loaded_step = checkpoint.get("global_step", 0)
        if "robust_loss" in checkpoint and self.robust_loss is not None:
            self.robust_loss.load_state_dict(checkpoint["robust_loss"])
        if "position" in checkpoint and self._trainer is not None and self._trainer.training:
            self._resumed["training_data"] = restore_position(self.trainer, checkpoint)


# Gradient accumulation. A window is the group of micro-batches whose gradients make one optimizer step.


def is_optimizer_step(trainer: Trainer, batch_idx: int) -> bool:
    """Return True if the optimizer steps after this micro-batch: its window is full, or the epoch ends."""
    number = batch_idx + 1
    # A loader without length has no last number.
    is_last = number == trainer.num_training_batches or trainer.is_last_batch
    return number % trainer.accumulate_grad_batches == 0 or is_last


def is_logged(trainer: Trainer, batch_idx: int) -> bool:
    """Return True if the step of this micro-batch is logged. Call it before the step is taken.

    Logged are every `trainer.log_every_n_steps`-th step, which loggers write, the first and the last step of the run,
    and the last step of each epoch, whose values callbacks may read. Metrics of other steps are not computed, because
    reading them would make the CPU wait for the device. A step after which `trainer.max_time` stops the run is not
    known before it.
    """
    step = trainer.global_step + 1
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning's connector
    window = trainer.accumulate_grad_batches
    ends_epoch = batch_idx // window == (trainer.num_training_batches - 1) // window or trainer.is_last_batch
    return ends_epoch or step in (1, trainer.max_steps) or (every > 0 and step % every == 0)


def window_weight(trainer: Trainer, pairs: int, batch_idx: int, weights: Tensor | None = None) -> float | Tensor:
    """Return the factor of a micro-batch's mean loss that makes the window's loss the mean over its pairs.

    The trainer divides by `accumulate_grad_batches`, even if a micro-batch or the epoch's last window is short.
    DeepSpeed, which accumulates by itself, divides by it once more. With weights, the window's loss is
    sum(w_i l_i) / sum(w_i) over its pairs on all devices, whose gradients the trainer averages. The sum of the weights
    is known from the order of the epoch, so no device waits for another one. It is 0 if all weights of the window are
    0.

    Args:
        trainer: The trainer. Only a `TrainingLoader` has known batch sizes. With another loader, the window's loss is
            the mean of those of its micro-batches.
        pairs: Number of pairs in the micro-batch.
        batch_idx: Number of the micro-batch in the epoch, from 0.
        weights: (B,) weights of the micro-batch's pairs. None: all are equal.
    """
    loader, window = trainer.train_dataloader, trainer.accumulate_grad_batches
    factor = float(window) if trainer.strategy.handles_gradient_accumulation else 1.0
    if not isinstance(loader, TrainingLoader) or (window == 1 and weights is None):
        return factor
    start = batch_idx - batch_idx % window
    end = min(start + window, int(trainer.num_training_batches))
    if weights is None:
        return factor * pairs * window / sum(loader.batch_sizes[start:end])
    total = loader.weight_sum(start, end)
    return weights.sum() * (factor * window * trainer.world_size / total) if total else 0.0
