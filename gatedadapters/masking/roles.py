"""The role of each parameter of a model. `include` and `exclude` select parameters by role or by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import Tensor, nn

from gatedadapters.backbone import Layout, discover
from gatedadapters.errors import LayoutError, MaskError


def parameter_roles(model: nn.Module, sample: Mapping[str, Tensor] | None = None) -> dict[str, str]:
    """The role of every parameter, by the parameter's name; see `roles_in`.

    Args:
        model: any module.
        sample: a batch for `discover`, for models whose layout cannot be found without one.
    """
    try:
        return roles_in(model, discover(model, sample))
    except LayoutError:
        return roles_in(model, None)


def roles_in(model: nn.Module, layout: Layout | None) -> dict[str, str]:
    """The role of every parameter, by the parameter's name.

    - Linear maps have the role that the layout finds: `q`, `k`, `v`, `o`, `up`, `gate`, `down`, `router`, ...
    - Maps outside the blocks are `head`. In a model without a layout (no stack of blocks), every map is `other`.
    - Lookup tables are `embedding`, also where they are tied to a head.
    - Biases are `bias`, other vectors `norm`, and all remaining parameters `other`.

    Args:
        model: any module.
        layout: of the model; None where it has none.
    """
    maps: dict[str, str] = {}
    if layout is not None:
        maps = {f"{linear.name}.{linear.parameter}": linear.role for _, _, linear in layout.maps()}
        maps |= {f"{linear.name}.{linear.parameter}": "head" for linear in layout.outside}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found = {}
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if id(parameter) in tables:
            found[name] = "embedding"
        elif name in maps:
            found[name] = maps[name]
        elif parameter.dim() <= 1:
            found[name] = "bias" if "bias" in last else "norm"
        else:
            found[name] = "other"
    return found


def matching_parameters(
    roles: Mapping[str, str], include: Iterable[str] | None, exclude: Iterable[str] | None, *, where: str
) -> list[str]:
    """Names of the parameters that match a pattern of `include` and no pattern of `exclude`, in the order of `roles`.

    A pattern is a role, or a name in which `*` and `?` stand for other characters, as in file names.

    Args:
        roles: role by parameter name, see `parameter_roles`.
        include: patterns; None matches every parameter.
        exclude: patterns; None matches no parameter.
        where: the caller, for errors.

    Raises:
        MaskError: a pattern matches nothing, or no parameter is left.
    """

    def matching(patterns: Iterable[str]) -> set[str]:
        names: set[str] = set()
        for pattern in patterns:
            found = {name for name, role in roles.items() if role == pattern or fnmatchcase(name, pattern)}
            if not found:
                raise MaskError(
                    "this matches no parameter",
                    got=repr(pattern),
                    where=where,
                    expected=f"a role among {', '.join(sorted(set(roles.values())))}, or a name",
                    fix="names may hold * and ?, as in *.mlp.*",
                )
            names |= found
        return names

    kept = set(roles) if include is None else matching([include] if isinstance(include, str) else include)
    if exclude is not None:
        kept -= matching([exclude] if isinstance(exclude, str) else exclude)
    if not kept:
        raise MaskError(
            "nothing is left to select from",
            expected="at least one parameter",
            got="none",
            where=where,
            fix="widen include= or drop exclude=",
        )
    return [name for name in roles if name in kept]
