"""An adapter that peft saved as gated paths on its model, so that its ranks and modules can be searched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from gatedadapters.artifacts.parts import Part, Places, attach_parts
from gatedadapters.artifacts.peft_folder import Matrices, PeftFolder, read_peft
from gatedadapters.artifacts.peft_records import VeraRecord
from gatedadapters.backbone import Layout, discover
from gatedadapters.backbone.fingerprint import fingerprint
from gatedadapters.backbone.quantized import check_gradients_pass
from gatedadapters.config import GateConfig
from gatedadapters.errors import ArtifactError
from gatedadapters.paths import LoRA, Norm, SkippedSite, WeightLoRA
from gatedadapters.paths.bias import BiasOptions
from gatedadapters.paths.lora import LoRAOptions
from gatedadapters.paths.norm import NormOptions
from gatedadapters.paths.rows import RowsOptions
from gatedadapters.paths.scale import ScaleOptions
from gatedadapters.paths.weight_lora import WeightLoRAOptions
from gatedadapters.structure.folder import Base
from gatedadapters.supernet.adapters import Adapters
from gatedadapters.supernet.attach import DEFAULT_TASK, check_no_adapters
from gatedadapters.supernet.merging import gain_offset, table_factor


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
    """Attach an adapter that peft saved as gated paths, at its modules; every rank and every token is a unit.

    The model then computes what peft's does; train on with a budget, or choose with `discretize`, then `compact`.

    | peft | here |
    |---|---|
    | LoRA, also at tables of token ids and maps to the vocabulary | `lora` |
    | its `target_parameters`, experts among them | `weight_lora`, or `lora` at a map of its own |
    | its `trainable_token_indices`, trainable tokens | `rows`, at both ends of a model that ties them |
    | DoRA | `lora`, `scale` by its magnitudes over the norms that they had, `bias` where a map has one |
    | VeRA | `lora` of the same rank, its vectors and random matrices multiplied out |
    | IA3 | `scale` |
    | LN tuning | `norm` |

    Ranks are turned into the singular directions of B A, largest first, which changes nothing of B A and lets a gate
    stand for a direction. `lora_alpha`, patterns and rank-stabilised scales are folded in; dropout is not taken over.

    Args:
        model: the model that the adapter was trained on, or one that holds it as its backbone; no adapters attached.
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        sample: a batch that runs through the model; a default is made for token models.
        tasks: names of the tasks, each with gates of its own.
        gates: how they are drawn; with `init` at its default or higher each is 1 in evaluation at the start.
        heads: parameters of the model to train and save along, beside the adapter's `modules_to_save`; default as in
            `attach`.
        base: `"updated"` accepts a backbone of the same shapes with other weights than the one `export_peft` saw;
            folders that peft wrote do not say which it was, only names and shapes are checked.
        seed: of gates and gate noise.
        verify: check the digests that `export_peft` stored; folders that peft wrote have none.

    Raises:
        ArtifactError: the folder is no adapter of these types, a file is pickled, truncated or foreign, the adapter is
            one of another backbone, or it holds what none of these paths computes (what, is said).
        AttachError: the model already has adapters, or no such heads.
        LayoutError: see `attach`.

    The model is left untouched by all of them.
    """
    check_no_adapters(model)
    read = read_peft(folder, verify=verify)
    adapter = _renamed(read, _prefix(model, read))
    own = fingerprint(model, skip=frozenset(adapter.heads)).values
    if adapter.backbone not in (None, own) and adapter.modules() == read.modules() and base == "same":
        raise ArtifactError(
            "this adapter was exported from a backbone with other weights",
            expected=f"values {adapter.backbone}"[:15],
            got=f"values {own}"[:15],
            where=adapter.where,
            fix="load that backbone, or accept this with base='updated'",
        )
    check_gradients_pass(model)
    _check_base(model, adapter)
    layout = discover(model, sample)
    with torch.no_grad():
        parts = list(_parts(model, layout, adapter))
    return attach_parts(
        model,
        parts,
        layout,
        description=f"the modules and sizes of a {adapter.record.peft_type} adapter of peft",
        saved=adapter.heads,
        tasks=tasks,
        gates=gates,
        heads=heads,
        seed=seed,
        where=adapter.where,
    )


@torch.no_grad()
def singular_values(adapters: Adapters) -> Tensor:
    """(tasks, units) scores of freshly imported adapters: the singular values of each module's B A.

    `adapters.discretize(budget, scores=singular_values(adapters))` is plain truncation, across all modules. Where ranks
    have no gates of their own, a module's largest stands for it. Of other kinds the score is the norm of what they add.
    """
    bank = adapters._gates()
    scores = torch.zeros_like(bank.kept)
    for key, path in adapters.typed_paths():
        where = bank.slices[key]
        sizes = path.up.norm(dim=0) * path.down.norm(dim=1) if isinstance(path, LoRA) else path.learned()
        values = sizes.to(scores)
        scores[:, where] = values if len(values) == where.stop - where.start else values.max()
    return scores


def _prefix(model: nn.Module, adapter: PeftFolder) -> str:
    """What precedes the adapter's names of modules: nothing, or the backbone's name where it was trained on that."""
    modules, held = dict(model.named_modules()), adapter.modules()
    within = getattr(model, "base_model_prefix", "")
    choices = ["", f"{within}."] if within and hasattr(model, within) else [""]
    prefix = next((p for p in choices if all(p + name in modules for name in held)), None)
    if prefix is None:
        missing = sorted(name for name in held if not any(p + name in modules for p in choices)) or sorted(held)
        raise _foreign(adapter.where, f"modules {', '.join(missing[:3])}", f"a {type(model).__name__} without them")
    adaptable = (name for name, module in modules.items() if isinstance(getattr(module, "weight", None), Tensor))
    forgotten = adapter.forgotten(name.removeprefix(prefix) for name in adaptable if name.startswith(prefix))
    if forgotten:
        raise _foreign(adapter.where, f"weights for {', '.join(forgotten[:3])}, which it targets", "none")
    return prefix


def _renamed(adapter: PeftFolder, prefix: str) -> PeftFolder:
    """The same with `prefix` before the names of its modules."""
    parts = ("maps", "tables", "parameters", "inputs", "outputs", "norms", "rows", "base", "heads")
    changes: dict[str, Any] = {part: {prefix + n: v for n, v in getattr(adapter, part).items()} for part in parts}
    return replace(adapter, **changes)


def _check_base(model: nn.Module, adapter: PeftFolder) -> None:
    """Raise where peft stored weights of the model with the adapter, and they are not those of this model."""
    state = model.state_dict()
    for name, value in adapter.base.items():
        if name not in state or state[name].shape != value.shape or not torch.equal(state[name].float(), value):
            got = "none" if name not in state else str(tuple(state[name].shape))
            raise ArtifactError(
                "peft stored weights of its model with the adapter, and this model has others",
                expected=f"{name} {tuple(value.shape)} with these values",
                got=f"{got} with others",
                where=adapter.where,
                fix="give the model these weights first (model.resize_token_embeddings, then load_state_dict with "
                "strict=False), or save the adapter with peft's save_embedding_layers=False",
            )


def _parts(model: nn.Module, layout: Layout, adapter: PeftFolder) -> Iterator[Part]:
    """What the adapter holds as paths, in order of the forward pass.

    Raises:
        ArtifactError: something does not fit its module.
    """
    places = Places(layout, adapter.where)
    makers: tuple[tuple[Mapping[str, object], Callable[[str], Iterator[Part]]], ...] = (
        (adapter.rows, lambda name: _rows(model, places, adapter, name)),
        (adapter.tables, lambda name: _table(model, places, adapter, name)),
        (adapter.maps, lambda name: _map(model, places, adapter, name)),
        (adapter.inputs, lambda name: _factors(places, adapter, name, adapter.inputs[name], "input")),
        (adapter.outputs, lambda name: _factors(places, adapter, name, adapter.outputs[name], "output")),
    )
    ordered = {name: index for index, name in enumerate(places.order())}
    for held, make in makers:
        for name in sorted(held, key=lambda name: ordered.get(name, -1)):
            yield from make(name)
    yield from _experts(model, places, adapter)
    yield from _norms(model, layout, adapter)


def _map(model: nn.Module, places: Places, adapter: PeftFolder, name: str) -> Iterator[Part]:
    """A low-rank map; with a magnitude (DoRA) also the factors, and what keeps the map's bias from being multiplied."""
    source = adapter.maps[name]
    yield _low_rank(places, adapter, name, source)
    if source.magnitude is None:
        return
    module = model.get_submodule(name)
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    stored = weight.detach().float()
    summed = (
        stored if stored.shape == (len(source.up), source.down.shape[1]) else stored.t()
    ) + source.up @ source.down
    if source.magnitude.numel() != len(summed):
        raise _foreign(adapter.where, f"{name}: {source.magnitude.numel()} magnitudes", f"{len(summed)} outputs")
    shift = source.magnitude.flatten() / summed.norm(dim=1) - 1
    yield from _factors(places, adapter, name, shift + 1, "output")
    if bias is not None:
        yield Part(BiasOptions(), places.side(name, "output"), {"shift": -shift * bias.detach().float()})


