"""Putting adapters into a model: from a search space, or from a Structure that is already known."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gatedadapters.backbone import Layout, discover
from gatedadapters.backbone.attached import apply_requires_grad, check_heads_untuned, trained_originally, unpacked
from gatedadapters.backbone.fingerprint import (
    Fingerprint,
    backbone_fingerprint,
    backbone_modules,
    backbone_parameters,
    is_own,
)
from gatedadapters.backbone.quantized import check_gradients_pass, is_packed
from gatedadapters.config import PathOptions, Penalty, Schedule, SearchSpace
from gatedadapters.errors import AttachError, PathError, TaskError
from gatedadapters.gates import GateBank, GateGroup
from gatedadapters.paths import Path, Site, SkippedSite, path_class
from gatedadapters.runtime.forward import OwnForward
from gatedadapters.runtime.sharding import check_layout_of_weights
from gatedadapters.structure import Structure
from gatedadapters.supernet.adapters import Adapters, get_adapters
from gatedadapters.supernet.hooks import InputHook, OutputHook
from gatedadapters.supernet.reach import NOT_ASKED_FOR, Reach
from gatedadapters.supernet.supernet import NAME

logger = logging.getLogger(__name__)

DEFAULT_TASK = "default"


@contextmanager
def uncollected() -> Iterator[None]:
    """Within this context Python does not collect garbage: searching ten thousand new paths took a third of the
    time.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@uncollected()
def attach(
    model: nn.Module,
    space: SearchSpace | Structure | str,
    sample: Mapping[str, Tensor] | None = None,
    *,
    tasks: Sequence[str] = (DEFAULT_TASK,),
    penalty: Penalty | None = None,
    schedule: Schedule | None = None,
    total_steps: int | None = None,
    heads: Sequence[str] | None = None,
    seed: int = 0,
) -> Adapters:
    """Freeze `model` and put gated candidate paths into it, in place.

    Given a `Structure`, it puts exactly those paths in, untrained and without gates.

    Args:
        model: any transformers model, or a module that contains one.
        space: a search space, the name of a preset, or a Structure to train from scratch.
        sample: a batch that runs through the model once, to discover its layout; a default is made for token models.
        tasks: names of the tasks; each task has its own gates over the shared paths.
        penalty: see `Adapters.set_penalty`.
        schedule: see `Adapters.set_penalty`.
        total_steps: see `Adapters.set_penalty`.
        heads: parameters of the model (names or prefixes) to train and save along; by default everything outside the
            backbone of a model without a language-model head, such as a classifier.
        seed: of path weights, gates and gate noise; equal seeds give equal adapters on every machine and rank.

    Raises:
        AttachError: the model or a part of it already has adapters; a penalty on a Structure; quantised weights
            through which no gradient passes; weights that are spread over processes in another way than FSDP2's.
        LayoutError: no repeated blocks, or the sample batch does not run.
        PathError: the space selects nothing, or a path does not fit its point.
        ConfigError: unknown preset.
        BudgetError: see `set_penalty`.

    The model is left untouched by all of them. A model that is sharded already is attached to on every process.
    """
    check_no_adapters(model)
    check_layout_of_weights(model)
    space = SearchSpace.load(space) if isinstance(space, str) else space
    head_names = find_heads(model, heads)
    with unpacked(model):
        check_gradients_pass(model)
        identity = backbone_fingerprint(model, skip=frozenset(head_names))
        if isinstance(space, Structure):
            if penalty is not None:
                raise AttachError(
                    "a structure has no gates for a penalty to act on",
                    expected="no penalty",
                    got=repr(penalty),
                    where="attach",
                    fix="drop penalty=, or attach a search space",
                )
            built = _from_scratch(model, space, identity, seed)
        else:
            built = _from_space(model, space, discover(model, sample), tasks, identity, head_names, seed)
            for _, path in built.typed_paths():
                path.start_from(model.get_submodule(path.site.write.module))
            if penalty is not None:
                built.set_penalty(penalty, schedule=schedule, total_steps=total_steps)
        return install(built, model, head_names)


def check_no_adapters(model: nn.Module) -> None:
    """Check that neither a model nor a part of it has adapters.

    Raises:
        AttachError: adapters are found.
    """
    for name, module in model.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        inside = any(isinstance(hook, InputHook | OutputHook) for hook in hooks)
        inside |= any(isinstance(vars(module).get(slot), OwnForward) for slot in ("forward", "_old_forward"))
        if hasattr(module, NAME) or inside:
            raise AttachError(
                "this model already has adapters",
                expected="a model without adapters, as a whole and in its parts",
                got=f"adapters at {name or 'the model itself'}",
                where=type(model).__name__,
                fix="ga.detach what they were attached to first",
            )


