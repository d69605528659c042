"""Times of the parts of training steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lpc_lightning.callbacks.resources import Time, read_clock, seconds_between
from lpc_lightning.policy import causal, logprobs

PARTS = (
    "data",
    "reference",
    "backbone forward",
    "head forward",
    "latent and loss",
    "backbone backward",
    "head backward",
    "optimizer",
    "other",
)
"""`data` is the time from the end of a batch to the arrival of the next one. `backbone backward` is the backward pass
without the head, and includes the latent's small networks. If the head is not trained (LoRA), its gradient is computed
in the forward pass: `head forward` includes it, and `head backward` is the rest. `other` is metrics, logging and the
trainer."""


class StepParts:
    """Clock of the parts of each batch's step. It wraps the calls that make them up until `close`.

    The time of a part is its own: that of a part nested in it is not included. On a GPU times are those of the device,
    read from events in its stream, so that the host does not wait.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        """Wrap the parts of the module's step.

        Args:
            trainer: The trainer, with its optimizers.
            module: The module, with its policy and reference.
        """
        self._device = module.device
        self._restore = ExitStack()
        self._batches: list[_Batch] = []
        self._stack: list[str] = []
        self._mark: Time | None = None
        self._end: Time | None = None
        policy: Any = module.policy
        self._wrap(policy, "hidden", "backbone forward")  # not its part that CUDA graphs capture and replay
        if module.reference is not None:
            self._wrap(module.reference, "logps", "reference")
        self._wrap(module, "training_terms", "latent and loss")
        self._wrap(causal.BatchForward, "logps", "head forward")
        self._wrap(causal.BatchForward, "logps_per_code", "head forward")
        for function in (logprobs._TokenLogps, logprobs._FrozenHeadLogps):
            self._wrap(function, "backward", "head backward", staticmethod)
        self._wrap(trainer.strategy, "backward", "backbone backward")
        for optimizer in trainer.optimizers:
            self._wrap(optimizer, "zero_grad", "optimizer")
        self._wrap(module, "configure_gradient_clipping", "optimizer")
        # The optimizer's step runs the closure, forward and backward, whose parts are not its own.
        self._wrap(trainer.strategy, "training_step", "other")
        self._wrap(trainer.strategy, "optimizer_step", "optimizer")

    def start(self) -> None:
        """Start a batch, which has arrived."""
        now = read_clock(self._device)
        self._batches.append(_Batch(now, waited_from=self._end))

    def end(self) -> None:
        """End the batch, and wait for the next one."""
        self._end = read_clock(self._device)
        if self._batches:
            self._batches[-1].end = self._end

    def pause(self) -> None:
        """Leave out the time up to the next batch, such as a validation."""
        self._end = None

    def close(self) -> None:
        """Remove the wrappers."""
        self._restore.close()

    def seconds(self) -> list[dict[str, float]]:
        """Return the seconds of each batch by part. On a GPU this waits for the device."""
        return [batch.seconds() for batch in self._batches if batch.end is not None]

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        # The reference is one part, whatever runs inside it.
        if "reference" in self._stack:
            yield
            return
        self._book()
        self._stack.append(name)
        try:
            yield
        finally:
            self._book()
            self._stack.pop()

    def _book(self) -> None:
        """Add the time since the last mark to the innermost part. Passes between batches belong to no step."""
        now = read_clock(self._device)
        if self._stack and self._mark is not None and self._batches and self._batches[-1].end is None:
            self._batches[-1].spans.append((self._stack[-1], self._mark, now))
        self._mark = now

    def _wrap(self, owner: Any, name: str, part: str, kind: Callable[[Any], Any] = lambda call: call) -> None:
        own = vars(owner).get(name)
        setattr(owner, name, kind(self._timed(getattr(owner, name), part)))
        if own is None:
            self._restore.callback(delattr, owner, name)
        else:
            self._restore.callback(setattr, owner, name, own)

    def _timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        @wraps(call)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self._part(part):
                return call(*arguments, **options)

        return timed


class _Batch:
    """Marks of one batch."""

    def __init__(self, start: Time, waited_from: Time | None) -> None:
        self.start, self.waited_from = start, waited_from
        self.end: Time | None = None
        self.spans: list[tuple[str, Time, Time]] = []

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part. `other` is what belongs to no part."""
        assert self.end is not None
        parts = dict.fromkeys(PARTS, 0.0)
        for part, start, end in self.spans:
            parts[part] += seconds_between(start, end)
        parts["other"] += seconds_between(self.start, self.end) - sum(parts.values())
        if self.waited_from is not None:
            parts["data"] = seconds_between(self.waited_from, self.start)
        return parts


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals, which may overlap, such as kernels of several streams."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def idle_share(profile: torch.profiler.profile, seconds: float) -> float:
    """Return the share of a profiled time in which no kernel and no copy ran on the GPU.

    Args:
        profile: A finished profile with the activities of CUDA.
        seconds: Seconds from the start of the profile until the device had finished.
    """
    device = torch.autograd.DeviceType.CUDA
    events = [event.time_range for event in profile.events() if event.device_type == device]
    return max(0.0, 1 - covered((span.start, span.end) for span in events) / 1e6 / seconds)
