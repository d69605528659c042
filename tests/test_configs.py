"""Every file under configs/: groups can be laid over each other, experiments open with their command and run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from itertools import cycle, pairwise, zip_longest
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.callbacks import AnnotatorAdaptation, LabelFlipNoise
from lpc_lightning.cli import PreferenceCLI
from lpc_lightning.data import PreferenceDataModule
from lpc_lightning.data.sources.columns import Columns
from lpc_lightning.data.sources.formats import to_example
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.ablation.grids.grid import read_grid
from lpc_lightning.evaluation.adaptation.scores import SHOTS
from lpc_lightning.latent import LatentSpace
from lpc_lightning.policy import PolicySpec, TinyPolicy
from tests.fixtures.commands import POLICY
from tests.fixtures.real_data import DATA_DIR

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[1] / "configs"
BASES: dict[str, type] = {
    "policy": PolicySpec,
    "latent": LatentSpace,
    "data": PreferenceDataModule,
    "algorithm": PreferenceModule,
}
EXPERIMENTS = sorted(CONFIGS.glob("experiment/**/*.yaml"))
ALGORITHMS = {"dpo": "DPO", "ipo": "IPO", "simpo": "SimPO", "kto": "KTO", "orpo": "ORPO"}
SPACES = {"none": "NoneType", "gumbel": "GumbelSpace", "marginal": "MarginalSpace"}


def groups() -> list[Path]:
    return sorted(path for group in BASES for path in (CONFIGS / group).glob("*.yaml"))


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


class Fit(PreferenceCLI):
    """The command line with `fit`, which stands for the other commands."""

    def __init__(self, arguments: list[str]) -> None:
        super().__init__(["fit", *arguments])


class Parsed(Fit):
    """The same without running the command, and without the copy of the settings for a checkpoint."""

    config_dump: ClassVar[dict[str, Any]] = {}

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.fixture
def swap(tmp_path: Path, cache_dir: Path) -> list[str]:
    """What is put in place of weights, data and GPUs that cannot be had here."""
    data = ["--data=SyntheticPreferences", "--data.train_pairs=6", "--data.validation_pairs=2", "--data.batch_size=2"]
    trainer = ["--trainer.accelerator=cpu", "--trainer.strategy=auto", "--trainer.devices=1"]
    data += ["--data.num_workers=0", f"--data.cache_dir={cache_dir}"]
    return [*POLICY, "--policy.options=null", *data, *trainer, f"--trainer.default_root_dir={tmp_path / 'runs'}"]


@pytest.mark.parametrize("path", groups(), ids=name_of)
def test_group_states_what_its_group_states(path: Path) -> None:
    """A file states what its siblings state: the parser keeps init_args that the second of two files leaves out."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(BASES[path.parent.name], "group", required=True, skip={"policy", "latent"})
    stated = yaml.safe_load(path.read_text())
    accepted = set(parser.parse_object({"group": stated}).as_dict()["group"]["init_args"])
    siblings = [yaml.safe_load(each.read_text())["init_args"] for each in path.parent.glob("*.yaml")]
    assert set(stated["init_args"]) >= accepted & {name for each in siblings for name in each}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_experiment_header(path: Path) -> None:
    first, second, *_ = path.read_text().splitlines()
    command = "make demo-smollm2" if path.name == "demo.yaml" else f"lpc-lightning fit --config configs/{name_of(path)}"
    assert first == f"# {command}"
    assert "See" in path.read_text().split()
    trainer = yaml.safe_load((path.parent / yaml.safe_load(path.read_text())["trainer"]).read_text())
    validates_once = trainer["num_sanity_val_steps"] == 0 and trainer["val_check_interval"] == trainer["max_epochs"]
    assert (" rise " in path.read_text()) != validates_once
    assert len(second) > 40
    assert "# --print_config prints all settings" in path.read_text()


def experiments() -> list[tuple[Path, str | None, str | None]]:
    """Each base, and every value of --model and --latent that its header names, one of each at a time."""
    found: list[tuple[Path, str | None, str | None]] = []
    for path in EXPERIMENTS:
        named = {group: re.findall(rf"^#   --{group} (\S+)", path.read_text(), re.M) for group in ("model", "latent")}
        found += [(path, *pair) for pair in zip_longest([None, *named["model"]], [None, *named["latent"]])]
    return found


