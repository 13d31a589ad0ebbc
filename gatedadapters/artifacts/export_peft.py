"""Compact structures of LoRA, scales, norms and rows as a folder that peft loads; writing it needs no peft."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path as FilePath
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from gatedadapters.artefact_files import DTYPES, check_finite, record_digest, tensors_digest, write_tensors
from gatedadapters.backbone.fingerprint import fingerprint
from gatedadapters.backbone.quantized import is_quantized
from gatedadapters.errors import ArtifactError, TaskError
from gatedadapters.paths import LoRA, Norm, Path, Rows, Scale, Site, WeightLoRA
from gatedadapters.paths.peft_kinds import TOGETHER, peft_has
from gatedadapters.runtime.sharding import class_name, in_a_group, is_sharded, on_first, whole
from gatedadapters.safe_files import whole_folder
from gatedadapters.supernet.adapters import Adapters
from gatedadapters.supernet.merging import merged_values, table_factor

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
BACKBONE = "backbone"  # key of the weights' metadata: digest of the backbone's values, for import_peft

TENSORS, COMPUTED = "digest", "config_digest"  # further keys: what the files must hold, so that damage is noticed
COMPUTED_FIELDS = (
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "fan_in_fan_out",
    "use_rslora",
)

# Names that peft gives a meaning of its own. In families whose experts older releases of transformers kept apart it
# takes these, wherever they occur, for such experts; in state-space families it refuses what is called out_proj.
_EXPERT_NAMES = {"mixtral": {"gate", "w1", "w2", "w3"}, "qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"}}
_STATE_SPACE = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}


def export_peft(
    adapters: Adapters,
    folder: str | FilePath,
    *,
    task: str | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> None:
    """Write a compact structure of LoRA, scales, norms or rows of tokens as a standard peft adapter.

    `PeftModel.from_pretrained(model, folder)` on the same backbone then computes the same, with no key missing or
    unexpected. Ranks may differ between modules: gates lie in B, and `lora_alpha = r` is the largest rank with
    `alpha_pattern = rank_pattern`, so that the scale is 1 also for a reader that ignores the patterns. A structure of
    scales becomes an IA3 adapter, one of norms an LN tuning adapter, one of rows at a table of token ids a trainable
    tokens adapter. LoRA at experts and other parameters becomes its `target_parameters`, padded to one rank. Norms
    beside LoRA or scales become `modules_to_save`, as task heads do, for which some inference servers have no use; rows
    beside LoRA become its `trainable_token_indices`.

    The weights file holds 4 (or 2) bytes a parameter and a header of about 150 bytes a matrix: below 2 % from
    about 16 kB a module on (rank 1 at width 2048 in fp32).

    Args:
        adapters: compact, attached to the model that the adapter is for.
        folder: a new or an empty folder.
        task: which task's adapter, where there are several: peft knows no routing by task.
        dtype: of what is stored, float32 or bfloat16.
        overwrite: replace an export that the folder holds, in one step.

    Raises:
        ArtifactError: the adapters are not compact, hold what peft cannot express (it is named, and what to do
            about it), or the folder is not free. Nothing is written.
        TaskError: unknown task.
    """
    paths = paths_of_task(adapters, task, where="export_peft")
    kinds = {type(path) for path, _ in paths}
    if not peft_has(kinds):
        raise _foreign_kinds([path for path, _ in paths])
    _check_parameters([path.site for path, _ in paths if path.site.at_weight])
    if dtype not in DTYPES.values():
        expected = "torch.float32 or torch.bfloat16"
        raise ArtifactError(
            "weights of this type cannot be written",
            expected=expected,
            got=str(dtype),
            where="export_peft(dtype=)",
            fix="choose one of them",
        )
    model = adapters.model
    by_kind = {kind: [(path, routing) for path, routing in paths if type(path) is kind] for kind in kinds}
    index = adapters.tasks.index(task) if task is not None else 0
    with adapters.disabled():  # merged adapters are no part of the backbone
        norms = _norms(model, [path for path, _ in by_kind.get(Norm, ())], index)
        rows = _rows(model, [path for path, _ in by_kind.get(Rows, ())], index)
    heads, saved = _modules_to_save(adapters, norms if kinds != {Norm} else {})
    if kinds & {LoRA, WeightLoRA}:
        config, tensors = _lora(model, by_kind.get(LoRA, []), by_kind.get(WeightLoRA, []))
        if rows:
            config["trainable_token_indices"] = {name: tokens for name, (tokens, _) in rows.items()}
            tensors |= {f"{n}.token_adapter.trainable_tokens_delta": values for n, (_, values) in rows.items()}
    elif Scale in kinds:
        config, tensors = _ia3(model, by_kind[Scale])
    elif Norm in kinds:
        config, tensors = _ln_tuning(model, norms)
    else:
        config, tensors = _trainable_tokens(rows, heads)
    shape = getattr(model, "config", None)
    config = {
        "auto_mapping": {"base_model_class": class_name(model), "parent_library": type(model).__module__},
        "base_model_name_or_path": getattr(shape, "_name_or_path", None) or None,
        "task_type": None,
        "inference_mode": True,
        **({} if kinds == {Rows} else {"modules_to_save": heads or None}),
        **config,
    }
    stored = {PREFIX + name: value.to(dtype) for name, value in (tensors | saved).items()}
    check_finite(stored, where="export_peft", fix="train again with a lower rate")
    metadata = {"format": "pt", TENSORS: tensors_digest(stored), COMPUTED: config_digest(config)}
    if not any(is_quantized(parameter) for parameter in model.parameters()):  # else it is for the original as well
        with adapters.disabled():  # merged adapters are no part of the backbone
            metadata[BACKBONE] = fingerprint(model, skip=frozenset(saved)).values

    def write() -> None:
        with whole_folder(folder, files={CONFIG, WEIGHTS}, overwrite=overwrite, together=in_a_group()) as new:
            (new / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
            write_tensors(new / WEIGHTS, stored, metadata=metadata)

    on_first(is_sharded(model), write)


def config_digest(config: Mapping[str, Any]) -> str:
    """A digest of the fields of a peft configuration that say what it computes; others may be changed by users."""
    fields = {field: config.get(field) for field in COMPUTED_FIELDS}
    if config.get("target_parameters"):  # exports of earlier releases have none, and digests without
        fields["target_parameters"] = config["target_parameters"]
    return record_digest(fields)


def paths_of_task(adapters: Adapters, task: str | None, *, where: str) -> list[tuple[Path, Tensor | None]]:
    """The paths that a task uses, with its routing of their units where there are several tasks.

    Args:
        adapters: compact.
        task: None if there is one.
        where: who asks, for errors.

    Raises:
        ArtifactError: they are not compact, there are several tasks and none is named, or none of the paths is used.
        TaskError: unknown task.
    """
    structure = adapters.structure
    if adapters.bank is not None or structure is None:
        raise ArtifactError(
            "only compact adapters are exported",
            expected="adapters whose gates are folded into their weights",
            got=f"gates over {len(adapters.paths)} candidate paths",
            where=where,
            fix="call adapters.compact() first",
        )
    if task is not None and task not in adapters.tasks:
        expected = f"one of {', '.join(adapters.tasks)}"
        raise TaskError("no such task", expected=expected, got=repr(task), where=f"{where}(task=)", fix="name a task")
    if task is None and len(adapters.tasks) > 1:
        raise ArtifactError(
            "an exported adapter has no routing by task",
            expected="adapters of one task",
            got=f"several: {', '.join(adapters.tasks)}",
            where=where,
            fix="export each into a folder of its own with task=, or keep one with adapters.compact(task=...)",
        )
    paths: list[tuple[Path, Tensor | None]] = []
    for record in structure.paths:
        path = cast(Path, adapters.paths[record.key])
        routing = None if path.routing is None else path.routing[adapters.tasks.index(cast(str, task))]
        if routing is None or bool(routing.any()):
            paths.append((path, routing))
    if not paths:
        raise ArtifactError(
            "there is nothing to export",
            expected="at least one path",
            got="none that is used" if task is None else f"none that task {task!r} uses",
            where=where,
            fix="search with a larger budget; without paths the backbone alone computes the same",
        )
    return paths


def _foreign_kinds(paths: Collection[Path]) -> ArtifactError:
    """What peft has no words for, by name."""
    first = {path.kind: f"{path.kind} at {path.site.write}" for path in reversed(list(paths))}
    known = {kind for one, beside in TOGETHER for kind in one | beside}
    foreign = {path.kind for path in paths if type(path) not in known}
    message = f"peft has no {' or '.join(sorted(foreign))} adapters" if foreign else "a peft adapter is of one kind"
    return ArtifactError(
        message,
        expected="lora and weight_lora, with norm and rows beside; or scale, with norm; or norm or rows alone",
        got=", ".join(first[kind] for kind in sorted(first)),
        where="export_peft",
        fix="search in a space of such paths, merge into the model with adapters.merge_and_detach if its kinds can, or "
        "keep the adapter as it is with adapters.save",
    )


def low_rank_maps(paths: Collection[tuple[Path, Tensor | None]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Down (rank, in) and up (out, rank) of every module, ranks of several paths at one module side by side.

    Args:
        paths: LoRA paths at linear maps and tables, each with the routing of its units or None.
    """
    downs: dict[str, list[Tensor]] = {}
    ups: dict[str, list[Tensor]] = {}
    for path, routing in paths:
        lora, name = cast(LoRA, path), path.site.write.module
        used = slice(None) if routing is None else routing.nonzero().flatten()
        downs.setdefault(name, []).append(lora.down.detach()[used])
        ups.setdefault(name, []).append((lora.up if routing is None else lora.up * routing).detach()[:, used])
    return {name: (torch.cat(downs[name]), torch.cat(ups[name], 1)) for name in sorted(downs)}


