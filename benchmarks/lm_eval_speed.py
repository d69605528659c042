"""How fast LatentLM answers a benchmark's loglikelihood requests, against stock HFLM on the same weights.

    python benchmarks/lm_eval_speed.py --model models/SmolLM2-135M-Instruct --data-dir $LPC_DATA_DIR/benchmarks

Both answer the same requests in turn, in one process, after a warm-up on a few. The latent is a codebook of zeros: it
costs what any codebook costs and leaves the scores as they are, so that they can be compared. Prints seconds (median
and all), the ratio of the medians, and how far the scores of a request are apart at most. Expect a ratio of 1.5 or more
on `arc_easy`, and scores that agree to 1e-3 in float32; in bfloat16 each of the two is tenths of a nat off.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lpc_lightning.evaluation.benchmarks.checks import check_tasks
from lpc_lightning.evaluation.benchmarks.latent_lm import LatentLM
from lpc_lightning.evaluation.benchmarks.tasks import load_tasks
from lpc_lightning.files.path_variables import expand_path
from lpc_lightning.inference.modeling_lpc import InferencePrior
from lpc_lightning.policy import CausalPolicy, PretrainedPolicy


def main() -> None:
    """Measure, and print what came out."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    spec = PretrainedPolicy(options.model, dtype=options.dtype)
    policy, tokenizer = spec.build().eval().requires_grad_(False).to(options.device), spec.load_tokenizer()
    stock = HFLM(policy.causal_lm, tokenizer=tokenizer, batch_size=options.batch_size)
    latent = LatentLM(policy, tokenizer, _codes_of_zeros(policy), batch_size=options.batch_size)
    requests = _requests(options.task, expand_path(options.data_dir, "--data-dir"), options.limit)

    models: dict[str, HFLM] = {"stock HFLM": stock, "LatentLM": latent}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    scores: dict[str, list[tuple[float, bool]]] = {}
    for model in models.values():
        model.loglikelihood(requests[:20], disable_tqdm=True)
    for repetition in range(options.repetitions):
        # Whoever goes second would profit from what the first has left in the caches: they take turns in that, too.
        for name in sorted(models, reverse=bool(repetition % 2)):
            start = time.perf_counter()
            scores[name] = models[name].loglikelihood(requests, disable_tqdm=True)
            seconds[name].append(time.perf_counter() - start)

    contexts = len({request.args[0] for request in requests})
    print(
        f"{options.task}: {len(requests)} requests on {contexts} contexts, {options.dtype}, batch {options.batch_size}"
    )
    print(f"{policy.head.weight.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, taken in seconds.items():
        print(f"{name:10}  {statistics.median(taken):8.2f} s   ({', '.join(f'{value:.2f}' for value in taken)})")
    ratio = statistics.median(seconds["stock HFLM"]) / statistics.median(seconds["LatentLM"])
    pairs = list(zip(scores["stock HFLM"], scores["LatentLM"], strict=True))
    print(f"ratio       {ratio:8.2f}")
    print(f"largest difference of a score: {max(abs(ours[0] - theirs[0]) for ours, theirs in pairs):.2e} nats")
    print(f"requests that differ in is_greedy: {sum(ours[1] != theirs[1] for ours, theirs in pairs)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="a model's folder or hub name")
    parser.add_argument("--data-dir", default="${LPC_DATA_DIR}/benchmarks", help="folder of local task data")
    parser.add_argument("--task", default="arc_easy", help="a task of loglikelihood requests, such as truthfulqa_mc2")
    parser.add_argument("--limit", type=int, help="documents, from the start of the task; default: all")
    parser.add_argument("--batch-size", type=int, default=8, help="for both")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="for both")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--repetitions", type=int, default=3, help="measurements of each")
    parser.add_argument("--threads", type=int, help="threads of torch; default: its own choice")
    return parser.parse_args()


def _codes_of_zeros(policy: CausalPolicy, codes: int = 32, hidden: int = 256) -> InferencePrior:
    sizes = {"first": (hidden, policy.width), "second": (codes, hidden)}
    layers = {f"prior.{name}.weight": torch.randn(size) for name, size in sizes.items()}
    biases = {f"prior.{name}.bias": torch.zeros(size[0]) for name, size in sizes.items()}
    tensors = {"codebook": torch.zeros(codes, policy.width), **layers, **biases}
    device = policy.head.weight.device
    return InferencePrior.of({"kind": "discrete", "num_codes": codes, "prior_mode": "mean"}, tensors).to(device)


def _requests(task: str, data_dir: str, limit: int | None) -> list[Instance]:
    check_tasks([task], data_dir)
    (loaded,) = load_tasks(task, data_dir)["tasks"].values()
    if loaded.get_config("num_fewshot") is None:
        loaded.set_config("num_fewshot", 0)
    loaded.set_fewshot_seed(1234)
    loaded.build_all_requests(limit=limit, rank=0, world_size=1)
    return list(loaded.instances)


if __name__ == "__main__":
    main()
