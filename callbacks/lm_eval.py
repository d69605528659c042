"""Benchmarks of the policy with its latent, after training and on the way."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.benchmarks.checks import check_chat_template, check_counts, check_tasks
from lpc_lightning.evaluation.benchmarks.preserve import preserved
from lpc_lightning.evaluation.benchmarks.results import BenchmarkResults, scores, write_results
from lpc_lightning.evaluation.benchmarks.tasks import PAPER_TASKS, load_tasks
from lpc_lightning.evaluation.benchmarks.trial import Trial, reason
from lpc_lightning.evaluation.tables import markdown_table, score
from lpc_lightning.inference.prior import inference_prior
from lpc_lightning.latent import PriorMode
from lpc_lightning.paths import expand_path
from lpc_lightning.seeding import run_seed

if TYPE_CHECKING:
    from lpc_lightning.evaluation.benchmarks.latent_lm import LatentLM

log = logging.getLogger(__name__)

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
SHARDED = (ModelParallelStrategy, FSDPStrategy, DeepSpeedStrategy)


class LMEvaluation(Callback):
    """Runs lm-eval on the policy at the end of `fit`, and on the way if asked; z comes from the prior.

    Scores go to all loggers as `lm_eval/TASK/METRIC`, and with all that is needed to run them again to `results.json`
    and `items.jsonl` in `lm_eval/` of the run folder. Runs on the way are in `lm_eval/step_N/`; where their limit is
    another one they ask other questions, and are logged as `lm_eval/first_LIMIT/TASK/METRIC`. A score's step is the
    number of optimizer steps behind the weights.

    By the end, training is over and its checkpoints are written: a benchmark that fails costs its scores and nothing
    else, which a warning and `results.json` tell. The weights are the last ones; `lpc-lightning evaluate` takes any
    checkpoint. Training goes on from a run on the way as if it had not been.

    Several processes (DDP) share the requests. A policy that is sharded among them (FSDP, DeepSpeed) is not evaluated.
    """

    def __init__(
        self,
        tasks: Sequence[str] = PAPER_TASKS,
        data_dir: str | None = None,
        limit: int | None = None,
        every_n_steps: int | None = None,
        step_limit: int = 100,
        num_fewshot: int | None = None,
        batch_size: int | str = 8,
        prior_mode: PriorMode | None = None,
        apply_chat_template: bool = False,
        seed: int = 1234,
    ) -> None:
        """Say what to run, and when.

        Args:
            tasks: lm-eval's names of tasks, groups or tags, or paths of task files (.yaml).
            data_dir: Folder with the tasks' data (arc/, gsm8k/, truthfulqa/), which is then not asked from the hub.
            limit: Documents of each task at the end, from its start. null: all of them.
            every_n_steps: Run after every so many optimizer steps as well. null: at the end alone.
            step_limit: Documents of each task in the runs on the way.
            num_fewshot: Examples in front of each question. null: each task's own number.
            batch_size: Sequences at once, or `auto`.
            prior_mode: How z is taken from the prior: `mean`, `sample`, `argmax`, or the number of a code. null: as the
                latent space does.
            apply_chat_template: Put prompts as conversations, in the tokenizer's chat template.
            seed: Seed of few-shot examples and of whatever is drawn.
        """
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(f"every_n_steps: found {every_n_steps}, expected at least 1, or null.")
        if step_limit < 1:
            raise ConfigError(f"step_limit: found {step_limit}, expected at least one document.")
        self.tasks, self.limit = tuple(tasks), limit
        self.data_dir = None if data_dir is None else expand_path(data_dir, "data_dir")
        self.every_n_steps, self.step_limit = every_n_steps, step_limit
        self.num_fewshot, self.batch_size, self.prior_mode = num_fewshot, batch_size, prior_mode
        self.apply_chat_template, self.seed = apply_chat_template, seed
        self._last_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before anything is trained, what could not run at the end, and get data from the hub.

        Raises:
            ConfigError: An unknown task, a file that is not there, settings that mean nothing.
        """
        if stage != "fit":
            return
        check_counts(self.limit, self.num_fewshot)
        if self.apply_chat_template:
            check_chat_template(pl_module.tokenizer)
        check_tasks(self.tasks, self.data_dir)
        if isinstance(trainer.strategy, SHARDED):
            rank_zero_warn(f"LMEvaluation: {_advice(trainer)}")
        elif self.data_dir is None:
            for task in self.tasks:
                with Trial() as trial:
                    load_tasks(task)
                if trial.failure:
                    rank_zero_warn(f"LMEvaluation: {task} will have no scores: {trial.failure}")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse settings that the model, which is built by now, cannot be evaluated with.

        Raises:
            ConfigError: No such batch size, or no such mode of the prior.
        """
        assert isinstance(pl_module, PreferenceModule)
        if not isinstance(trainer.strategy, SHARDED):
            with preserved(pl_module, pl_module.tokenizer):
                self._lm(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out the step that a resumed run starts from."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Run after the step, if it is one of those; the last one is left to the end of training."""
        step = trainer.global_step
        if self.every_n_steps is None or step == self._last_step or step == trainer.estimated_stepping_batches:
            return
        self._last_step = step
        if step % self.every_n_steps == 0 and not isinstance(trainer.strategy, SHARDED):
            name = "lm_eval" if self.step_limit == self.limit else f"lm_eval/first_{self.step_limit}"
            self._run(trainer, pl_module, self.step_limit, Path(f"step_{step}"), name)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run on the trained policy. All checkpoints are written by now, and signals do again what they do."""
        if isinstance(trainer.strategy, SHARDED):
            rank_zero_warn(f"LMEvaluation: nothing was run. {_advice(trainer)}")
            return
        assert isinstance(pl_module, PreferenceModule)
        with _on(trainer.strategy.root_device, pl_module):
            results = self._run(trainer, pl_module, self.limit, Path(), "lm_eval")
        if trainer.is_global_zero:
            print(_table(results))

    def _run(
        self, trainer: Trainer, pl_module: LightningModule, limit: int | None, folder: Path, name: str
    ) -> BenchmarkResults:
        assert isinstance(pl_module, PreferenceModule)
        # Lightning asks the first process for the folder, so that all have to.
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "lm_eval" / folder
        with preserved(pl_module, pl_module.tokenizer):
            try:
                results = self._benchmarks(trainer, pl_module, limit)
            except Exception as error:  # whatever it is, the training is worth more
                log.debug("Benchmarks failed.", exc_info=error)
                results = BenchmarkResults({}, [], dict.fromkeys(self.tasks, reason(error)))
        if trainer.is_global_zero:
            self._report(trainer, pl_module, results, folder, name)
        return results

    def _lm(self, trainer: Trainer, module: PreferenceModule) -> LatentLM:
        # Imports lm-eval: a second that runs without this callback should not pay.
        from lpc_lightning.evaluation.benchmarks.latent_lm import LatentLM

        return LatentLM(
            module.policy,
            module.tokenizer,
            None if module.latent is None else inference_prior(module.latent),
            prior_mode=self.prior_mode,
            batch_size=self.batch_size,
            mixed_precision_dtype=AUTOCAST.get(str(trainer.precision)),
            seed=self.seed,
        )

    def _benchmarks(self, trainer: Trainer, module: PreferenceModule, limit: int | None) -> BenchmarkResults:
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
        for task, why in results.failures.items():
            rank_zero_warn(f"LMEvaluation: {task} has no scores: {why}")
        try:
            write_results(folder, results, _origin(trainer, module, folder))
        except OSError as error:
            rank_zero_warn(f"LMEvaluation: could not write the results into {folder}: {error}")
        values = {
            f"{name}/{task}/{metric}": value
            for task, found in results.metrics.items()
            for metric, value in found.items()
        }
        for logger in trainer.loggers if values else ():
            logger.log_metrics(values, trainer.global_step)
            logger.save()


@contextmanager
def _on(device: torch.device, module: PreferenceModule) -> Iterator[None]:
    """The policy on the device where it was trained, and after that where Lightning has put it (on the CPU)."""
    before = module.policy.model.device
    module.policy.to(device)
    try:
        yield
    finally:
        module.policy.to(before)


def _advice(trainer: Trainer) -> str:
    return (
        f"{type(trainer.strategy).__name__} shards the policy over devices, where lm-eval cannot run it; when the fit "
        "is over, run `lpc-lightning evaluate` on a checkpoint of the run."
    )


def _origin(trainer: Trainer, module: PreferenceModule, folder: Path) -> dict[str, Any]:
    """What was evaluated. A module that was built in code does not know its settings, but for the names of classes."""
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
    """Scores with standard errors, a line each, and what has none."""
    rows = [
        [task, metric, score(*found)]
        for task, metrics in results.metrics.items()
        for metric, found in scores(metrics).items()
    ]
    rows += [[task, "failed", "-"] for task in results.failures]
    return f"\n{markdown_table(['benchmark', 'metric', 'score'], rows, left=2)}\n"
