"""Runs of `test_distributed.py`, in one process or in two."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers.logger import Logger
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.live_memory import peak_bytes
from lpc_lightning.algorithms import DPO, FSDP2Strategy
from lpc_lightning.callbacks import ResourceMonitor
from lpc_lightning.callbacks.resources import peak_memory
from lpc_lightning.data import SyntheticPreferences
from lpc_lightning.data.batching.loading import TrainingBatches
from lpc_lightning.data.sources.example_source import ExamplesInMemory
from lpc_lightning.distributed.checkpoint_io import AtomicCheckpointIO
from lpc_lightning.errors import CheckpointError, ConfigError, UnsupportedPolicyError
from lpc_lightning.latent import GumbelSpace, MarginalSpace
from lpc_lightning.policy import CausalPolicy, LoRA, PretrainedPolicy, TinyPolicy
from lpc_lightning.robust import REPO
from lpc_lightning.seeding import derive, run_seed
from lpc_lightning.types import PairLogps, PairLosses

LATENTS = {
    "plain": lambda: None,
    "marginal": lambda: MarginalSpace(num_codes=4, hidden=8, init_logit_std=1.0),
    "gumbel": lambda: GumbelSpace(num_codes=4, hidden=8, init_logit_std=1.0, g=None),
}
CHECKPOINTED = {"plain": True, "marginal": False, "gumbel": True}
LORAS = {"full": lambda: None, "lora": lambda: LoRA(rank=2, alpha=4)}
STRATEGIES = {
    "one": lambda: "auto",
    "ddp": lambda: "ddp",
    "fsdp": lambda: FSDP2Strategy(),
    "fsdp in one file": lambda: FSDP2Strategy(save_distributed_checkpoint=False),
}
REFERENCES = ("cached", "live")
BUILDS = (
    ("plain", "full", "live"),
    ("plain", "lora", "cached"),
    ("marginal", "full", "cached"),
    ("marginal", "lora", "live"),
    *(("gumbel", lora, reference) for lora in LORAS for reference in REFERENCES),
)
"""Latent, adapter and reference of the modules that are built sharded: every pair of values of any two."""
LAYERS = {"plain": 2, "marginal": 2, "gumbel": 20}
"""Layers of these modules by latent. One layer is a small part of the policy whose peak of memory is compared."""
SEED = 3
EPOCHS = 2
VALIDATION_PAIRS = 7


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3, fused=True)


def module(latent: str, lora: str = "full", reference: Any = "cached", algorithm: type[DPO] = DPO) -> DPO:
    # With gradient checkpointing, as for large policies. It does not change the results.
    policy = TinyPolicy(width=16, layers=2, heads=2, lora=LORAS[lora](), gradient_checkpointing=CHECKPOINTED[latent])
    return algorithm(policy=policy, latent=LATENTS[latent](), reference=reference, optimizer=adam, latent_lr=1e-2)


def warm_starting() -> DPO:
    latent = MarginalSpace(num_codes=4, hidden=8, warm_start_pairs=16)
    return DPO(policy=TinyPolicy(width=16, layers=1, heads=2), latent=latent, optimizer=adam, latent_lr=1e-2)


class Rows(Logger):
    """Logger that keeps all metrics in memory."""

    name, version = "rows", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(dict(metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def with_name(self, name: str) -> list[dict[str, float]]:
        return [row for row in self.rows if name in row]


class Count(Callback):
    """Counts the tokens that this process reads for each step."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.tokens.append(0)
        self.tokens[-1] += batch.tokens


