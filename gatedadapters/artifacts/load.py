"""From a folder back to adapters on a model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from gatedadapters.backbone.fingerprint import Fingerprint, backbone_fingerprint
from gatedadapters.errors import ArtifactError, GatedAdaptersError
from gatedadapters.paths import Site, path_class
from gatedadapters.safe_files import leftovers, read_tensors
from gatedadapters.structure import Structure
from gatedadapters.structure.folder import STRUCTURE, WEIGHTS, state
from gatedadapters.supernet.adapters import Adapters
from gatedadapters.supernet.attach import attach, check_free

Base = Literal["same", "updated"]
"""Whether saved adapters insist on the backbone they were made on, or accept a newer release of it."""


def load_adapters(model: nn.Module, folder: str | Path, *, base: Base = "same") -> Adapters:
    """Attach saved adapters to the backbone they were made for, weights and task heads included.

    The result computes what the saved one did, bit for bit where it was saved in fp32. Everything is checked
    before the model is touched, and nothing in the files is executed.

    Args:
        model: with the same backbone and heads, no adapters attached.
        folder: what `Adapters.save` wrote.
        base: `"updated"` accepts a backbone of the same layout with other weights, a newer release of it, and records
            the one they came from in `Structure.lineage`. An artefact does not hold the configuration of its backbone:
            that two of equal shapes differ in their heads or non-linearities is what
            `gatedadapters.transfer.check_versions(old, new)` finds, where the old one is at hand.

    Raises:
        ArtifactError: the folder is no artefact, a file is truncated or foreign, or the backbone is another
            one; it says whether its class, its shapes or its values differ.
        AttachError: the model already has adapters.

    The model is left untouched by all of them.
    """
    check_free(model)
    structure, tensors = read_saved(model, folder, base=base)
    adapters = attach(model, structure, heads=structure.fingerprint.heads, seed=structure.seed)
    with torch.no_grad():
        for name, value in state(adapters).items():
            value.copy_(tensors[name])
    adapters.structure = structure
    return adapters


def read_saved(model: nn.Module, folder: str | Path, *, base: Base = "same") -> tuple[Structure, dict[str, Tensor]]:
    """What `Adapters.save` wrote, checked against the model and the structure; raises as `load_adapters` does."""
    path = Path(folder)
    structure = Structure.load(_existing(path) / STRUCTURE)
    found = _check_backbone(model, structure, path, updated=base == "updated")
    tensors = read_tensors(path / WEIGHTS, _expected(model, structure, path))
    return structure if found.values == structure.fingerprint.values else structure.carried_to(found), tensors


def _existing(folder: Path) -> Path:
    if (folder / STRUCTURE).is_file():
        return folder
    if not folder.exists():
        interrupted = [left for left in leftovers(folder) if (left / STRUCTURE).is_file()]
        fix = f"an interrupted save left {interrupted[0]}: rename it" if interrupted else "check the path"
        raise ArtifactError("no such folder", expected="a saved adapter", got="nothing there", where=folder, fix=fix)
    held = sorted(item.name for item in folder.iterdir()) if folder.is_dir() else ["a file"]
    peft = "adapter_config.json" in held
    raise ArtifactError(
        "this is not a saved adapter",
        expected=f"a folder with {STRUCTURE} and {WEIGHTS}",
        got="a peft adapter" if peft else ", ".join(held[:4]) or "an empty folder",
        where=folder,
        fix="import it as a peft adapter" if peft else "give the folder that Adapters.save wrote",
    )


def _check_backbone(model: nn.Module, structure: Structure, folder: Path, *, updated: bool) -> Fingerprint:
    saved = structure.fingerprint
    present = dict(model.named_parameters())
    missing = [name for name in saved.heads if name not in present]
    if missing:
        raise ArtifactError(
            "the model lacks task heads that were saved",
            expected=", ".join(missing[:4]),
            got=f"a {type(model).__name__} without them",
            where=folder,
            fix="build the model with the same tasks, in the same class",
        )
    found = backbone_fingerprint(model, skip=frozenset(saved.heads))
    parts = {"model_class": "class", "shapes": "names or shapes of parameters", "values": "values of parameters"}
    differ = [part for part in parts if getattr(saved, part) != getattr(found, part)]
    if not differ or (updated and differ == ["values"]):
        return found
    what = " and ".join(parts[part] for part in differ)
    fix = "load the backbone they were trained on"
    if differ == ["values"]:
        if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
            fix = (
                "float16 rounds values: load the backbone in float32 or bfloat16, then the adapters, then model.half()"
            )
        fix += ', or accept an updated one with base="updated"'
    misplaced = _misplaced(model, structure)
    raise ArtifactError(
        f"these adapters were made for another backbone ({what} differ)",
        expected=_described(saved),
        got=_described(found) + (f"; {misplaced}" if misplaced else ""),
        where=folder,
        fix=fix,
    )


def _misplaced(model: nn.Module, structure: Structure) -> str:
    """The first path whose place this model lacks, or has in another width."""
    modules = dict(model.named_modules())
    for record in structure.paths:
        for point, width in ((record.site.tap, record.site.width_in), (record.site.write, record.site.width_out)):
            if point.module not in modules:
                return f"no module {point.module}"
            weight = getattr(modules[point.module], "weight", None)
            if isinstance(weight, torch.Tensor) and weight.dim() == 2 and width not in weight.shape:
                return f"{point.module} is {tuple(weight.shape)}, not {width} wide"
    return ""


def _described(identity: Fingerprint) -> str:
    return f"{identity.model_class} (shapes {identity.shapes[:8]}, values {identity.values[:8]})"


def _expected(model: nn.Module, structure: Structure, folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of everything that must be in the file, without allocating any of it."""
    shapes: dict[str, tuple[int, ...]] = {}
    for record in structure.paths:
        try:
            with torch.device("meta"):
                path = path_class(record.options)(Site.from_dict(record.site.model_dump()), record.options)
        except (GatedAdaptersError, KeyError, TypeError, RuntimeError) as error:
            raise ArtifactError(
                "the structure names a path that cannot be built",
                expected="a path as it was saved",
                got=f"{type(error).__name__}: {error}",
                where=f"path {record.key} in {folder / STRUCTURE}",
                fix="restore the file",
            ) from error
        shapes |= {f"paths.{record.key}.{name}": tuple(value.shape) for name, value in path.state_dict().items()}
        if len(structure.tasks) > 1:
            shapes[f"paths.{record.key}.routing"] = (len(structure.tasks), len(record.kept))
    heads = structure.fingerprint.heads
    return shapes | {f"heads.{name}": tuple(model.get_parameter(name).shape) for name in heads}
