"""Memory and time of a training step on paper: the numbers of `docs/memory.md` on Llama-3-8B, and their derivation.

Letters: V vocabulary, d hidden width, L layers, h heads times head width, f feed-forward width; T tokens that the
backbone reads on a device, padding included, N answer tokens. Everything is for a decoder of the Llama family, whose
layer has a gated feed-forward network and two RMS norms, and for AdamW.

`python -m benchmarks.memory_model` prints the tables.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from lpc_lightning.policy.logprobs import chunk_size

Precision = Literal["32-true", "bf16-mixed", "bf16-true"]
GIB = 2**30


@dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    feed_forward: int
    tied: bool

    @classmethod
    def of(cls, config: Any) -> Architecture:
        """Return the sizes in a config of transformers."""
        return cls(
            vocabulary=config.vocab_size,
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_width=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            feed_forward=config.intermediate_size,
            tied=config.tie_word_embeddings,
        )

    @property
    def attended(self) -> int:
        """h: width of all heads side by side."""
        return self.heads * self.head_width

    @property
    def layer(self) -> int:
        """Weights of a layer."""
        attention = self.width * self.head_width * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.width * self.feed_forward + 2 * self.width

    @property
    def outside(self) -> int:
        """Weights outside the layers: embedding, head (one matrix where they are tied) and the last norm."""
        return self.vocabulary * self.width * (1 if self.tied else 2) + self.width

    @property
    def weights(self) -> int:
        """All weights."""
        return self.layers * self.layer + self.outside


LLAMA_3_8B = Architecture(128256, 4096, 32, 32, 8, 128, 14336, False)


@dataclass(frozen=True)
class Step:
    """What a device reads in one pass, and how it is set up."""

    tokens: int
    """T, padding included."""
    answers: int
    """N: tokens whose log-probability is computed."""
    row: int
    """Tokens in a row: the width of the mask."""
    precision: Precision = "bf16-mixed"
    devices: int = 1
    """Devices that share weights, gradients and optimizer state (FSDP2); 1: this one holds them all."""
    checkpointing: bool = False
    """`policy.gradient_checkpointing`."""
    chunked: bool = True
    """Whether the head runs in chunks that the backward pass computes again."""
    live_reference: bool = True
    """Whether a frozen copy of the policy is in memory and run at every batch; False: cached, or none needed."""
    adapter: int | None = None
    """Weights of a LoRA adapter, which are then all that is trained; the policy is its own reference."""
    accumulated: bool = False
    """Whether gradients of earlier micro-batches are kept."""
    codes: int = 0
    """K, for the exact marginal."""
    gpu: bool = False
    """True on a GPU, where the chunks of the head are larger."""

    @property
    def stored(self) -> int:
        """Bytes of a weight."""
        return 2 if self.precision == "bf16-true" else 4

    @property
    def wide(self) -> int:
        """Bytes of a value between layers and in norms."""
        return 2 if self.precision == "bf16-true" else 4

    @property
    def narrow(self) -> int:
        """Bytes of a value in a matrix product."""
        return 4 if self.precision == "32-true" else 2


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the step's peak, by what they are for."""

    weights: float
    reference: float
    optimizer: float
    gradients: float
    gathered: float
    """FSDP2: what lies outside the layers, whole, and two layers (the current one and the next)."""
    activations: float
    """What the backward pass needs of the backbone, with what is in flight."""
    head: float
    """Logits, and what is made of them."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


def memory(model: Architecture, step: Step) -> Memory:
    """Compute the memory at the peak of a step after the first.

    There are four candidates: the end of the forward pass; the head's backward pass; the last layer's backward pass,
    while the activations of all layers are in memory; and the optimizer's step, which needs the gradients alone.
    """
    trained = model.weights if step.adapter is None else step.adapter
    frozen = 0 if step.adapter is None else model.weights
    copy = model.weights if step.live_reference and step.adapter is None else 0
    share = step.stored / step.devices
    gradients = trained * share
    gathered = gathered_weights(model, step)
    kept = activations(model, step)
    earlier = gradients if step.accumulated else 0.0
    forward = {
        "gradients": earlier,
        "activations": kept + passing(model, step),
        "head": head_forward(model, step),
    }
    backward = {"gradients": earlier, "activations": kept, "head": head_backward(model, step)}
    turning = {
        "gradients": earlier,
        "activations": kept + layer_backward(model, step),
        "head": 0.0 if step.adapter is not None else model.vocabulary * model.width * step.stored,
    }
    stepping = {"gradients": gradients, "activations": 0.0, "head": 0.0}
    largest = max(forward, backward, turning, stepping, key=lambda moment: sum(moment.values()))
    return Memory(
        weights=(trained + frozen) * share,
        reference=copy * share,
        optimizer=2 * trained * share,
        gathered=gathered,
        **largest,
    )


def gathered_weights(model: Architecture, step: Step) -> float:
    """Return the bytes of the weights that FSDP2 gathers during a step."""
    if step.devices == 1:
        return 0.0
    policies = 2 if step.live_reference and step.adapter is None else 1
    return step.stored * (policies * model.outside + 2 * model.layer)


def layer_activations(model: Architecture, step: Step) -> float:
    """Return the bytes of a token that the backward pass of one layer needs (see `policy.memory_efficient_layers`).

    Two norms keep their input (wide) and give their output to products (narrow); attention keeps queries, keys and
    values (repeated for grouped queries) and its output; the feed-forward network keeps gate and other factor.
    """
    norms = (step.wide + step.narrow) * 2 * model.width
    attention = step.narrow * 4 * model.attended
    return norms + attention + step.narrow * 2 * model.feed_forward


def activations(model: Architecture, step: Step) -> float:
    """Return the bytes kept from the forward pass: those of all layers, or with checkpointing their inputs."""
    layer = step.wide * model.width if step.checkpointing else layer_activations(model, step)
    # The last norm, as published (input and normalized input), and a row of the mask, which all layers share.
    last = step.wide * 2 * model.width + step.narrow * step.row
    casts = 2 * step.narrow * model.layers * model.layer / 2 if step.precision == "bf16-mixed" else 0
    if step.adapter is not None:
        casts = 0  # autocast keeps the casts of trained weights only
    return step.tokens * (model.layers * layer + last) + casts


def passing(model: Architecture, step: Step) -> float:
    """Return the temporary bytes of the forward pass of a layer that keeps nothing: checkpointed or the reference's."""
    if not (step.live_reference or step.checkpointing):
        return 0.0
    return step.tokens * (step.wide * 2 * model.width + step.narrow * 3 * model.feed_forward)


