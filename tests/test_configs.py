"""Every file under configs/: groups say all their settings, experiments open with their command and run."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import Strategy

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.callbacks import AnnotatorAdaptation, LabelFlipNoise
from lpc_lightning.cli import PreferenceCLI
from lpc_lightning.data import PreferenceDataModule
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.ablation.grid import read_grid
from lpc_lightning.evaluation.adaptation.scores import SHOTS
from lpc_lightning.latent import LatentSpace
from lpc_lightning.policy import PolicySpec, TinyPolicy

CONFIGS = Path(__file__).parents[1] / "configs"
BASES: dict[str, type] = {
    "policy": PolicySpec,
    "latent": LatentSpace,
    "data": PreferenceDataModule,
    "algorithm": PreferenceModule,
}
EXPERIMENTS = sorted(CONFIGS.glob("experiment/**/*.yaml"))
ALGORITHMS = {"dpo": "DPO", "ipo": "IPO", "simpo": "SimPO"}
SPACES = {"": "NoneType", "_lpc": "GumbelSpace", "_lpc_marginal": "MarginalSpace"}


def groups() -> list[Path]:
    return sorted(path for group in BASES for path in (CONFIGS / group).glob("*.yaml"))


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


class Parsed(PreferenceCLI):
    """The command line without running a command; `fit` stands for the others."""

    def __init__(self, arguments: list[str]) -> None:
        super().__init__(["fit", *arguments])

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns where it is given arguments and the process has some as well: these would be pytest's."""
    monkeypatch.setattr("sys.argv", ["lpc-lightning"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


@pytest.fixture
def swap(tmp_path: Path) -> list[str]:
    """What is put in place of weights, data and GPUs that cannot be had here."""
    data = ["--data=SyntheticPreferences", "--data.train_pairs=6", "--data.validation_pairs=2", "--data.batch_size=2"]
    policy = [
        "--policy=TinyPolicy",
        "--policy.width=16",
        "--policy.layers=1",
        "--policy.heads=2",
        "--policy.options=null",
    ]
    trainer = ["--trainer.accelerator=cpu", "--trainer.strategy=auto", "--trainer.devices=1"]
    data += ["--data.num_workers=0", f"--data.cache_dir={tmp_path}"]
    return [*policy, *data, *trainer, f"--trainer.default_root_dir={tmp_path / 'runs'}"]


@pytest.mark.parametrize("path", groups(), ids=name_of)
def test_a_group_states_every_argument_of_its_class(path: Path) -> None:
    stated = yaml.safe_load(path.read_text())
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(BASES[path.parent.name], "group", required=True, skip={"policy", "latent"})
    parsed = parser.parse_object({"group": stated})
    assert_all_stated(stated, parsed.as_dict()["group"], path.name)


def assert_all_stated(stated: Any, parsed: Any, where: str) -> None:
    """All that the parser knows about a class and its nested classes is written in the file."""
    if not isinstance(parsed, dict) or "class_path" not in parsed:
        return
    assert set(stated["init_args"]) == set(parsed["init_args"]), where
    for name, value in parsed["init_args"].items():
        assert_all_stated(stated["init_args"][name], value, f"{where} {name}")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_an_experiment_opens_with_its_command_and_what_to_see(path: Path) -> None:
    first, second, *_ = path.read_text().splitlines()
    command = "make demo" if path.name == "demo.yaml" else f"lpc-lightning fit --config configs/{name_of(path)}"
    assert first == f"# {command}"
    assert second.startswith("# ")
    assert len(second) > 40


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_an_experiment_is_instantiated_as_its_name_says(path: Path, swap: list[str]) -> None:
    built = Parsed([f"--config={path}", *swap])
    algorithm, _, latent = path.stem.replace("demo", "dpo_lpc_marginal").partition("_")
    assert type(built.model).__name__ == ALGORITHMS[algorithm]
    assert type(built.model.latent).__name__ == SPACES[f"_{latent}" if latent else ""]
    assert isinstance(built.model.policy_spec, TinyPolicy)
    assert built.model.make_optimizer([torch.zeros(1, requires_grad=True)]).defaults["fused"]
    names = {type(callback).__name__ for callback in built.trainer.callbacks}
    assert {"ModelCheckpoint", "GracefulStop", "RunSummary", "FinalValidation", "ResourceMonitor"} <= names


@pytest.mark.parametrize("path", groups(), ids=name_of)
def test_a_group_parses_and_says_what_it_is(path: Path) -> None:
    base = BASES[path.parent.name]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "group", required=True, skip={"policy", "latent"})
    parsed = parser.parse_object({"group": yaml.safe_load(path.read_text())})
    if base is not PreferenceModule:  # which cannot be without a policy
        assert isinstance(parser.instantiate(parsed).group, base)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("trainer/*.yaml")), ids=name_of)
def test_a_trainer_parses_with_its_own_strategy(path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Trainer, "trainer")
    assert parser.parse_object({"trainer": yaml.safe_load(path.read_text())}).trainer.devices in (1, 8)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("trainer/*.yaml")), ids=name_of)
