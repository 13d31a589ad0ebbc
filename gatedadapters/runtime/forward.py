"""Running one module with other tensors in place of its parameters, for the length of one call.

A copy of the module that shares everything but the tensors in question runs instead of it. The module itself is never
written to, so threads that run it at the same time do not see each other's tensors, and nothing has to be put back when
a forward fails or a checkpointed block stops early.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gatedadapters.errors import AttachError


def with_tensors(module: nn.Module, tensors: Mapping[str, Any]) -> nn.Module:
    """A shallow copy of `module` that computes with `tensors` in place of its parameters of those names.

    Buffers, hooks, flags and all other parameters are shared. Names with dots reach into descendants, of which shallow
    copies are made, too. The tensors need be no `nn.Parameter`.
    """
    copy: nn.Module = object.__new__(type(module))
    state = vars(copy)
    state.update(vars(module))
    state.pop("forward", None)  # an instance's own forward, such as `OwnForward`, is what makes this copy
    state.pop("_old_forward", None)
    state["_parameters"] = dict(module._parameters)
    inside: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        child, dot, rest = name.partition(".")
        if dot:
            inside.setdefault(child, {})[rest] = tensor
        else:
            state["_parameters"][name] = tensor
    if inside:
        state["_modules"] = dict(module._modules)
        for child, own in inside.items():
            state["_modules"][child] = with_tensors(module.get_submodule(child), own)
    return copy


class OwnForward:
    """An instance's own `forward`, to derive from: it decides for each call with which tensors the module runs.

    It stands in the instance's `__dict__`, in front of the class's method: the class, the state dict and `__call__`
    with its hooks stay what they are. accelerate keeps a module's forward in `_old_forward` where it manages its
    weights; then this one goes there, under accelerate's.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What `module(*args, **kwargs)` computes between its hooks."""
        return self.run({}, args, kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.module).forward.__get__(self.module))

    def run(self, tensors: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The class's forward, with `tensors` in place of parameters (none: those of the module)."""
        module = self.module if not tensors else with_tensors(self.module, tensors)
        return type(self.module).forward(module, *args, **kwargs)

    def install(self) -> None:
        """Let calls of the module come here.

        Raises:
            AttachError: somebody else's forward stands there, which may not run on a copy of the module.
        """
        own = vars(self.module)
        slot = "_old_forward" if "_hf_hook" in own and "_old_forward" in own else "forward"
        present = own.get(slot)
        function = getattr(present, "__func__", None)
        if present is not None and function is not type(self.module).forward:
            raise AttachError(
                "this module's forward was replaced, so that it cannot run with other weights",
                expected=f"the forward of {type(self.module).__name__}",
                got=repr(present),
                where=type(self.module).__name__,
                fix="attach before what replaced it, or leave this module out of the search space",
            )
        own[slot] = self

    def remove(self) -> None:
        """Let calls of the module go to its class's forward again."""
        own = vars(self.module)
        if own.get("forward") is self:
            del own["forward"]
        elif own.get("_old_forward") is self:
            own["_old_forward"] = type(self.module).forward.__get__(self.module)


def parameter_of(module: nn.Module, name: str) -> Tensor:
    """The registered parameter of that (dotted) name, also where an attribute of the instance hides it.

    Raises:
        KeyError: none of that name.
    """
    inner, _, leaf = name.rpartition(".")
    found = module.get_submodule(inner)._parameters[leaf]
    if found is None:
        raise KeyError(name)
    return found
