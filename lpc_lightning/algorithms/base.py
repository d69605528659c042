"""The LightningModule that all algorithms share: the step, the metrics, the optimizer groups, the checkpoint."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer

from lpc_lightning.algorithms.accumulation import is_logged, is_optimizer_step, share_of_window
from lpc_lightning.algorithms.checkpoint import check_same_architecture, rewind_to_last_step
from lpc_lightning.algorithms.metrics import PreferenceMetrics, fetch
from lpc_lightning.algorithms.policy_module import REFERENCES, PolicyModule
from lpc_lightning.algorithms.recent_losses import RecentLosses
from lpc_lightning.algorithms.run_length import compare_run_length, run_length
from lpc_lightning.algorithms.scoring import BatchScorer, Evaluated, TrainingOutput
from lpc_lightning.data import PreferenceDataModule
from lpc_lightning.data.batching.loading import TrainingLoader
from lpc_lightning.errors import ConfigError
from lpc_lightning.latent import DiscreteSpace, LatentSpace
from lpc_lightning.policy import PolicySpec
from lpc_lightning.policy.logprobs import BatchForward, code_range
from lpc_lightning.seeding import derive, run_seed
from lpc_lightning.types import PairLogps, PairLosses, PreferenceBatch

PROGRESS_BAR = ("loss", "rewards/accuracies", "rewards/margins", "latent/codebook_perplexity")


class PreferenceModule(PolicyModule):
    """Fits a policy to preference pairs; a subclass says its loss and whether it needs a reference."""

    def __init__(
        self,
        policy: PolicySpec,
        latent: LatentSpace | None = None,
        reference: Literal["cached", "live"] = "cached",
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=5e-7, weight_decay=0.0, fused=True),
        latent_lr: float = 1e-3,
        lr_schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine",
        warmup_ratio: float = 0.1,
    ) -> None:
        """Keep the settings; models are built in `configure_model`.

        Args:
            policy: The model to train, as a spec.
            latent: The latent space of Latent Preference Coding. null is the plain algorithm.
            reference: `cached` works out the reference's log-probabilities of all pairs that a run will read before its
                first step, keeps them on disk for other runs (data.cache_dir), and holds no reference in memory; `live`
                asks it at every batch: a frozen copy of the policy, or with LoRA the policy with its adapter off.
            optimizer: Optimizer of both parameter groups; its learning rate is the policy's.
            latent_lr: Learning rate of the latent space: fresh networks need a larger one than a pretrained backbone.
            lr_schedule: What the learning rates do after warm-up; cosine and linear go down to 0.
            warmup_ratio: Share of the optimizer steps over which the learning rates rise from 0.
        """
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is an instance of `nn.Module`")
            self.save_hyperparameters()
        if "_class_path" not in self.hparams:
            # Built in code and not by the command line: live objects do not belong into a checkpoint.
            self.remove_ignored_hparams(["policy", "latent", "optimizer"])
        if not self.needs_reference:
            self.remove_ignored_hparams(["reference"])
        if reference not in REFERENCES:
            raise ConfigError(f"model.reference: found {reference!r}, expected {' or '.join(REFERENCES)}.")
        self.policy_spec, self.latent, self.optimizer_of = policy, latent, optimizer
        self.latent_lr, self.lr_schedule, self.warmup_ratio = latent_lr, lr_schedule, warmup_ratio
        self.strict_loading = False  # a checkpoint holds no frozen weights; `on_load_checkpoint` checks the rest
        self.reference_kind = reference
        self._warm_started = False
        self._losses = RecentLosses()
        self._code_range: float | None = None
        self._resumed: dict[str, Any] = {}

    @abstractmethod
    def preference_loss(self, logps: PairLogps) -> PairLosses:
        """The algorithm's loss of each pair."""

    def check_settings(self) -> None:
        """Ask for the loss of one pair: settings out of range are told now and not at the first step.

        Raises:
            ValueError: As the loss says.
        """
        self.preference_loss(PairLogps(*torch.zeros(6, 1, device="cpu")))

    def setup(self, stage: str) -> None:
        """Begin a run: what a checkpoint said that was loaded earlier, for its weights, is not its to go on with."""
        super().setup(stage)
        self._resumed, self._warm_started = {}, False
        self._losses, self._code_range = RecentLosses(), None

    # The step

    def read(self, batch: PreferenceBatch, code_range: float | None = None) -> tuple[BatchForward, BatchScorer]:
        """One backbone pass of the policy, and (where there is one) of the reference.

        Args:
            batch: The pairs.
            code_range: See `token_logps_per_code`.

        Returns:
            What the pass yields, and the algorithm's loss as a function of the latent.
        """
        reading = self.policy.read(batch)
        reference = None if self.reference is None else self.reference.logps(batch)
        return reading, BatchScorer(reading, batch.lengths, reference, self.preference_loss, code_range)

    def on_train_start(self) -> None:
        """Take up the data where a resumed run left it, and tell where this run is set up otherwise.

        Lightning would give the loader its state, but not to one that exists before the loops are restored (as ours
        does, by `estimated_stepping_batches`), and not after a whole epoch, when order and data have to match as well.
        """
        loader = self.trainer.train_dataloader
        if "training_data" in self._resumed and isinstance(loader, TrainingLoader):
            loader.load_state_dict(self._resumed["training_data"])
        if "run_length" in self._resumed:
            compare_run_length(self.trainer, self._resumed["run_length"])
        # A checkpoint of step 0 may have been written before the warm start, or within the first step, after it.
        self._warm_started = "warm_started" in self._resumed
        self._code_range = self._resumed.get("code_range")
        self._resumed = {}
        self._check_annotators()
        if (
            self.latent is not None
            and self.latent.warm_start_pairs
            and self.trainer.global_step == 0
            and not self._warm_started
        ):
            # Scikit-learn, which it needs, takes a while to import.
            from lpc_lightning.algorithms.warm_start.warm_start import warm_start

            warm_start(self, self.latent)
            self._warm_started = True

    def _check_annotators(self) -> None:
        """Refuse to share what annotators say where nobody is known to have labelled anything."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning's connector
        shares = isinstance(self.latent, DiscreteSpace) and self.latent.annotators
        if shares and isinstance(data, PreferenceDataModule) and not any(data.training_pairs.annotators):
            raise ConfigError(
                f"latent.annotators: found true, and no annotator in {len(data.training_pairs)} training pairs, "
                "expected a column `annotator` (see data.columns.annotator), or latent.annotators false."
            )

    def on_train_epoch_start(self) -> None:
        """Have the data follow this run's epochs: resumed under `max_steps`, Lightning's count for it is one ahead."""
        if isinstance(loader := self.trainer.train_dataloader, TrainingLoader):
            loader.sampler.set_epoch(self.current_epoch)

    def on_train_batch_start(self, batch: PreferenceBatch, batch_idx: int) -> None:
        """Tie the step's random draws to its place in the run (see `seeding`)."""
        torch.manual_seed(derive("step", run_seed(), self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> TrainingOutput:
        """Mean over pairs of the preference loss and the latent's penalty. Callbacks get what it is a mean of."""
        reading, score = self.read(batch, self._known_code_range())
        terms = self.training_terms(reading.states, score, self.progress)
        losses = terms.pairs.losses + terms.penalty
        loss = losses.mean()
        self._losses.add(loss, self.trainer.global_step, self.current_epoch, batch_idx, batch.ids)
        logged = is_logged(self.trainer, batch_idx)
        if logged:
            self.train_metrics.update(terms, reading.states)
            if is_optimizer_step(self.trainer, batch_idx):
                self._log_training()
        margins = terms.pairs.chosen_rewards - terms.pairs.rejected_rewards
        share = share_of_window(self.trainer, batch.pairs, batch_idx)
        return {"loss": loss * share, "losses": losses.detach(), "margins": margins, "logged": logged}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Close the window for the latent space as well, whose moments go by steps."""
        if self.latent is not None:
            self.latent.close_window()

    def on_validation_start(self) -> None:
        """Look at the losses so far: a run that has diverged is not validated."""
        self._losses.check()

    def on_train_end(self) -> None:
        """Look at the last losses."""
        self._losses.check()

    def on_train_batch_end(self, outputs: Any, batch: PreferenceBatch, batch_idx: int) -> None:
        """Drop the gradients with the step: Lightning would keep them through the next forward pass."""
        if is_optimizer_step(self.trainer, batch_idx):
            for optimizer in self.trainer.optimizers:
                optimizer.zero_grad()

    def validation_step(self, batch: PreferenceBatch, batch_idx: int) -> Evaluated:
        """Score the pairs as the policy is used: under the prior. Callbacks get the pass, to ask more of it."""
        return self._evaluate(batch, batch_idx, self.val_metrics)

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> Evaluated:
        """Like validation, on test data."""
        return self._evaluate(batch, batch_idx, self.test_metrics)

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> dict[str, Any]:
        """Rewards, margins and prior of each pair, by its id."""
        terms = self._infer(batch, batch_idx)["terms"]
        pairs = terms.pairs
        return {
            "ids": batch.ids,
            "rewards/chosen": pairs.chosen_rewards,
            "rewards/rejected": pairs.rejected_rewards,
            "rewards/margins": pairs.chosen_rewards - pairs.rejected_rewards,
            "prior": None if terms.prior is None else terms.prior.exp(),
        }

    def on_validation_epoch_end(self) -> None:
        """Log means over all validation pairs, on all devices."""
        self._report("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log means over all test pairs, on all devices."""
        self._report("test", self.test_metrics)

    def _infer(self, batch: PreferenceBatch, batch_idx: int) -> Evaluated:
        torch.manual_seed(derive("evaluation", run_seed(), batch_idx, self.global_rank))
        reading, score = self.read(batch)
        return {"terms": self.inference_terms(reading.states, score), "states": reading.states, "score": score}

    def _evaluate(self, batch: PreferenceBatch, batch_idx: int, metrics: PreferenceMetrics) -> Evaluated:
        evaluated = self._infer(batch, batch_idx)
        metrics.update(evaluated["terms"], evaluated["states"])
        return evaluated

    def _log_training(self) -> None:
        """Log the window that ends, after one transfer from the device for all that is read of it."""
        losses, measured = self._losses.unread(), self._measured_code_range()
        read = fetch({**self.train_metrics.collect(), **losses, **measured})
        self._losses.check({name: read.pop(name) for name in losses})
        for name in measured:
            self._code_range = float(read.pop(name))
        for name, value in read.items():
            self.log(f"train/{name}", value, prog_bar=name in PROGRESS_BAR, batch_size=1)

    def _measured_code_range(self) -> dict[str, Tensor]:
        """The range of the codes' logits as they are now, on the device; empty where training has no use for it."""
        if not (isinstance(self.latent, DiscreteSpace) and self.latent.scores_codes):
            return {}
        return {"code_range": code_range(self.policy.head, self.latent.codebook.weight)}

    def _known_code_range(self) -> float | None:
        """The range as it was at the last logged step. The first step of a run measures it, and waits for that."""
        if self._code_range is None:
            for value in self._measured_code_range().values():
                self._code_range = float(value)
        return self._code_range

    def _report(self, stage: str, metrics: PreferenceMetrics) -> None:
        for name, value in metrics.collect().items():
            # All devices hold the same value by now; sync_dist only keeps Lightning from warning that they might not.
            self.log(f"{stage}/{name}", value, prog_bar=name in PROGRESS_BAR, batch_size=1, sync_dist=True)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was trained (the policy or its adapter, and the latent space, not the reference) and on what."""
        self._losses.check()
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if name in self._trained}
        trainer = self.trainer
        if isinstance(loader := trainer.train_dataloader, TrainingLoader):
            window, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
            taken = rewind_to_last_step(checkpoint["loops"], window, batches)
            checkpoint["training_data"] = loader.state_dict() | {"taken": taken}
        checkpoint["run_length"] = run_length(trainer)
        if self._warm_started:
            checkpoint["warm_started"] = True
        if self._code_range is not None:
            checkpoint["code_range"] = self._code_range

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse a checkpoint whose weights are not this model's. (DeepSpeed has loaded its own before it asks.)"""
        if not self._built:
            self._build()
        if "state_dict" in checkpoint:
            check_same_architecture(self._trained, checkpoint["state_dict"])
        told = ("training_data", "run_length", "warm_started", "code_range")
        self._resumed = {name: checkpoint[name] for name in told if name in checkpoint}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch does; frozen weights, which no checkpoint holds, are not told as missing."""
        found = super().load_state_dict(state_dict, strict, assign)
        found.missing_keys[:] = [name for name in found.missing_keys if name in self._trained]
        return found
