"""The printed pair against the targets of a batch, which are what the loss reads."""

import re
from dataclasses import replace

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from lpc_lightning import DPO, SyntheticPreferences, TinyPolicy
from lpc_lightning.data.batching.layouts import PaddedLayout, SharedPrefixLayout
from lpc_lightning.data.rendered_pair import escape_text, render_pair
from lpc_lightning.data.tokenization.templates import make_template
from lpc_lightning.types import PreferenceExample

TEXTS = ("Egg?\n\nSoft.\x1b[31m", "Boil \\n it: 三分钟, \u202e 5 min 🥚.", "No <|im_end|> idea.")


@pytest.fixture
def pair(tokenizers):
    question, chosen, rejected = TEXTS
    example = PreferenceExample("row 1", ({"role": "user", "content": question},), chosen, rejected)
    return make_template(tokenizers["chatml"]).tokenize(example)


def restored(text: str) -> str:
    """Undo the escapes."""
    return re.sub(r"\\(\\|n|r|t|x..|u....|U........)", lambda match: eval(f'"{match[0]}"'), text)


@pytest.mark.parametrize("layout", [PaddedLayout(0), SharedPrefixLayout(0, None)], ids=["padded", "shared_prefix"])
def test_marked_part_equals_batch_targets(tokenizers, pair, layout):
    tokenizer, batch = tokenizers["chatml"], layout([pair, replace(pair.swapped(), id="other")])
    marked = re.findall(r"trained: >>>(.*)<<<$", render_pair(pair, tokenizer), re.MULTILINE)
    assert len(marked) == 2
    for owner, text in zip((0, 2), marked, strict=True):  # the batch has both chosen answers first
        targets = batch.targets[batch.owner == owner]
        assert restored(text) == tokenizer.decode(targets)
        assert text.endswith("<|im_end|>")


def test_lines_have_prompt_and_token_boundaries(tokenizers, pair):
    lines = render_pair(pair, tokenizers["chatml"]).split("\n")
    assert len(lines) == 6
    assert lines[1].endswith(r"not trained: <|im_start|>user\nEgg?\n\nSoft.\x1b[31m<|im_end|>\n<|im_start|>assistant\n")
    assert r"[ssistant] [\n] >>> [No] [ ] [<] ... " in lines[5]
    assert lines[5].endswith("[.] [<|im_end|>] <<<")
    assert "".join(lines).isprintable()
    assert "the label is known to be wrong" in render_pair(pair.swapped(), tokenizers["chatml"])


@pytest.mark.parametrize("text", [*TEXTS, "\\\\x41 \u2028 \u00a0 \r\t \U000f0000"])
def test_escape_is_printable_and_reversible(text):
    assert escape_text(text).isprintable()
    assert restored(escape_text(text)) == text


@pytest.mark.slow
@pytest.mark.parametrize("print_pair", [True, False])
def test_fit_keeps_the_pair_in_the_run_folder(tmp_path, print_pair):
    data = SyntheticPreferences(
        train_pairs=2, validation_pairs=0, batch_size=2, print_pair=print_pair, cache_dir=str(tmp_path / "cache")
    )
    logger = CSVLogger(tmp_path, "run", "0")
    options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=1, logger=logger, enable_checkpointing=False, log_every_n_steps=1, **options)
    module = DPO(policy=TinyPolicy(width=16, layers=1, heads=2))
    trainer.fit(module, datamodule=data)
    file = tmp_path / "run" / "0" / "rendered_pair.txt"
    assert file.is_file() is print_pair
    if print_pair:
        assert file.read_text() == render_pair(data.pairs["train"][0], module.tokenizer) + "\n"