def _low_rank(places: Places, adapter: PeftFolder, name: str, source: Matrices) -> Part:
    site, down = places.at_map(name), source.down
    if isinstance(adapter.record, VeraRecord):  # one matrix for all modules, each reads the columns that it needs
        down = down[:, : site.width_in]
    shape = down.shape[1], source.up.shape[0]
    if shape != (site.width_in, site.width_out):
        raise _foreign(adapter.where, f"{name}: {shape[0]} -> {shape[1]}", f"{site.width_in} -> {site.width_out}")
    return Part(LoRAOptions(rank=len(down)), site, {"down": down, "up": source.up})


def _table(model: nn.Module, places: Places, adapter: PeftFolder, name: str) -> Iterator[Part]:
    """A low-rank map at a table of token ids. Where the table multiplies its rows, peft multiplies what it adds."""
    source = adapter.tables[name]
    factor = table_factor(model.get_submodule(name), name)
    yield _low_rank(places, adapter, name, Matrices(source.down, source.up * factor))


def _factors(places: Places, adapter: PeftFolder, name: str, factors: Tensor, side: str) -> Iterator[Part]:
    options = ScaleOptions(side="input" if side == "input" else "output")
    site = places.side(name, options.side)
    if len(factors) != site.width_out:
        raise _foreign(adapter.where, f"{name}: {len(factors)} factors at its {side}", f"{site.width_out} features")
    yield Part(options, site, {"shift": factors - 1})