def test_experiments_are_those_of_the_paper() -> None:
    names = {path.stem for path in EXPERIMENTS}
    assert names == {"demo", "llama3_8b", "llama3_8b_instruct", "mistral_7b", "smollm2", "tiny", "tiny_reader"}
    assert len(experiments()) == 6 * 3 + 1


@pytest.mark.parametrize(
    ("path", "model", "latent"), experiments(), ids=lambda value: str(getattr(value, "stem", value))
)
def test_experiment_is_instantiated(
    path: Path, model: str | None, latent: str | None, swap: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    flags = [f"--{name}={value}" for name, value in (("model", model), ("latent", latent)) if value]
    built = Parsed([f"--config={path}", *flags, *swap])
    algorithm = Path(model or "dpo").stem.partition("_")[0].lower()
    space = Path(latent or ("marginal" if path.stem == "demo" else "none")).stem
    assert type(built.model).__name__ == ALGORITHMS[algorithm]
    assert type(built.model.latent).__name__ == SPACES[space]
    assert isinstance(built.model.policy_spec, TinyPolicy)
    defaults = built.model.make_optimizer([torch.zeros(1, requires_grad=True)]).defaults
    assert defaults["fused"]
    stated = model if model and model.endswith(".yaml") else yaml.safe_load(path.read_text())["model"]
    if isinstance(stated, str):
        stated = yaml.safe_load((Path() if stated == model else path.parent).joinpath(stated).read_text())
    assert defaults["lr"] == stated["init_args"]["optimizer"]["init_args"]["lr"]
    names = {type(callback).__name__ for callback in built.trainer.callbacks}
    assert {"BestAndLast", "GracefulStop", "RunSummary", "FinalValidation", "ResourceMonitor"} <= names


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_dry_run_of_the_quickstart(path: Path, swap: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags that the page adds to any experiment, on a machine without a GPU."""
    monkeypatch.chdir(CONFIGS.parent)
    (flags,) = re.findall(r"^ +(--policy .* --trainer.max_steps 20)$", Path("docs/quickstart.md").read_text(), re.M)
    built = Parsed([f"--config={path}", *flags.split(), swap[-1]])
    assert isinstance(built.model.policy_spec, TinyPolicy)
    assert isinstance(built.trainer.accelerator, CPUAccelerator)
    assert (built.trainer.max_steps, built.trainer.num_devices, built.trainer.num_nodes) == (20, 1, 1)


@pytest.mark.parametrize("path", groups(), ids=name_of)
def test_group_is_instantiated(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = BASES[path.parent.name]
    monkeypatch.setenv("LPC_DATA_DIR", str(tmp_path))
    for file in re.findall(r"\$\{LPC_DATA_DIR\}/(\S+)", path.read_text()):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()  # it is read by a run only
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "group", required=True, skip={"policy", "latent"})
    parsed = parser.parse_object({"group": yaml.safe_load(path.read_text())})
    if base is not PreferenceModule:  # which cannot be without a policy
        assert isinstance(parser.instantiate(parsed).group, base)


HUB_DATA = [path for path in CONFIGS.glob("data/*.yaml") if re.search(r"^  path: \w+/", path.read_text(), re.M)]


@pytest.mark.parametrize("path", sorted(HUB_DATA), ids=name_of)
def test_hub_data_skips_bad_rows(path: Path, tmp_path: Path) -> None:
    """Rows as in HH-RLHF: 9 of the 2,312 of its harmless-base/test.jsonl are of the two kinds below."""
    start, stated = "\n\nHuman: Hi {}\n\nAssistant: ", yaml.safe_load(path.read_text())
    pairs = [(start.format(number) + "Hello.", start.format(number) + "Go away.") for number in range(5)]
    pairs += [(start, start + "Sure."), (f"{start}No.\n\nHuman: Why?\n\nAssistant: Because.", f"{start}Yes.")]
    split = stated["init_args"]["train_split"]
    rows = [json.dumps({"chosen": chosen, "rejected": rejected, "split": split}) for chosen, rejected in pairs]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    stated["init_args"] |= {"path": str(tmp_path / "rows.jsonl"), "cache_dir": str(tmp_path)}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PreferenceDataModule, "data", required=True)
    data = parser.instantiate(parser.parse_object({"data": stated})).data
    data.load("train", TinyPolicy().load_tokenizer())
    report = data.reports["train"]
    assert report.kept + report.held_apart == 5
    assert report.bad == {"empty answer": 1, "conversations differ before the last turn": 1}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("trainer/*.yaml")), ids=name_of)
def test_trainer_parses(path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Trainer, "trainer")
    assert parser.parse_object({"trainer": yaml.safe_load(path.read_text())}).trainer.devices in (1, 8)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("trainer/*.yaml")), ids=name_of)
def test_strategy_is_built(path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--strategy", type=str | Strategy)
    # Every setting is checked against the class's signature.
    parsed = parser.parse_object({"strategy": yaml.safe_load(path.read_text())["strategy"]})
    if path.stem.startswith("deepspeed") and find_spec("deepspeed") is None:
        stated = parsed.strategy.init_args
        assert (stated.stage, stated.offload_optimizer, stated.exclude_frozen_parameters) == (2, False, True)
    else:
        assert isinstance(parser.instantiate(parsed).strategy, str | Strategy)


@pytest.mark.parametrize("strategy", [CONFIGS / "trainer" / "deepspeed_8gpu.yaml", "deepspeed_stage_2"], ids=str)
def test_strategy_not_installed(strategy: Path | str, swap: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lpc_lightning.cli.preference_cli.find_spec", lambda name: None)
    where = [f"--trainer={strategy}"] if isinstance(strategy, Path) else [f"--trainer.strategy={strategy}"]
    swap = [each for each in swap if "strategy" not in each]
    with pytest.raises(ConfigError, match=r"needs DeepSpeed, .* `pip install .* '\.\[deepspeed\]'`, or set"):
        Parsed(["--model=DPO", *swap, *where])


def test_trainers_state_the_same_settings() -> None:
    stated = {path.name: set(yaml.safe_load(path.read_text())) for path in CONFIGS.glob("trainer/*.yaml")}
    assert len({frozenset(names) for names in stated.values()}) == 1, stated


LATENTS = [None, *sorted(CONFIGS.glob("latent/*.yaml"))]


@pytest.mark.parametrize(
    ("algorithm", "latent"),
    list(zip(cycle(ALGORITHMS), LATENTS, strict=False)),
    ids=lambda value: str(getattr(value, "stem", value)),
)
def test_algorithm_and_latent_train_two_steps(algorithm: str, latent: Path | None, swap: list[str]) -> None:
    """Each latent file under one of the algorithms. tests/algorithms/ has every pair of the classes."""
    path = CONFIGS / "experiment" / "smollm2.yaml"
    steps = [
        "--data.deciding=hidden",
        "--data.train_pairs=32",
        "--trainer.max_steps=2",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.precision=32-true",
    ]
    groups = [f"--model={ALGORITHMS[algorithm]}", f"--latent={latent or 'null'}"]
    done = Fit([f"--config={path}", *groups, *swap, *steps])
    assert done.trainer.global_step == 2
    losses = done.trainer.callback_metrics
    assert torch.isfinite(losses["train/loss"])
    assert torch.isfinite(losses["val/loss"])
    fresh = done.model.policy_spec.build().state_dict()
    assert any(not torch.equal(fresh[name], value) for name, value in done.model.policy.state_dict().items())


INHERITED = {"refresh_rate", "process_position", "leave"}
"""Of Lightning's progress bar."""


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("callbacks/*.yaml")), ids=name_of)
def test_callbacks_state_our_arguments(path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback", required=True)
    for stated in yaml.safe_load(path.read_text()):
        if stated["class_path"].startswith("callbacks."):
            parsed = parser.parse_object({"callback": stated}).as_dict()["callback"]
            ours = {"init_args": {}} | parsed
            assert set(stated.get("init_args", {})) >= set(ours["init_args"]) - INHERITED, stated["class_path"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("logger/*.yaml")), ids=name_of)
