"""Reads and writes the folder that compact adapters are saved in.

`structure.json` is the Structure, the Origin and digests; `adapters.safetensors` holds `paths.<key>.<parameter>`
(routing included) and `heads.<parameter of the model>`, all in float32 or all in bfloat16. `README.md` is the model
card, which is never read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Literal

import torch
from torch import Tensor, nn

from gatedadapters.artefact_files import (
    DTYPES,
    RecordFile,
    check_finite,
    read_record_file,
    read_tensors,
    with_digests,
    with_entry,
    write_tensors,
)
from gatedadapters.backbone.fingerprint import Fingerprint, backbone_fingerprint, backbone_parameters, is_own
from gatedadapters.config.base import parse_record
from gatedadapters.errors import ArtifactError, GatedAdaptersError
from gatedadapters.paths import Path
from gatedadapters.runtime.sharding import in_a_group
from gatedadapters.safe_files import leftovers, whole_folder
from gatedadapters.structure.card import CARD, by_hand, model_card
from gatedadapters.structure.hub import downloaded
from gatedadapters.structure.origin import ORIGIN, Origin, is_hub_id
from gatedadapters.structure.structure import VERSIONS, Structure

STRUCTURE, WEIGHTS = "structure.json", "adapters.safetensors"
FILES = frozenset({STRUCTURE, WEIGHTS, CARD})
ADAPTER = "adapter"
"""Name of the folder that a run saves its adapter in, within its own folder."""

logger = logging.getLogger(__name__)

Base = Literal["same", "updated"]
"""The backbone that saved adapters may be loaded on: the one they were trained on, or also an update of it."""


@dataclass(frozen=True, slots=True)
class Saved:
    """The content of a folder.

    Attributes:
        structure: of the adapters; on an updated backbone, as carried over to it.
        paths: by key, with the weights that were saved.
        heads: values of the model's task heads, by parameter.
        identity: fingerprint of the backbone that they were read for.
        origin: base, tasks and training, as the folder names them; None in artefacts of releases 0.1 and 0.2.
    """

    structure: Structure
    paths: dict[str, Path]
    heads: dict[str, Tensor]
    identity: Fingerprint
    origin: Origin | None


def write(
    folder: str | FilePath,
    structure: Structure,
    paths: Mapping[str, Path],
    heads: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    overwrite: bool,
    origin: Origin | None = None,
    beside: bool = False,
    allow_nonfinite: bool = False,
) -> None:
    """Write compact adapters, whole or not at all.

    Args:
        folder: a new or an empty folder.
        structure: of the paths.
        paths: by key.
        heads: the model's task heads, by parameter.
        dtype: of what is stored, float32 or bfloat16.
        overwrite: replace an artefact that the folder holds, in one step.
        origin: base, tasks and training, to name them in the folder.
        beside: other files that the folder holds stay; an earlier artefact in it is replaced.
        allow_nonfinite: also write infinities and NaN.

    Raises:
        ArtifactError: another dtype, values that are not finite, or the folder is not free.
    """
    if dtype not in DTYPES.values():
        raise ArtifactError(
            "adapters are not saved in this dtype",
            expected="torch.float32 or torch.bfloat16",
            got=str(dtype),
            where="Adapters.save(dtype=)",
            fix="choose one of them",
        )
    own = {f"paths.{key}.{name}": value for key, path in paths.items() for name, value in _values(path).items()}
    tensors = own | {f"heads.{name}": value for name, value in heads.items()}
    stored = {name: value.detach().to(dtype) for name, value in tensors.items()}
    if not allow_nonfinite:
        fix = "train again with a lower rate, or write them as they are with allow_nonfinite=True"
        check_finite(stored, where=folder, fix=fix)
    with whole_folder(
        folder, files=FILES, overwrite=overwrite, beside=STRUCTURE if beside else None, together=in_a_group()
    ) as new:
        digest = write_tensors(new / WEIGHTS, stored, metadata={"format": "gatedadapters 1"})
        text = structure.to_json()
        if origin is not None:
            text = with_entry(text, ORIGIN, origin.model_dump(mode="json", exclude_none=True))
        (new / STRUCTURE).write_text(with_digests(text, {WEIGHTS: digest}), encoding="utf-8")
        (new / CARD).write_bytes(_own_card(FilePath(folder)) or model_card(structure, origin).encode())


def _own_card(folder: FilePath) -> bytes | None:
    """The card in a folder that somebody wrote or edited, which a save leaves as it is; None if there is none."""
    try:
        found = (folder / CARD).read_bytes()
    except FileNotFoundError:
        return None
    if not by_hand(found.decode("utf-8", errors="replace")):
        return None
    logger.info("%s was not written by gatedadapters, or was edited since: it stays as it is", folder / CARD)
    return found


def read(
    model: nn.Module,
    folder: str | FilePath,
    *,
    base: Base = "same",
    revision: str | None = None,
    verify: bool = True,
    allow_nonfinite: bool = False,
    identify: Callable[[frozenset[str]], Fingerprint] | None = None,
) -> Saved:
    """Read a folder that `write` wrote, and check it against a model, which is not changed.

    Args:
        model: with the backbone and the heads that the adapters were made for.
        folder: the folder, or the id of a repository on the hub.
        base: `"updated"` accepts a backbone of the same layout with other weights.
        revision: branch, tag or commit of the repository.
        verify: check the digests of the files.
        allow_nonfinite: also read infinities and NaN.
        identify: gives the model's fingerprint without these task heads; None computes it.

    Raises:
        ArtifactError: the folder is not an artefact, a file is truncated, foreign or damaged, a value is not finite, or
            the backbone is another one; the message says whether its class, its shapes or its values differ.
    """
    path = adapter_folder(folder, revision=revision)
    record, structure = _structure(path / STRUCTURE, verify)
    origin = _origin(record)
    identify = identify or (lambda heads: backbone_fingerprint(model, skip=heads))
    found = _check_backbone(model, structure, origin, path, identify, updated=base == "updated")
    paths = _build(structure, path)
    heads = {name: tuple(model.get_parameter(name).shape) for name in structure.fingerprint.heads}
    own = {f"paths.{key}.{name}": value for key, path in paths.items() for name, value in _values(path).items()}
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    tensors = read_tensors(
        path / WEIGHTS,
        shapes | {f"heads.{name}": shape for name, shape in heads.items()},
        digest=record.digest(WEIGHTS),
        allow_nonfinite=allow_nonfinite,
    )
    if found.values != structure.fingerprint.values and not found.is_quantization_of(structure.fingerprint):
        structure = structure.carried_to(found)
    values = {name: tensors[f"heads.{name}"] for name in heads}
    return Saved(structure, _filled(paths, structure, tensors), values, found, origin)


def read_origin(folder: str | FilePath, *, verify: bool = True) -> tuple[Structure, Origin | None]:
    """The structure of saved adapters, and their origin, without a model; arguments and errors are those of `read`."""
    record, structure = _structure(adapter_folder(folder) / STRUCTURE, verify)
    return structure, _origin(record)


def _origin(record: RecordFile) -> Origin | None:
    data = record.data.get(ORIGIN)
    if data is None:
        return None
    if not isinstance(data, dict):
        raise ArtifactError(
            "the origin of the adapters cannot be read",
            expected="a JSON object",
            got=type(data).__name__,
            where=f"{ORIGIN} in {record.where}",
            fix="copy the folder again as it was saved",
        )
    return parse_record(Origin, data, what="an origin", where=f"{ORIGIN} in {record.where}")


def _structure(file: FilePath, verify: bool) -> tuple[RecordFile, Structure]:
    try:
        record = read_record_file(file, verify=verify, what="a Structure", versions=VERSIONS)
    except ArtifactError:
        raise
    except (OSError, ValueError) as error:
        raise ArtifactError(
            "the structure cannot be read",
            expected="a Structure as JSON",
            got=str(error),
            where=file,
            fix="the file is truncated or foreign: copy or save it again",
        ) from error
    structure = Structure.of_record(record.data, where=file)
    names = [point.module for path in structure.paths for point in (path.site.tap, path.site.write)]
    names += [path.site.host for path in structure.paths] + list(structure.fingerprint.heads)
    foreign = [name for name in dict.fromkeys(names) if is_own(name)]
    if foreign:
        raise ArtifactError(
            "the structure names a part of the library instead of one of the backbone",
            expected="modules of the backbone",
            got=foreign[0],
            where=file,
            fix="restore the file",
        )
    return record, structure


def _build(structure: Structure, folder: FilePath) -> dict[str, Path]:
    """The paths without values. A file may claim any size, so nothing is allocated before the weights are checked."""
    paths: dict[str, Path] = {}
    with torch.device("meta"):
        for record in structure.paths:
            try:
                paths[record.key] = path = record.build()
                if len(structure.tasks) > 1:
                    path.routing = structure.routing(record)
            except (GatedAdaptersError, KeyError, TypeError, RuntimeError) as error:
                raise ArtifactError(
                    "the structure names a path that cannot be built",
                    expected="a path as it was saved",
                    got=f"{type(error).__name__}: {error}",
                    where=f"path {record.key} in {folder / STRUCTURE}",
                    fix="restore the file",
                ) from error
    return paths


def _filled(paths: dict[str, Path], structure: Structure, tensors: Mapping[str, Tensor]) -> dict[str, Path]:
    """The paths with their saved values, in float32, as new paths are."""
    for key, path in paths.items():
        for place, module in path.named_modules():
            prefix = f"paths.{key}.{place}." if place else f"paths.{key}."
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    value = tensors[prefix + name].float()
                    module._parameters[name] = nn.Parameter(value, parameter.requires_grad)
            for name in module._buffers:
                if prefix + name in tensors:
                    module._buffers[name] = tensors[prefix + name].float()
    if any(buffer.is_meta for path in paths.values() for buffer in path.buffers()):
        # Other buffers are computed when a path is built, so build it again off meta.
        generator = torch.Generator().manual_seed(structure.seed)
        for record in structure.paths:
            whole = record.build(generator)
            whole.routing = structure.routing(record)
            whole.load_state_dict(whole.state_dict() | _values(paths[record.key]))
            paths[record.key] = whole
    return paths


def _values(path: Path) -> dict[str, Tensor]:
    """What the file of weights holds of a path; integers, such as positions of elements, follow from its options."""
    return {name: value for name, value in path.state_dict().items() if value.is_floating_point()}


def adapter_folder(folder: str | FilePath, *, revision: str | None = None) -> FilePath:
    """The folder of a saved adapter: `folder` itself, the one that a run saved in `folder`, or one in the hub's cache.

    Args:
        folder: a folder; or, as text, the id of a repository on the hub. What begins with an existing folder is no id,
            unless a revision is given: it is a path with a mistake in it.
        revision: branch, tag or commit of the repository.

    Raises:
        ArtifactError: there is none.
    """
    is_id = isinstance(folder, str) and "/" in folder and is_hub_id(folder)
    if is_id and (revision is not None or not FilePath(folder).parent.exists()):
        return downloaded(str(folder), (STRUCTURE, WEIGHTS), revision=revision, inside=(ADAPTER,))
    if revision is not None:
        raise ArtifactError(
            "only repositories on the hub have revisions",
            expected='the id of one, "user/name"',
            got=f"revision {revision!r} of {folder}",
            where="revision",
            fix="leave revision out to load a folder",
        )
    folder = FilePath(folder)
    for place in (folder, folder / ADAPTER):
        if (place / STRUCTURE).is_file():
            return place
    if not folder.exists():
        interrupted = [left for left in leftovers(folder) if (left / STRUCTURE).is_file()]
        fix = f"an interrupted save left {interrupted[0]}: rename it" if interrupted else "check the path"
        if not interrupted and is_hub_id(str(folder)) and "/" in str(folder):
            fix += '; if it is the id of a repository on the hub, say so with revision="main"'
        raise ArtifactError("no such folder", expected="a saved adapter", got="nothing there", where=folder, fix=fix)
    held = sorted(item.name for item in folder.iterdir()) if folder.is_dir() else ["a file"]
    peft = "adapter_config.json" in held
    fix = "import it: ga.import_peft(model, folder)" if peft else "give the folder that Adapters.save wrote"
    if {"adapters", "delta"} <= set(held):
        fix = (
            "load_joint(model, folder) on their own base. A delta cannot be carried to an update, adapters can: "
            'load_adapters(model, folder + "/adapters", base="updated")'
        )
    if folder.is_dir() and is_unfinished_run(folder):
        fix = "the run that writes it has not saved an adapter yet: let it finish, or start it again"
    raise ArtifactError(
        "this is not a saved adapter",
        expected=f"a folder with {STRUCTURE} and {WEIGHTS}",
        got="a peft adapter" if peft else ", ".join(held[:4]) or "an empty folder",
        where=folder,
        fix=fix,
    )


def is_unfinished_run(folder: FilePath) -> bool:
    """Whether a folder is that of a run that has saved no adapter yet."""
    held = {item.name for item in folder.iterdir()}
    return bool(held) and held <= {"tensorboard", ADAPTER} and not (folder / ADAPTER / STRUCTURE).is_file()


def _check_backbone(
    model: nn.Module,
    structure: Structure,
    origin: Origin | None,
    folder: FilePath,
    identify: Callable[[frozenset[str]], Fingerprint],
    *,
    updated: bool,
) -> Fingerprint:
    saved = structure.fingerprint
    present = {name for name, _, _ in backbone_parameters(model)} if saved.heads else set()
    missing = [name for name in saved.heads if name not in present]
    if missing:
        raise ArtifactError(
            "the model lacks task heads that were saved",
            expected=", ".join(missing[:4]),
            got=f"a {type(model).__name__} without them",
            where=folder,
            fix="build the model with the same tasks, in the same class",
        )
    found = identify(frozenset(saved.heads))
    parts = {"model_class": "class", "shapes": "names or shapes of parameters", "values": "values of parameters"}
    differ = [part for part in parts if getattr(saved, part) != getattr(found, part)]
    if not differ or (differ == ["values"] and (updated or found.is_quantization_of(saved))):
        return found
    what = " and ".join(parts[part] for part in differ)
    named = origin.base_model_name_or_path if origin is not None else None
    fix = "load the backbone they were trained on" + ("" if named is None else f", {named}")
    if updated and differ != ["values"]:
        fix = (
            "weights do not carry over to other shapes: train anew. Where names and widths of modules are the same, "
            "ga.attach(model, ga.Structure.load(folder)) takes the structure over"
        )
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
    """The first site that this model lacks or has with another width, or ""."""
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
