"""Benchmarks of the policy with its latent, after and during training."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.algorithms.averaged_weights import validated_weights
from lpc_lightning.algorithms.run_length import total_steps
from lpc_lightning.data.tokenization.templates import make_template
from lpc_lightning.data.trainer_data import template_settings
from lpc_lightning.distributed.sharding import keeps_weights_elsewhere
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.benchmarks.checks import check_chat_template, check_counts, check_tasks
from lpc_lightning.evaluation.benchmarks.preserve import preserved
from lpc_lightning.evaluation.benchmarks.results import BenchmarkResults, scores, write_results
from lpc_lightning.evaluation.benchmarks.tasks import PAPER_TASKS, load_tasks
from lpc_lightning.evaluation.benchmarks.trial import Trial, failure_reason
from lpc_lightning.evaluation.tables import score
from lpc_lightning.files.markdown import markdown_table
from lpc_lightning.files.path_variables import expand_path
from lpc_lightning.inference.opening import inference_prior, with_end
from lpc_lightning.latent import PriorMode
from lpc_lightning.loggers import run_folder
from lpc_lightning.seeding import run_seed

if TYPE_CHECKING:
    from lpc_lightning.evaluation.benchmarks.latent_lm import LatentLM

log = logging.getLogger(__name__)

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class LMEvaluation(Callback):
    """Callback that runs lm-eval on the policy at the end of `fit`, and optionally during it. z comes from the prior.

    Scores are logged as `lm_eval/TASK/METRIC`. `lm_eval/` in the run folder gets `items.jsonl`, and `results.json` with
    all that is needed to repeat the evaluation. Results during training are in `lm_eval/step_N/`. If their limit is not
    that of the end, they are over other questions, and are logged as `lm_eval/first_LIMIT/TASK/METRIC`. The step of a
    score is the number of optimizer steps before it.

    At the end, training is over and its checkpoints are written. If a benchmark fails, only its scores are missing: a
    warning and `results.json` give the reason. The evaluated weights are the last ones; `lpc-lightning evaluate`
    evaluates any checkpoint. Evaluation during training does not change the training. With `WeightAveraging` it
    evaluates the average. List that callback first: if it is second, its average lacks the step that has just ended.

    With several processes (DDP), each evaluates a part of the requests. A policy that is sharded over processes (FSDP,
    DeepSpeed) is not evaluated.
    """

    def __init__(
        self,
        tasks: Sequence[str] = PAPER_TASKS,
        data_dir: str | None = None,
        limit: int | float | None = None,
        every_n_steps: int | None = None,
        step_limit: int = 100,
        num_fewshot: int | None = None,
        batch_size: int | str = 8,
        prior_mode: PriorMode | None = None,
        apply_chat_template: bool = False,
        seed: int = 1234,
    ) -> None:
        """Set what to evaluate, and when.

        Args:
            tasks: Names of lm-eval's tasks, groups or tags, or paths of task files (.yaml).
            data_dir: Folder with the tasks' data (arc/, gsm8k/, truthfulqa/). null: download the data from the hub.
            limit: Evaluate the first documents of each task up to this number, at the end; below 1: this share of them.
                null: all of them.
            every_n_steps: Also evaluate after every n-th optimizer step. null: only at the end.
            step_limit: Same as `limit`, for evaluations during training.
            num_fewshot: Examples before each question. null: the task's default. A task whose default is 0, such as
                truthfulqa_mc1, always has no examples, and a line names it.
            batch_size: Sequences in a batch, or `auto`.
            prior_mode: How z is taken from the prior: `mean`, `sample`, `argmax`, or the index of a code. null: the
                default of the latent space.
            apply_chat_template: Format prompts as conversations, with the tokenizer's chat template.
            seed: Seed of the few-shot examples and of all sampling. A task that shuffles its documents while they are
                loaded uses lm-eval's default seeds instead.
        """
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(f"LMEvaluation.every_n_steps: found {every_n_steps}, expected at least 1, or null.")
        if step_limit < 1:
            raise ConfigError(f"LMEvaluation.step_limit: found {step_limit}, expected at least one document.")
        self.tasks, self.limit = tuple(tasks), limit
        self.data_dir = None if data_dir is None else expand_path(data_dir, "LMEvaluation.data_dir")
        self.every_n_steps, self.step_limit = every_n_steps, step_limit
        self.num_fewshot, self.batch_size, self.prior_mode = num_fewshot, batch_size, prior_mode
        self.apply_chat_template, self.seed = apply_chat_template, seed
        self._last_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the settings before training, and download the data.

        Raises:
            ConfigError: A task is unknown, a file is missing, or a setting is out of range.
        """
        if stage != "fit":
            return
        check_counts(self.limit, self.num_fewshot)
        if self.apply_chat_template:
            check_chat_template(pl_module.tokenizer)
        check_tasks(self.tasks, self.data_dir)
        if keeps_weights_elsewhere(trainer.strategy):
            rank_zero_warn(f"LMEvaluation: {_advice(trainer)}")
        elif self.data_dir is None:
            for task in self.tasks:
                with Trial() as trial:
                    load_tasks(task)
                if trial.failure:
                    rank_zero_warn(f"LMEvaluation: {task} will have no scores: {trial.failure}")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the settings that depend on the model, which is built now.

        Raises:
            ConfigError: The batch size or the mode of the prior is invalid.
        """
        assert isinstance(pl_module, PreferenceModule)
        if not keeps_weights_elsewhere(trainer.strategy):
            with _evaluated(trainer, pl_module):
                self._lm(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Skip the step at which a resumed run starts: it was evaluated before."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate after every n-th step. The last step is evaluated at the end of training."""
        step = trainer.global_step
        if self.every_n_steps is None or step == self._last_step or step == total_steps(trainer):
            return
        self._last_step = step
        if step % self.every_n_steps == 0 and not keeps_weights_elsewhere(trainer.strategy):
            name = "lm_eval" if self.step_limit == self.limit else f"lm_eval/first_{self.step_limit}"
            with validated_weights(trainer, pl_module):
                self._run(trainer, pl_module, self.step_limit, Path(f"step_{step}"), name)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the trained policy. All checkpoints are written, and the signal handlers are restored."""
        if keeps_weights_elsewhere(trainer.strategy):
            rank_zero_warn(f"LMEvaluation: no benchmark was run. {_advice(trainer)}")
            return
        assert isinstance(pl_module, PreferenceModule)
        with _moved_to(trainer.strategy.root_device, pl_module):
            results = self._run(trainer, pl_module, self.limit, Path(), "lm_eval")
        if trainer.is_global_zero:
            print(_table(results))

    def _run(
        self, trainer: Trainer, pl_module: LightningModule, limit: int | float | None, folder: Path, name: str
    ) -> BenchmarkResults:
        assert isinstance(pl_module, PreferenceModule)
        folder = run_folder(trainer) / "lm_eval" / folder
        with _evaluated(trainer, pl_module):
            try:
                results = self._benchmarks(trainer, pl_module, limit)
            except Exception as error:  # no error of an evaluation may end the training
                log.debug("Benchmarks failed.", exc_info=error)
                results = BenchmarkResults({}, [], dict.fromkeys(self.tasks, failure_reason(error)))
        if trainer.is_global_zero:
            self._report(trainer, pl_module, results, folder, name)
        return results

    def _lm(self, trainer: Trainer, module: PreferenceModule) -> LatentLM:
        # Importing lm-eval takes a second, which runs without this callback should not need.
        from lpc_lightning.evaluation.benchmarks.latent_lm import LatentLM

        return LatentLM(
            module.policy,
            module.tokenizer,
            None if module.latent is None else inference_prior(module.latent),
            prior_mode=self.prior_mode,
            batch_size=self.batch_size,
            mixed_precision_dtype=AUTOCAST.get(str(trainer.precision)),
            seed=self.seed,
            template=make_template(module.tokenizer, *template_settings(trainer)) if self.apply_chat_template else None,
        )

    def _benchmarks(self, trainer: Trainer, module: PreferenceModule, limit: int | float | None) -> BenchmarkResults:
        from lpc_lightning.evaluation.benchmarks.runner import run_benchmarks

        return run_benchmarks(
            self._lm(trainer, module),
            self.tasks,
            data_dir=self.data_dir,
            limit=limit,
            num_fewshot=self.num_fewshot,
            apply_chat_template=self.apply_chat_template,
            seed=self.seed,
        )

    def _report(
        self, trainer: Trainer, module: PreferenceModule, results: BenchmarkResults, folder: Path, name: str
    ) -> None:
        for task, failure in results.failures.items():
            rank_zero_warn(f"LMEvaluation: {task} has no scores: {failure}")
        try:
            write_results(folder, results, _origin(trainer, module, folder))
        except OSError as error:
            rank_zero_warn(f"LMEvaluation: could not write the results into {folder}: {error}")
        values = {
            f"{name}/{task}/{metric}": value
            for task, metrics in results.metrics.items()
            for metric, value in metrics.items()
        }
        for logger in trainer.loggers if values else ():
            logger.log_metrics(values, trainer.global_step)
            logger.save()


@contextmanager
def _evaluated(trainer: Trainer, module: PreferenceModule) -> Iterator[None]:
    """Preserve the state of training. Within the block, answers end as those of the module's checkpoints do."""
    model, template = module.policy.causal_lm, make_template(module.tokenizer, *template_settings(trainer))
    published = model.generation_config
    with preserved(module, module.tokenizer):
        model.generation_config = with_end(published, template.end_id)
        try:
            yield
        finally:
            model.generation_config = published