def lora_config(ranks: Mapping[str, int], rank: int) -> dict[str, Any]:
    """The fields of a LoRA whose scale is 1 for every reader, also for one that ignores the patterns.

    Args:
        ranks: of the modules, by the name or the expression that they go by.
        rank: the largest.
    """
    pattern = {name: own for name, own in ranks.items() if own != rank}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _lora(
    model: nn.Module, paths: list[tuple[Path, Tensor | None]], experts: list[tuple[Path, Tensor | None]]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A (rank, in) and B (out, rank) of every module, and of every parameter that holds experts."""
    maps = low_rank_maps(paths)
    _check_names(model, maps)
    tables = {path.site.write.module for path, _ in paths if path.site.reads_ids}
    conv = _storage(model, maps.keys() - tables)
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in maps.items():
        if name in tables:  # peft multiplies what it adds there with the factor of the table
            up = up / table_factor(model.get_submodule(name), name)
            tensors[f"{name}.lora_embedding_A"], tensors[f"{name}.lora_embedding_B"] = down, up
        else:
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = down, up
    ranks = {name: len(down) for name, (down, _) in maps.items()}
    stacks = _expert_stacks(experts)
    largest = max([*ranks.values(), *(down.shape[1] for down, _ in stacks.values())])
    anchored = _ambiguous(model, ranks)
    config = lora_config({f"^{re.escape(n)}" if anchored else n: rank for n, rank in ranks.items()}, largest)
    config["target_modules"] = _regex(ranks) if anchored else sorted(ranks)
    config["fan_in_fan_out"] = conv
    if stacks:
        config["target_parameters"] = sorted(stacks)
        tensors |= _parameter_tensors(model, stacks, largest)
    return config, tensors


def _check_parameters(sites: Collection[Site]) -> None:
    """Raise where peft would not reach a parameter, or take its rows for columns."""
    for site in sites:
        if site.host != site.write.module or (site.transposed and not site.experts):
            raise ArtifactError(
                "peft adapts parameters of modules that multiply with them as x W^T",
                expected="such a module",
                got=f"{site.host}, which multiplies with it{' as x W' if site.transposed else ''}",
                where=f"weight_lora at {site.write}",
                fix="leave it out of the search space (at: exclude), or keep the adapter with adapters.save",
            )


def _expert_stacks(paths: list[tuple[Path, Tensor | None]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Down (experts, rank, in) and up (experts, out, rank) of every parameter, padded to its largest rank."""
    stacks: dict[str, tuple[Tensor, Tensor]] = {}
    for path, routing in paths:
        up, down = cast(WeightLoRA, path).factors(routing)
        name = str(path.site.write)
        if name in stacks:
            down, up = torch.cat([stacks[name][0], down], 1), torch.cat([stacks[name][1], up], 2)
        stacks[name] = down.detach(), up.detach()
    return stacks


def _parameter_tensors(model: nn.Module, stacks: Mapping[str, tuple[Tensor, Tensor]], rank: int) -> dict[str, Tensor]:
    """A (experts x rank, in), expert by expert, and B (out, rank x experts), rank by rank, of every parameter.

    peft wraps a module once for each of its parameters, in their order. All get the same rank, by zeros: it takes a
    rank_pattern of parameters, but warns of it.
    """
    tensors: dict[str, Tensor] = {}
    for module in sorted({name.rpartition(".")[0] for name in stacks}):
        names = [f"{module}.{own}" for own, _ in model.get_submodule(module).named_parameters(recurse=False)]
        for depth, name in enumerate(reversed([name for name in names if name in stacks])):
            down, up = stacks[name]
            spare, inner = rank - down.shape[1], f"{module}{'.base_layer' * depth}"
            tensors[f"{inner}.lora_A.weight"] = F.pad(down, (0, 0, 0, spare)).flatten(0, 1)
            tensors[f"{inner}.lora_B.weight"] = F.pad(up, (0, spare)).permute(1, 2, 0).flatten(1)
    return tensors


def _ia3(model: nn.Module, paths: list[tuple[Path, Tensor | None]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The factors 1 + s of every module, (out, 1) or, where they act on its input, (1, in)."""
    factors: dict[str, Tensor] = {}
    sides: dict[str, set[str]] = {}
    for path, routing in paths:
        scale, point = cast(Scale, path), path.site.write
        shift = scale.shift.detach() if routing is None else scale.shift.detach() * routing
        factors[point.module] = factors.get(point.module, torch.ones_like(shift)) * (1 + shift)
        sides.setdefault(point.module, set()).add(point.side)
        if len(sides[point.module]) > 1:
            raise ArtifactError(
                "IA3 scales one side of a module",
                expected="a scale at the input or at the output",
                got="both",
                where=point.module,
                fix="offer one side in the search space, or keep the adapter as it is with adapters.save",
            )
    conv, anchored = _storage(model, factors), _ambiguous(model, factors)
    inner = sorted(name for name in factors if sides[name] == {"input"})
    config = {
        "peft_type": "IA3",
        "target_modules": _regex(factors) if anchored else sorted(factors),
        "feedforward_modules": _regex(inner) if anchored else inner,
        "fan_in_fan_out": conv,
        "init_ia3_weights": True,
    }
    tensors = {f"{n}.ia3_l": factors[n][None] if n in inner else factors[n][:, None] for n in sorted(factors)}
    return config, tensors


def _norms(model: nn.Module, paths: list[Path], index: int) -> dict[str, dict[str, Tensor]]:
    """Everything in the norms that have paths, with the paths merged, by module and name."""
    merged = merged_values(model, {str(number): path for number, path in enumerate(paths)}, index)
    found: dict[str, dict[str, Tensor]] = {}
    for path in paths:
        name = path.site.write.module
        state = model.get_submodule(name).state_dict()
        found[name] = {key: merged.get(f"{name}.{key}", value.detach()) for key, value in state.items()}
    return found


def _ln_tuning(model: nn.Module, norms: Mapping[str, Mapping[str, Tensor]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The norms themselves, which peft exchanges for those of the model."""
    anchored = _ambiguous(model, norms)
    config = {"peft_type": "LN_TUNING", "target_modules": _regex(norms) if anchored else sorted(norms)}
    return config, {f"{n}.ln_tuning_layers.{key}": value for n in sorted(norms) for key, value in norms[n].items()}


def _rows(model: nn.Module, paths: list[Path], index: int) -> dict[str, tuple[list[int], Tensor]]:
    """The tokens of each table and their merged rows."""
    tokens: dict[str, set[int]] = {}
    for path in paths:
        name = path.site.write.module
        weight = model.get_submodule(name)._parameters["weight"]
        users = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight]
        if not path.site.reads_ids or len(users) > 1:
            raise ArtifactError(
                "peft has no such rows: it keeps tied weights tied, and takes maps to the vocabulary for tied ones",
                expected="rows at a table of token ids whose weight nothing else uses",
                got=" and ".join(users),
                where=f"{path.kind} at {name}",
                fix="untie the weights before attaching, or keep the adapter as it is with adapters.save",
            )
        tokens.setdefault(name, set()).update(cast(Rows, path).tokens.tolist())
    merged = merged_values(model, {str(number): path for number, path in enumerate(paths)}, index)
    return {name: (sorted(own), merged[f"{name}.weight"][sorted(own)]) for name, own in tokens.items()}


def _trainable_tokens(
    rows: Mapping[str, tuple[list[int], Tensor]], heads: Collection[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The rows themselves, which peft puts in the place of those of the table."""
    if len(rows) > 1 or heads:
        raise ArtifactError(
            "such a peft adapter has one list of tokens and no task heads",
            expected="rows at one table, and no trained heads",
            got=", ".join([*sorted(rows), *heads]),
            where="export_peft",
            fix="search with lora paths beside, or keep the adapter as it is with adapters.save",
        )
    ((name, (tokens, values)),) = rows.items()
    config = {
        "peft_type": "TRAINABLE_TOKENS",
        "target_modules": [name],
        "token_indices": tokens,
        "init_weights": True,
    }
    return config, {f"{name}.trainable_tokens_delta": values}


def _storage(model: nn.Module, names: Collection[str]) -> bool:
    """Whether weights are stored (in, out); raises where a module is none that peft adapts."""
    modules = {name: model.get_submodule(name) for name in names}
    foreign = {n: type(m).__name__ for n, m in modules.items() if not isinstance(m, (nn.Linear, Conv1D))}
    if foreign:
        raise ArtifactError(
            "peft adapts no such module",
            expected="torch.nn.Linear or transformers' Conv1D",
            got=", ".join(sorted(set(foreign.values()))),
            where=", ".join(sorted(foreign)[:3]) + (", ..." if len(foreign) > 3 else ""),
            fix="leave it out of the search space (at: exclude), or keep the adapter with adapters.save",
        )
    return any(isinstance(module, Conv1D) for module in modules.values())


def _check_names(model: nn.Module, names: Collection[str]) -> None:
    """Raise where peft would take a module of this name for something else."""
    family = getattr(getattr(model, "config", None), "model_type", "")
    conversions = import_module("transformers.conversion_mapping")  # peft reads the same table
    ancestor = getattr(conversions, "_MODEL_TO_CONVERSION_PATTERN", {}).get(family)
    taken = _EXPERT_NAMES.get("mixtral" if family == "mixtral" else ancestor or "", set())
    taken = taken | ({"out_proj"} if family in _STATE_SPACE else set())
    lost = sorted(name for name in names if name.rpartition(".")[2] in taken)
    if lost:
        raise ArtifactError(
            f"peft cannot adapt these modules of a {family} model: it reserves their names",
            expected=f"no module called {', '.join(sorted(taken))}",
            got=", ".join(lost[:3]) + (", ..." if len(lost) > 3 else ""),
            where="export_peft",
            fix="leave them out of the search space (at: exclude), or keep the adapter with adapters.save",
        )


def _ambiguous(model: nn.Module, names: Collection[str]) -> bool:
    """Whether some other module's name ends like one of these: peft compares ends of names."""
    return any(other.endswith(f".{name}") for other, _ in model.named_modules() for name in names)


def _regex(names: Collection[str]) -> str:
    """A regular expression that peft matches against whole names."""
    return "|".join(re.escape(name) for name in sorted(names)) or "(?!)"


def _modules_to_save(
    adapters: Adapters, norms: Mapping[str, Mapping[str, Tensor]]
) -> tuple[list[str], dict[str, Tensor]]:
    """The modules that own the trained heads, and norms, and everything in them by name."""
    model = adapters.model
    owners = {name.rpartition(".")[0] for name in adapters.head_names} | norms.keys()
    owners = {name for name in owners if not any(name.startswith(f"{other}.") for other in owners)}
    inside = tuple(f"{name}." for name in owners)
    learned = {id(parameter) for parameter in adapters.head_parameters()}
    problems = ["a parameter of the model itself"] if "" in owners else []
    problems += [
        f"{name}, which is tied to one"
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in learned and not name.startswith(inside)
    ]
    problems += [  # peft takes whatever ends in the name of a module to save
        f"{other}, whose name ends like one"
        for other, _ in model.named_modules(remove_duplicate=False)
        if other not in owners and other.endswith(tuple(owners)) and owners and not other.startswith(inside)
    ]
    if problems:
        raise ArtifactError(
            f"peft cannot hold these {'norms' if norms else 'task heads'}",
            expected="modules of their own, and of names that no other module's name ends in",
            got="; ".join(problems[:3]),
            where=", ".join([*adapters.head_names, *norms][:3]),
            fix="keep the adapter as it is with adapters.save, or attach with heads=() and train none",
        )
    states: Mapping[str, Tensor] = {
        f"{owner}.{name}": whole(value.detach())
        for owner in sorted(owners)
        for name, value in model.get_submodule(owner).state_dict().items()
    }
    changed = {f"{name}.{key}": value for name, own in norms.items() for key, value in own.items()}
    return sorted(owners), dict(states) | changed