def _rows(model: nn.Module, places: Places, adapter: PeftFolder, name: str) -> Iterator[Part]:
    """New rows of a table, less the old ones; also at the map to the vocabulary where the two are tied."""
    tokens, rows = adapter.rows[name]
    weight = model.get_submodule(name)._parameters.get("weight")
    if weight is None or weight.dim() != 2 or tokens[-1] >= len(weight) or rows.shape[1] != weight.shape[1]:
        got = "no table" if weight is None else f"{tuple(weight.shape)}"
        raise _foreign(adapter.where, f"{name}: rows of width {rows.shape[1]}, the last of token {tokens[-1]}", got)
    change = rows - weight.detach().float()[tokens]
    users = [n for n, parameter in model.named_parameters(remove_duplicate=False) if parameter is weight]
    for user in users:
        module = user.rpartition(".")[0]
        site = places.at_map(module)
        factor = table_factor(model.get_submodule(module), module) if site.reads_ids else 1.0
        yield Part(RowsOptions(tokens=tuple(tokens)), site, {"values": change * factor})


def _experts(model: nn.Module, places: Places, adapter: PeftFolder) -> Iterator[Part]:
    """Low-rank maps at parameters. peft wraps a module once for each, in the order of the module's parameters."""
    found = (site for site in WeightLoRA.sites(WeightLoRAOptions(), places.layout) if not isinstance(site, SkippedSite))
    sites = {str(site.write): site for site in found}
    _check_parameters(model, adapter)
    for module, stacks in adapter.parameters.items():
        names = [f"{module}.{name}" for name, _ in model.get_submodule(module).named_parameters(recurse=False)]
        names = [name for name in names if adapter.targets_parameter(name)]
        if len(names) != len(stacks):
            raise _foreign(adapter.where, f"{len(stacks)} parameters of {module} with a LoRA", f"{', '.join(names)}")
        for name, stack in zip(reversed(names), stacks, strict=True):
            site = sites.get(name)
            experts = (site.experts or 1) if site is not None else 1
            rank, rest = divmod(len(stack.down), experts)
            if rest or not rank:
                raise _foreign(adapter.where, f"{name}: {len(stack.down)} ranks", f"{experts} experts")
            up = stack.up * adapter.scale_of(name, rank)
            if site is None:
                yield _low_rank(places, adapter, module, Matrices(stack.down, up))
                continue
            shape = stack.down.shape[1], len(up)
            if shape != (site.width_in, site.width_out):
                raise _foreign(
                    adapter.where, f"{name}: {shape[0]} -> {shape[1]}", f"{site.width_in} -> {site.width_out}"
                )
            by_expert = up.unflatten(1, (rank, experts)).transpose(1, 2).flatten(1)
            yield Part(WeightLoRAOptions(rank=rank), site, {"down": stack.down, "up": by_expert})


