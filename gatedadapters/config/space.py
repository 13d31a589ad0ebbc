"""Search spaces: which points, which candidate paths at them, which gate levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path as FilePath
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator

from gatedadapters.config.base import Config, read_yaml
from gatedadapters.config.gates import GateConfig
from gatedadapters.errors import ConfigError
from gatedadapters.patterns import Pattern

SublayerKind = Literal["attention", "cross_attention", "feed_forward", "mixer", "outside", "embedding"]


class Where(Config):
    """Conditions that select points of a layout. All that are given must hold; without any, every point is selected.

    Attributes:
        sublayers: kinds of sub-layer. `outside` (poolers, heads, projections of embeddings) and `embedding` (the tables
            of token ids) are selected only if they are named here.
        roles: roles of linear maps (`q`, `k`, `v`, `o`, `up`, `gate`, `down`, ...).
        blocks: indices of blocks; negative ones count from the end.
        stacks: `encoder`, `decoder`, or `""` for a single stack.
        include: a regular expression to find in the module's qualified name.
        exclude: a regular expression that must not be found there.
    """

    sublayers: tuple[SublayerKind, ...] | None = None
    roles: tuple[str, ...] | None = None
    blocks: tuple[int, ...] | None = None
    stacks: tuple[str, ...] | None = None
    include: str | None = None
    exclude: str | None = None

    @field_validator("include", "exclude")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            Pattern(value)
        return value

    def accepts(
        self, *, module: str, block: int, n_blocks: int, stack: str, sublayer: str, role: str | None = None
    ) -> bool:
        """Whether a module is selected.

        Args:
            module: its qualified name.
            block: index of its block.
            n_blocks: number of blocks in its stack.
            stack: name of the stack.
            sublayer: kind of its sub-layer.
            role: role of a linear map; None for a whole sub-layer, which passes any condition on roles.
        """
        if self.blocks is not None and block not in {b + n_blocks if b < 0 else b for b in self.blocks}:
            return False
        for field, text, wanted in (("include", self.include, True), ("exclude", self.exclude, False)):
            if text is not None and _matches(text, module, field) is not wanted:
                return False
        return (
            (self.sublayers is None or sublayer in self.sublayers)
            and (self.stacks is None or stack in self.stacks)
            and (self.roles is None or role is None or role in self.roles)
        )


@lru_cache(maxsize=256)
def _pattern(text: str) -> Pattern:
    return Pattern(text)


def _matches(text: str, module: str, field: str) -> bool:
    """Whether a regular expression of a search space is found in the name of a module.

    Raises:
        ConfigError: matching takes too long.
    """
    try:
        return _pattern(text).search(module)
    except ValueError as error:
        raise ConfigError(
            "a regular expression cannot be matched",
            expected="one with few ways to match",
            got=str(error),
            where=f"at.{field}, for module {module[:100]}",
            fix="leave out repeats within repeats, such as (a+)+",
        ) from None


class PathOptions(Config):
    """The options of one candidate path. Each kind has a subclass, beside its path, with options of its own.

    A subclass that gives `kind` a default is known to search spaces by that name.

    Attributes:
        kind: name of the kind of path.
        at: the points it is offered at.
    """

    registry: ClassVar[dict[str, type[PathOptions]]] = {}

    kind: str
    at: Where = Where()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        kind = cls.model_fields["kind"].default
        if isinstance(kind, str):
            PathOptions.registry[kind] = cls

    @property
    def size(self) -> int:
        """Number of units (ranks or widths) of the whole candidate."""
        return 1

    def resized(self, size: int) -> Self:
        """The same options with `size` units.

        Raises:
            ConfigError: the kind has one unit only, and `size` is another number.
        """
        if size != self.size:
            raise ConfigError(expected="one unit", got=f"{size} units", where=f"path {self.kind!r}", fix="keep size 1")
        return self

    def select(self, units: Sequence[int]) -> Self:
        """The options of a candidate that keeps only some units.

        Args:
            units: their positions among the units of this candidate, sorted.
        """
        return self.resized(len(units))


def _parse_options(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    kind = value.get("kind")
    options = PathOptions.registry.get(kind) if isinstance(kind, str) else None
    if options is None:
        raise ValueError(f"unknown path kind {kind!r}; known kinds: {', '.join(sorted(PathOptions.registry))}")
    return options.model_validate(dict(value))


AnyPathOptions = Annotated[SerializeAsAny[PathOptions], BeforeValidator(_parse_options)]


class SearchSpace(Config):
    """Which candidate paths a search may choose from, at which points, with which gates. Presets: `search_spaces/`.

    Attributes:
        name: name of the space, in structures and reports.
        description: what the space is meant for.
        gates: levels and constants of the gates.
        paths: the candidates.
    """

    version: Literal[1] = 1
    name: str = "custom"
    description: str = ""
    gates: GateConfig = GateConfig()
    paths: tuple[AnyPathOptions, ...] = Field(min_length=1)

    @classmethod
    def load(cls, preset_or_file: str | FilePath) -> Self:
        """Read a preset by its name (`"lora-all-linear"`) or a YAML file by its path.

        Raises:
            ConfigError: there is no such preset (the error lists them), the file cannot be read, or keys are unknown or
                invalid.
        """
        path = FilePath(preset_or_file)
        if path.suffix not in {".yaml", ".yml"}:
            path = presets_folder() / f"{preset_or_file}.yaml"
        try:
            data = read_yaml(path)
        except ConfigError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            raise ConfigError(
                expected=f"a preset ({', '.join(presets())}) or a YAML file",
                got=repr(str(preset_or_file)),
                where="SearchSpace.load",
                fix="use one of the presets, or give the path of a file ending in .yaml",
            ) from None
        return cls.parse(data, where=str(path))

    def with_gates(self, **changes: Any) -> Self:
        """The same space with other fields of its gates, such as `with_gates(levels=("path", "rank"))`.

        Raises:
            ConfigError: the fields are not valid.
        """
        gates = GateConfig.parse({**self.gates.model_dump(), **changes}, where="SearchSpace.with_gates")
        return self.model_copy(update={"gates": gates})


def presets_folder() -> FilePath:
    """The folder of the presets: inside the installed package, or at the top of a checkout."""
    package = FilePath(__file__).resolve().parent.parent
    shipped = package / "search_spaces"
    return shipped if shipped.is_dir() else package.parent / "search_spaces"


def presets() -> tuple[str, ...]:
    """Names of the presets of search spaces, sorted."""
    return tuple(sorted(path.stem for path in presets_folder().glob("*.yaml")))
