"""What each code stands for, at the end of a fit."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.algorithms.averaged_weights import validated_weights
from lpc_lightning.data.trainer_data import preference_data
from lpc_lightning.distributed.sharding import keeps_weights_elsewhere
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.accuracy.collect import CollectValidation
from lpc_lightning.evaluation.codebook.explanation import Explanation, ExplanationPairs
from lpc_lightning.evaluation.codebook.explanation_files import TEXT, write_explanation
from lpc_lightning.evaluation.codebook.pair_keys import find_examples
from lpc_lightning.loggers import log_text, run_folder


class CodeExplanations(CollectValidation):
    """Callback that writes what each code stands for to `codes.md` and `codes.json` in the run folder.

    The files are written at the end of a fit, over the pairs of the last validation, and after `validate`. Loggers that
    take text get the text, too. They have the tokens that a code raises and lowers, the prompts that choose it, the
    pairs that it decides, and a label. The cost is small: nothing is generated, and the log-probabilities under all
    codes are shared with other callbacks. `lpc-lightning explain` does the same for a checkpoint, with answers. Idle
    without codes, and for a policy that is sharded over devices.
    """

    def __init__(self, tokens: int = 10, examples: int = 3) -> None:
        """Check and store the settings.

        Args:
            tokens: Tokens that a code raises, and tokens that it lowers, at most.
            examples: Prompts and pairs of each code at most.

        Raises:
            ConfigError: A setting is out of range.
        """
        for name, value, least in (("tokens", tokens, 1), ("examples", examples, 0)):
            if value < least:
                raise ConfigError(f"CodeExplanations.{name}: found {value}, expected at least {least}.")
        self.tokens, self.examples = tokens, examples
        self.collector: ExplanationPairs | None = None
        self._latest: Explanation | None = None
        self._origin: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the collector if the latent has codes."""
        assert isinstance(pl_module, PreferenceModule)
        has_codes = pl_module.latent is not None and pl_module.latent.has_codes
        is_on = has_codes and not keeps_weights_elsewhere(trainer.strategy)
        self.collector, self._latest = ExplanationPairs() if is_on else None, None

    def finish(self, stage: str, trainer: Trainer, pl_module: LightningModule) -> None:
        """Explain the codes by the round, and keep the result until the end."""
        assert isinstance(pl_module, PreferenceModule)
        assert self.collector is not None
        if trainer.sanity_checking:
            return
        space, policy = pl_module.latent, pl_module.policy
        assert space is not None
        with validated_weights(trainer, pl_module, at_epoch_end=self):
            self._latest = self.collector.explain(
                space.codes, policy.head, pl_module.tokenizer, self.tokens, self.examples
            )
        loaded = None if trainer.state.fn == TrainerFn.FITTING else trainer.ckpt_path
        path = None if loaded is None else str(loaded)
        self._origin = {"checkpoint": path, "step": pl_module.weights_step, "preferences": None}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files after `validate`, and after the last validation of a fit.

        `FinalValidation` requests the stop before that validation. The end of the training would be too late: a run
        that is ended in between and resumed from its last checkpoint has no validation and no end of training.
        """
        if trainer.state.fn == TrainerFn.VALIDATING or trainer.should_stop:
            self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files if the last validation was not known to be the last one."""
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if self.collector is None:
            return
        folder = run_folder(trainer)
        explanation, self._latest = self._latest, None
        if explanation is None or not trainer.is_global_zero:
            return
        try:
            data = preference_data(trainer)
            if data is not None:
                explanation = explanation.with_texts(find_examples(data, "validation", explanation.shown_pairs))
            text = write_explanation(folder, explanation, self._origin)
            log_text(trainer, "codes", text, self._origin["step"])
        except Exception as error:  # a failed explanation must not end the training
            rank_zero_warn(f"CodeExplanations: the codes have no {TEXT}: {type(error).__name__}: {error}")
            return
        rank_zero_info(f"What the codes stand for: {folder / TEXT}.")