def layer_backward(model: Architecture, step: Step) -> float:
    """Return the temporary bytes of a layer's backward pass: recomputed values, and gradients of its values."""
    again = layer_activations(model, step) if step.checkpointing else 0.0
    return step.tokens * (again + step.wide * 2 * model.width + step.narrow * 5 * model.feed_forward)


def chunk(model: Architecture, step: Step) -> int:
    """Return the number of answer tokens whose logits are alive at once."""
    return chunk_size(step.answers, model.vocabulary, step.gpu) if step.chunked else step.answers


def head_forward(model: Architecture, step: Step) -> float:
    """Return the bytes of the head's forward pass: the product, logits in float32, and the head in the narrow type."""
    product = 0 if step.narrow == 4 else 2
    logits = chunk(model, step) * model.vocabulary * (4 + product)
    return logits + product * model.vocabulary * model.width + 3 * 4 * step.codes * model.vocabulary


def head_backward(model: Architecture, step: Step) -> float:
    """Return the bytes of the head's backward pass: probabilities, their gradient, and the gradient of the head."""
    product = 0 if step.narrow == 4 else 2
    logits = chunk(model, step) * model.vocabulary * (8 + product)
    gradient = 0 if step.adapter is not None else model.vocabulary * model.width * (step.stored + step.narrow)
    states = 2 * step.answers * model.width * step.wide
    return logits + gradient + states + product * model.vocabulary * model.width + 4 * 4 * step.codes * model.vocabulary


@dataclass(frozen=True)
class Machine:
    """A GPU and its link to the others: an H100 SXM by NVIDIA's data sheet (www.nvidia.com/en-us/data-center/h100).

    There: 80 GB, 3.35 TB/s, 900 GB/s of NVLink in both directions together, 1,979 TFLOP/s in bfloat16 with sparsity,
    which is 989 without.
    """

    flops: float = 989e12
    """Floating-point operations a second in bfloat16, dense."""
    link: float = 450e9
    """Bytes a second in each direction, between the GPUs of a node."""
    memory: float = 80e9
    """Bytes."""
    share: float = 0.4
    """Of `flops` that a training step reaches (MFU): an assumption, not a measurement."""
    usable: float = 0.9
    """Of `memory`, for tensors; CUDA, NCCL and what the allocator cannot use take the rest: an assumption, too."""


