"""Every code block of the documentation and of the README runs.

The blocks of a page run in order, in one folder of their own and one namespace. What a fence says decides how:

- ``python`` is executed; with a ``title`` it is a file, written into the folder for a later command;
- ``yaml``, ``toml`` are files if they have a title, and must parse;
- ``console`` holds commands after ``$``. ``gatedadapters`` and ``pytest`` run; of others it is checked that what
  they name is there;
- ``text`` is output, which is not compared.

The folder holds what ``docs/guides/index.md`` writes, and tiny random models under the hub ids that the guides name.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from packaging.requirements import Requirement
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from gatedadapters import paths
from gatedadapters.allocation import registry
from gatedadapters.cli.main import main, parser
from gatedadapters.config import PathOptions
from gatedadapters.masking import scores
from gatedadapters.testing import tiny

ROOT = Path(__file__).parents[2]
START = ROOT / "docs" / "guides" / "index.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODELS = {
    "sentence-transformers/all-MiniLM-L6-v2": ("bert", "base"),
    "HuggingFaceTB/SmolLM2-135M": ("llama", "lm"),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama", "lm"),
}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # of whole blocks of 64, which 4 bits come in
CHAT_TEMPLATE = (
    "{% for message in messages %}[BOS] {{ message.role }} {{ message.content }} [EOS] {% endfor %}"
    "{% if add_generation_prompt %}[BOS] assistant {% endif %}"
)
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n]*)\n(?P<body>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, the file it is (if it has a title), its text, and the line it begins at."""

    language: str
    title: str | None
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    content = page.read_text(encoding="utf-8")
    found = []
    for fence in FENCE.finditer(content):
        language, _, options = fence["info"].partition(" ")
        title = re.search(r'title="([^"]+)"', options)
        line = content[: fence.start()].count("\n") + 1
        found.append(Block(language, title and title[1], textwrap.dedent(fence["body"]), line))
    return found


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tables that the guides read and models in the place of those on the hub."""
    folder = tmp_path_factory.mktemp("guides")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_page(START, folder)
    tokenizer = made_for((folder / name).read_text() for name in ("reviews.csv", "questions.csv", "general.txt"))
    for name, (family, head) in MODELS.items():
        model, _ = tiny(family, head=head, **(WIDE if family == "llama" else {}))
        model.save_pretrained(folder / name)
        tokenizer.chat_template = CHAT_TEMPLATE if name.endswith("Instruct") else None
        tokenizer.save_pretrained(folder / name)
    write_adapterhub(folder / "my-adapterhub", width=32, blocks=3)
    return folder


def write_adapterhub(folder: Path, *, width: int, blocks: int) -> None:
    """A Pfeiffer adapter for the encoder of the guides, as the adapters library saves one."""
    settings = {"mh_adapter": False, "output_adapter": True, "non_linearity": "relu", "original_ln_before": True}
    settings |= {"original_ln_after": True, "residual_before_ln": True}
    config = {"name": "task", "model_type": "bert", "version": "adapters.1.3.0", "config": settings}
    tensors = {}
    for block in range(blocks):
        holder = f"bert.encoder.layer.{block}.output.adapters.task"
        for part, shape in (("down.0", (4, width)), ("up", (width, 4))):
            tensors[f"{holder}.adapter_{part}.weight"] = torch.full(shape, 0.01)
            tensors[f"{holder}.adapter_{part}.bias"] = torch.zeros(shape[0])
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter.safetensors")


def made_for(texts: Any) -> PreTrainedTokenizerFast:
    """A tokenizer that knows every word of some texts."""
    words = dict.fromkeys(word for text in texts for word in re.findall(r"\w+|[^\w\s]", text))
    special = ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]
    known = {word: index for index, word in enumerate([*special, *words])}
    backend = Tokenizer(WordLevel(known, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.fixture
def nothing_stays_registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a guide registers and imports is gone afterwards."""
    for module, name in ((paths, "_KINDS"), (scores, "_KINDS"), (registry, "_KINDS"), (PathOptions, "registry")):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(os.getcwd()):
            del sys.modules[name]


@pytest.mark.usefixtures("nothing_stays_registered")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # guides leave the Trainer's default
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks by the old name
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=named)
def test_every_block_of_the_page_runs(
    page: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if "push_to_hub" in page.read_text(encoding="utf-8"):
        request.getfixturevalue("hub")
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    run_page(page, folder)


def run_page(page: Path, folder: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page):
        where = f"{named(page)}, line {block.line}"
        if block.title is not None:
            (folder / block.title).write_text(block.text, encoding="utf-8")
        if block.language == "python" and block.title is None:
            # blank lines before, so that a traceback shows the lines of the page
            exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)
        elif block.language == "yaml":
            assert yaml.safe_load(block.text) is not None, where
        elif block.language == "toml":
            assert tomllib.loads(block.text), where
        elif block.language == "console":
            for command in re.findall(r"^\$ (.*)$", block.text, re.MULTILINE):
                run_command(shlex.split(command, comments=True), where)
        else:
            assert block.language in ("python", "text", ""), f"{where}: a block that no rule runs"


def run_command(words: list[str], where: str) -> None:
    """Run a command, or check that it could be run."""
    program, *arguments = words
    if words[:2] == ["gatedadapters", "quickstart"]:  # takes minutes
        parser().parse_args(arguments)
    elif program == "gatedadapters" and arguments[-1] == "--help":
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
    elif program == "gatedadapters":
        assert main(arguments) == 0, where
        AcceleratorState._reset_state()  # elsewhere a command is a process of its own
    elif program == "pytest":
        quiet = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(Path.cwd())]
        tests = [str(Path(name).resolve()) for name in arguments]
        printed = processes.run(processes.module, "pytest", *quiet, *tests, log=Path("pytest.log"))
        assert " passed" in printed, where
    elif words[:2] == ["pip", "install"]:
        check_installable(arguments[1:], where)
    elif program == "python" and arguments[0] == "-m":
        assert find_spec(arguments[1]) is not None, where
    elif program in ("accelerate", "torchrun"):  # their own tests run them on several processes
        files = [word for word in arguments if word.endswith((".py", ".yaml"))]
        assert files, where
        assert all((ROOT / file).is_file() for file in files), where
    elif program in ("bash", "python"):
        script = ROOT / arguments[0]
        assert script.is_file() or (script / "__main__.py").is_file(), where
    elif program == "tensorboard":
        assert find_spec("tensorboard") is not None, where
        folder = Path(arguments[arguments.index("--logdir") + 1])
        assert list(folder.rglob("events.out.tfevents.*")), f"{where}: nothing to see in {folder}"
    else:
        pytest.fail(f"{where}: no rule says how to check {program!r}")


def check_installable(words: list[str], where: str) -> None:
    """This package, with extras that it has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in (Requirement(word.replace(".[", "gatedadapters[")) for word in words if word[0] not in "-."):
        assert requirement.name == project["name"], where
        assert requirement.extras <= project["optional-dependencies"].keys(), where
