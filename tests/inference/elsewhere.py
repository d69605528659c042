"""Run by itself, by the tests of `export`: opens exported folders where the project cannot be imported.

Arguments: a JSON file `{"cases": {name: what to open}, "prompt": text, "tokens": ids, "mask": ...}`, and a file for
what was found.
"""

import json
import re
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path


class Nowhere(MetaPathFinder):
    """Makes the project, and what only it needs, impossible to import."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lpc_lightning", "lightning", "jsonargparse"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Nowhere())

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.disable_progress_bar()
torch.set_num_threads(1)


def outputs_of(model, tokens, tokenizer, prompt):
    """Return logits for tokens, and the answers to a prompt and to a batch."""
    found = {"class": type(model).__name__, "dtype": str(model.dtype), "logits": model(**tokens).logits}
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**text, max_new_tokens=8, do_sample=False)
    found["text"] = tokenizer.decode(answer[0, text["input_ids"].shape[1] :])
    found["batch"] = model.generate(**tokens, max_new_tokens=6, do_sample=False)
    torch.manual_seed(7)
    found["sampled"] = model.generate(**tokens, max_new_tokens=6, do_sample=True)
    return found


@torch.no_grad()
def main() -> None:
    """Open every case both ways, save it again and open that, and run its model card."""
    requested = json.loads(Path(sys.argv[1]).read_text())
    tokens = {"input_ids": torch.tensor(requested["tokens"]), "attention_mask": torch.tensor(requested["mask"])}
    found = {}
    for name, place in requested["cases"].items():
        tokenizer = AutoTokenizer.from_pretrained(place)
        stock = AutoModelForCausalLM.from_pretrained(place)
        latent = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
        found[name] = {
            "stock": outputs_of(stock, tokens, tokenizer, requested["prompt"]),
            "latent": outputs_of(latent, tokens, tokenizer, requested["prompt"]),
            "half": type(
                AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True, dtype=torch.bfloat16)
            ).__name__,
        }
        again = Path(sys.argv[2]).parent / "again" / name
        latent.save_pretrained(again)
        found[name]["stock"]["again"] = AutoModelForCausalLM.from_pretrained(again)(**tokens).logits
        found[name]["latent"]["again"] = type(latent).from_pretrained(again)(**tokens).logits
        found[name]["files again"] = sorted(file.name for file in again.iterdir())
        if (card := Path(place, "README.md")).is_file():
            here = {"weights": torch.ones(5) / 5}
            for block in re.findall(r"```python\n(.*?)```", card.read_text(), re.S):
                exec(block.replace("max_new_tokens=256", "max_new_tokens=4"), here)
            found[name]["card"] = sorted(set(here) & {"answer", "steer", "table", "plain"})
    found["imported"] = [module for module in sys.modules if module.partition(".")[0] in ("lpc_lightning", "lightning")]
    torch.save(found, sys.argv[2])


main()
