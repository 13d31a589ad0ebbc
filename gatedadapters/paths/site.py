"""Where candidates go: points of the layout, the sites of paths, and sites that were skipped."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from gatedadapters.backbone import Block, LinearMap, Sublayer
from gatedadapters.errors import PathError

Side = Literal["input", "output"]


@dataclass(frozen=True, slots=True)
class Point:
    """One side of one module of the layout; for the side `weight`, the module's `parameter` itself."""

    module: str
    side: Literal[Side, "weight"]
    parameter: str = ""

    def __str__(self) -> str:
        return f"{self.module}.{self.parameter or self.side}"


@dataclass(frozen=True, slots=True)
class Site:
    """Where one candidate reads and writes.

    If no module takes the input of a map and returns its output, tap and write are both its weight.

    Attributes:
        tap: the point where the path reads.
        write: the point whose value it changes.
        width_in: size of the last dimension at the tap; at a table of token ids, the size of the vocabulary.
        width_out: size of the last dimension at the write side.
        block: qualified name of the block.
        block_index: index of the block in call order.
        sublayer: kind of the sub-layer.
        role: role of the linear map; empty for a sub-layer as a whole.
        traffic: tokens that pass here for each token that enters the stack; 4.0 for a block called four times.
        experts: at a weight: number of experts, the first dimension of the weight; 0 for a plain matrix.
        transposed: whether the weight is stored as (in, out), not (out, in).
        host: at a weight: the module that multiplies with it.
        shifts: at a norm: whether it adds a vector, too.
    """

    tap: Point
    write: Point
    width_in: int
    width_out: int
    block: str
    block_index: int
    sublayer: str
    role: str
    traffic: float = 1.0
    experts: int = 0
    transposed: bool = False
    host: str = ""
    shifts: bool = False

    def __post_init__(self) -> None:
        if self.tap.side == "output" and self.tap != self.write:
            raise PathError(
                "a path that reads the output of a module must write there",
                expected=f"tap and write at {self.tap}",
                got=f"write at {self.write}",
                where=f"block {self.block_index}, {self.sublayer}",
                fix="tap the input of the module that follows",
            )

    @classmethod
    def at_map(cls, block: Block, sublayer: Sublayer, linear: LinearMap, *, tap: Side, write: Side) -> Self:
        """The site of a path around one linear map."""
        sides = {"input": linear.in_features, "output": linear.out_features}
        return cls(
            Point(linear.name, tap),
            Point(linear.name, write),
            sides[tap],
            sides[write],
            block.name,
            block.index,
            sublayer.kind,
            linear.role,
            linear.traffic,
            transposed=linear.transposed,
        )

    @property
    def at_weight(self) -> bool:
        """Whether paths here change a weight, not the input or output of a module."""
        return self.write.side == "weight"

    @property
    def reads_ids(self) -> bool:
        """Whether the module looks token ids up in a table, so that its input is not a vector but the place of a 1."""
        return self.sublayer == "embedding"

    @property
    def weight_name(self) -> str:
        """Name of the weight inside the host; only for sites at a weight."""
        return str(self.write).removeprefix(f"{self.host}.")

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight as it is stored; only for sites at a weight."""
        matrix = (self.width_in, self.width_out) if self.transposed else (self.width_out, self.width_in)
        return (self.experts, *matrix) if self.experts else matrix

    @property
    def is_sublayer(self) -> bool:
        """Whether the site is a whole sub-layer, not one linear map in it."""
        return not self.role

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        return cls(**{**data, "tap": Point(**data["tap"]), "write": Point(**data["write"])})


@dataclass(frozen=True, slots=True)
class SkippedSite:
    """A selected site where a path of this kind cannot go. Users are told about it.

    Attributes:
        kind: path kind.
        module: name of the module or parameter.
        reason: why it cannot go there.
        instead: a kind that can go there, or "". If a space offers that kind too, nothing is reported.
    """

    kind: str
    module: str
    reason: str
    instead: str = ""