def install(built: Adapters, model: nn.Module, head_names: Sequence[str]) -> Adapters:
    """Put adapters into a model and freeze all of it but its heads. If anything fails, the model is left untouched.

    Raises:
        AttachError: a sparse delta tunes a head, or a weight that a path sits at.
    """
    check_layout_of_weights(model)
    check_heads_untuned(model, head_names)
    for key, path in built.typed_paths():
        if not path.site.at_weight:
            continue
        owner = model.get_submodule(path.site.write.module)
        weight = owner._parameters.get(path.site.write.parameter)
        if weight is not None and is_packed(weight):
            raise AttachError(
                "a path that changes a weight cannot change a packed one",
                expected="a floating-point weight",
                got=f"{type(weight).__name__}, {weight.dtype}",
                where=f"path {key}",
                fix="search without it (exclude: in the path's `at`), or let the quantiser leave this module out "
                f"(bitsandbytes: llm_int8_skip_modules=[{path.site.write.module.rpartition('.')[2]!r}, ...])",
            )
        if path.site.write.parameter in owner.__dict__:
            raise AttachError(
                "something stands in for this weight already",
                expected="a weight of the backbone's own",
                got=type(owner.__dict__[path.site.write.parameter]).__name__,
                where=f"path {key}",
                fix="exclude it from the mask of the sparse delta, or search without weight_lora",
            )
    built.head_names = tuple(head_names)
    built._required_grad = trained_originally(model)
    built.train(model.training)
    move_beside(built, model)
    try:
        built._model.append(model)
        built.hook(model)
        model.add_module(NAME, built)
        apply_requires_grad(model, built._required_grad)
    except BaseException:
        built.unhook()
        if hasattr(model, NAME):
            delattr(model, NAME)
        apply_requires_grad(model, built._required_grad)
        raise
    return built


def detach(model: nn.Module) -> Adapters:
    """Take the adapters out of `model`, which is then bit for bit what it was; returns them.

    Raises:
        AttachError: the model has none.
    """
    adapters = get_adapters(model)
    adapters.detach()
    return adapters


def candidates(
    space: SearchSpace, layout: Layout
) -> tuple[dict[str, tuple[PathOptions, Site]], tuple[SkippedSite, ...]]:
    """Every candidate that a space offers on a layout, by key, and the sites where a selected candidate does not fit.

    Raises:
        PathError: the space selects nothing.
    """
    found: dict[str, tuple[PathOptions, Site]] = {}
    skipped_sites: list[SkippedSite] = []
    seen: Counter[str] = Counter()
    for options in space.paths:
        for site in path_class(options).sites(options, layout):
            if isinstance(site, SkippedSite):
                skipped_sites.append(site)
                continue
            place = str(site.tap) if site.tap.parameter else site.tap.module
            stem = f"{place.replace('.', '/')}:{options.kind}"
            seen[stem] += 1
            found[stem if seen[stem] == 1 else f"{stem}#{seen[stem]}"] = (options, site)
    taken = {(options.kind, str(site.tap)) for options, site in found.values()}
    skipped_sites = [skipped for skipped in skipped_sites if (skipped.instead, skipped.module) not in taken]
    if not found:
        maps = [f"{sublayer.kind}.{linear.role}" for _, sublayer, linear in (*layout.maps(), *layout.maps_outside())]
        norms = [f"{sublayer.kind}.{norm.role}" for _, sublayer, norm in layout.norms()]
        offered = ", ".join(sorted({*maps, *norms}))
        raise PathError(
            "the search space selects no point of this model",
            expected="at least one candidate",
            got="; ".join(f"{m.module}: {m.reason}" for m in skipped_sites[:3]) or "no match",
            where=f"search space {space.name!r} on {layout.model_class}",
            fix=f"the model offers {offered}",
        )
    return found, tuple(skipped_sites)


def gate_groups(found: Mapping[str, tuple[PathOptions, Site]], n_tasks: int) -> list[GateGroup]:
    """The candidates as the gate bank counts them. With several tasks, each unit also stores one routing value per
    task.
    """
    routing = n_tasks if n_tasks > 1 else 0
    result = []
    for key, (options, site) in found.items():
        units, params, flops = path_class(options).cost(site, options)
        result.append(GateGroup(key, site.block, str(site.tap), units, params + routing, flops))
    return result


def _from_space(
    model: nn.Module,
    space: SearchSpace,
    layout: Layout,
    tasks: Sequence[str],
    identity: Fingerprint,
    head_names: Sequence[str],
    seed: int,
) -> Adapters:
    found, skipped_sites = candidates(space, layout)
    if len(tasks) > 1 and not layout.examples_first:
        raise TaskError(
            "this model's hidden state counts positions first, so that tasks cannot be told apart in it",
            expected="examples in the first dimension",
            got=layout.model_class,
            where="attach(tasks=)",
            fix="attach for one task at a time, or load the model with batch_first=True if it knows that",
        )
    adapters = gated_candidates(found, space, layout, tasks=tasks, identity=identity, seed=seed)
    adapters.skipped_sites = skipped_sites
    for text in [f"{m.kind} does not fit {m.module}: {m.reason}" for m in skipped_sites]:
        logger.warning(text)
    sites = [site for _, site in found.values()]
    adapters.reach = Reach.of(model, layout, sites, skipped_sites, heads=head_names)
    logger.info("%s %s", space.name, adapters.reach)
    for left in adapters.reach.left:
        if left.reason != NOT_ASKED_FOR:
            logger.warning("not reached: %s (%d matrices): %s; %s", left.role, left.matrices, left.reason, left.remedy)
    return adapters


