"""Few-shot annotators: their codes from a few of their labels, and accuracy on their others."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from lpc_lightning.data import DataError
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.accuracy.accuracy_modes import Group
from lpc_lightning.evaluation.accuracy.preferences import pass_over
from lpc_lightning.evaluation.accuracy.scored_pairs import PairsFile
from lpc_lightning.evaluation.adaptation.files import SCORES, WEIGHTS, write_adaptation
from lpc_lightning.evaluation.adaptation.pairs import AdaptationPairs, AdaptationReport
from lpc_lightning.evaluation.adaptation.plots import TITLE, draw_adaptation, score_estimate, score_line, to_shots
from lpc_lightning.evaluation.adaptation.policy import PolicyUnderMixtures
from lpc_lightning.evaluation.adaptation.scores import SHOTS, Score
from lpc_lightning.evaluation.comparison.command import name_models
from lpc_lightning.evaluation.figures import Plot, write_plots
from lpc_lightning.evaluation.line_panels import Line, describe_lines
from lpc_lightning.evaluation.tables import markdown_table, score
from lpc_lightning.function_command import run_function
from lpc_lightning.inference.checkpoints import run_config
from lpc_lightning.inference.generation import trained_template
from lpc_lightning.inference.opening import open_module
from lpc_lightning.latent import DiscreteSpace

UNDER_Z = "exact_z"
"""Of scores under z = sum_k w_k e_k, the weights inferred as for `exact`."""
NAMES = {UNDER_Z: "exact, under z", "prior": "prior, for anybody", "no_latent": "no latent (z = 0)"}
TABLE = "adaptation.md"


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
    shots: list[int] | None = None,
    rounds: int = 20,
    under_z: bool = True,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int = 1024,
    precision: Literal["32-true", "64-true", "bf16-mixed", "bf16-true"] = "32-true",
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Infer each annotator's codes from a few of their labelled pairs, and score their other pairs under them.

    The codes weigh by prior times evidence (`exact`), and where a posterior is learned also by the average of what it
    says of the labelled pairs (`amortised`). Given none, they weigh as the prior says. A pair is right where the codes,
    each asked for itself and then weighed, are more for its label than for the opposite one: for DPO, where the label's
    probability is above 1/2. `exact, under z` asks the policy under the mixture z of the codes instead, under which
    `generate` answers. A policy without codes, such as plain DPO, has nothing to adapt and stands beside as a level.

    OUTPUT gets adaptation.md, the plot as .svg and .png, and for each model MODEL/adaptation.json, with standard errors
    over pairs, and MODEL/code_weights.json, with each annotator's weights from all of their pairs, under which
    `lpc-lightning generate --code-weights OUTPUT/MODEL/code_weights.json ANNOTATOR` answers.

    Args:
        models: Checkpoints (runs/version_0/checkpoints/best.ckpt), at least one of them with codes.
        preferences: A file of preference pairs; of one with a column `split`, the rows of `test`.
        annotator_column: What says whose pair it is: the column `annotator`, `factor` or `source`.
        output: Folder for the results.
        names: Names of the models in tables and folders, as many as models. null: made from their paths.
        split: Rows whose column `split` says this. null: `test`, where there is such a column.
        shots: Labelled pairs to give. null: 0, 1, 2, 4, 8 and 16.
        rounds: Random choices of the pairs that are given, to average over.
        under_z: Score the policy under z = sum_k w_k e_k as well, in the first of the rounds. The pairs are gone over
            once more.
        limit: Pairs, from the start. null: all of them.
        batch_size: Pairs at a time.
        max_length: Most tokens of a prompt with its longer answer; longer pairs are left out, and told.
        precision: Of the computation, as `trainer.precision`.
        device: Where to run: `auto`, `cpu`, `cuda` ...
        seed: Seed of the random choices.

    Raises:
        ConfigError: No model has codes, or a setting is out of range.
        DataError: There are no such pairs, none that says whose it is, or no annotator with enough of them.
    """
    named = name_models(models, names)
    asked = AdaptationPairs(annotator_column, SHOTS if shots is None else shots, rounds, seed)
    reports: dict[str, AdaptationReport] = {}
    for name, path in named:
        pairs = PairsFile(preferences, split=split, limit=limit, batch_size=batch_size, max_length=max_length)
        pairs.template = trained_template(run_config(Path(path)))
        module = open_module(path, device)
        if len(named) == 1 and not isinstance(module.latent, DiscreteSpace):
            raise ConfigError(f"models: {path} has no codes: there is nothing to infer from labelled pairs.")
        rows = pass_over(module, pairs, asked, precision=precision)
        print(f"{name}: {rows}")
        report = asked.collect()
        _check_annotators(report, asked, preferences)
        if report.weights and under_z:
            policy = PolicyUnderMixtures(report.mixtures, annotator_column)
            pass_over(module, pairs, policy, precision=precision)
            report = replace(report, scores={**report.scores, UNDER_Z: policy.scores()})
        write_adaptation(Path(output) / name, report, asked)
        reports[name] = report
        del module
        gc.collect()  # its parts know each other, which only the collector sees through
    if not any(report.weights for report in reports.values()):
        raise ConfigError(f"models: none of {', '.join(models)} has codes: there is nothing to infer.")
    _write(Path(output), reports, asked.shots)