def test_logger_file_parses_and_opens_with_its_flag(path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Logger, "logger", required=True)
    stated = yaml.safe_load(path.read_text())
    assert parser.parse_object({"logger": stated}).logger.class_path == stated["class_path"]
    assert path.read_text().startswith(f"# `--trainer.logger configs/{name_of(path)}`: ")


@pytest.mark.parametrize(
    "path", [path for path in sorted(CONFIGS.glob("callbacks/*.yaml")) if "label_flip" in path.stem], ids=name_of
)
def test_label_noise_is_added_by_flags(path: Path, swap: list[str]) -> None:
    base = CONFIGS / "experiment" / "smollm2.yaml"
    built = Parsed([f"--config={base}", *swap, f"--callbacks+={path}", "--callbacks.rate=0.1"])
    (noise,) = [each for each in built.trainer.callbacks if isinstance(each, LabelFlipNoise)]
    assert (noise.rate, noise.marker) == (0.1, "[FLIP]" if "marked" in path.stem else None)
    assert any(type(each).__name__ == "GracefulStop" for each in built.trainer.callbacks)


def test_adaptation_is_added_by_flags(swap: list[str]) -> None:
    base, path = CONFIGS / "experiment" / "smollm2.yaml", CONFIGS / "callbacks" / "adaptation.yaml"
    built = Parsed([f"--config={base}", *swap, f"--callbacks+={path}", "--callbacks.column=factor"])
    (added,) = [each for each in built.trainer.callbacks if isinstance(each, AnnotatorAdaptation)]
    assert (added.pairs.column, added.pairs.shots, added.pairs.rounds) == ("factor", SHOTS, 20)
    assert any(type(each).__name__ == "GracefulStop" for each in built.trainer.callbacks)


