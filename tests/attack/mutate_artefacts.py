"""Damaged artefacts of every kind, given to the functions that read them.

Whatever is refused must leave the model as it was. What is accepted must give the result of the whole artefact, unless
its digests were taken out: then only refusal and acceptance themselves are judged.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import damage
import torch
from runner import Attack
from torch import Tensor, nn

import gatedadapters as ga
from gatedadapters.continual import StreamResult
from gatedadapters.continual.core import load_core
from gatedadapters.continual.probing import Probe, probe
from gatedadapters.continual.states import Change, digest
from gatedadapters.errors import ArtifactError
from gatedadapters.testing import tiny
from gatedadapters.testing.streams import TRAINING, CountingCollate, tiny_classifier, tiny_tasks


@dataclass(frozen=True)
class Kind:
    """A kind of artefact.

    Attributes:
        model: makes the model that it is read for.
        read: reads a folder for a model; returns what comes of it, and how to undo it.
    """

    model: Callable[[], nn.Module]
    read: Callable[[Any, Path], tuple[Any, Callable[[], object]]]


def _nothing() -> None:
    """Reading changed no model."""


def _output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = model(input_ids=torch.arange(12).reshape(2, 6))
    return found.logits.clone()


def _adapters(model: nn.Module, folder: Path) -> tuple[Any, Callable[[], object]]:
    adapters = ga.load_adapters(model, folder)
    return _output(model), adapters.detach


def _shelf(model: nn.Module, folder: Path) -> tuple[Any, Callable[[], object]]:
    shelf = ga.Shelf.load(model, {"a": folder / "a", "b": folder / "b"})
    with shelf.using("b"):
        return (_output(model), shelf.active), shelf.detach


def _delta(model: nn.Module, folder: Path) -> tuple[Any, Callable[[], object]]:
    delta = ga.load_delta(model, folder)
    return _output(model), delta.remove


def _subspace(model: nn.Module, folder: Path) -> tuple[Any, Callable[[], object]]:
    subspace = ga.load_subspace(model, folder)
    return (_output(model), subspace.protected), subspace.remove


def _joint(model: nn.Module, folder: Path) -> tuple[Any, Callable[[], object]]:
    adapters, delta = ga.load_joint(model, folder)
    return _output(model), lambda: (delta.remove(), adapters.detach())


def _peft(model: nn.Module, folder: Path) -> tuple[Any, Callable[[], object]]:
    adapters = ga.import_peft(model, folder)
    return _output(model), adapters.detach


def _mask(model: nn.Module, folder: Path) -> tuple[Any, Callable[[], object]]:
    mask = ga.Mask.load(folder)
    return (mask.digest, mask.identity, mask.roles, mask.table()), _nothing


def _scores(model: nn.Module, folder: Path) -> tuple[Any, Callable[[], object]]:
    scores = ga.Scores.load(folder)
    return (scores.record, *(scores[name].clone() for name in scores.names)), _nothing


def _probe(model: nn.Module, folder: Path) -> tuple[Any, Callable[[], object]]:
    found = Probe.load(folder)
    squared = found.squared_gradients()
    return (found.record, *(found.delta(name) for name in found.names), *(squared[n] for n in found.names)), _nothing


def _change(model: nn.Module, folder: Path) -> tuple[Any, Callable[[], object]]:
    change = Change.load(folder)
    change.apply(model)
    return digest(model), lambda: change.apply(model, back=True)


def _stream(model: nn.Module, folder: Path) -> tuple[Any, Callable[[], object]]:
    result = StreamResult.load(folder)
    cores = [(task, core.indices, core.infos, core.scores) for task, core in result.cores()]
    result.restore(model, 2)
    return (digest(model), result.to_json(), str(result), cores), lambda: result.restore(model, 0)


def _core(model: nn.Module, folder: Path) -> tuple[Any, Callable[[], object]]:
    core = load_core(folder)
    return (core.indices, core.infos, core.kind, core.scores), _nothing


def encoder() -> nn.Module:
    return tiny("bert", head="classification", num_hidden_layers=1)[0]


def decoder() -> nn.Module:
    return tiny("llama", head="lm", num_hidden_layers=1)[0]


KINDS = {
    "adapters": Kind(encoder, _adapters),
    "bfloat16": Kind(encoder, _adapters),
    "shelf": Kind(decoder, _shelf),
    "delta": Kind(encoder, _delta),
    "subspace": Kind(encoder, _subspace),
    "joint": Kind(encoder, _joint),
    "peft": Kind(decoder, _peft),
    "mask": Kind(decoder, _mask),
    "scores": Kind(decoder, _scores),
    "probe": Kind(tiny_classifier, _probe),
    "change": Kind(tiny_classifier, _change),
    "stream": Kind(tiny_classifier, _stream),
    "core": Kind(tiny_classifier, _core),
}
_MODELS: dict[str, nn.Module] = {}
_EXPECTED: dict[str, list[Any]] = {}  # of the artefact itself, and of the other one


def prepare(folder: Path) -> None:
    """Write one artefact of each kind, and one of the same layout with another content."""
    torch.manual_seed(0)
    for place, scale in ((folder, 1.0), (folder.with_name("other"), 2.0)):
        _write(place, scale)
    for name, kind in KINDS.items():
        _MODELS[name], _EXPECTED[name] = kind.model(), []
        for place in (folder, folder.with_name("other")):
            heads = _heads(_MODELS[name])
            found, undo = kind.read(_MODELS[name], place / name)
            undo()
            _put_back(_MODELS[name], heads)
            _EXPECTED[name].append(found)


def attack(chosen: random.Random, valid: Path, folder: Path) -> Attack:
    """Damage one file of an artefact."""
    name = chosen.choice(sorted(KINDS))
    where, other = folder / name, valid.with_name("other") / name
    shutil.copytree(valid / name, where)
    bare = chosen.random() < 0.4
    if bare:
        damage.without_digests(where)
    file = chosen.choice(sorted(path for path in where.rglob("*") if path.suffix in (".json", ".safetensors")))
    if chosen.random() < 0.2:
        what = damage.damage_folder(chosen, where, other)
    else:
        what = (damage.damage_json if file.suffix == ".json" else damage.damage_tensors)(chosen, file)
    mixed = name == "stream" and "another" in what  # a whole record of another stream: nothing binds it to this one
    right = _EXPECTED[name][: 2 if "another" in what else 1]  # where all that differs was exchanged, it is the other
    is_right = None if bare or mixed else lambda found: any(same(found, one) for one in right)
    return Attack(f"{name}{' without digests' if bare else ''}, {what}", lambda: _read(name, where), is_right)


def same(one: Any, other: Any) -> bool:
    """Whether two results are equal, tensors in every bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return bool(one == other)


