"""The hooks that put paths into a backbone.

Hooks are objects that reach their paths through the registered `Adapters` module, never closures: a deep copy or a
pickle of the model then carries copies of the paths, not references to the original's. No module is replaced and no
class swapped, so the backbone's type, signature and state-dict keys stay what they are.
"""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from gatedadapters.paths import Path
    from gatedadapters.supernet.adapters import Adapters

RUNNING: dict[int, Any] = {}
"""What runs, by the `serial` of what was attached; falsy for nothing. A global, so that compiled code follows it: the
compiler takes whatever it reaches through a hook for constant, but not globals."""


class ModelHook:
    """Before the model runs: begin a step if the optimiser has moved, and take `task_ids` from the call."""

    def __init__(self, adapters: Adapters, *, pop_task_ids: bool) -> None:
        self.adapters, self.pop_task_ids = adapters, pop_task_ids

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook with kwargs."""
        given = kwargs.get("task_ids")
        self.adapters.begin_forward(given, batch_size(args, kwargs))
        if given is None or not self.pop_task_ids:
            return None
        return args, {name: value for name, value in kwargs.items() if name != "task_ids"}


class OutputAnchor:
    """After the model ran. Where every gate was drawn as 0 it hangs the gates on the output, at no change of value:
    without it such a step of a model without heads could not be differentiated, and under DistributedDataParallel the
    penalty would be the gates' second contribution, after they were counted as unused.
    """

    def __init__(self, adapters: Adapters) -> None:
        self.adapters = adapters

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the model."""
        self.adapters.end_forward()
        bank = self.adapters.bank
        learning = bank is not None and not bank.frozen and self.adapters.training and torch.is_grad_enabled()
        if bank is None or not learning or not self.adapters.enabled or any(bank.open_paths.values()):
            return None
        nothing = 0.0 * bank.log_alpha.sum()
        if isinstance(output, Tensor):
            return output + nothing
        items = output.items() if isinstance(output, Mapping) else enumerate(output)
        place, value = next((k, v) for k, v in items if isinstance(v, Tensor) and v.is_floating_point())
        if isinstance(output, Mapping):
            output[place] = value + nothing.to(value.dtype)  # type: ignore[index]
            return output
        return (*output[:place], value + nothing.to(value.dtype), *output[place + 1 :])


class Trained(Protocol):
    """Adapters, or a sparse delta: what is trained in a model whose own parameters are frozen."""

    def checkpointing(self) -> bool:
        """Whether the model checkpoints activations while training."""


class EmbeddingHook:
    """Lets gradients into checkpointed blocks: the re-entrant mode gives none to a block whose input needs none."""

    def __init__(self, owner: Trained) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the input embedding."""
        if torch.is_grad_enabled() and isinstance(output, Tensor) and self.owner.checkpointing():
            return output.requires_grad_() if output.is_leaf else output
        return output


class InputHook:
    """Before a module runs: remember its input for paths that write elsewhere, change it for paths that write here."""

    def __init__(self, adapters: Adapters, keys: list[str], stash: str | None) -> None:
        self.adapters, self.keys, self.stash = adapters, keys, stash

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook with kwargs."""
        if not RUNNING[self.adapters.serial]:
            return None
        hidden = first_tensor(args, kwargs)
        changed = self.change(hidden)
        return None if changed is hidden else replace_first(args, kwargs, changed)

    def change(self, hidden: Tensor) -> Tensor:
        """What the module shall read instead of `hidden`; the same object for no change."""
        if self.stash is not None:
            self.adapters.tapped[self.stash] = hidden
        return run_paths(self.adapters, self.keys, hidden, hidden) if self.keys else hidden