ABLATIONS = sorted(CONFIGS.glob("ablation/*.yaml"))


@pytest.mark.parametrize("path", ABLATIONS, ids=name_of)
def test_ablation_header(path: Path) -> None:
    first, second, *_ = path.read_text().splitlines()
    assert first.startswith(f"# lpc-lightning ablate configs/{name_of(path)}")
    assert second.startswith("# ")


@pytest.mark.parametrize(
    ("name", "wrong_vote"), [("votes", {"gold": "rejected"}), ("humour", {"one_vote": "rejected"})]
)
def test_gold_labels_of_votes_are_right(name: str, wrong_vote: dict[str, str]) -> None:
    """A pair whose vote is wrong has a wrong label under labels=votes, and the right one under labels=gold."""
    grid = read_grid(CONFIGS / "ablation" / f"{name}_smollm2.yaml")
    row = {"prompt": "?", "chosen": "first", "rejected": "second", "meta": wrong_vote}
    pairs = {}
    for labels in ("votes", "gold"):
        arguments = dict(each.split("=", 1) for each in grid.with_changes([f"labels={labels}"]).cells()[0].arguments)
        columns = yaml.safe_load((CONFIGS.parent / arguments["--data"]).read_text())["init_args"]["columns"]
        if vote := arguments.get("--data.columns.vote"):
            columns["vote"] = yaml.safe_load(vote)
        pairs[labels] = to_example(row, "row 1", Columns(**columns))
    assert [pairs[labels].flipped for labels in pairs] == [True, False]
    assert pairs["gold"].chosen == pairs["votes"].rejected


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "file", "entry"),
    [("votes", "ukp_convarg_crowdsample.jsonl", "gold"), ("humour", "humour_votes.jsonl", "one_vote")],
)
def test_oracles_have_the_rate_of_the_votes(name: str, file: str, entry: str) -> None:
    """The rate is the share of training rows in whose `meta` vote and right answer differ."""
    path = DATA_DIR / "preferences" / file
    if not path.is_file():
        pytest.skip(f"needs {path}")
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if row["split"] == "train"]
    wrong = sum(row["meta"][entry] == "rejected" for row in rows) / len(rows)
    grid = read_grid(CONFIGS / "ablation" / f"{name}_smollm2.yaml")
    for cell in grid.with_changes(["arm=cdpo_oracle,rdpo_oracle", "seed=1"]).cells():
        assert f"--model.robust_loss.rate={wrong:.2f}" in cell.arguments


EXPLORATIONS = {"annotators_smollm2", "demo", "learning_rates_tiny"}
"""Grids without a tuned axis, with one seed. They are no evidence."""