def _read(name: str, folder: Path) -> Any:
    try:
        return read_and_undo(_MODELS[name], KINDS[name].read, folder)
    except ArtifactError:
        raise
    except BaseException:
        _MODELS[name] = KINDS[name].model()
        raise


def read_and_undo(model: nn.Module, read: Callable[[Any, Path], tuple[Any, Callable[[], object]]], folder: Path) -> Any:
    """Read a folder for a model, see `Kind.read`; whether it is refused or undone, the model must be as before."""
    before, heads = digest(model), _heads(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    try:
        result, undo = read(model, folder)
    except ArtifactError:
        _check(model, before, flags)
        raise
    undo()
    _put_back(model, heads)
    _check(model, before, flags)
    return result


def _heads(model: nn.Module) -> dict[str, Tensor]:
    """Values of the heads, which keep what was loaded with an artefact."""
    own = ("classifier", "pooler")
    return {name: p.detach().clone() for name, p in model.named_parameters() if any(part in name for part in own)}


def _put_back(model: nn.Module, heads: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in heads.items():
            model.get_parameter(name).copy_(value)


def _check(model: nn.Module, before: str, flags: list[bool]) -> None:
    assert digest(model) == before, "the model was changed"
    assert flags == [parameter.requires_grad for parameter in model.parameters()], "requires_grad was changed"
    hooks = [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__]
    assert not hooks, f"hooks are left at {hooks}"
    assert not hasattr(model, "gated_adapters"), "adapters are left"
    assert not hasattr(model, "sparse_delta"), "a delta is left"


def _write(folder: Path, scale: float) -> None:
    bert, llama = encoder(), decoder()
    tuned(bert, scale).save(folder / "adapters")
    ga.get_adapters(bert).save(folder / "bfloat16", dtype=torch.bfloat16)
    for name in ("a", "b"):
        tuned(llama, scale if name == "a" else 3 * scale).save(folder / "shelf" / name)
        if name == "a":
            ga.export_peft(ga.get_adapters(llama), folder / "peft")
        ga.detach(llama)
    tuned_elements(bert, scale).save(folder / "delta")
    ga.save_joint(bert, folder / "joint")
    turned = encoder()
    subspace = ga.apply_subspace(turned, include=["q", "down"])
    with torch.no_grad():
        for parameter in subspace.parameters():
            parameter.mul_(1 + scale)
    subspace.save(folder / "subspace")
    chosen = {"lm_head.weight": torch.arange(int(9 * scale)) * 7, "model.norm.weight": torch.arange(32)}
    ga.Mask.build(llama, chosen).save(folder / "mask")
    scores = ga.score(llama, [{"input_ids": torch.arange(6)[None]}], kind="magnitude", include=["*norm*", "*q_proj*"])
    replace_values = {name: scores[name] * scale for name in scores.names}
    ga.Scores(scores.record, replace_values).save(folder / "scores")
    tasks = tiny_tasks(CountingCollate())[:2]
    model = tiny_classifier()
    core = {"granularity": "element", "share": 0.02 * scale}
    result = ga.run_stream(model, tasks, {"kind": "random", "core": core}, training=TRAINING, folder=folder / "stream")
    shutil.copytree(result.folder / "stages" / "000" / "change", folder / "change")
    shutil.copytree(result.folder / "stages" / "000" / "memory", folder / "core")
    config = ga.config.ProbeConfig(steps=1, batch_size=4, fisher_batches=1, learning_rate=1e-3 * scale)
    probe(tiny_classifier(), tasks[0], folder / "probe", config, elements=True)


def tuned(model: nn.Module, scale: float) -> ga.Adapters:
    """Compact adapters on the model, with some values."""
    space = ga.SearchSpace.parse({"name": "small", "paths": [{"kind": "lora", "rank": 2}]}, where="attack")
    adapters = ga.attach(model, space)
    generator = torch.Generator().manual_seed(int(10 * scale))
    with torch.no_grad():
        for parameter in adapters.weight_parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    adapters.compact(adapters.discretize(scores=torch.ones_like(adapters.bank.kept)))
    return adapters


def tuned_elements(model: nn.Module, scale: float) -> Any:
    name = next(n for n, p in model.named_parameters() if p.dim() == 2 and "embeddings" not in n and "gated" not in n)
    delta = ga.apply_mask(
        model,
        ga.Mask.build(
            model,
            {name: torch.arange(50) * int(2 + scale)},
            heads=frozenset(n for n, _ in model.named_parameters() if n.startswith("classifier")),
        ),
    )
    with torch.no_grad():
        for part in delta.parts():
            part.values.mul_(1 + scale)
    delta.write()
    return delta