def gated_candidates(
    found: Mapping[str, tuple[PathOptions, Site]],
    space: SearchSpace,
    layout: Layout,
    *,
    tasks: Sequence[str],
    identity: Fingerprint,
    seed: int,
) -> Adapters:
    """Gated candidates, not yet in the model.

    Raises:
        TaskError: no tasks, or two of one name.
    """
    if not tasks or isinstance(tasks, str) or len(set(tasks)) != len(tasks):
        raise TaskError(
            "these task names cannot be used",
            expected="one or more distinct task names",
            got=repr(tasks),
            where="attach(tasks=)",
            fix="pass a tuple or a list of names",
        )
    generator = torch.Generator().manual_seed(seed)
    paths = {key: path_class(options)(site, options, generator) for key, (options, site) in found.items()}
    adapters = Adapters(paths, tasks=tasks, space=space, identity=identity, seed=seed)
    adapters.bank = GateBank(gate_groups(found, len(tasks)), space.gates, tasks=len(tasks), seed=seed)
    adapters.layout = layout
    return adapters


def adapters_of(model: nn.Module, structure: Structure, paths: Mapping[str, Path]) -> Adapters:
    """Compact adapters with these paths, not yet in the model.

    Raises:
        PathError: the structure names a module or a weight that the model lacks.
    """
    modules = dict(backbone_modules(model))
    for record in structure.paths:
        site = paths[record.key].site
        for point in (site.tap, site.write):  # a host contains the weight's module
            module = modules.get(point.module)
            weight = module._parameters.get(point.parameter) if module is not None else None
            if module is None or (point.parameter and (weight is None or tuple(weight.shape) != site.weight_shape)):
                raise PathError(
                    "this structure does not fit the model",
                    expected=f"{point} of shape {site.weight_shape}" if point.parameter else point.module,
                    got="none of that name" if weight is None else f"shape {tuple(weight.shape)}",
                    where=f"path {record.key} on {type(model).__name__}",
                    fix="attach it to the backbone it was made for",
                )
    adapters = Adapters(
        paths, tasks=structure.tasks, space=structure.space, identity=structure.fingerprint, seed=structure.seed
    )
    adapters.structure = structure
    return adapters


def _from_scratch(model: nn.Module, structure: Structure, identity: Fingerprint, seed: int) -> Adapters:
    """Untrained adapters of a Structure on a backbone that need not be the one it was made on."""
    generator = torch.Generator().manual_seed(seed)
    paths: dict[str, Path] = {}
    for record in structure.paths:
        paths[record.key] = path = record.build(generator)
        path.routing = structure.routing(record)
    fresh = structure.model_copy(update={"version": 1, "fingerprint": identity, "lineage": ()})
    adapters = adapters_of(model, fresh, paths)
    adapters.seed = seed
    return adapters


def move_beside(adapters: Adapters, model: nn.Module) -> None:
    """Move each path to the device of the module it writes to, and the gates to that of the first path."""
    modules = dict(backbone_modules(model))
    device = None
    for _, path in adapters.typed_paths():
        home = next((p.device for _, p, _ in backbone_parameters(modules[path.site.write.module])), None)
        if home is not None and home.type != "meta":
            if home.type != "cpu":  # where it was built
                path.to(home)
            device = device or home
    if device is not None:
        for part in (adapters.bank, adapters.pressure):
            if part is not None:
                part.to(device)


def find_heads(model: nn.Module, heads: Sequence[str] | None) -> tuple[str, ...]:
    """Names of a model's task heads, which are trained and saved with the adapters.

    Args:
        model: the model.
        heads: names or prefixes of parameters; default: everything outside the backbone, such as a classifier, and
            nothing if the model has a language-model head.

    Raises:
        AttachError: no parameter has such a name.
    """
    names = [name for name, _ in model.named_parameters() if not is_own(name)]
    if heads is not None:
        missing = [h for h in heads if not any(n == h or n.startswith(f"{h}.") for n in names)]
        if missing:
            raise AttachError(
                "the model has no such heads",
                expected="names or prefixes of the model's parameters",
                got=", ".join(missing),
                where="attach(heads=)",
                fix=f"the model's top-level parts are {', '.join(n for n, _ in model.named_children())}",
            )
        return tuple(n for n in names if any(n == h or n.startswith(f"{h}.") for h in heads))
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix and not isinstance(model, PreTrainedModel):
        inside = [f"{name}." for name, m in model.named_modules() if name and isinstance(m, PreTrainedModel)]
        own = [name for name in names if not any(name.startswith(part) for part in inside)]
        if inside and own:
            logger.warning(
                "%s stays frozen: pass heads=[...] to train what %s puts around its transformers model",
                ", ".join(own[:4]),
                type(model).__name__,
            )
    output_embeddings = getattr(model, "get_output_embeddings", None)
    generates = callable(output_embeddings) and output_embeddings() is not None
    if not prefix or not hasattr(model, prefix) or generates:
        return ()
    return tuple(name for name in names if not name.startswith(f"{prefix}."))
