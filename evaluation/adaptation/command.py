"""Each annotator's codes from a few labels, and the accuracy on the annotator's other pairs."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.cli.function_command import run_function
from lpc_lightning.data import DataError
from lpc_lightning.data.sources.columns import Columns
from lpc_lightning.data.tokenization.templates import TemplateSettings
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.accuracy.accuracy_modes import Group
from lpc_lightning.evaluation.accuracy.preferences import evaluate_pairs
from lpc_lightning.evaluation.accuracy.scored_pairs import PairsFile
from lpc_lightning.evaluation.accuracy.training_overlap import count_trained, overlap_sentence, training_pairs
from lpc_lightning.evaluation.adaptation.annotated_pairs import label_batches
from lpc_lightning.evaluation.adaptation.files import SCORES, WEIGHTS, check_origins, write_adaptation
from lpc_lightning.evaluation.adaptation.output import TABLE, write_reports
from lpc_lightning.evaluation.adaptation.pairs import AdaptationPairs, AdaptationReport
from lpc_lightning.evaluation.adaptation.policy import PolicyUnderMixtures
from lpc_lightning.evaluation.adaptation.scores import SHOTS
from lpc_lightning.evaluation.comparison.command import name_models
from lpc_lightning.files.output_paths import check_folder, claim_output_folder
from lpc_lightning.inference.checkpoints import checkpoint_origin, read_checkpoint, trained_template
from lpc_lightning.inference.fingerprint import weights_fingerprint
from lpc_lightning.inference.opening import open_module
from lpc_lightning.policy.precision import TRAINER_PRECISION, WEIGHTS_TYPE, Precision, resolve_precision


def main(arguments: list[str]) -> None:
    """Run the command."""
    run_function(adapt, arguments[1:], arguments[0])


def adapt(
    models: list[str],
    preferences: str,
    annotator_column: Group = "annotator",
    output: str = "adaptation",
    names: list[str] | None = None,
    split: str | None = None,
    labelled_split: str | None = None,
    shots: list[int] | None = None,
    rounds: int = 20,
    under_z: bool = True,
    columns: Columns | None = None,
    bad_rows: Literal["error", "skip"] = "error",
    limit: int | float | None = None,
    batch_size: int = 8,
    max_length: int = 1024,
    precision: Precision = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
    seed: int = 0,
) -> None:
    """Infer each annotator's codes from a few labelled pairs, and score the annotator's other pairs under them.

    The weight of a code is its prior times the likelihood of the labels under it (`exact`). If a posterior is learned,
    a second inference averages it over the labelled pairs (`amortized`). Without labelled pairs, the weights are the
    prior. A pair is correct if the weighted predictions of the codes favour its label over the opposite one. For DPO:
    if the probability of the label is above 1/2. `exact, under z` scores the policy under the mixture z of the codes
    instead, which `generate` uses. It is the only adaptation of a Gaussian latent, whose weights are the mean of the
    posterior's means over the labelled pairs. A policy without codes, such as plain DPO, has nothing to
    adapt: its scores depend on the number of labels only because annotators with too few are left out.

    If all pairs have the same two answers, such as "I agree." and "I disagree.", two baselines use labels alone: the
    majority of the annotator's labelled pairs, and the majority of other annotators' labels of the same prompt.

    OUTPUT contains adaptation.md and the plot as .svg and .png. For each model it contains MODEL/adaptation.json, with
    standard errors over prompts, and MODEL/code_weights.json, with the weights of each annotator from all pairs. To
    generate text for an annotator: `lpc-lightning generate --code_weights OUTPUT/MODEL/code_weights.json ANNOTATOR`.

    Args:
        models: Checkpoints (runs/version_0/checkpoints/best.ckpt). At least one must have codes.
        preferences: File of preference pairs.
        annotator_column: Column that identifies a pair's annotator: `annotator`, `factor` or `source`.
        output: Folder for the results.
        names: Names of the models in tables and folders, one for each model. null: made from the paths.
        split: Use the rows with this value in the column `split`. null: `test` if the file has this column, else all.
        labelled_split: Take the labelled pairs from the rows with this value in the column `split`, such as `train`.
            All pairs of an annotator are then predicted from the same ones. It must not be `split`. null: the labelled
            pairs are other pairs of `split`.
        shots: Numbers of labelled pairs. null: 0, 1, 2, 4, 8 and 16.
        rounds: Number of random choices of the labelled pairs, which are averaged.
        under_z: Also score the policy under z = sum_k w_k e_k, in the first round. This takes a second pass over the
            pairs. Needed for a Gaussian latent.
        columns: Names of the columns, and how their cells are read, as `data.columns` of a fit. null: the defaults.
        bad_rows: Treatment of pairs that cannot be used. `error`: stop and list them. `skip`: leave them out and count
            them.
        limit: Use the first pairs up to this number; below 1: this share of them. null: all of them.
        batch_size: Pairs in a batch.
        max_length: Most tokens of a prompt with its longer answer. Longer pairs are left out and counted in the output.
        precision: `float32`, weights of any type converted to float32; `bfloat16`, weights in their stored type and
            arithmetic in bfloat16; `auto`, bfloat16 if the device multiplies it fast, else float32.
        device: Device: `auto`, `cpu`, `cuda` ...
        trust_remote_code: Run Python code that comes with the model or its tokenizer. Read that code first.
        seed: Seed of the random choices, and of the draws of a sampled z.

    Raises:
        ConfigError: No model has codes, a setting is out of range, or results of other models, weights or pairs would
            be replaced.
        DataError: There are no such pairs, no pair has an annotator, or no annotator has enough pairs.
    """
    named = name_models(models, names)
    check_folder(Path(output), "output")
    _check_labelled_split(preferences, split, labelled_split)
    collector = AdaptationPairs(annotator_column, SHOTS if shots is None else shots, rounds, seed)
    open_file = partial(
        PairsFile, limit=limit, columns=columns, bad_rows=bad_rows, batch_size=batch_size, max_length=max_length
    )
    computed = resolve_precision(precision, device)
    scoring = _Scoring(preferences, open_file, collector, labelled_split, under_z, TRAINER_PRECISION[computed])
    with claim_output_folder(Path(output), "output"):
        read = {
            "preferences": os.path.realpath(preferences),
            "split": split,
            "labelled_split": labelled_split,
            "annotator_column": annotator_column,
            "limit": limit,
            "pairs_fingerprint": open_file(preferences, split=split).content,
            "labelled_fingerprint": labelled_split and open_file(preferences, split=labelled_split).content,
        }
        paths = {name: os.path.realpath(path) for name, path in named}
        origins = {
            name: {"checkpoint": path, "weights_fingerprint": weights_fingerprint(path), **read}
            for name, path in paths.items()
        }
        check_origins(Path(output), origins, [TABLE])
        reports: dict[str, AdaptationReport] = {}
        overlaps: list[str] = []
        for name, path in named:
            origin = checkpoint_origin(read_checkpoint(Path(path), weights=False), Path(path))
            pairs = scoring.pairs(split, trained_template(origin))
            module = open_module(path, device, trust_remote_code, WEIGHTS_TYPE[computed])
            if len(named) == 1 and (module.latent is None or not module.latent.num_codes):
                raise ConfigError(
                    f"models: found no codes in {path}, so that nothing can be inferred from labelled pairs; expected "
                    "a checkpoint of a latent with codes, such as MarginalSpace."
                )
            reports[name] = scoring.report(name, module, pairs)
            if (trained := training_pairs(origin)) is not None and (found := count_trained(pairs, trained)):
                overlaps.append(f"{name}: {overlap_sentence(found, len(pairs.pairs['test']))}.")
            write_adaptation(Path(output) / name, reports[name], collector, origins[name])
            del module
            gc.collect()  # the module contains reference cycles, which only the collector frees
        if not any(report.mixtures for report in reports.values()):
            raise ConfigError(
                f"models: found no codes in any of {', '.join(models)}; expected at least one checkpoint of a latent "
                "with codes, such as MarginalSpace."
            )
        text = write_reports(Path(output), reports, collector.shots, overlaps)
        files = f"{Path(output) / TABLE} and the plot, and {SCORES} and {WEIGHTS} of each model beside them"
        print(f"\n{text}\n\nWrote {files}.")


@dataclass(frozen=True)
class _Scoring:
    """Settings of how a model is scored. See `adapt` for their meaning."""

    preferences: str
    open_file: Callable[..., PairsFile]
    """Function from the path and the split to the pairs."""
    collector: AdaptationPairs
    labelled_split: str | None
    under_z: bool
    precision: str
    """As `trainer.precision`."""

    def pairs(self, split: str | None, template: TemplateSettings) -> PairsFile:
        """Return the pairs of a split, with the template of a model."""
        pairs = self.open_file(self.preferences, split=split)
        pairs.template_settings = template
        return pairs

    def report(self, name: str, module: PreferenceModule, pairs: PairsFile) -> AdaptationReport:
        """Score a model.

        Args:
            name: Name of the model in the output.
            module: The model.
            pairs: Pairs to predict.
        """
        seed = self.collector.seed
        if self.labelled_split is not None:
            labelled = self.pairs(self.labelled_split, pairs.template_settings)
            if module.latent is None:  # their scores would not be used
                for batch in label_batches(labelled, "test", module.tokenizer):
                    self.collector.labelled.add_labels(batch)
                rows = labelled.reports["test"]
            else:
                rows = evaluate_pairs(module, labelled, self.collector.labelled, precision=self.precision, seed=seed)
            print(f"{name}, labelled pairs: {rows}")
        # The run empties the collector of the evaluated pairs alone.
        print(f"{name}: {evaluate_pairs(module, pairs, self.collector.evaluated, precision=self.precision, seed=seed)}")
        report = self.collector.collect()
        _check_annotators(report, self.collector, self.preferences)
        if report.mixtures and self.under_z:
            policy = PolicyUnderMixtures(report.mixtures, self.collector.column)
            evaluate_pairs(module, pairs, policy, precision=self.precision, seed=seed)
            report = replace(report, scores={**report.scores, **policy.scores()})
        return report


def _check_labelled_split(preferences: str, split: str | None, labelled_split: str | None) -> None:
    """Check that no pair can be predicted from its own label."""
    if labelled_split is None:
        return
    predicted = PairsFile(preferences, split=split).split
    if predicted is None or predicted == labelled_split:
        rows = f"all rows of {preferences}, which has no splits" if predicted is None else f"of the split {predicted}"
        raise ConfigError(
            f"labelled_split: found {labelled_split}, but the pairs to predict are {rows}. Expected two different "
            "splits, so that no pair is predicted from its own label. Choose another one, or leave labelled_split out."
        )


def _check_annotators(report: AdaptationReport, pairs: AdaptationPairs, preferences: str) -> None:
    if not report.annotators:
        raise DataError(
            f"annotator_column: found no value of {pairs.column} in any pair of {preferences}, expected the annotator "
            "of each pair. Choose another column: annotator, factor or source."
        )
    least, most = min(pairs.shots), max(report.available.values())
    if most < least:
        others, remedy = ("other", "more pairs") if report.labelled is None else ("labelled", "another labelled_split")
        raise DataError(
            f"shots: found {least} as the smallest number, but no {pairs.column} in {preferences} has more than {most} "
            f"{others} pairs for each predicted pair, copies of it not counted; expected at least {least}. Use fewer "
            f"shots or {remedy}."
        )