def _check_annotators(report: AdaptationReport, asked: AdaptationPairs, preferences: str) -> None:
    if not report.annotators:
        raise DataError(
            f"annotator_column: found no {asked.column} in any pair of {preferences}, expected whose pair it is. Take "
            "another column: annotator, factor or source."
        )
    most = max(report.annotators.values())
    if most <= min(asked.shots):
        raise DataError(
            f"shots: found {min(asked.shots)} at least, and in {preferences} no {asked.column} with more than {most} "
            "pairs, expected one with others to predict. Give fewer, or more pairs."
        )


def _write(folder: Path, reports: Mapping[str, AdaptationReport], shots: Sequence[int]) -> None:
    told = "\n".join([table(reports, shots), *(f"\n{each}" for each in left_out(reports, shots))])
    (folder / TABLE).write_text(told + "\n", encoding="utf-8")
    found = panels(reports)
    figure = draw_adaptation(found, sorted(set(shots)), None, "accuracy")
    plot = Plot("adaptation", TITLE, figure, describe_lines(TITLE, found, to_shots), "Bands: 95 % over pairs.")
    list(write_plots(folder, [plot]))
    print(f"\n{told}\n\nWrote {folder / TABLE} and the plot, and {SCORES} and {WEIGHTS} of each model beside them.")


def table(reports: Mapping[str, AdaptationReport], shots: Sequence[int]) -> str:
    """Accuracies with standard errors: a line a model and way of inference, a column a number of shots."""
    numbers = sorted({0, *shots})  # 0: where the levels stand
    rows = []
    for name, report in reports.items():
        for inference, scores in _curves(report).items():
            cells = [score(each.accuracy, each.standard_error) if (each := scores.get(n)) else "-" for n in numbers]
            rows.append([name, NAMES.get(inference, inference), *cells])
        for baseline, each in report.baselines.items():
            level = score(each.accuracy, each.standard_error)
            rows.append([name, NAMES[baseline], level, *["-"] * (len(numbers) - 1)])
    return markdown_table(["model", "codes by", *(f"given {n}" for n in numbers)], rows, left=2)


def left_out(reports: Mapping[str, AdaptationReport], shots: Sequence[int]) -> list[str]:
    """A sentence for each number of shots at which annotators have too few pairs, and a model where they differ."""
    told: dict[str, list[str]] = {}
    for name, report in reports.items():
        for n in sorted(set(shots)):
            few = [count for count in report.annotators.values() if count <= n]
            if few:
                whole = sum(report.annotators.values())
                without = f"annotators left out for having {n} or fewer: {len(few)}."
                told.setdefault(f"given {n}: {whole - sum(few)} of {whole} pairs, {without}", []).append(name)
    return [f"{', '.join(names)}, {sentence}" for sentence, names in told.items()]


def panels(reports: Mapping[str, AdaptationReport]) -> dict[str, list[Line]]:
    """Of one model all curves and the level at z = 0. Of several a panel each way of inference, with a line a model."""
    if len(reports) == 1:
        (report,) = reports.values()
        curves = [score_line(NAMES.get(kind, kind), scores) for kind, scores in report.scores.items()]
        return {"": [*curves, _level(NAMES["no_latent"], report.baselines["no_latent"])]}
    kinds = dict.fromkeys(kind for report in reports.values() for kind in _curves(report))
    return {
        NAMES.get(kind, kind): [
            score_line(name, report.scores[kind]) if report.weights else _level(name, report.baselines["prior"])
            for name, report in reports.items()
            if not report.weights or kind in report.scores
        ]
        for kind in kinds
    }


def _curves(report: AdaptationReport) -> Mapping[str, Mapping[int, Score]]:
    """Of a policy without codes none: it stays at its level."""
    return report.scores if report.weights else {}


def _level(label: str, score: Score) -> Line:
    return Line(label, (), (), level=score_estimate(score))
