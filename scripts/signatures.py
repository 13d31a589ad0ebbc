"""For the documentation: the signature of a configuration class shows its fields with types, defaults and limits.

Its constructor takes ``**data`` and would say nothing. An extension of Griffe, named in mkdocs.yml.
"""

from __future__ import annotations

from typing import Any

import griffe

BASE = "gatedadapters.config.base.Config"


class FieldsAsParameters(griffe.Extension):
    """Gives every class that derives from `Config` a constructor with one keyword argument per field."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Called once, when all modules of a package are read."""
        for path in dict(_classes(pkg)).values():
            fields: dict[str, griffe.Parameter] = {}
            for kind in reversed([path, *path.mro()]):
                for name, member in kind.members.items():
                    if member.is_attribute and _is_field(member):
                        fields[name] = griffe.Parameter(
                            name,
                            annotation=member.annotation,
                            kind=griffe.ParameterKind.keyword_only,
                            default=member.value,
                        )
            path.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*fields.values())))


def _classes(scope: griffe.Object) -> Any:
    for member in scope.members.values():
        if member.is_alias:
            continue
        if member.is_class and BASE in [kind.path for kind in member.mro()]:
            yield member.path, member
        if member.is_module or member.is_class:
            yield from _classes(member)


def _is_field(member: griffe.Object) -> bool:
    public = not member.name.startswith("_") and member.name != "model_config"
    return (
        public
        and member.annotation is not None
        and "ClassVar" not in str(member.annotation)
        and "property" not in member.labels
    )