class Save(Callback):
    """Saves after the fourth batch and, to the same path, after the eighth, the second one of the second epoch."""

    def __init__(self, path: Path) -> None:
        self.path, self.batches = path, 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.batches += 1
        if self.batches in (4, 8):
            trainer.save_checkpoint(self.path)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def fit(
    strategy: str,
    devices: int,
    module: DPO,
    cache: str,
    save: Path | None = None,
    resume: Path | None = None,
    data: type[SyntheticPreferences] = SyntheticPreferences,
    batch_size: int | None = None,
    accumulate: int = 2,
    precision: str = "32-true",
    log_every: int = 1,
) -> dict[str, Any]:
    """Train for two epochs of 22 pairs, with 4 pairs in a batch of all devices and 8 in a step.

    The last batch and step of an epoch are short.

    Returns:
        Metrics of each training step and of each validation, and the unsharded weights and moments.
    """
    seed_everything(SEED, verbose=False)
    rows = Rows()
    monitor, count = ResourceMonitor(), Count()
    callbacks: list[Callback] = [monitor, count, *([Save(save)] if save else [])]
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        devices=devices,
        strategy=STRATEGIES[strategy](),
        logger=rows,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=log_every,
        max_epochs=EPOCHS,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
    )
    pairs = data(
        train_pairs=22,
        validation_pairs=VALIDATION_PAIRS,
        test_pairs=5,
        batch_size=batch_size or 4 // devices,
        eval_batch_size=3,
        cache_dir=cache,
    )
    trainer.fit(module, datamodule=pairs, ckpt_path=resume, weights_only=True)
    return {
        "train": [
            {name: value for name, value in row.items() if not name.startswith("resources/")}
            for row in rows.with_name("train/loss")
        ],
        "val": rows.with_name("val/loss"),
        "weights": {name: whole(value) for name, value in module.state_dict().items()},
        "reliability": None if module.robust_loss is None else module.robust_loss.state_dict(),
        "steps": trainer.global_step,
        "tokens": [
            round(row["resources/tokens_per_second"] * row["resources/seconds_per_step"])
            for row in rows.with_name("resources/tokens_per_second")
        ],
        "tokens of this process": count.tokens,
        "peak": monitor.summary()["peak_memory_gib"],
        "peak of this process": peak_memory(torch.device("cpu")),
    }


def reliable() -> DPO:
    return DPO(policy=TinyPolicy(width=16, layers=1, heads=2), robust_loss=REPO(rate=0.5), optimizer=adam)


class DivergingOnOne(DPO):
    """DPO whose loss is NaN in the second process, in the third micro-batch alone."""

    batches = 0

    def preference_loss(self, logps: PairLogps) -> PairLosses:
        result = super().preference_loss(logps)
        self.batches += self.training and logps.policy_chosen.requires_grad
        if self.batches != 3 or self.global_rank != 1:
            return result
        return PairLosses(result.losses * torch.nan, result.chosen_rewards, result.rejected_rewards)


class WeightedPairs(SyntheticPreferences):
    """The same pairs with weights, some of them 0, and margins."""

    def source(self, stage: Any) -> ExamplesInMemory | None:
        source = super().source(stage)
        if source is None:
            return None
        numbered = enumerate(source.examples)
        examples = [replace(example, weight=float(n % 4), margin=n / 10 - 1) for n, example in numbered]
        return ExamplesInMemory(examples, f"weighted {source.name}")


# Noise of two devices in one process


class BothRanks(TrainingBatches):
    """Batches of two devices in turn: first batches of both, second batches of both, and so on."""

    def __init__(self, *plan: Any) -> None:
        super().__init__(*plan)
        self.ranks = [TrainingBatches(self.pairs, self.batch_size, self.seed, rank, 2) for rank in range(2)]

    @property
    def sizes(self) -> list[int]:
        return list(chain(*zip(*(rank.sizes for rank in self.ranks), strict=True)))

    def __iter__(self) -> Iterator[list[int]]:
        for rank in self.ranks:
            rank.set_epoch(self.epoch)
        return iter(list(chain(*zip(*self.ranks, strict=True))))


class BothRanksData(SyntheticPreferences):
    def _training_batches(self) -> TrainingBatches:
        return BothRanks(self.pairs["train"], self.batch_size, run_seed())


