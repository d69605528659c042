"""What kept states of frozen layers save: steps of a LoRA on the upper layers with and without them.

    python -m benchmarks.frozen_layers --data $LPC_DATA_DIR/preferences/ukp_convarg_crowdsample.jsonl

Each batch is taken three times in turn: by all layers, with states that are not known yet, and with known states.
"""

from __future__ import annotations

import statistics
import time

from benchmarks.batches import batches_of, step_options
from benchmarks.latent_cost import Stepper
from lpc_lightning.policy import LoRA, PretrainedPolicy

ALL, NEW, KNOWN = "all layers", "states not known", "states known"


def main() -> None:
    """Measure and print a table."""
    parser = step_options(__doc__, steps=6, batch_size=8)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 4, 2], help="numbers of upper layers with a LoRA")
    options = parser.parse_args()
    plain = PretrainedPolicy(options.model)
    batches = batches_of(options, plain)
    depth = plain.load_config().num_hidden_layers
    print("| upper layers with a LoRA | | s/step | time vs all layers |\n|---|---|---:|---:|")
    for layers in options.layers:
        upper = "|".join(map(str, range(depth - layers, depth)))
        lora = LoRA(target_modules=rf".*\.layers\.({upper})\..*_proj")
        sides = {
            gib: Stepper(PretrainedPolicy(options.model, lora=lora, frozen_states_gib=gib), None) for gib in (0, 8)
        }
        seconds: dict[str, list[float]] = {ALL: [], NEW: [], KNOWN: []}
        for batch in batches:
            for name, side in ((ALL, sides[0]), (NEW, sides[8]), (KNOWN, sides[8])):
                start = time.perf_counter()
                side.step(batch)
                seconds[name].append(time.perf_counter() - start)
        print(*rows(layers, seconds), sep="\n", flush=True)


def rows(layers: int, seconds: dict[str, list[float]]) -> list[str]:
    """Medians over the steps but the first. A ratio is the median of the ratios of the same batches."""
    lines = []
    for name, taken in seconds.items():
        ratio = statistics.median(mine / other for mine, other in zip(taken[1:], seconds[ALL][1:], strict=True))
        lines.append(f"| {layers} | {name} | {statistics.median(taken[1:]):.2f} | {ratio:.2f} |")
    return lines


if __name__ == "__main__":
    main()