def test_a_strategy_is_built_with_its_settings(path: Path) -> None:
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
def test_what_is_not_installed_is_named_in_one_sentence(
    strategy: Path | str, swap: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lpc_lightning.cli.find_spec", lambda name: None)
    where = [f"--trainer={strategy}"] if isinstance(strategy, Path) else [f"--trainer.strategy={strategy}"]
    swap = [each for each in swap if "strategy" not in each]
    with pytest.raises(ConfigError, match=r"needs DeepSpeed, .* `pip install .* '\.\[deepspeed\]'`, or set"):
        Parsed(["--model=DPO", *swap, *where])


def test_all_trainers_state_the_same_settings() -> None:
    stated = {path.name: set(yaml.safe_load(path.read_text())) for path in CONFIGS.glob("trainer/*.yaml")}
    assert len({frozenset(names) for names in stated.values()}) == 1, stated


@pytest.mark.parametrize("latent", [None, *sorted(CONFIGS.glob("latent/*.yaml"))], ids=lambda path: path and path.stem)
@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_every_algorithm_trains_two_steps_with_every_latent(
    algorithm: str, latent: Path | None, swap: list[str]
) -> None:
    path = CONFIGS / "experiment" / "smollm2" / f"{algorithm}.yaml"
    steps = [
        "--data.deciding=hidden",
        "--data.train_pairs=32",
        "--trainer.max_steps=2",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.precision=32-true",
    ]
    done = PreferenceCLI(["fit", f"--config={path}", f"--latent={latent or 'null'}", *swap, *steps])
    assert done.trainer.global_step == 2
    losses = done.trainer.callback_metrics
    assert torch.isfinite(losses["train/loss"])
    assert torch.isfinite(losses["val/loss"])
    fresh = done.model.policy_spec.build().state_dict()
    assert any(not torch.equal(fresh[name], value) for name, value in done.model.policy.state_dict().items())


INHERITED = {"refresh_rate", "process_position", "leave"}
"""Of Lightning's progress bar."""


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("callbacks/*.yaml")), ids=name_of)
def test_a_file_of_callbacks_states_every_argument_of_ours(path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback", required=True)
    for stated in yaml.safe_load(path.read_text()):
        if stated["class_path"].startswith("callbacks."):
            parsed = parser.parse_object({"callback": stated}).as_dict()["callback"]
            ours = {"init_args": {}} | parsed
            assert set(stated.get("init_args", {})) >= set(ours["init_args"]) - INHERITED, stated["class_path"]


@pytest.mark.parametrize(
    "path", [path for path in sorted(CONFIGS.glob("callbacks/*.yaml")) if "label_flip" in path.stem], ids=name_of
)
def test_label_noise_is_added_to_an_experiment_and_changed_by_flags(path: Path, swap: list[str]) -> None:
    base = CONFIGS / "experiment" / "smollm2" / "dpo.yaml"
    built = Parsed([f"--config={base}", *swap, f"--callbacks+={path}", "--callbacks.rate=0.1"])
    (noise,) = [each for each in built.trainer.callbacks if isinstance(each, LabelFlipNoise)]
    assert (noise.rate, noise.marker) == (0.1, "[FLIP]" if "marked" in path.stem else None)
    assert any(type(each).__name__ == "GracefulStop" for each in built.trainer.callbacks)


def test_few_shot_annotators_are_added_to_an_experiment_and_changed_by_flags(swap: list[str]) -> None:
    base, path = CONFIGS / "experiment" / "smollm2" / "dpo_lpc.yaml", CONFIGS / "callbacks" / "adaptation.yaml"
    built = Parsed([f"--config={base}", *swap, f"--callbacks+={path}", "--callbacks.column=factor"])
    (added,) = [each for each in built.trainer.callbacks if isinstance(each, AnnotatorAdaptation)]
    assert (added.pairs.column, added.pairs.shots, added.pairs.rounds) == ("factor", SHOTS, 20)
    assert any(type(each).__name__ == "GracefulStop" for each in built.trainer.callbacks)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("ablation/*.yaml")), ids=name_of)
def test_an_ablation_opens_with_its_command_and_its_first_cell_takes_two_steps(
    path: Path, swap: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    first, second, *_ = path.read_text().splitlines()
    assert first.startswith(f"# lpc-lightning ablate configs/{name_of(path)}")
    assert second.startswith("# ")
    cells = read_grid(path).cells()
    by_annotator = any("pairs_per_annotator" in argument for argument in cells[0].arguments)
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
    done = PreferenceCLI(["fit", *cells[0].arguments, *swap, *steps])
    assert done.trainer.global_step == 2


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("ablation/*.yaml")), ids=name_of)
def test_every_value_of_an_ablations_axes_is_understood(
    path: Path, swap: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those too that are not taken unless the command line asks for them."""
    monkeypatch.chdir(CONFIGS.parent)
    grid = read_grid(path)
    named = [axis for axis in grid.axes if isinstance(axis.arguments, Mapping)]
    met: set[tuple[str, str]] = set()
    for cell in grid.with_changes([f"{axis.name}={','.join(axis.arguments)}" for axis in named]).cells():
        values = {(axis, str(value)) for axis, value in cell.axes.items()}
        if values - met:
            Parsed([*cell.arguments, *swap, "--data.batch_size=16", "--trainer.precision=32-true"])
        met |= values
