"""The hooks that put paths into a backbone.

Hooks are objects that reach their paths through the registered `Supernet` module, never closures: a deep copy or a
pickle of the model then carries copies of the paths, not references to the original's. No module is replaced and no
class swapped, so the backbone's type, signature and state-dict keys stay what they are. What belongs to one forward
lives in its `Call`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gatedadapters.errors import AttachError
from gatedadapters.paths import Path
from gatedadapters.runtime.call import Call
from gatedadapters.supernet.supernet import Supernet

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a module's forward."""


class ModelHook:
    """Before the model runs: begin the call, taking `task_ids` from its arguments."""

    def __init__(self, supernet: Supernet, *, pop_task_ids: bool) -> None:
        self.supernet, self.pop_task_ids = supernet, pop_task_ids

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Forward pre-hook with kwargs."""
        given = kwargs.get("task_ids")
        self.supernet.begin_forward(given, batch_size(args, kwargs))
        if given is None or not self.pop_task_ids:
            return None
        return args, {name: value for name, value in kwargs.items() if name != "task_ids"}


class OutputAnchor:
    """After the model ran, or raised: the call ends.

    In training, a sharded model is watched until its backward pass ends; see `EndOfBackward`.

    If all gates were drawn as 0, it adds `0 * log_alpha.sum()` to the outputs, so that backward and
    DistributedDataParallel still reach the gates, whichever output the loss is computed from. Without it the loss of a
    model without heads would need no gradient, and DDP would count the gates as unused before the penalty adds their
    gradient.
    """

    def __init__(self, supernet: Supernet) -> None:
        self.supernet = supernet

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the model, called also after an exception; `output` is None then."""
        supernet, bank = self.supernet, self.supernet.bank
        runs = supernet.call().runs
        supernet.end_forward()
        learning = bank is not None and not bank.frozen and supernet.training and torch.is_grad_enabled()
        training = output is not None and runs and supernet.training and torch.is_grad_enabled()
        if not training:
            return None
        averaging = supernet.averaging
        closed = bank is not None and learning and not any(bank.open_paths.values())
        if not closed and (averaging is None or averaging.follow(output)):
            return None
        if not closed and not supernet.weight_parameters():
            return None
        anchor = bank.log_alpha if closed and bank is not None else supernet.weight_parameters()[0]
        anchored = _anchored(output, 0.0 * anchor.sum())
        if averaging is not None:
            averaging.follow(anchored)
        return anchored


def _anchored(output: Any, nothing: Tensor) -> Any:
    """The output with `nothing`, which is 0, added to every tensor in it."""
    if isinstance(output, Mapping):
        for name, value in output.items():
            output[name] = _plus(value, nothing)  # type: ignore[index]
        return output
    return tuple(_plus(value, nothing) for value in output) if isinstance(output, tuple) else _plus(output, nothing)


