"""Where a candidate goes: a point of the layout, the site of one path, and a site that was skipped."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from gatedadapters.backbone import Block, LinearMap, Sublayer
from gatedadapters.errors import PathError

Side = Literal["input", "output"]


@dataclass(frozen=True, slots=True)
class Point:
    """One module of the layout and the side tapped; for side `weight`, its `parameter` itself."""

    module: str
    side: Literal[Side, "weight"]
    parameter: str = ""

    def __str__(self) -> str:
        return f"{self.module}.{self.parameter or self.side}"


@dataclass(frozen=True, slots=True)
class Site:
    """Where one candidate goes: it reads at `tap` (width `width_in`) and changes the hidden values at `write`.

    `traffic` is how many tokens pass here for each token entering the stack (a block shared by 4 layers: 4.0). Where a
    map has no module boundary of its own, tap and write are its weight: (out, in), or (in, out) if `transposed`, for
    a stack of `experts` with those in front; `host` is the module that uses it.
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

    def __post_init__(self) -> None:
        if self.tap.side == "output" and self.tap != self.write:
            raise PathError(
                "what taps an output must write there",
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
        )

    @property
    def at_weight(self) -> bool:
        """Whether paths change a weight here, not what a module takes or returns."""
        return self.write.side == "weight"

    @property
    def weight_name(self) -> str:
        """At a weight: its name inside the host."""
        return str(self.write).removeprefix(f"{self.host}.")

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """At a weight: its shape as it is stored."""
        matrix = (self.width_in, self.width_out) if self.transposed else (self.width_out, self.width_in)
        return (self.experts, *matrix) if self.experts else matrix

    @property
    def is_sublayer(self) -> bool:
        """Whether this is a sub-layer as a whole, not one linear map in it."""
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
    """A selected place where a path cannot go, and why; reported, never dropped silently.

    `instead` names the kind made for such places: where a space offers that one too, nothing is amiss.
    """

    kind: str
    module: str
    reason: str
    instead: str = ""