def _check_parameters(model: nn.Module, adapter: PeftFolder) -> None:
    """Raise where the adapter names parameters that the model lacks, or holds nothing for one that it names."""
    targets = getattr(adapter.record, "target_parameters", None) or ()
    named = [name for name, _ in model.named_parameters()] if targets else []
    for target in targets:
        found = [name for name in named if name == target or name.endswith(f".{target}")]
        empty = [name for name in found if name.rpartition(".")[0] not in adapter.parameters]
        if not found or empty:
            got = f"no values for {empty[0]}" if empty else "no such parameter"
            raise _foreign(adapter.where, f"LoRA at the parameters {target}", got)


def _norms(model: nn.Module, layout: Layout, adapter: PeftFolder) -> Iterator[Part]:
    """Other gains and shifts of norms, as changes of the present ones."""
    if not adapter.norms:
        return
    options = NormOptions()
    sites = {site.write.module: site for site in Norm.sites(options, layout) if not isinstance(site, SkippedSite)}
    for name in sorted(adapter.norms, key=lambda name: list(sites).index(name) if name in sites else -1):
        values, module = adapter.norms[name], model.get_submodule(name)
        own = {key: value for key, value in module.state_dict().items() if key in ("weight", "bias")}
        if name not in sites or {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in values.items()}:
            got = ", ".join(f"{key} {tuple(value.shape)}" for key, value in own.items())
            held = ", ".join(f"{key} {tuple(value.shape)}" for key, value in values.items())
            raise _foreign(adapter.where, f"a norm {name} with {held}", f"{type(module).__name__} with {got or 'none'}")
        offset = gain_offset(module, name)
        old, new = own["weight"].float() + offset, values["weight"] + offset
        gain = torch.where(old == new, 0.0, new / old - 1)
        if not bool(gain.isfinite().all()):
            raise ArtifactError(
                "a gain that is 0 here has another value in the adapter, and no factor leads there",
                expected="gains other than 0",
                got=f"{int((~gain.isfinite()).sum())} that are 0",
                where=f"{name} in {adapter.where}",
                fix="merge the adapter into the model with peft (merge_and_unload)",
            )
        changes = {"gain": gain}
        if "bias" in own:
            changes["shift"] = values["bias"] - own["bias"].float() * (1 + gain)
        yield Part(options, sites[name], changes)


def _foreign(where: FilePath, expected: str, got: str) -> ArtifactError:
    return ArtifactError(
        "this adapter was trained on another model",
        expected=expected,
        got=got,
        where=where,
        fix="build the model in the class it was trained with; see base_model_name_or_path in its adapter_config.json",
    )
