"""Tests of commands that continue or measure a run from its checkpoint, and of checkpoints that they refuse."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from lpc_lightning.cli import main
from lpc_lightning.inference.export import export
from lpc_lightning.inference.opening import open_policy
from tests.fixtures.commands import ALL, DATA, MODEL, TRAINER, Command, assert_one_error, logged, places_in


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of runs with one run of one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = ["fit", *ALL, *places_in(folder), "--trainer.max_epochs=1"]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            patch.setenv(name, "0")
        patch.setattr("sys.argv", ["lpc-lightning", *arguments])
        main(arguments)
    return folder / "runs"


@pytest.fixture
def checkpoint(trained: Path, runs: Path) -> Path:
    """Of a copy of that run, in version_0."""
    shutil.copytree(trained, runs)
    (path,) = (runs / "version_0").glob("checkpoints/*.ckpt")
    return path


# Lightning warns that the best score of the old folder does not count in the new one.
@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
class TestFromACheckpoint:
    @pytest.mark.slow
    def test_resume_keeps_the_model_settings(self, checkpoint: Path, fit: Command, runs: Path) -> None:
        with pytest.warns(UserWarning, match=r"resume: found trainer\.max_epochs 2 \(before: 1\)"):
            output = fit(f"--ckpt_path={checkpoint}", "--model.beta=9", "--policy.width=32", "--latent=null")
        assert output.code == 0, output.err
        message = f"Model, policy and latent are set as in {checkpoint}; flags and config files do not change them."
        assert message in output.out
        resumed = logged(runs / "version_1")
        assert len(resumed["train/loss"]) == 3
        assert resumed["train/latent/prior_entropy"]
        module = LightningModule.load_from_checkpoint(next((runs / "version_1").glob("checkpoints/*.ckpt")))
        assert (module.beta, module.policy_spec.width, module.latent.num_codes) == (0.1, 16, 3)

    @pytest.mark.slow
    def test_run_with_a_robust_loss_is_resumed_and_opened(self, fit: Command, runs: Path) -> None:
        whole = ["--model.robust_loss=REPO", "--latent=null"]
        assert fit(*whole, "--trainer.max_epochs=1").code == 0
        (stopped,) = (runs / "version_0").glob("checkpoints/*.ckpt")
        with pytest.warns(UserWarning, match=r"resume: found trainer\.max_epochs 2 \(before: 1\)"):
            resumed = fit(f"--ckpt_path={stopped}")
        assert resumed.code == 0, resumed.err
        (path,) = (runs / "version_1").glob("checkpoints/*.ckpt")
        assert torch.load(path, weights_only=True)["robust_loss"]
        assert open_policy(str(path)).kind == "checkpoint"

    @pytest.mark.slow
    @pytest.mark.parametrize(("name", "prefix"), [("validate", "val"), ("test", "test")])
    def test_it_is_measured(
        self, name: str, prefix: str, checkpoint: Path, command: Command, places: list[str], runs: Path, caplog: Any
    ) -> None:
        measure = [name, *ALL[: -len(TRAINER)], *TRAINER[:3], *places]
        output = command(*measure, f"--ckpt_path={checkpoint}")
        assert output.code == 0, output.err
        assert "ckpt_path: found none" not in caplog.text
        assert command(*measure).code == 0
        assert "scores are those of the policy that a fit would start from, TinyPolicy. `--ckpt_path" in caplog.text
        found = logged(runs / "version_1")
        assert 0 <= found[f"{prefix}/rewards/accuracies"][0] <= 1
        assert f"{prefix}/rewards/accuracies" in output.out
        if name == "validate":
            fitted = logged(runs / "version_0")
            names = [column for column in fitted if column.startswith("val/")]
            assert len(names) > 8
            for column in names:
                assert found[column] == fitted[column]

    @pytest.mark.slow
    def test_start_from_trained_weights_is_named(
        self, checkpoint: Path, command: Command, places: list[str], caplog: Any
    ) -> None:
        start = ["--policy=TrainedPolicy", f"--policy.path={checkpoint}", "--policy.keep_latent=false"]
        assert command("validate", *start, *MODEL, *DATA, *TRAINER[:3], *places).code == 0
        assert f"the policy that a fit would start from, {checkpoint} without latent. `--ckpt_path" in caplog.text
        assert "before training" not in caplog.text

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("flags", "changes"),
        [
            (["--data.template=plain"], r"data\.template plain \(in training: chat\)"),
            (
                ["--data.template_kwargs={thinking: true}", "--data.system_turns=fold"],
                r"data\.template_kwargs \{'thinking': True\} \(in training: null\), "
                r"data\.system_turns fold \(in training: auto\)",
            ),
            (["--data.template=chat"], None),
        ],
        ids=["template", "arguments", "equal"],
    )
    def test_another_template_is_warned_of(
        self, flags: list[str], changes: str | None, checkpoint: Path, command: Command, places: list[str]
    ) -> None:
        """Its arguments are refused after that, as no text of these pairs reads them."""
        arguments = ["test", *ALL[: -len(TRAINER)], *TRAINER[:3], *places, f"--ckpt_path={checkpoint}", *flags]
        if changes is None:
            assert command(*arguments).code == 0  # any warning is an error
            return
        with pytest.warns(UserWarning, match=rf"^template: found {changes} for {re.escape(str(checkpoint))}\. The sc"):
            command(*arguments)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("policy", "is_export"), [("TrainedPolicy", False), ("TrainedPolicy", True), ("PretrainedPolicy", True)]
    )
    @pytest.mark.filterwarnings("ignore:policy.path. found an export with a latent")
    def test_new_fit_with_another_template(
        self, policy: str, is_export: bool, checkpoint: Path, command: Command, places: list[str], tmp_path: Path
    ) -> None:
        path = export(str(checkpoint), str(tmp_path / "export")) if is_export else checkpoint
        start = [f"--policy={policy}", f"--policy.path={path}", *MODEL, *TRAINER[:3], "--trainer.fast_dev_run=true"]
        start += ["--policy.keep_latent=false"] if policy == "TrainedPolicy" else []
        changes = r"^template: found data\.template plain \(in training: chat\) for .* The fit changes the form"
        with pytest.warns(UserWarning, match=changes):
            command("fit", *start, *DATA, "--data.batch_size=2", "--data.template=plain", *places)

    @pytest.mark.slow
    def test_its_pairs_are_predicted(self, checkpoint: Path, command: Command, places: list[str], runs: Path) -> None:
        options = [*ALL[: -len(TRAINER)], *TRAINER[:3], *places, f"--ckpt_path={checkpoint}"]
        output = command("predict", *options, "--callbacks+=lpc_lightning.callbacks.WritePredictions")
        assert output.code == 0, output.err
        (file,) = runs.glob("*/predictions_0.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert len({row["id"] for row in rows}) == len(rows) > 0
        for row in rows:
            assert row["rewards/chosen"] - row["rewards/rejected"] == pytest.approx(row["rewards/margins"], abs=1e-5)
            assert sum(row["prior"]) == pytest.approx(1, abs=1e-5)

    @pytest.mark.parametrize(
        ("content", "message"),
        [(None, "found no file"), ("not a checkpoint", "is no checkpoint")],
        ids=["missing", "something else"],
    )
    def test_file_that_is_no_checkpoint_is_refused(
        self, content: str | None, message: str, fit: Command, tmp_path: Path
    ) -> None:
        path = tmp_path / "last.ckpt"
        if content is not None:
            path.write_text(content)
        output = fit(f"--ckpt_path={path}")
        assert_one_error(output, r"ckpt_path: .*last\.ckpt.*expected (a checkpoint|one such as)")
        assert message in output.err

    @pytest.mark.parametrize("name", ["fit", "validate", "test", "predict"])
    @pytest.mark.parametrize("word", ["best", "last", "hpc", ""])
    def test_word_for_a_checkpoint_is_refused(
        self, word: str, name: str, command: Command, places: list[str], runs: Path
    ) -> None:
        """Each command starts a run folder without checkpoints, so that `last` would mean new weights."""
        output = command(name, *ALL[: -len(TRAINER)], *TRAINER[:3], *places, f"--ckpt_path={word}")
        example = re.escape(f"{runs}/version_0/checkpoints/{'last' if word == 'last' else 'best'}.ckpt")
        found = word or "no path"
        assert_one_error(output, rf"ckpt_path: found {found}, expected the path of a checkpoint, such as {example}\. ")
        assert not runs.exists()

    def test_truncated_checkpoint_is_refused(self, checkpoint: Path, fit: Command, tmp_path: Path) -> None:
        half = tmp_path / "half.ckpt"
        half.write_bytes(checkpoint.read_bytes()[:50_000])
        assert_one_error(
            fit(f"--ckpt_path={half}"),
            r"ckpt_path: .*half\.ckpt is no checkpoint, or one that was cut short, expected one",
        )

    def test_other_architecture_is_refused(self, checkpoint: Path, fit: Command) -> None:
        """Made in code, it holds no settings, so that the flags' model is to take it."""
        kept = torch.load(checkpoint, weights_only=True)
        kept["hyper_parameters"] = {}
        torch.save(kept, checkpoint)
        output = fit(f"--ckpt_path={checkpoint}", "--policy.width=32", "--trainer.max_epochs=2")
        assert_one_error(
            output, r"checkpoint: its weights are of another architecture: .*found \(3, 16\), expected \(3, 32\)"
        )

    @pytest.mark.slow
    def test_damaged_entries_are_refused(
        self, checkpoint: Path, fit: Command, command: Command, tmp_path: Path
    ) -> None:
        kept = torch.load(checkpoint, weights_only=True)
        name = next(iter(kept["callbacks"]))
        settings = kept["hyper_parameters"]
        changes: dict[str, tuple[dict[str, Any], str]] = {
            "loops": ({"loops": {"fit_loop": 3}}, "found no counts in loops"),
            "count": ({"loops": kept["loops"] | {"fit_loop": {"state_dict": {}}}}, "found no counts in loops"),
            "callbacks": ({"callbacks": {name: 3}}, "cannot be restored"),
            "optimizer": ({"optimizer_states": [{"state": 3}]}, "cannot be restored"),
            "schedule": ({"lr_schedulers": [None]}, "cannot be restored"),
            "policy": ({"hyper_parameters": settings | {"policy": {"class_path": "os.system"}}}, "cannot import code"),
            "beta": ({"hyper_parameters": settings | {"beta": []}}, "holds settings that cannot be used"),
        }
        for change, message in changes.values():
            torch.save(kept | change, tmp_path / "other.ckpt")
            output = fit(f"--ckpt_path={tmp_path / 'other.ckpt'}", "--trainer.max_epochs=2")
            assert_one_error(output, rf"ckpt_path: .*other\.ckpt.*{message}")
        del kept["loops"]
        torch.save(kept, tmp_path / "other.ckpt")
        output = fit(f"--ckpt_path={tmp_path / 'other.ckpt'}", "--trainer.max_epochs=2")
        assert_one_error(output, r"ckpt_path: .*other\.ckpt: found no entry loops, expected the full state of a run")

    @pytest.mark.slow
    def test_steps_of_another_size_are_refused(self, checkpoint: Path, fit: Command) -> None:
        output = fit(f"--ckpt_path={checkpoint}", "--trainer.accumulate_grad_batches=2")
        assert_one_error(
            output, r"trainer\.accumulate_grad_batches: found 2, expected 1 as in the checkpoint\. Resume with"
        )

    @pytest.mark.slow
    @pytest.mark.parametrize("change", ["--seed_everything=5", "--data.train_pairs=8", "--data.batch_size=3"])
    def test_other_data_is_refused(self, change: str, checkpoint: Path, fit: Command) -> None:
        output = fit(f"--ckpt_path={checkpoint}", change)
        assert_one_error(output, r"resume: found data order .*expected .* as in the checkpoint\. Resume with the same")
