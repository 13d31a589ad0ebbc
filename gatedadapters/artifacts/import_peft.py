"""An existing LoRA as gated paths on its model, so that its ranks and modules can be searched."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import cast

import torch
from torch import Tensor, nn

from gatedadapters.artifacts.peft_folder import Matrices, PeftFolder, read_peft
from gatedadapters.backbone import Layout, LinearMap, discover
from gatedadapters.backbone.fingerprint import backbone_fingerprint, fingerprint
from gatedadapters.backbone.quantized import check_gradients_pass
from gatedadapters.config import GateConfig, PathOptions, SearchSpace, Where
from gatedadapters.errors import ArtifactError
from gatedadapters.paths import LoRA, Point, Site
from gatedadapters.paths.lora import LoRAOptions
from gatedadapters.structure.folder import Base
from gatedadapters.supernet.adapters import Adapters
from gatedadapters.supernet.attach import DEFAULT_TASK, check_no_adapters, find_heads, gated_candidates, install

OUTSIDE = "outside"  # the sub-layer of maps that lie in no block: poolers, heads, embedding projections


def import_peft(
    model: nn.Module,
    folder: str | FilePath,
    sample: Mapping[str, Tensor] | None = None,
    *,
    tasks: Sequence[str] = (DEFAULT_TASK,),
    gates: GateConfig | None = None,
    heads: Sequence[str] | None = None,
    base: Base = "same",
    seed: int = 0,
    verify: bool = True,
) -> Adapters:
    """Attach a LoRA that peft saved as gated paths, one at each of its modules, every rank a unit of its own.

    The model then computes what peft's does; train on with a budget, or choose with `discretize`, then `compact`.
    Ranks are turned into the singular directions of B A, largest first, which changes nothing of B A and lets a gate
    stand for a direction. `lora_alpha`, patterns and rank-stabilised scales are folded in; dropout is not taken over.

    Args:
        model: the model that the LoRA was trained on, or one that holds it as its backbone; no adapters attached.
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        sample: a batch that runs through the model; a default is made for token models.
        tasks: names of the tasks, each with gates of its own.
        gates: how they are drawn; with `init` at its default or higher each is 1 in evaluation at the start.
        heads: parameters of the model to train and save along, beside the LoRA's `modules_to_save`; default as in
            `attach`.
        base: `"updated"` accepts a backbone of the same shapes with other weights than the one `export_peft` saw;
            folders that peft wrote do not say which it was, only names and shapes are checked.
        seed: of gates and gate noise.
        verify: check the digests that `export_peft` stored; folders that peft wrote have none.

    Raises:
        ArtifactError: the folder is no LoRA, a file is pickled, truncated or foreign, the LoRA is one of another
            backbone, or it holds more than a plain LoRA (what, is said).
        AttachError: the model already has adapters, or no such heads.
        LayoutError: see `attach`.

    The model is left untouched by all of them.
    """
    check_no_adapters(model)
    lora = read_peft(folder, verify=verify)
    prefix = _prefix(model, lora)
    maps = {prefix + name: value for name, value in lora.maps.items()}
    saved = {prefix + name: value for name, value in lora.heads.items()}
    _check_heads(model, saved, lora.where)
    own = fingerprint(model, skip=frozenset(saved)).values
    if lora.backbone not in (None, own) and not prefix and base == "same":
        raise ArtifactError(
            "this LoRA was exported from a backbone with other weights",
            expected=f"values {lora.backbone}"[:15],
            got=f"values {own}"[:15],
            where=lora.where,
            fix="load that backbone, or accept this with base='updated'",
        )
    check_gradients_pass(model)
    layout = discover(model, sample)
    found: dict[str, tuple[PathOptions, Site]] = {}
    sources: dict[str, Matrices] = {}
    for site in _sites(layout, maps, lora.where):
        source = maps[site.tap.module]
        key = f"{site.tap.module.replace('.', '/')}:{LoRA.kind}"
        found[key], sources[key] = (LoRAOptions(rank=len(source.down)), site), source
    head_names = find_heads(model, heads)
    parameters = {name for name, _ in model.named_parameters()}
    head_names += tuple(name for name in saved if name in parameters and name not in head_names)
    adapters = gated_candidates(
        found,
        _space(maps, gates or GateConfig()),
        layout,
        tasks=tasks,
        identity=backbone_fingerprint(model, skip=frozenset(head_names)),
        seed=seed,
    )
    with torch.no_grad():
        for key, source in sources.items():
            path = cast(LoRA, adapters.paths[key])
            path.down.copy_(source.down)
            path.up.copy_(source.up)
            path.condense(torch.arange(path.units), torch.ones(path.units))
    install(adapters, model, head_names)
    with torch.no_grad():
        state = model.state_dict()
        for name, value in saved.items():
            state[name].copy_(value)
    return adapters


@torch.no_grad()
def singular_values(adapters: Adapters) -> Tensor:
    """(tasks, units) scores of freshly imported adapters: the singular values of each module's B A.

    `adapters.discretize(budget, scores=singular_values(adapters))` is plain truncation, across all modules. Where ranks
    have no gates of their own, a module's largest stands for it.
    """
    bank = adapters._gates()
    scores = torch.zeros_like(bank.kept)
    for key, path in adapters.typed_paths():
        lora, where = cast(LoRA, path), bank.slices[key]
        values = (lora.up.norm(dim=0) * lora.down.norm(dim=1)).to(scores)
        scores[:, where] = values if len(values) == where.stop - where.start else values.max()
    return scores


def _prefix(model: nn.Module, lora: PeftFolder) -> str:
    """What precedes the LoRA's names of modules: nothing, or the backbone's name where it was trained on that alone."""
    modules = dict(model.named_modules())
    within = getattr(model, "base_model_prefix", "")
    choices = ["", f"{within}."] if within and hasattr(model, within) else [""]
    prefix = next((p for p in choices if all(p + name in modules for name in lora.maps)), None)
    if prefix is None:
        missing = [name for name in lora.maps if not any(p + name in modules for p in choices)] or list(lora.maps)
        raise _foreign(lora.where, f"modules {', '.join(missing[:3])}", f"a {type(model).__name__} without them")
    adaptable = (name for name, module in modules.items() if isinstance(getattr(module, "weight", None), Tensor))
    forgotten = lora.forgotten(name.removeprefix(prefix) for name in adaptable if name.startswith(prefix))
    if forgotten:
        raise _foreign(lora.where, f"weights for {', '.join(forgotten[:3])}, which it targets", "none")
    return prefix


def _sites(layout: Layout, maps: Mapping[str, Matrices], where: FilePath) -> list[Site]:
    """Where each low-rank map goes, in order of the forward pass.

    Raises:
        ArtifactError: a map does not fit its module.
    """
    sites: dict[str, Site] = {}
    for block, sublayer, linear in layout.maps():
        if linear.name in maps:
            sites.setdefault(linear.name, Site.at_map(block, sublayer, linear, tap="input", write="output"))
    for linear in layout.outside:
        if linear.name in maps:
            site = Site(
                tap=Point(linear.name, "input"),
                write=Point(linear.name, "output"),
                width_in=linear.in_features,
                width_out=linear.out_features,
                block=linear.name,
                block_index=len(layout.blocks),
                sublayer=OUTSIDE,
                role=linear.role,
                traffic=linear.traffic,
            )
            sites.setdefault(linear.name, site)
    for linear in (*(linear for _, _, linear in layout.maps()), *layout.outside):
        if linear.name in maps:
            _check_fit(linear, maps[linear.name], where)
    reasons = {unknown.name.removesuffix(".weight"): unknown.reason for unknown in layout.unknown}
    missing = [name for name in maps if name not in sites]
    if missing:
        raise ArtifactError(
            "a LoRA at a module that is no linear map of the model",
            expected="linear maps that the sample batch runs through",
            got=f"{missing[0]} ({reasons.get(missing[0], 'no matrix, or not reached')})",
            where=where,
            fix="pass sample=, a batch that runs through it",
        )
    return list(sites.values())


def _check_fit(linear: LinearMap, source: Matrices, where: FilePath) -> None:
    shape = source.down.shape[1], source.up.shape[0]
    if linear.kind == "experts" or shape != (linear.in_features, linear.out_features):
        kind = "fused experts" if linear.kind == "experts" else f"{linear.in_features} -> {linear.out_features}"
        raise _foreign(where, f"{linear.name}: {shape[0]} -> {shape[1]}", kind)


def _check_heads(model: nn.Module, saved: Mapping[str, Tensor], where: FilePath) -> None:
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


def _space(maps: Mapping[str, Matrices], gates: GateConfig) -> SearchSpace:
    """The candidates as a search space: the ranks of the LoRA, at its modules."""
    by_rank: dict[int, list[str]] = {}
    for name, source in maps.items():
        by_rank.setdefault(len(source.down), []).append(re.escape(name))
    paths = tuple(LoRAOptions(rank=r, at=Where(include=f"^(?:{'|'.join(n)})$")) for r, n in sorted(by_rank.items()))
    return SearchSpace(name="imported", description="the modules and ranks of a peft LoRA", gates=gates, paths=paths)


def _foreign(where: FilePath, expected: str, got: str) -> ArtifactError:
    return ArtifactError(
        "this LoRA was trained on another model",
        expected=expected,
        got=got,
        where=where,
        fix="build the model in the class it was trained with; see base_model_name_or_path in its adapter_config.json",
    )
