"""Writes small artefacts of every kind, and what they are to give, with the release that is installed.

    python tests/compatibility/write.py

They go to a folder named after that release, `tests/compatibility/v0.1`, and are never written again: the tests there
show that later releases read them. Run it once, on the last commit of a release, before its successor changes anything.
`release.json` says what it ran on.
"""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import safetensors
import torch
import transformers
import yaml
from cases import (
    CLASSES,
    EXPERTS,
    RUNS,
    SPACE,
    STREAMS,
    STUDIES,
    TASK_IDS,
    batch,
    chosen,
    classifier,
    decoder,
    encoder,
    logits,
    outcome,
    shallow,
    stream,
    study,
    texts,
)
from safetensors.torch import save_file
from torch import Tensor, nn

import gatedadapters as ga
from gatedadapters.config import ContinualConfig, SearchConfig, SelectConfig, StudyConfig, TransferConfig
from gatedadapters.testing.helpers import stir

FOLDER = Path(__file__).parent / f"v{'.'.join(ga.__version__.split('.')[:2])}"
Expected = dict[str, Tensor]

EVERY_KIND = ga.SearchSpace.parse(
    {
        "name": "every-kind",
        "gates": {"levels": ["block", "point", "path", "rank"]},
        "paths": [
            {"kind": "lora", "rank": 3, "at": {"sublayers": ["attention"], "roles": ["q", "v"]}},
            {"kind": "lora", "rank": 3, "at": {"roles": ["up"]}},
            {"kind": "serial", "width": 3, "activation": "gelu", "at": {"sublayers": ["feed_forward"]}},
            {"kind": "parallel", "width": 3, "activation": "silu", "at": {"sublayers": ["attention"]}},
            {"kind": "scale", "side": "output", "at": {"sublayers": ["attention"], "roles": ["k"]}},
            {"kind": "scale", "side": "input", "at": {"sublayers": ["feed_forward"], "roles": ["down"]}},
        ],
    },
    where="write",
)


def stirred(model: nn.Module, space: ga.SearchSpace, *, seed: int = 0, **options: Any) -> ga.Adapters:
    """Adapters with weights, heads and gates as chance would leave them."""
    adapters = ga.attach(model, space, options.pop("sample", batch()), seed=seed, **options)
    stir(adapters, by=0.1, seed=seed)
    return adapters


def differs(found: Tensor, plain: Tensor) -> Tensor:
    """See that an artefact does something."""
    assert float((found - plain).abs().max()) > 0.02
    return found


# -- adapters ----------------------------------------------------------------------------------------------------------


def write_adapters(folder: Path) -> Expected:
    """One task (fp32, bf16, carried to a newer base), several tasks, one of several, experts."""
    found, plain = {}, logits(encoder())
    model = encoder()
    adapters = stirred(model, EVERY_KIND)
    structure = adapters.compact()
    assert {path.kind for path in structure.paths} == {"lora", "serial", "parallel", "scale"}
    assert adapters.head_names
    adapters.save(folder / "one-task")
    adapters.save(folder / "bfloat16", dtype=torch.bfloat16)
    for name in ("one-task", "bfloat16"):
        model = encoder()
        ga.load_adapters(model, folder / name)
        found[name] = differs(logits(model), plain)
    model = encoder(seed=1)
    ga.load_adapters(model, folder / "one-task", base="updated").save(folder / "updated-base")
    found["updated-base"] = logits(model)
    sample = batch() | {"task_ids": TASK_IDS}
    for name, task in (("several-tasks", None), ("one-of-several", "topic")):
        model = classifier()
        adapters = stirred(model, EVERY_KIND, tasks=tuple(CLASSES), sample=sample)
        if task is None:
            (folder / "structure.json").write_text(adapters.discretize(ga.Budget(fraction=0.4)).to_json())
        adapters.compact(task=task)
        adapters.save(folder / name)
        ids = TASK_IDS if task is None else torch.full_like(TASK_IDS, list(CLASSES).index(task))
        found[name] = differs(logits(model, task_ids=ids), logits(classifier(), task_ids=ids))
    for family in EXPERTS:
        model = shallow(family, "lm")
        space = {"name": family, "paths": [{"kind": "weight_lora", "rank": 2}, {"kind": "lora", "rank": 1}]}
        structure = stirred(model, ga.SearchSpace.parse(space, where="write")).compact()
        assert "weight_lora" in {path.kind for path in structure.paths}
        ga.get_adapters(model).save(folder / family)
        found[family] = differs(logits(model), logits(shallow(family, "lm")))
    return {f"adapters/{name}": value for name, value in found.items()}


