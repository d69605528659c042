"""Every command once on a tiny policy: each algorithm, latent, reference, adapter and kernel at least once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import yaml

from benchmarks.gpu.guard import ROOT
from lpc_lightning.cli.commands import commands

CONFIGS = ROOT / "configs"
LORA = '{"class_path": "lpc_lightning.policy.LoRA", "init_args": {"rank": 2}}'
FLASH = "flash_attn"
"""The package that flash_attention_2 needs."""


@dataclass(frozen=True)
class Cell:
    """One command and what it is to show."""

    name: str
    command: list[str]
    needs: str | None = None
    """Package without which the cell is left out."""


@dataclass
class Smoke:
    """The commands, in the order in which they need one another."""

    folder: Path
    device: str
    tiny: bool
    """True leaves out the fits that compile and most of the others."""
    _cells: list[Cell] = field(default_factory=list)

    def cells(self) -> Iterator[Cell]:
        """Yield all cells; those that compile come last."""
        self._write_pairs()
        gpu = self.device == "cuda"
        mixed = "bf16-mixed" if gpu else "32-true"
        yield self._fit("DPO", "DPO, no latent", precision=mixed)
        yield self._fit("gumbel", "IPO, gumbel, LoRA, live", "IPO", "gumbel", lora=True, live=True, precision=mixed)
        if not self.tiny:
            yield self._fit("SimPO", "SimPO, expected, bf16-true", "SimPO", "expected", precision="bf16-true")
            yield self._fit("KTO", "KTO, marginal", "KTO", "marginal", precision=mixed)
            yield self._fit("ORPO", "ORPO, no latent", "ORPO", precision=mixed)
            yield self._fit("sdpa", "DPO, marginal, live, sdpa", "DPO", "marginal", live=True, attention="sdpa")
            yield self._fit("padded", "DPO, gumbel, padded", "DPO", "gumbel", more={"data.layout": "padded"})
            yield self._fit("lora", "DPO, marginal, LoRA, cached", "DPO", "marginal", lora=True, precision=mixed)
            kept = {"policy.gradient_checkpointing": "true"}
            yield self._fit(
                "kept", "DPO, checkpointing, eager attention", attention="eager", precision=mixed, more=kept
            )
            for control in ("vector", "mlp", "gaussian", "prior_only", "posterior_only"):
                yield self._fit(control, f"DPO, {control}", "DPO", control, precision=mixed)
            annotators = {
                "data.deciding": "hidden",
                "data.batch_order": "ByAnnotator",
                "data.batch_order.pairs_per_annotator": 2,
            }
            yield self._fit("annotators", "DPO, marginal_annotators", "DPO", "marginal_annotators", more=annotators)
            wide = {"policy.attention": "flash_attention_2"}
            yield self._fit(
                "flash", "DPO, flash_attention_2, float32 weights", precision="bf16-mixed", more=wide, needs=FLASH
            )
        warm = {"latent.warm_start_pairs": 8, "latent.num_codes": 4}
        yield self._fit("warm", "DPO, marginal, warm start, checkpoint", "DPO", "marginal", more=warm, saved=True)
        run = self.folder / "warm"
        checkpoint = run / "version_0" / "checkpoints" / "last.ckpt"
        for command in ("validate", "test", "predict"):
            yield Cell(command, [command, f"--config={run}/version_0/config.yaml", f"--ckpt_path={checkpoint}"])
        config = f"--config={run}/version_0/config.yaml"
        yield Cell("fit, resumed", ["fit", config, f"--ckpt_path={checkpoint}", "--trainer.max_steps=4"])
        pairs = self.folder / "pairs.jsonl"
        flags = ["--prompt", "How do I boil an egg?", "--codes", "1", "--max_new_tokens", "4", "--device", self.device]
        yield Cell("generate", ["generate", "--model", str(checkpoint), *flags])
        yield Cell("export", ["export", "--checkpoint", str(checkpoint), "--output", str(self.folder / "exported")])
        scored = ["--preferences", str(pairs), "--output", str(self.folder / "scores"), "--device", self.device]
        if not self.tiny:
            flags = ["generate", "--model", str(self.folder / "exported"), *flags]
            yield Cell("generate, exported folder", flags)
            yield Cell("evaluate", ["evaluate", str(checkpoint), "--tasks", "none", *scored])
            given = ["--shots", "0", "2", "--rounds", "2", "--output", str(self.folder / "given")]
            yield Cell("adapt", ["adapt", str(checkpoint), *scored[:2], *given, "--device", self.device])
            if gpu:
                yield self._fit("flex", "DPO, flex_attention", attention="flex_attention", precision=mixed)
            compiled = {"policy.compile": "true"}
            yield self._fit("compiled", "DPO, marginal, compile", "DPO", "marginal", precision=mixed, more=compiled)

    def _fit(
        self,
        folder: str,
        name: str,
        algorithm: str = "DPO",
        latent: str | None = None,
        *,
        lora: bool = False,
        live: bool = False,
        attention: str = "auto",
        precision: str = "32-true",
        saved: bool = False,
        more: Mapping[str, object] | None = None,
        needs: str | None = None,
    ) -> Cell:
        settings: dict[str, object] = {
            "trainer": CONFIGS / "trainer" / "cpu_tiny.yaml",
            "trainer.accelerator": "gpu" if self.device == "cuda" else "cpu",
            "trainer.precision": precision,
            "trainer.max_steps": 2,
            "trainer.limit_val_batches": 1,
            "trainer.default_root_dir": self.folder / folder,
            "policy": CONFIGS / "policy" / "tiny.yaml",
            "policy.attention": attention,
            "policy.dtype": "bfloat16" if precision == "bf16-true" else "float32",
            "data": CONFIGS / "data" / "synthetic.yaml",
            "data.train_pairs": 16,
            "data.validation_pairs": 4,
            "data.test_pairs": 4,
            "data.batch_size": 4,
            "data.cache_dir": self.folder / "cache",
            "model": algorithm,
            "seed_everything": 0,
        }
        if algorithm not in ("SimPO", "ORPO"):
            settings["model.reference"] = "live" if live else "cached"
        if latent is not None:
            settings["latent"] = CONFIGS / "latent" / f"{latent}.yaml"
        if lora:
            settings["policy.lora"] = LORA
        if saved:
            settings["callbacks"] = json.dumps(self._callbacks())
        else:
            settings["trainer.enable_checkpointing"] = "false"
        settings.update(more or {})
        return Cell(f"fit: {name}", ["fit", *(f"--{key}={value}" for key, value in settings.items())], needs)

    def _callbacks(self) -> list[object]:
        """Return the default callbacks without the progress bar."""
        callbacks = yaml.safe_load((CONFIGS / "callbacks" / "default.yaml").read_text())
        return [each for each in callbacks if "ProgressBar" not in each["class_path"]]

    def _write_pairs(self) -> None:
        """Write pairs of two annotators, for evaluation and for inference from labels."""
        rows = [
            {
                "prompt": f"How do I cook {number} eggs?",
                "chosen": f"Boil them for {number} minutes.",
                "rejected": "Please look it up.",
                "annotator": f"annotator-{number % 2}",
                "split": "test",
            }
            for number in range(1, 9)
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def run_cell(cell: Cell) -> dict[str, str]:
    """Run a command in this process.

    Raises:
        RuntimeError: The command ended with a code other than 0.
    """
    if cell.needs is not None and find_spec(cell.needs) is None:
        return {"left_out": f"{cell.needs} is not installed"}
    run = commands()[cell.command[0]].run
    try:
        run(cell.command)
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"lpc-lightning {cell.command[0]} ended with code {ended.code}; see the log.") from ended
    return {}