def operations(model: Architecture, step: Step) -> float:
    """Return the floating-point operations of one pass on a device: 2 a weight and token forward, 4 backward."""
    backbone = 2 * model.layers * model.layer * step.tokens
    attention = 2 * model.layers * model.attended * step.row * step.tokens  # half of a row is seen, in two products
    head = 2 * model.vocabulary * model.width * step.answers
    backward = 2 if step.adapter is None else 1  # frozen weights get no gradient
    again = 1 if step.checkpointing else 0
    reference = 1 if step.live_reference else 0
    through = 1 + backward + again + reference
    return through * (backbone + attention) + (1 + backward + (1 if step.chunked else 0) + reference) * head


def traffic(model: Architecture, step: Step) -> float:
    """Return the bytes that a device receives: weights for both passes, gradients, and the reference's weights.

    With an adapter and no sharding (DDP), the adapter's gradients alone.
    """
    if step.adapter is not None:
        return 2 * step.stored * step.adapter
    if step.devices == 1:
        return 0.0
    times = 3 + (1 if step.live_reference else 0)
    return times * step.stored * model.weights * (step.devices - 1) / step.devices


def seconds(model: Architecture, step: Step, machine: Machine) -> tuple[float, float]:
    """Return the seconds of one pass for computing and for communication. At best the two overlap."""
    return operations(model, step) / (machine.flops * machine.share), traffic(model, step) / machine.link


def table(rows: dict[str, Step], model: Architecture, machine: Machine) -> str:
    """Format the GiB of each part on a device, whether they fit, and the seconds of a pass, as a Markdown table."""
    names = [field.name for field in fields(Memory)]
    lines = [f"| | {' | '.join(names)} | **total** | fits | s |", "|---|" + "---:|" * (len(names) + 3)]
    for title, step in rows.items():
        parts = memory(model, step)
        cells = " | ".join(f"{getattr(parts, name) / GIB:.1f}" for name in names)
        fits = "yes" if parts.total <= machine.usable * machine.memory else "**no**"
        time = max(seconds(model, step, machine))
        lines.append(f"| {title} | {cells} | **{parts.total / GIB:.1f}** | {fits} | {time:.2f} |")
    return "\n".join(lines)


def cases() -> dict[str, dict[str, Step]]:
    """Return the cases of `docs/memory.md` by heading."""
    full = Step(tokens=4096, answers=2600, row=1024, devices=8, checkpointing=True, live_reference=False, gpu=True)
    lora = replace(full, devices=1, adapter=41_943_040, precision="bf16-true")
    return {
        "FSDP2, 8 GPUs, all weights trained, bf16-mixed": {
            "cached, chunks, checkpointing": full,
            "reference live": replace(full, live_reference=True),
            "head whole": replace(full, chunked=False),
            "reference live, head whole": replace(full, chunked=False, live_reference=True),
            "no checkpointing": replace(full, checkpointing=False),
            "no checkpointing, reference live, head whole": replace(
                full, checkpointing=False, chunked=False, live_reference=True
            ),
            # That rows are padded to the longest is left out.
            "prompt twice (padded layout)": replace(full, tokens=2 * 4096 - 2600, row=699),
            "marginal latent, K = 32": replace(full, codes=32),
            "4 x the tokens": replace(full, tokens=16384, answers=10400, row=1024),
            "4 x the tokens, head whole": replace(full, tokens=16384, answers=10400, row=1024, chunked=False),
        },
        "DDP or one GPU, all weights trained, bf16-mixed": {"cached, chunks, checkpointing": replace(full, devices=1)},
        "DDP, LoRA of rank 16, bf16-true": {
            "cached, chunks, checkpointing": lora,
            "reference live (adapter off)": replace(lora, live_reference=True),
            "head whole": replace(lora, chunked=False),
            "no checkpointing": replace(lora, checkpointing=False),
            "no checkpointing, reference live, head whole": replace(
                lora, checkpointing=False, chunked=False, live_reference=True
            ),
        },
    }


def main() -> None:
    """Print the tables of `docs/memory.md`."""
    for heading, rows in cases().items():
        print(f"{heading}:\n\n{table(rows, LLAMA_3_8B, Machine())}\n")


if __name__ == "__main__":
    main()