def write_shelf(folder: Path) -> Expected:
    """Two adapters for one model, each alone and mixed by example."""
    for seed, name in enumerate(CLASSES):
        adapters = stirred(decoder(), EVERY_KIND, seed=seed)
        adapters.compact()
        adapters.save(folder / name)
    model, found = decoder(), {}
    shelf = ga.Shelf.load(model, {name: folder / name for name in CLASSES})
    for name in CLASSES:
        with shelf.using(name):
            found[f"shelf/{name}"] = differs(logits(model), logits(decoder()))
    return found | {"shelf/mixed": logits(model, adapter_names=["topic", None, "mood", "topic"])}


def write_peft(folder: Path) -> Expected:
    """A LoRA in peft's format."""
    model = decoder()
    adapters = stirred(model, SPACE)
    adapters.compact()
    ga.export_peft(adapters, folder)
    return {"peft": differs(logits(model), logits(decoder()))}


# -- masks -------------------------------------------------------------------------------------------------------------


def write_masks(folder: Path) -> Expected:
    """A mask of one's own, scores of two kinds of data and the mask selected by them."""
    model = decoder()
    ga.Mask.build(model, chosen(model)).save(folder / "own")
    rows = [{key: torch.tensor([row[key]]) for key in row} for row in texts()]
    roles = ("q", "v")
    general, domain = (ga.score(model, part, kind="taylor", include=roles) for part in (rows[:4], rows[4:]))
    general.save(folder / "general")
    domain.save(folder / "domain")
    ga.select(general, domain, density=0.1).save(folder / "selected")
    return {"scores/taylor": torch.cat([general[name].flatten() for name in general.names])}


def moved(delta: ga.SparseDelta) -> ga.SparseDelta:
    """A delta with values that do something."""
    with torch.no_grad():
        for part in delta.parts():
            part.values.add_(torch.linspace(-0.5, 0.5, len(part.values)))
    delta.write()
    return delta


def write_deltas(folder: Path) -> Expected:
    """Sparse deltas in fp32 and bf16, one with a task head, one beside adapters."""
    found = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = decoder()
        moved(ga.apply_mask(model, ga.Mask.build(model, chosen(model)))).save(folder / name, dtype=dtype)
        model = decoder()
        ga.load_delta(model, folder / name)
        found[f"delta/{name}"] = differs(logits(model), logits(decoder()))
    model = encoder()
    heads = frozenset({"classifier.weight", "classifier.bias"})
    delta = moved(ga.apply_mask(model, ga.Mask.build(model, chosen(model), heads=heads), heads=("classifier",)))
    with torch.no_grad():
        model.classifier.weight.mul_(2)
    delta.save(folder / "with-head")
    found["delta/with-head"] = differs(logits(model), logits(encoder()))
    model = decoder()
    mask = ga.Mask.build(model, chosen(model))
    stirred(model, EVERY_KIND)
    moved(ga.apply_mask(model, mask))
    ga.get_adapters(model).compact()
    ga.save_joint(model, folder / "joint")
    return found | {"delta/joint": differs(logits(model), logits(decoder()))}


# -- what can be gone on with ------------------------------------------------------------------------------------------


def write_checkpoints(folder: Path) -> Expected:
    """Trainings whose checkpoints lie before and after the prune, and what the whole training came to."""
    found = {}
    for name, run in RUNS.items():
        with tempfile.TemporaryDirectory() as scratch:
            trainer = run(Path(scratch))
            trainer.train()
            for step in (4, 8) if name == "search" else (4,):
                kept = folder / name / f"checkpoint-{step}"
                shutil.copytree(Path(scratch) / kept.name, kept)
                (kept / "training_args.bin").unlink()  # pickled, names folders of this machine, and nothing reads it
        found[f"checkpoints/{name}"] = outcome(name, trainer.model)
        if name != "selective":
            (folder / name / "structure.json").write_text(trainer.adapters.compact().to_json())
    return found


