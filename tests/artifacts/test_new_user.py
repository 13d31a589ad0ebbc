"""From a table of one's own to llama.cpp, as two people do it: every step a process of its own, the hub another one.

`pytest -s` shows the commands and what they print.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from local_hub import OWNER
from test_export_gguf import llama, write_base
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
WORDS = ["the", "film", "soup", "was", "superb", "awful", "glad", "sad", "good", "bad", "a", "plot"]
MOODS = {"superb": "glad", "awful": "sad", "good": "glad", "bad": "sad"}
SEARCH = """\
model: org/base
tasks:
  - {name: mood, train: reviews.csv, kind: choice}
space: lora-all-linear
requires: [peft]
budget: {fraction: 0.5}
training: {steps: 8, batch_size: 4, learning_rate: 2.0e-2, max_length: 32, seed: 0, precision: fp32}
"""
PUSH = 'import gatedadapters as ga; ga.load("out").adapters.push_to_hub("anna/mood", license="apache-2.0")'
LOGITS = """\
import json, sys, torch, gatedadapters as ga
ids = torch.tensor([[int(i) for i in sys.argv[1:]]])
print(json.dumps(ga.load("anna/mood").model(input_ids=ids).logits[0, -1].log_softmax(-1).tolist()))
"""
TEXTS = ["--text", "the soup was awful", "--text", "a superb plot", "--json"]


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The address of a hub that holds the base."""
    base = tmp_path / "base"
    model = llama()
    model.save_pretrained(base)  # type: ignore[operator]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{word: i for i, word in enumerate(WORDS, 3)}}
    words = Tokenizer(WordLevel(vocabulary | {f"w{i}": i for i in range(len(vocabulary), 99)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(base)
    write_base(model, tmp_path / "base.gguf")
    server = subprocess.Popen(
        [sys.executable, str(HERE.parent / "local_hub.py"), f"org/base={base}"], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        yield server.stdout.readline().strip()
    finally:
        server.kill()
        server.communicate()


class Person:
    """Somebody with a folder, a cache and perhaps a token, who types commands."""

    def __init__(self, folder: Path, address: str, token: Mapping[str, str]) -> None:
        folder.mkdir()
        self.folder = folder
        foreign = {name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        own = {"HF_ENDPOINT": address, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1", **token}
        self.environment = {name: value for name, value in os.environ.items() if name not in foreign} | own

    def types(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        print(f"{self.folder.name}$ python {' '.join(words)}\n{done.stdout}{done.stderr[-2000:]}", flush=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)  # nine processes, each of which imports torch
@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs xllamacpp")
def test_a_search_on_a_table_of_ones_own_is_served_elsewhere_by_name_alone(tmp_path: Path, address: str) -> None:
    anna, bert = Person(tmp_path / "anna", address, {"HF_TOKEN": OWNER}), Person(tmp_path / "bert", address, {})
    rows = [f"the {thing} was {word},{mood}" for thing in ("film", "soup", "plot") for word, mood in MOODS.items()]
    (anna.folder / "reviews.csv").write_text("\n".join(["text,label", *rows * 8]))
    (anna.folder / "mood.yaml").write_text(SEARCH)
    ga = ("-m", "gatedadapters")
    assert "mood" in anna.types(*ga, "search", "mood.yaml", "--out", "out")
    answers = anna.types(*ga, "predict", "out", *TEXTS)
    assert {json.loads(line)["label"] for line in answers.splitlines()} <= set(MOODS.values())
    anna.types("-c", PUSH)

    assert bert.types(*ga, "predict", "anna/mood", *TEXTS) == answers
    bert.types(*ga, "export", "anna/mood", "--to", "gguf", "--out", "mood.gguf")
    ids = ("3", "5", "6", "8")
    reader = str(HERE / "llamacpp_reader.py")
    expected, found, plain = (
        torch.tensor(json.loads(printed.splitlines()[-1]))
        for printed in (
            bert.types("-c", LOGITS, *ids),
            bert.types(reader, str(tmp_path / "base.gguf"), "mood.gguf", *ids),
            bert.types(reader, str(tmp_path / "base.gguf"), "-", *ids),
        )
    )
    assert (plain - expected).abs().max() > 0.02
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