def _plus(value: Any, nothing: Tensor) -> Any:
    return value + nothing.to(value.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class Checkpointing(Protocol):
    """Adapters, or a sparse delta: something trained inside a model whose own parameters are frozen."""

    def checkpointing(self) -> bool:
        """Whether the model checkpoints activations while training."""


class EmbeddingHook:
    """Lets gradients into checkpointed blocks: the re-entrant mode gives none to a block whose input needs none."""

    def __init__(self, owner: Checkpointing) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the input embedding."""
        if torch.is_grad_enabled() and isinstance(output, Tensor) and self.owner.checkpointing():
            return output.requires_grad_() if output.is_leaf else output
        return output


class InputHook:
    """Before a module runs: remember its input for paths that write elsewhere, change it for paths that write here.

    Args:
        supernet: whose paths.
        keys: of the paths that write here.
        remembered: the module's name, if a path taps its input and writes at another module.
    """

    def __init__(self, supernet: Supernet, keys: list[str], remembered: str | None) -> None:
        self.supernet, self.keys, self.remembered = supernet, keys, remembered

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Forward pre-hook with kwargs."""
        call = self.supernet.call()
        if not call.runs:
            return None
        hidden = hidden_argument(args, kwargs)
        changed = self.change(hidden, call)
        return None if changed is hidden else replace_hidden(args, kwargs, changed)

    def change(self, hidden: Tensor, call: Call) -> Tensor:
        """What the module reads instead of `hidden`; the same object for no change."""
        if self.remembered is not None:
            call.inputs[self.remembered] = hidden
        return run_paths(self.supernet, self.keys, hidden, hidden, call) if self.keys else hidden


class OutputHook:
    """After a module ran: add what its paths contribute, in the order of their stages.

    Args:
        supernet: whose paths.
        keys: of the paths that write here.
        taps: modules whose remembered inputs are not needed after this.
        whole: whether the paths act on what a sub-layer as a whole returns, not on one linear map in it.
    """

    def __init__(self, supernet: Supernet, keys: list[str], taps: list[str], *, whole: bool = False) -> None:
        self.supernet, self.keys, self.taps, self.whole = supernet, keys, taps, whole

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook with kwargs."""
        call = self.supernet.call()
        if not call.runs:
            return None
        is_tensor = isinstance(output, Tensor)
        target = output if is_tensor else output[0]
        changed = self.change(hidden_argument(args, kwargs), target, call)
        if changed is target:
            return None
        return changed if is_tensor else (changed, *output[1:])

    def change(self, hidden: Tensor, target: Tensor, call: Call) -> Tensor:
        """What the module, having read `hidden`, returns instead of `target`; the same object for no change."""
        changed = run_paths(self.supernet, self.keys, hidden, target, call)
        for tap in self.taps:  # remembered inputs are not held beyond their use
            call.inputs.pop(tap, None)
        return changed


def run_paths(supernet: Supernet, keys: list[str], hidden: Tensor, target: Tensor, call: Call) -> Tensor:
    """Run the open paths of one point, those of one kind and tap together; the same object back if all are closed."""
    opened: list[tuple[Path, Tensor | None]] = []
    for key in keys:
        is_open, gate = supernet.gate(key, call)
        if is_open:
            opened.append((cast(Path, supernet.paths[key]), gate))
    while opened:
        kind, site = type(opened[0][0]), opened[0][0].site
        tap, count = site.tap, 1
        while count < len(opened) and type(opened[count][0]) is kind and opened[count][0].site.tap == tap:
            count += 1
        members, opened = opened[:count], opened[count:]
        if tap.module != site.write.module:
            if tap.module not in call.inputs:
                raise AttachError(
                    "a path reads what this call has not computed",
                    expected=f"{tap.module} to run before {site.write.module or 'the whole model'} ends, in one call",
                    got="no input of it",
                    where=f"a path of kind {kind.kind}",
                    fix="use the structure as it was saved; call the whole model, not a part of it",
                )
            tapped = call.inputs[tap.module]
        else:
            tapped = hidden if tap.side == "input" else target
        target = kind.forward_together([path for path, _ in members], tapped, target, [gate for _, gate in members])
    return target


def point_hooks(supernet: Supernet) -> Iterator[tuple[str, InputHook | OutputHook]]:
    """Hooks that run the paths which change what modules take or return, and the modules where they go."""
    inputs: dict[str, list[str]] = {}
    outputs: dict[tuple[str, bool], list[str]] = {}
    remembered_by: dict[str, set[str]] = {}
    for key, path in sorted(supernet.typed_paths(), key=lambda item: (item[1].stage, item[0])):
        site = path.site
        if site.at_weight:
            continue
        if site.write.side == "input":
            inputs.setdefault(site.write.module, []).append(key)
        else:
            outputs.setdefault((site.write.module, site.is_sublayer), []).append(key)
        if site.tap.module != site.write.module:
            remembered_by.setdefault(site.write.module, set()).add(site.tap.module)
            inputs.setdefault(site.tap.module, [])
    remembered = Counter(tap for taps in remembered_by.values() for tap in taps)
    for name, keys in inputs.items():
        yield name, InputHook(supernet, keys, name if name in remembered else None)
    for (name, whole), keys in sorted(outputs.items(), key=lambda item: item[0][1]):
        final = whole or (name, True) not in outputs
        last = [tap for tap in sorted(remembered_by.get(name, ())) if remembered[tap] == 1 and final]
        yield name, OutputHook(supernet, keys, last, whole=whole)


def register_hook(hook: InputHook | OutputHook, module: nn.Module) -> RemovableHandle:
    """Register a hook at its module."""
    if isinstance(hook, InputHook):
        return module.register_forward_pre_hook(hook, with_kwargs=True)
    return module.register_forward_hook(hook, with_kwargs=True)


def hook_embedding(owner: Checkpointing, model: nn.Module) -> list[RemovableHandle]:
    """An `EmbeddingHook` where tokens become vectors, if the model says where that is."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        embedding = getter() if callable(getter) else None
    except NotImplementedError:
        return []
    return [embedding.register_forward_hook(EmbeddingHook(owner))] if isinstance(embedding, nn.Module) else []


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """How many examples a call of the model carries, as far as its arguments tell."""
    named = [kwargs.get(name) for name in ("input_ids", "inputs_embeds", "pixel_values")]
    return next((len(value) for value in (*named, *args[:1]) if isinstance(value, Tensor) and value.dim() > 1), None)


def hidden_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state among a module's arguments: first positional tensor, else `hidden_states`, else any float, else
    any tensor (the token ids of an embedding).
    """
    if args and isinstance(args[0], Tensor):
        return args[0]
    hidden = kwargs.get("hidden_states")
    if isinstance(hidden, Tensor):
        return hidden
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return next((value for value in tensors if value.is_floating_point()), tensors[0])


def replace_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the tensor that `hidden_argument` finds replaced."""
    old = hidden_argument(args, kwargs)
    return tuple(value if a is old else a for a in args), {k: value if v is old else v for k, v in kwargs.items()}
