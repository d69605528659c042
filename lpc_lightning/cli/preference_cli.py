"""The commands `fit`, `validate`, `test` and `predict`."""

from __future__ import annotations

import os
import sys
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from jsonargparse import ArgumentError
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.connectors import checkpoint_connector
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.algorithms.refused_callbacks import check_callbacks
from lpc_lightning.cli.checkpoint_path import check_checkpoint_path, warn_of_template
from lpc_lightning.cli.machine import check_accelerator, check_devices, default_precision, is_narrow
from lpc_lightning.cli.number_ranges import check_numbers
from lpc_lightning.cli.run_folder import DiscardedRunFolder, RunFolder
from lpc_lightning.cli.run_loggers import SaveSettings, build_logger, run_loggers
from lpc_lightning.cli.settings_parser import SettingsParser
from lpc_lightning.cli.user_errors import USER_ERRORS
from lpc_lightning.data import DataError, PreferenceDataModule
from lpc_lightning.errors import CheckpointError, ConfigError, one_line
from lpc_lightning.inference.checkpoint_entries import check_classes, check_resumable
from lpc_lightning.inference.checkpoints import read_checkpoint
from lpc_lightning.inference.model_places import find_models, make_places_absolute
from lpc_lightning.latent import LatentSpace
from lpc_lightning.policy import PolicySpec