class OutputHook:
    """After a module ran: add what its paths contribute, in the order of their stages.

    `whole` says that the paths act on what a sub-layer as a whole returns, not on one linear map in it.
    """

    def __init__(self, adapters: Adapters, keys: list[str], taps: list[str], *, whole: bool = False) -> None:
        self.adapters, self.keys, self.taps, self.whole = adapters, keys, taps, whole

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook with kwargs."""
        if not RUNNING[self.adapters.serial]:
            return None
        is_tensor = isinstance(output, Tensor)
        target = output if is_tensor else output[0]
        changed = self.change(first_tensor(args, kwargs), target)
        if changed is target:
            return None
        return changed if is_tensor else (changed, *output[1:])

    def change(self, hidden: Tensor, target: Tensor) -> Tensor:
        """What the module, having read `hidden`, shall return instead of `target`; the same object for no change."""
        changed = run_paths(self.adapters, self.keys, hidden, target)
        for tap in self.taps:  # remembered inputs are not held beyond their use
            self.adapters.tapped.pop(tap, None)
        return changed


def run_paths(adapters: Adapters, keys: list[str], hidden: Tensor, target: Tensor) -> Tensor:
    """Run the open paths of one point, those of one kind and tap together; the same object back if all are closed."""
    opened: list[tuple[Path, Tensor | None]] = []
    for key in keys:
        is_open, gate = adapters.gate(key)
        if is_open:
            opened.append((adapters.paths[key], gate))  # type: ignore[arg-type]
    while opened:
        kind, site = type(opened[0][0]), opened[0][0].site
        tap, count = site.tap, 1
        while count < len(opened) and type(opened[count][0]) is kind and opened[count][0].site.tap == tap:
            count += 1
        members, opened = opened[:count], opened[count:]
        if tap.module != site.write.module:
            tapped = adapters.tapped[tap.module]
        else:
            tapped = hidden if tap.side == "input" else target
        target = kind.forward_together([path for path, _ in members], tapped, target, [gate for _, gate in members])
    return target


def point_hooks(adapters: Adapters) -> Iterator[tuple[str, InputHook | OutputHook]]:
    """Hooks that run the paths which change what modules take or return, and the modules where they go."""
    inputs: dict[str, list[str]] = {}
    outputs: dict[tuple[str, bool], list[str]] = {}
    stashes: dict[str, set[str]] = {}
    for key, path in sorted(adapters.typed_paths(), key=lambda item: (item[1].stage, item[0])):
        site = path.site
        if site.at_weight:
            continue
        if site.write.side == "input":
            inputs.setdefault(site.write.module, []).append(key)
        else:
            outputs.setdefault((site.write.module, site.is_sublayer), []).append(key)
        if site.tap.module != site.write.module:
            stashes.setdefault(site.write.module, set()).add(site.tap.module)
            inputs.setdefault(site.tap.module, [])
    remembered = Counter(tap for taps in stashes.values() for tap in taps)
    for name, keys in inputs.items():
        yield name, InputHook(adapters, keys, name if name in remembered else None)
    for (name, whole), keys in sorted(outputs.items(), key=lambda item: item[0][1]):
        final = whole or (name, True) not in outputs
        last = [tap for tap in sorted(stashes.get(name, ())) if remembered[tap] == 1 and final]
        yield name, OutputHook(adapters, keys, last, whole=whole)


_serials = itertools.count()


def new_serial(attached: nn.Module) -> int:
    """A key of its own in `RUNNING`, free again when `attached` is gone."""
    serial = next(_serials)
    RUNNING[serial] = False
    weakref.finalize(attached, RUNNING.pop, serial, None)
    return serial


def place(hook: InputHook | OutputHook, module: nn.Module) -> RemovableHandle:
    """Register a hook at its module."""
    if isinstance(hook, InputHook):
        return module.register_forward_pre_hook(hook, with_kwargs=True)
    return module.register_forward_hook(hook, with_kwargs=True)


def hook_embedding(adapters: Any, model: nn.Module) -> list[RemovableHandle]:
    """An `EmbeddingHook` where tokens become vectors, if the model says where that is."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        embedding = getter() if callable(getter) else None
    except NotImplementedError:
        return []
    return [embedding.register_forward_hook(EmbeddingHook(adapters))] if isinstance(embedding, nn.Module) else []


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """How many examples a call of the model carries, as far as its arguments tell."""
    named = [kwargs.get(name) for name in ("input_ids", "inputs_embeds", "pixel_values")]
    return next((len(value) for value in (*named, *args[:1]) if isinstance(value, Tensor) and value.dim() > 1), None)


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state among a module's arguments: first positional tensor, else `hidden_states`, else any float."""
    if args and isinstance(args[0], Tensor):
        return args[0]
    hidden = kwargs.get("hidden_states")
    if isinstance(hidden, Tensor):
        return hidden
    found: Tensor = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point())
    return found


def replace_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the tensor that `first_tensor` finds replaced."""
    old = first_tensor(args, kwargs)
    return tuple(value if a is old else a for a in args), {k: value if v is old else v for k, v in kwargs.items()}