@pytest.mark.parametrize("path", [path for path in ABLATIONS if path.stem not in EXPLORATIONS], ids=name_of)
def test_ablation_tunes_every_arm_alike(path: Path) -> None:
    grid = read_grid(path)
    assert grid.tune is not None
    assert grid.tune.axis.settings == ["model.optimizer.lr"]
    values = grid.tune.axis.values
    assert len(values) >= 4
    assert all(2 < larger / smaller < 4 for smaller, larger in pairwise(values))
    assert len(grid.tune.seeds) >= 2
    (seeds,) = (axis for axis in grid.axes if axis.name == "seed")
    assert len(seeds.values) >= 5
    if "llama3" in grid.base[0]:
        assert "--data=configs/data/ultrafeedback_held_out.yaml" in grid.base
    elif path.stem.endswith("_tiny"):
        assert seeds.settings == ["seed_everything", "data.data_seed"]
        (pairs,) = (argument for argument in grid.base if argument.startswith("--data.validation_pairs="))
        assert int(pairs.partition("=")[2]) >= 512


@pytest.mark.parametrize("path", [path for path in ABLATIONS if path.stem not in EXPLORATIONS], ids=name_of)
def test_warm_start_has_an_arm_of_equal_work(path: Path) -> None:
    """The pass of a warm start over the pairs is an epoch of the plain arm, where the grid has one."""
    for axis in read_grid(path).axes:
        arms = list(axis.arguments.values()) if isinstance(axis.arguments, Mapping) else []
        is_warm = any(argument.startswith("--latent.warm_start_pairs=") for arm in arms for argument in arm)
        if is_warm and ["--latent=null"] in map(list, arms):
            assert ["--latent=null", "--trainer.max_epochs=2"] in map(list, arms)


@pytest.mark.parametrize(
    "name",
    [
        "annotators_smollm2",
        "demo",
        "flips_smollm2",
        "g_schedule_tiny",
        "gumbel_remedies",
        "hidden_tiny",
        "noise",
        "noise_marked_tiny",
        "people_smollm2",
    ],
)
def test_ablation_first_cell_takes_two_steps(name: str, swap: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Grids with every base experiment, every file of callbacks, and with batches of annotators."""
    monkeypatch.chdir(CONFIGS.parent)
    cells = read_grid(CONFIGS / "ablation" / f"{name}.yaml").cells()
    by_annotator = any("ByAnnotator" in argument for argument in cells[0].arguments)
    steps = [
        f"--data.deciding={'hidden' if by_annotator else 'visible'}",
        "--trainer.accumulate_grad_batches=1",
        "--data.batch_size=16",
        "--data.train_pairs=32",
        "--trainer.max_steps=2",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.precision=32-true",
    ]
    done = Fit([*cells[0].arguments, *swap, *steps])
    assert done.trainer.global_step == 2


@cache
def cells_with_all_values() -> dict[Path, list[list[str]]]:
    """Return the arguments of at least one cell of each grid, which hold every argument of every grid's axes.

    Named values are all taken, also those that are not taken unless the command line asks for them; of others, the
    ends. Grids share most of their arguments, and a parse takes most of a second.
    """
    chosen: dict[Path, list[list[str]]] = {}
    parsed = set[tuple[str, ...]]()
    for path in ABLATIONS:
        grid = read_grid(path)
        ends = {axis.name: (axis.values[0], axis.values[-1]) for axis in grid.axes}
        ends |= {axis.name: tuple(axis.arguments) for axis in grid.axes if isinstance(axis.arguments, Mapping)}
        axes = {axis.name: axis.with_values(list(dict.fromkeys(ends[axis.name]))) for axis in grid.axes}
        cells = replace(grid, axes=tuple(axes.values())).cells()
        held = [{tuple(axes[axis].arguments_for(value)) for axis, value in cell.axes.items()} for cell in cells]
        missing, taken = set[tuple[str, ...]]().union(*held) - parsed, list[int]()
        while missing or not taken:
            taken.append(max(range(len(cells)), key=lambda number: len(held[number] & missing)))
            missing -= held[taken[-1]]
        parsed |= set[tuple[str, ...]]().union(*held)
        values = [] if grid.tune is None else [grid.tune.axis.values[-1]]
        tuned = [grid.at(cells[number], value) for number in taken for value in values]
        chosen[path] = [list(cell.arguments) for cell in tuned or [cells[number] for number in taken]]
    return chosen


@pytest.mark.parametrize("path", ABLATIONS, ids=name_of)
def test_ablation_values_parse(path: Path, swap: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    for arguments in cells_with_all_values()[path]:
        Parsed([*arguments, *swap, "--data.batch_size=16", "--trainer.precision=32-true"])