class PreferenceCLI(LightningCLI):
    """LightningCLI with policy, latent and callbacks as groups of their own, each from a file or from flags."""

    def __init__(self, arguments: list[str] | None = None, run_folder: Path | None = None) -> None:
        """Parse and run.

        Args:
            arguments: The command line after the program's name. None: that of this process.
            run_folder: Folder of the run. None: a new folder `version_N` in `trainer.default_root_dir`.
        """
        self._command = (sys.argv[1:] if arguments is None else arguments)[:1]
        self._run_folder = run_folder
        self._claimed: RunFolder | None = None
        self._trained_template: dict[str, Any] | None = None
        try:
            super().__init__(
                PreferenceModule,
                PreferenceDataModule,
                save_config_callback=SaveSettings,
                parser_class=SettingsParser,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                parser_kwargs={
                    "prog": "lpc-lightning",
                    "description": "Train a policy on preference pairs, or score pairs.",
                    **{name: {"description": _description(name)} for name in self._command if name in SUMMARIES},
                },
                args=None if arguments == sys.argv[1:] else arguments,
            )
        finally:
            if self._claimed is not None:
                self._claimed.release()

    def setup_parser(self, *arguments: Any, **options: Any) -> None:
        """Name the command in its usage. Options come after it, so that the parser's `[options]` before it is wrong."""
        super().setup_parser(*arguments, **options)
        for name, parser in self._subcommand_parsers.items():
            parser.prog = f"{self.parser.prog} {name}"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the groups, link them to the settings that they fill, and explain settings of Lightning that differ."""
        import_module("lpc_lightning.callbacks")  # the parser finds only imported classes by a short name
        parser.add_subclass_arguments(PolicySpec, "policy", instantiate=False, help="The model to train.")
        parser.add_argument(
            "--latent",
            type=LatentSpace | None,
            default=None,
            sub_configs=True,
            help="The latent space of Latent Preference Coding. null is the plain algorithm.",
        )
        parser.add_argument(
            "--callbacks",
            type=list[Callback] | None,
            default=None,
            sub_configs=True,
            help="What happens around training. A file, or `--callbacks+=NAME` to add one.",
        )
        parser.link_arguments("policy", "model.init_args.policy")
        parser.link_arguments("latent", "model.init_args.latent")
        parser.link_arguments("callbacks", "trainer.callbacks")
        for action in parser._actions:
            action.help = HELP.get(action.dest, action.help)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and check the numbers before Lightning takes the first one."""
        super().parse_arguments(parser, args)
        check_numbers(self.config[self.config.subcommand])

    def before_instantiate_classes(self) -> None:
        """Fill in what depends on the machine and on the runs that are there already.

        Raises:
            ConfigError: `policy`, `model` or `data` has no class, or the strategy needs a package that is missing.
        """
        config = self.config[str(self.subcommand)]
        for name, base, example in (
            ("policy", PolicySpec, "--policy TinyPolicy"),
            ("model", PreferenceModule, "--model DPO"),
            ("data", PreferenceDataModule, "--data PreferenceData --data.path pairs.jsonl"),
        ):
            # Settings without a class are taken to be the base class's.
            if config[name] is None or config[name].class_path.endswith(f".{base.__name__}"):
                raise ConfigError(f"{name}: found no class, expected one, as in `{example}`.")
        if "OMP_NUM_THREADS" not in os.environ and is_narrow(config.policy):
            torch.set_num_threads(1)
        trainer = config.trainer
        strategy = getattr(trainer.strategy, "class_path", trainer.strategy)
        if "deepspeed" in str(strategy).lower() and find_spec("deepspeed") is None:
            raise ConfigError(
                f"trainer.strategy: found {strategy}, which needs DeepSpeed, and that is not installed. "
                "`pip install -c constraints.txt -e '.[deepspeed]'`, or set it to fsdp2."
            )
        if trainer.precision is None:
            trainer.precision = default_precision(trainer.accelerator)
        # Lightning refuses these callbacks then; our default callbacks hold some.
        refused = tuple(chain(*(names for setting, names in REFUSED.items() if trainer[setting] is False)))
        if refused and trainer.callbacks:
            trainer.callbacks = [each for each in trainer.callbacks if not each.class_path.endswith(refused)]
        if trainer.fast_dev_run and trainer.logger:
            trainer.logger = None  # a trial of a few batches reports nowhere
        if trainer.plugins is None:
            trainer.plugins = [{"class_path": "lpc_lightning.distributed.checkpoint_io.AtomicCheckpointIO"}]

    def instantiate_classes(self) -> None:
        """Build everything.

        Raises:
            ConfigError: A class refuses its settings.
        """
        trainer = self.config[str(self.subcommand)].trainer
        if self._run_folder is None:
            root = Path(trainer.default_root_dir or "runs")
            self._claimed = DiscardedRunFolder() if trainer.fast_dev_run else RunFolder(root)
            self._run_folder = self._claimed.path
        self.parser.add_instantiator(partial(build_logger, self._run_folder), class_type=Logger)
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise ConfigError(_reason(error)) from error
        self._check_template()
        # Only for checkpoints: `config.yaml` keeps what was given, which a report compares between machines.
        make_places_absolute(self.model.hparams)

    def _check_template(self) -> None:
        """Warn if pairs get another template than the policy was trained with. A resume refuses other tokens."""
        path, spec = self.config[str(self.subcommand)].ckpt_path, self.model.policy_spec
        recorded = spec.trained_template if path is None else self._trained_template
        if recorded is None or (path is not None and self.subcommand == "fit"):
            return
        result = "The scores are those of texts that the policy was not trained on."
        if self.subcommand == "fit":
            result = "The fit changes the form of the texts that the policy was trained on."
        settings = self.datamodule.template_settings
        warn_of_template(recorded, settings, self.model.tokenizer, path or spec.start, result)

    def instantiate_trainer(self, **options: Any) -> Trainer:
        """Give the run a folder of its own, which its config does not name: run again, it is another run.

        Raises:
            ConfigError: A setting of the trainer or a callback is refused.
        """
        settings = self.config[str(self.subcommand)].trainer
        check_accelerator(settings.accelerator)
        check_devices(settings.devices, settings.accelerator)
        check_callbacks(self._get(self.config_init, "callbacks") or [])  # Lightning refuses some without their setting
        if self._claimed is not None and (settings.fast_dev_run or settings.logger is False):
            options["default_root_dir"] = str(self._claimed.path)
        else:
            assert self._run_folder is not None
            options["logger"] = run_loggers(self._run_folder, self._get(self.config_init, "trainer").logger)
        try:
            return super().instantiate_trainer(**options)
        except (MisconfigurationException, ValueError) as error:
            raise ConfigError(f"trainer: {one_line(error)}") from error

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # theirs is static
        """Return the given one of Lightning's four commands, with its arguments that are no settings.

        Parsers of the other three, which take time, are built only for an unknown command.
        """
        theirs = LightningCLI.subcommands()
        theirs |= {name: {*theirs[name], "verbose"} for name in ("validate", "test")}
        return {name: theirs[name] for name in self._command if name in theirs} or theirs

    def before_fit(self) -> None:
        """State what a run without callbacks does not write."""
        if not self._get(self.config, "callbacks"):
            rank_zero_info(
                "callbacks: found none. The run keeps the checkpoint of its last epoch, and writes no best.ckpt, "
                "last.ckpt and summary.json. `--callbacks configs/callbacks/default.yaml` adds them."
            )

    def before_validate(self) -> None:
        """State which weights are scored without a checkpoint."""
        if self._get(self.config, "ckpt_path") is None:
            rank_zero_info(
                "ckpt_path: found none. The scores are those of the policy that a fit would start from, "
                f"{self.model.policy_spec.start}. `--ckpt_path runs/version_0/checkpoints/best.ckpt` scores a run's."
            )

    before_test = before_validate

    def before_predict(self) -> None:
        """State the same, and that a prediction without callbacks is not written."""
        self.before_validate()
        if not self._get(self.config, "callbacks"):
            rank_zero_info(
                "callbacks: found none, so the predictions are not written. `--callbacks "
                "configs/callbacks/default.yaml` writes them."
            )

    def after_test(self) -> None:
        """Refuse a test or a prediction without pairs, which Lightning ends without a result.

        Raises:
            DataError: There are no test pairs.
        """
        data = self.datamodule
        if not len(data.pairs.get("test", ())):
            rows = f" {data.reports['test']}." if "test" in data.reports else ""
            raise DataError(
                f"{self.subcommand}: found no test pairs, expected at least one.{rows} Set data.test_split to the "
                "split to use, or data.test_pairs for built-in pairs."
            )

    after_predict = after_test

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        found = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand in ("validate", "test"):
            # Lightning's table has a row for every group of pairs: not next to the short one of `RunSummary`.
            callbacks = self.config[subcommand].trainer.callbacks or []
            found["verbose"] = not any(each.class_path.endswith(".RunSummary") for each in callbacks)
        return found

    def _parse_ckpt_path(self) -> None:
        """Let the model settings in a checkpoint win over flags, and print that.

        LightningCLI does the same, but would put policy and latent under `model`, where our groups are linked to and
        nothing may be set.
        """
        command = self.config.get("subcommand")
        path = self.config[command].get("ckpt_path") if command else None
        if path is None:
            return
        check_checkpoint_path(path, self.config[command].trainer.default_root_dir)
        try:
            checkpoint = read_checkpoint(Path(path), weights=False)
            if command == "fit":
                check_resumable(checkpoint, Path(path))
            self._trained_template = checkpoint.get("template")
            settings = dict(checkpoint.get("hyper_parameters", {}))
            if "_class_path" not in settings:
                return
            check_classes(settings, Path(path))
            settings = find_models(settings, Path(path))
        except CheckpointError as error:
            raise CheckpointError(f"ckpt_path: {error}") from error
        settings.pop("_instantiator", None)
        found = {name: settings.pop(name, None) for name in ("policy", "latent")}
        if (policy := (found["policy"] or {}).get("init_args") or {}).get("trust_remote_code"):
            # A checkpoint from another author must not allow its own code.
            allowed = self.config[command].get("policy") and self.config[command].policy.init_args
            policy["trust_remote_code"] = bool(allowed and allowed.get("trust_remote_code"))
        model = {"class_path": settings.pop("_class_path"), "init_args": settings}
        print(f"Model, policy and latent are set as in {path}; flags and config files do not change them.")
        exits, self.parser.exit_on_error = self.parser.exit_on_error, False
        try:
            self.config = self.parser.parse_object({command: {"model": model, **found}}, self.config)
        except (ArgumentError, TypeError, KeyError, AttributeError) as error:
            reason = one_line(error)
            raise CheckpointError(
                f"ckpt_path: {path} holds settings that cannot be used ({reason}), expected those of the run. Take "
                "another checkpoint of the run."
            ) from error
        finally:
            self.parser.exit_on_error = exits

    def _run_subcommand(self, subcommand: str) -> None:
        """Run a command. An error of Lightning while it restores a checkpoint is one of the checkpoint."""
        try:
            super()._run_subcommand(subcommand)
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            path = self.config[subcommand].get("ckpt_path")
            if not path or isinstance(error, USER_ERRORS) or not _is_restoring(error):
                raise
            reason = one_line(error)
            raise CheckpointError(
                f"ckpt_path: {path} cannot be restored ({type(error).__name__}: {reason}), expected the state of a run "
                "with this trainer and these callbacks. Take another checkpoint of the run."
            ) from error