@contextmanager
def _moved_to(device: torch.device, module: PreferenceModule) -> Iterator[None]:
    """Move the policy to the device of the training, and afterwards back to where Lightning has put it (the CPU)."""
    before = module.policy.model.device
    module.policy.to(device)
    try:
        yield
    finally:
        module.policy.to(before)


def _advice(trainer: Trainer) -> str:
    return (
        f"{type(trainer.strategy).__name__} shards the policy over devices, and lm-eval does not support this. After "
        "the fit, run `lpc-lightning evaluate` on a checkpoint of the run."
    )


def _origin(trainer: Trainer, module: PreferenceModule, folder: Path) -> dict[str, Any]:
    """Return what was evaluated. A module that was built in code has no recorded settings, only names of classes."""
    settings = dict(module.hparams)
    latent = None if module.latent is None else type(module.latent).__name__
    return {
        "kind": "fit",
        "path": folder,
        "algorithm": type(module).__name__,
        "policy": settings.pop("policy", type(module.policy_spec).__name__),
        "latent": settings.pop("latent", latent),
        "settings": {name: value for name, value in settings.items() if not name.startswith("_")},
        "precision": trainer.precision,
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "seed": run_seed(),
    }


def _table(results: BenchmarkResults) -> str:
    """Format the scores with standard errors, and the tasks that failed."""
    rows = [
        [task, metric, score(*value)]
        for task, metrics in results.metrics.items()
        for metric, value in scores(metrics).items()
    ]
    rows += [[task, "failed", "-"] for task in results.failures]
    return f"\n{markdown_table(['benchmark', 'metric', 'score'], rows, left=2)}\n"