class BothRanksDPO(DPO):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(derive("step", run_seed(), self.current_epoch, batch_idx // 2, batch_idx % 2))


def fit_as_two(latent: str, cache: str, lora: str = "full") -> dict[str, Any]:
    """Train in one process like two processes, with the noise of both."""
    both = module(latent, lora, algorithm=BothRanksDPO)
    return fit("one", 1, both, cache, data=BothRanksData, batch_size=2, accumulate=4)


# Two processes


def runs(folder: Path, cache: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the results of all runs by name. Checkpoints in `folder` are named after their run."""
    for latent in LATENTS:
        for strategy in ("ddp", "fsdp"):
            yield f"{strategy} {latent}", fit(strategy, 2, module(latent), cache, folder / f"{strategy} {latent}.ckpt")
    for strategy in ("ddp", "fsdp"):
        yield f"{strategy} live", fit(strategy, 2, module("plain", reference="live"), cache)
    for strategy in ("ddp", "fsdp", "fsdp in one file"):
        name = f"{strategy} lora"
        yield name, fit(strategy, 2, module("gumbel", "lora"), cache, folder / f"{name}.ckpt")
    for strategy in ("ddp", "fsdp"):
        for written, lora in (("ddp gumbel", "full"), ("fsdp gumbel", "full"), ("fsdp in one file lora", "lora")):
            resumed = fit(strategy, 2, module("gumbel", lora), cache, resume=folder / f"{written}.ckpt")
            yield f"{strategy} from {written}", resumed
    yield "ddp warm_started", fit("ddp", 2, warm_starting(), cache)
    yield "ddp weighted", fit("ddp", 2, module("marginal"), cache, data=WeightedPairs)
    yield "ddp reliable", fit("ddp", 2, reliable(), cache)
    try:
        diverging = module("plain", algorithm=DivergingOnOne)
        fit("ddp", 2, diverging, cache, save=folder / "diverged.ckpt", log_every=50)
    except FloatingPointError as error:
        yield "ddp diverged", {"error": str(error)}
    try:
        fit("fsdp", 2, warm_starting(), cache)
    except ConfigError as error:
        yield "fsdp warm_started", {"error": str(error)}
    for strategy in ("ddp", "fsdp"):
        yield f"{strategy} mixed", fit(strategy, 2, module("marginal"), cache, precision="bf16-mixed")
    for written in ("ddp gumbel", "fsdp gumbel"):
        try:
            fit("fsdp", 2, module("marginal"), cache, resume=folder / f"{written}.ckpt")
        except CheckpointError as error:
            yield f"{written} refused", {"error": str(error)}


def build(latent: str, lora: str, reference: Any) -> dict[str, Any]:
    """Build a module sharded over two processes, and compare it with one that this process builds alone."""
    made = []
    for mesh in (init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",)), None):
        torch.manual_seed(torch.distributed.get_rank())  # must have no effect
        policy = TinyPolicy(width=128, layers=LAYERS[latent], heads=4, lora=LORAS[lora]())
        made.append(DPO(policy=policy, latent=LATENTS[latent](), reference=reference))
        made[-1]._device_mesh = mesh
    sharded, plain = made
    peak = peak_bytes(sharded.configure_model)
    plain.configure_model()
    expected = plain.state_dict()
    held = [getattr(value, "__self__", value) for value in vars(sharded.reference).values()]
    buffers, others = (dict(part.named_buffers()) for part in (sharded, plain))
    return {
        "peak": peak,
        "whole": sum(parameter.nbytes for parameter in plain.parameters()),
        "local": sum(parameter.to_local().nbytes for parameter in sharded.parameters()),
        "same": {name: torch.equal(whole(value), expected[name]) for name, value in sharded.state_dict().items()},
        "same buffers": {name: torch.equal(value, others[name]) for name, value in buffers.items()},
        "names": list(expected) == list(sharded.state_dict()) and list(buffers) == list(others),
        "reference uses the policy": [value is sharded.policy for value in held if isinstance(value, CausalPolicy)],
        "trained": [p.requires_grad for p in sharded.parameters()] == [p.requires_grad for p in plain.parameters()],
    }


def build_error() -> str:
    """Return the error in this process if the first process cannot build the policy."""
    one = DPO(policy=PretrainedPolicy("models/nowhere", tokenizer=str(Path(__file__).parent)))
    one._tokenizer = TinyPolicy().load_tokenizer()
    one._device_mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))
    try:
        one.configure_model()
    except UnsupportedPolicyError as error:
        return str(error)
    return ""


def run_all(folder: Path, cache: str) -> None:
    """Write the results of all runs of this process to `folder`."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    # The second process allocates more memory, for the test of the reported peak.
    ballast = torch.ones(int(os.environ["RANK"]) * 2**27, dtype=torch.uint8)
    results = dict(runs(folder, cache))
    results["built"] = {
        f"{latent} {lora} {reference}": build(latent, lora, reference) for latent, lora, reference in BUILDS
    }
    results["build_error"] = {"error": build_error()}
    del ballast
    torch.save(results, folder / f"{torch.distributed.get_rank()}.pt")
