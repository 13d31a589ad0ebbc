"""The model card: the README.md beside saved adapters, with the metadata that the Hugging Face Hub reads.

A card that the library wrote ends with a digest of its own text. Only such a card is ever replaced: one that somebody
wrote or edited has another digest, or none.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from gatedadapters.paths import path_class
from gatedadapters.paths.peft_kinds import peft_has
from gatedadapters.reporting.tables import markdown_table
from gatedadapters.structure.origin import Origin, has_id_form
from gatedadapters.structure.structure import Structure

CARD, PICTURE = "README.md", "structure.png"
UNKNOWN_LICENSE = "unknown"
"""The hub's name for a licence that nobody stated."""

_MARK = "<!-- written by gatedadapters, digest {}: without this line the card is yours -->\n"
_END = re.compile("\n" + _MARK.format("([0-9a-f]{16})") + r"\Z")
_HEADER = re.compile(r"\A---\r?\n(?P<metadata>.*?)^---\r?\n?", re.DOTALL | re.MULTILINE)
_LICENSE = re.compile(r"^license:[ \t]*(\S.*?)[ \t\r]*$", re.MULTILINE)


def model_card(
    structure: Structure,
    origin: Origin | None,
    *,
    repository: str | None = None,
    license: str = UNKNOWN_LICENSE,
    picture: bool = False,
) -> str:
    """The text of a card.

    Args:
        structure: of the adapters.
        origin: base, tasks and training, as far as they are known.
        repository: id of the repository on the hub; None for a folder.
        license: id of the licence, such as `apache-2.0`.
        picture: whether `PICTURE` lies beside the card.
    """
    origin = origin or Origin()
    parts = [
        f"---\n{_metadata(structure, origin, repository, license).to_yaml()}\n---\n",
        f"# {repository or 'Adapters'}",
        f"{_size(structure)}, whose places, kinds and sizes "
        "[gatedadapters](https://github.com/gatedadapters/gatedadapters) chose.",
        markdown_table(["", ""], _facts(structure, origin)),
        _metrics(origin),
        _usage(structure, origin, repository or "FOLDER"),
        f"## Structure\n\n```text\n{structure}\n```",
        f"![share of the offered units that stayed, by block and place]({PICTURE})" if picture else "",
    ]
    text = "\n\n".join(part for part in parts if part)
    return f"{text}\n\n{_MARK.format(_digest(text))}"


def by_hand(card: str) -> bool:
    """Whether somebody wrote or edited a card. The hub makes one of a licence alone, which does not count."""
    end = _END.search(card)
    if end is not None and end[1] == _digest(card[: end.start()].rstrip("\n")):
        return False
    return bool(_HEADER.sub("", card, count=1).strip())


def license_of(card: str) -> str | None:
    """The licence in the metadata of a card, or None."""
    header = _HEADER.match(card)
    found = _LICENSE.search(header["metadata"]) if header else None
    return found[1].strip("\"'") if found else None


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _kinds(structure: Structure) -> list[str]:
    return sorted({path.kind for path in structure.paths})


def _metadata(structure: Structure, origin: Origin, repository: str | None, license: str) -> ModelCardData:
    base = origin.base_model_name_or_path
    on_hub: dict[str, Any] = {}
    if base is not None and has_id_form(base):  # folders are named by their whole path
        on_hub = {"base_model": base, "base_model_relation": "adapter"}
    results = [
        EvalResult(
            task_type=origin.task_type or "other",
            dataset_type="custom",
            dataset_name=task.name,
            dataset_split="test",
            metric_type=name,
            metric_value=round(value, 4),
        )
        for task in origin.tasks
        for name, value in task.metrics.items()
    ]
    return ModelCardData(
        library_name="gatedadapters",
        license=license,
        pipeline_tag=origin.task_type,
        tags=["gatedadapters", "adapter", *_kinds(structure)],
        metrics=sorted({name for task in origin.tasks for name in task.metrics}) or None,
        eval_results=results or None,
        model_name=(repository or "adapters") if results else None,
        **on_hub,
    )


def _size(structure: Structure) -> str:
    kinds = ", ".join(_kinds(structure)) or "none"
    return f"Adapters of {structure.params:,} parameters in {len(structure.paths)} paths ({kinds})"


def _facts(structure: Structure, origin: Origin) -> list[list[str]]:
    """Rows of a table: what the adapters belong to and how they came about."""
    rows = []
    if origin.base_model_name_or_path is not None:
        revision = f", revision {origin.revision}" if origin.revision else ""
        rows.append(["base model", f"`{origin.base_model_name_or_path}`{revision}"])
    rows.append(["class of the model", f"`{structure.fingerprint.model_class}`"])
    for task in origin.tasks:
        labels = f": {', '.join(task.labels)}" if task.labels else ""
        rows.append(["task", f"{task.name} ({task.kind}){labels}"])
    if origin.training:
        rows.append(["training", ", ".join(f"{name} {value}" for name, value in origin.training.items())])
    rows.append(["made with", ", ".join(f"{name} {version}" for name, version in structure.created_with.items())])
    return [[name, " ".join(value.split())] for name, value in rows]


def _metrics(origin: Origin) -> str:
    rows = [[task.name, name, f"{value:.4g}"] for task in origin.tasks for name, value in task.metrics.items()]
    return f"## Scores on held-out data\n\n{markdown_table(['task', 'score', ''], rows)}" if rows else ""


def _usage(structure: Structure, origin: Origin, name: str) -> str:
    """How to load the adapters: here, and in peft where it can hold their kinds."""
    lines = ["## How to load", "", "```python", "import gatedadapters as ga", ""]
    complete = origin.task_type is not None and origin.tasks and origin.base_model_name_or_path is not None
    if complete:
        lines += [
            f'loaded = ga.load("{name}")  # base, tokenizer and adapters',
            'print(loaded.predict(["a text"]))',
            "```",
            "",
            "On a model that you have built yourself:",
            "",
            "```python",
        ]
    lines += [f'adapters = ga.load_adapters(model, "{name}")', "```"]
    if structure.paths and peft_has({path_class(path.options) for path in structure.paths}):
        lines += [
            "",
            "[peft](https://github.com/huggingface/peft) can hold these kinds. `export_peft` writes a folder for it"
            + (", one task at a time:" if len(structure.tasks) > 1 else ":"),
            "",
            "```python",
            'ga.export_peft(adapters, "out-peft"' + (", task=...)" if len(structure.tasks) > 1 else ")"),
            "",
            "from peft import PeftModel",
            "",
            'model = PeftModel.from_pretrained(model, "out-peft")  # on a fresh copy of the base',
            "```",
        ]
    return "\n".join(lines)
