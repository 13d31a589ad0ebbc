"""Adapters that another library wrote, as paths of ours with values: what every import has in common."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath

import torch
from torch import Tensor, nn

from gatedadapters.artefact_files import check_finite
from gatedadapters.backbone import Layout, LinearMap
from gatedadapters.backbone.fingerprint import backbone_fingerprint
from gatedadapters.config import GateConfig, PathOptions, SearchSpace, Where
from gatedadapters.errors import ArtifactError
from gatedadapters.paths import LoRA, Point, Site
from gatedadapters.paths.site import Side
from gatedadapters.structure.folder import ADAPTER, STRUCTURE
from gatedadapters.supernet.adapters import Adapters
from gatedadapters.supernet.attach import find_heads, gated_candidates, install


@dataclass(frozen=True)
class Part:
    """One path: its options, its site, and the values of its parameters by name."""

    options: PathOptions
    site: Site
    values: Mapping[str, Tensor]


def attach_parts(
    model: nn.Module,
    parts: Sequence[Part],
    layout: Layout,
    *,
    description: str,
    saved: Mapping[str, Tensor],
    tasks: Sequence[str],
    gates: GateConfig | None,
    heads: Sequence[str] | None,
    seed: int,
    where: FilePath,
) -> Adapters:
    """Attach parts as gated paths, and give the model the heads that were saved with them.

    Ranks of LoRA are turned into singular directions, largest first, which changes nothing of what they compute.

    Args:
        model: without adapters.
        parts: in order of the forward pass.
        layout: of the model.
        description: what they are, for the search space.
        saved: values of heads, by parameter or buffer of the model.
        tasks: names of the tasks.
        gates: how they are drawn.
        heads: see `find_heads`; the saved ones come on top.
        seed: of gates and gate noise.
        where: the folder, for errors.

    Raises:
        ArtifactError: the heads are not those of the model, or values are not finite.
        AttachError: see `install`.
    """
    check_heads(model, saved, where)
    keys: Counter[str] = Counter()
    found: dict[str, tuple[PathOptions, Site]] = {}
    values: dict[str, Mapping[str, Tensor]] = {}
    for part in parts:
        tap = part.site.tap
        stem = f"{(str(tap) if tap.parameter else tap.module).replace('.', '/')}:{part.options.kind}"
        keys[stem] += 1
        key = stem if keys[stem] == 1 else f"{stem}#{keys[stem]}"
        found[key], values[key] = (part.options, part.site), part.values
    head_names = find_heads(model, heads)
    parameters = {name for name, _ in model.named_parameters()}
    head_names += tuple(name for name in saved if name in parameters and name not in head_names)
    adapters = gated_candidates(
        found,
        _space(found, gates or GateConfig(), description),
        layout,
        tasks=tasks,
        identity=backbone_fingerprint(model, skip=frozenset(head_names)),
        seed=seed,
    )
    fix = "restore the folder: its values, or the scale in its configuration, are too large"
    with torch.no_grad():
        for key, path in adapters.typed_paths():
            check_finite({f"{key} {name}": value for name, value in values[key].items()}, where=where, fix=fix)
            for name, value in values[key].items():
                path.get_parameter(name).copy_(value)
            if isinstance(path, LoRA):
                path.condense(torch.arange(path.units), torch.ones(path.units))
            made = {f"{key} {name}": value for name, value in path.named_parameters()}
            check_finite(made, where=where, fix=fix)  # they may be of a narrower type
    install(adapters, model, head_names)
    with torch.no_grad():
        state = model.state_dict()
        for name, value in saved.items():
            state[name].copy_(value)
    return adapters


def check_heads(model: nn.Module, saved: Mapping[str, Tensor], where: FilePath) -> None:
    """Check that a model has the heads that were saved, and that nothing else uses them.

    Raises:
        ArtifactError: it has not.
    """
    state = model.state_dict()
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    tied = {name for names in shared.values() if len(names) > 1 for name in names}
    for name, value in saved.items():
        if name not in state or state[name].shape != value.shape:
            got = tuple(state[name].shape) if name in state else "no such parameter"
            raise ArtifactError(
                "the model's heads are not those that were saved",
                expected=f"{name} {tuple(value.shape)}",
                got=got,
                where=where,
                fix="build the model in the class, and with the number of classes, it was trained with",
            )
        if name in tied:
            raise ArtifactError(
                "a saved module is tied to another one here",
                expected="a head of its own",
                got=name,
                where=where,
                fix="load the model with tie_word_embeddings=False",
            )


def not_here(what: str, files: Sequence[str], where: FilePath) -> ArtifactError:
    """The error for a folder that lacks the first of the files by which another library's folders are known.

    Args:
        what: the kind of folder: "a peft adapter".
        files: names of the files.
        where: the folder.
    """
    got, fix = f"no {files[0]} in it", "restore the folder as it was saved"
    if not where.exists():
        got, fix = "no such folder", "check the path"
    elif any((folder / STRUCTURE).is_file() for folder in (where, where / ADAPTER)):
        got = "an adapter that this library saved"
        fix = "load_adapters loads it; export_peft, or gatedadapters export, writes it for peft and its readers"
    expected = f"a folder with {' and '.join(files)}"
    return ArtifactError(f"this is not {what}", expected=expected, got=got, where=where, fix=fix)


class Places:
    """The sites of a layout by the names that other libraries give them."""

    def __init__(self, layout: Layout, where: FilePath) -> None:
        self.layout, self.where = layout, where
        self._maps: dict[str, Site] = {}
        self._linear: dict[str, LinearMap] = {}
        for block, sublayer, linear in (*layout.maps(), *layout.maps_outside()):
            if not linear.host:
                self._maps.setdefault(linear.name, Site.at_map(block, sublayer, linear, tap="input", write="output"))
            self._linear.setdefault(linear.name, linear)
        self._reasons = {unknown.name.removesuffix(".weight"): unknown.reason for unknown in layout.unknown}

    def order(self) -> Iterator[str]:
        """The modules of the maps, in order of the forward pass."""
        return iter(self._maps)

    def at_map(self, name: str) -> Site:
        """Where a path goes that reads the input of a linear map, or of a table of token ids, and adds to its output.

        Raises:
            ArtifactError: there is no such map.
        """
        site = self._maps.get(name)
        if site is None:
            linear = self._linear.get(name)
            reason = self._reasons.get(name, "no matrix, or not reached")
            raise ArtifactError(
                "an adapter at a module that is no linear map of the model",
                expected="linear maps that the sample batch runs through",
                got=f"{name} ({reason if linear is None else 'fused experts'})",
                where=self.where,
                fix="pass sample=, a batch that runs through it",
            )
        return site

    def side(self, name: str, side: Side) -> Site:
        """Where a path goes that changes the input or the output of a linear map.

        Raises:
            ArtifactError: there is no such map.
        """
        found = self.at_map(name)
        point, width = Point(name, side), found.width_in if side == "input" else found.width_out
        return Site(
            point, point, width, width, found.block, found.block_index, found.sublayer, found.role, found.traffic
        )


def _space(found: Mapping[str, tuple[PathOptions, Site]], gates: GateConfig, description: str) -> SearchSpace:
    """The candidates as a search space: each kind and size, at its modules."""
    alike: dict[PathOptions, list[str]] = {}
    for options, site in found.values():
        alike.setdefault(options, []).append(re.escape(site.tap.module))
    paths = tuple(
        options.model_copy(update={"at": Where(include=f"^(?:{'|'.join(dict.fromkeys(names))})$")})
        for options, names in sorted(alike.items(), key=lambda item: (item[0].kind, item[0].size))
    )
    return SearchSpace(name="imported", description=description, gates=gates, paths=paths)