def write_streams(folder: Path) -> Expected:
    """Finished streams, and what the model computes in each of their states."""
    found = {}
    for kind in STREAMS:
        model = classifier()
        result = stream(model, kind, folder / kind)
        found[f"streams/{kind}/scores"] = torch.tensor(result.matrix)
        if kind == "per_task":
            shelf = result.shelf(model)
            for index, task in enumerate(CLASSES):
                with shelf.using(task):
                    ids = torch.full_like(TASK_IDS, index)
                    found[f"streams/{kind}/{task}"] = logits(model, task_ids=ids)
        else:
            for state in range(len(CLASSES) + 1):
                result.restore(model, state)
                found[f"streams/{kind}/{state}"] = logits(model, task_ids=TASK_IDS)
    return found


def write_studies(folder: Path) -> Expected:
    """Studies of which a part is done."""
    found = {}
    folder.mkdir()
    for kind in STUDIES:
        begun = study(kind, folder / f"{kind}.journal").run(n_trials=4)
        found[f"studies/{kind}"] = torch.tensor([trial.values for trial in begun.trials], dtype=torch.float64)
    return found


# -- configurations ----------------------------------------------------------------------------------------------------

TABLE = {"name": "mood", "train": "mood.csv", "test": "more.csv", "text": "review", "label": "stars", "max_train": 100}
CONFIGURATIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "search": (
        SearchConfig,
        {
            "model": "nowhere",
            "tasks": [TABLE],
            "space": EVERY_KIND.model_dump(mode="json"),
            "noise": {"kind": "label", "ratio": 0.1},
            "perturbation": {"kind": "typos", "ratio": 0.2},
            "compare": ["uniform", "random"],
        },
    ),
    "select": (
        SelectConfig,
        {"model": "nowhere", "general": {"file": "general.txt"}, "domain": {"file": "asked.csv", "answer": "answer"}},
    ),
    "continual": (
        ContinualConfig,
        {"model": "nowhere", "tasks": [TABLE], "strategy": STREAMS["l2_fisher"], "compare": ["lora"], "seeds": [0, 1]},
    ),
    "transfer": (
        TransferConfig,
        {"model": "nowhere", "update": "elsewhere", "tasks": [TABLE], "search": True, "prefer_transferable": True},
    ),
    "study": (StudyConfig, STUDIES["optimise"]),
}


def write_configurations(folder: Path) -> Expected:
    """Every field of every command's configuration, as this release names it."""
    folder.mkdir()
    for name, (kind, given) in CONFIGURATIONS.items():
        data = kind.parse(given, where="write").model_dump(mode="json", exclude_none=True)
        for unread in ("schedule", "budget") if name == "transfer" else ():
            data.pop(unread, None)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    return {}


WRITERS: dict[str, Callable[[Path], Expected]] = {
    "adapters": write_adapters,
    "shelf": write_shelf,
    "peft": write_peft,
    "masks": write_masks,
    "deltas": write_deltas,
    "checkpoints": write_checkpoints,
    "streams": write_streams,
    "studies": write_studies,
    "configurations": write_configurations,
}


def main() -> None:
    """Write everything anew."""
    torch.set_num_threads(1)
    shutil.rmtree(FOLDER, ignore_errors=True)
    expected: Expected = {}
    for name, write in WRITERS.items():
        torch.manual_seed(0)
        expected |= write(FOLDER / name)
    save_file({name: value.contiguous() for name, value in expected.items()}, FOLDER / "expected.safetensors")
    on = {
        "gatedadapters": ga.__version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (FOLDER / "release.json").write_text(json.dumps(on, indent=1) + "\n", encoding="utf-8")
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    print(f"{len(files)} files, {sum(path.stat().st_size for path in files):,} bytes in {FOLDER}")


if __name__ == "__main__":
    main()