def _description(command: str) -> str:
    summary = SUMMARIES[command]
    return (
        f"{summary[:1].upper()}{summary[1:]}. The settings are in groups, each from a file or from flags: policy, "
        "data, model (the algorithm), latent, trainer, callbacks. The settings of a class have a help of their own: "
        "--model.help DPO, --latent.help GumbelSpace, --policy.help PretrainedPolicy, --data.help PreferenceData. "
        "--print_config prints the values of all settings and does not run."
    )


def _is_restoring(error: BaseException) -> bool:
    """Return whether an error was raised while Lightning restored a checkpoint."""
    frames = (frame.f_code for frame, _ in walk_tb(error.__traceback__))
    names = ("restore", "_restore", "resume", "_load")
    return any(code.co_filename == checkpoint_connector.__file__ and code.co_name.startswith(names) for code in frames)


def _reason(error: ValueError) -> str:
    """Return why a class refuses its settings, without what jsonargparse adds about other types."""
    lines = [line.strip() for line in str(error).splitlines()]
    reasons = [line[2:] for line in lines if line.startswith("- ") and not line.startswith(JSONARGPARSE)]
    return "; ".join(dict.fromkeys(reasons)) or str(error)


SUMMARIES = {
    "fit": "train a policy on preference pairs",
    "validate": "score the validation pairs under the prior",
    "test": "score the test pairs under the prior",
    "predict": "rewards and prior of each test pair",
}
"""Result of each command, in a few words."""
HELP = {
    "seed_everything": "Seed of all random numbers of a run: new weights, the order of the pairs, noise; from 0 to "
    "4294967295. true: the environment variable PL_GLOBAL_SEED, or 0 if it is unset.",
    "trainer.precision": "Type of the arithmetic. null: bf16-mixed if the device multiplies bfloat16 fast (most GPUs, "
    "processors with AMX or AVX512-BF16), otherwise 32-true.",
    "trainer.logger": "Loggers besides metrics.csv: a file of configs/logger/, a class, or a list of classes. null or "
    "true: TensorBoard. false: no logger, and no metrics.csv.",
    "trainer.default_root_dir": "Local folder of the runs. Each run makes a new folder version_N in it. null: runs.",
    "trainer.gradient_clip_val": "Largest norm of a gradient, or largest entry (gradient_clip_algorithm). Policy and "
    "latent are clipped separately, except by DeepSpeed. null: no clipping.",
}
"""Help of the settings of which Lightning's own is wrong here."""
REFUSED = {
    "enable_progress_bar": ("ProgressBar",),
    "logger": (".LearningRateMonitor", ".DeviceStatsMonitor"),
    "enable_checkpointing": (".BestAndLast",),
}
"""Ends of the class paths of callbacks that Lightning refuses, by the setting that is false."""
JSONARGPARSE = tuple(
    f"- {start}"
    for start in ("Expected a", "Does not validate", "Problem with", "Not a valid", "a class path", "a dict with")
)
"""Beginnings of the lines of its own errors."""
