"""The contract every candidate path meets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from gatedadapters.backbone import Block, Layout, LinearMap, Sublayer
from gatedadapters.config import PathOptions
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
class Misfit:
    """A selected place where a path cannot go, and why; reported, never dropped silently.

    `instead` names the kind made for such places: where a space offers that one too, nothing is amiss.
    """

    kind: str
    module: str
    reason: str
    instead: str = ""


class Path(nn.Module, ABC):
    """One candidate adapter at one site.

    Its parameters belong to `units` (ranks, hidden widths; 1 for a path that is kept whole), each costing
    `unit_params` parameters and `unit_flops` flops per token (forward, multiply-add = 2). Every parameter belongs to
    exactly one unit, so a structure's parameter count is a sum over its units.

    Contract (checked by `gatedadapters.testing.PathContract`): output unchanged at start; a gate of 0 gives the
    backbone's output exactly; a gate of 1 the ungated path; gates get gradient once the path is non-zero;
    `scale_units` and `select_units` do what gates of those values did; `cost` counts the parameters; `merge_into`
    gives the map that computes the same, or says that none does.
    """

    kind: ClassVar[str]
    stage: ClassVar[int] = 0  # order among paths writing at one point: lower first

    routing: Tensor | None

    def __init__(self, site: Site, options: PathOptions, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.site, self.options = site, options
        self.register_buffer("routing", None)  # compact, several tasks: (tasks, units), what each task uses

    @classmethod
    @abstractmethod
    def sites(cls, options: PathOptions, layout: Layout) -> Iterator[Site | Misfit]:
        """Every place of `layout` that `options.at` selects, in order of the blocks."""

    @classmethod
    @abstractmethod
    def cost(cls, site: Site, options: PathOptions) -> tuple[int, int, float]:
        """(units, parameters of one unit, flops per token of one unit), without building anything."""

    @property
    @abstractmethod
    def units(self) -> int:
        """Number of units it has now."""

    @abstractmethod
    def forward(self, tapped: Tensor, target: Tensor, gate: Tensor | None) -> Tensor:
        """New value at the write side.

        Args:
            tapped: what the tap carries, (..., width_in).
            target: what the write side carries, (..., width_out); the result has its shape and dtype.
            gate: None for fully open, else (g,) for the whole batch or (n, g) for its n examples, where target's
                leading dimensions hold n equal runs; g is `units` or 1.
        """

    @abstractmethod
    def scale_units(self, scale: Tensor) -> None:
        """Multiply what each unit contributes by `scale` (units,), in place: the function of a gate of that value."""

    def condense(self, keep: Tensor, scale: Tensor) -> None:
        """Leave only the units `keep` (indices) contributing, in place, as the gates `scale` (units,) are fixed.

        Paths whose units can stand in for each other override this, so that those kept take over what they can of the
        rest; where the rest contributes nothing the function must not change.
        """
        kept = torch.zeros_like(scale)
        kept[keep] = scale[keep]
        self.scale_units(kept)

    @abstractmethod
    def select_units(self, keep: Tensor) -> None:
        """Keep only the units `keep` (indices), as new, smaller parameters."""

    def merge_into(self, weight: Tensor, bias: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The linear map that alone computes what the map written at computes together with this path.

        Linear kinds override this; what is no linear map is refused, by this very method.

        Args:
            weight: (out, in) of the map at `site.write`, in a type wide enough to add in; not changed.
            bias: (out,), or None; not changed.
            gate: None for fully open, else (units,) or (1,).

        Returns:
            The new weight and bias, in the type of `weight`.

        Raises:
            PathError: no weight can stand in for this kind.
        """
        raise PathError(
            f"a {self.kind} path cannot be merged: what it computes is no linear map",
            expected="paths that a weight can take over, such as lora and scale",
            got=f"{self.kind} at {self.site.write}",
            where="merge",
            fix="keep the adapters attached, or search a space without this kind and merge what it finds",
        )

    @classmethod
    def forward_together(
        cls, paths: Sequence[Path], tapped: Tensor, target: Tensor, gates: Sequence[Tensor | None]
    ) -> Tensor:
        """Several paths of this kind that share a tap; overridden where they can run fused."""
        for path, gate in zip(paths, gates, strict=True):
            target = path(tapped, target, gate)
        return target

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.site.tap} -> {self.site.write}, units={self.units}"


def map_sites(
    options: PathOptions, layout: Layout, *, tap: Side, write: Side, kind: str, instead: str = ""
) -> Iterator[Site | Misfit]:
    """Sites around every selected linear map; those inside a module that does more are reported, with the kind that
    takes such places `instead`.
    """
    for block, sublayer, linear in selected_maps(options, layout):
        if linear.host:
            reason = f"{linear.host} multiplies with it and does more: no module takes its input and returns its output"
            reason += f"; {instead} can go there" if instead else ""
            yield Misfit(kind, f"{linear.name}.{linear.parameter}", reason, instead)
        else:
            yield Site.at_map(block, sublayer, linear, tap=tap, write=write)


def selected_maps(options: PathOptions, layout: Layout) -> Iterator[tuple[Block, Sublayer, LinearMap]]:
    """Every map of the blocks that `options.at` selects, then those outside them where it names `outside`."""
    outside = layout.maps_outside() if "outside" in (options.at.sublayers or ()) else ()
    for block, sublayer, linear in (*layout.maps(), *outside):
        name = linear.name if linear.kind != "experts" else f"{linear.name}.{linear.parameter}"
        if selected(options, layout, block, sublayer, name, linear.role):
            yield block, sublayer, linear


def sublayer_sites(options: PathOptions, layout: Layout, *, tap: Side, kind: str) -> Iterator[Site | Misfit]:
    """Sites that write where a selected sub-layer returns, before the residual addition; roles do not apply."""
    for block in layout.blocks:
        for sublayer in block.sublayers:
            if not selected(options, layout, block, sublayer, sublayer.name, None):
                continue
            reader = sublayer.reader if tap == "input" else sublayer.writer
            if reader is None or sublayer.writer is None:
                yield Misfit(kind, sublayer.name, "where this sub-layer reads or writes the hidden state is unknown")
                continue
            traffic = max((m.traffic for m in sublayer.maps if m.name == sublayer.writer), default=float(block.calls))
            yield Site(
                Point(reader, tap),
                Point(sublayer.writer, "output"),
                sublayer.width,
                sublayer.width,
                block.name,
                block.index,
                sublayer.kind,
                "",
                traffic,
            )


def selected(
    options: PathOptions, layout: Layout, block: Block, sublayer: Sublayer, module: str, role: str | None
) -> bool:
    """Whether `options.at` selects this module."""
    return options.at.accepts(
        module=module,
        block=block.index,
        n_blocks=len(layout.blocks),
        stack=block.stack,
        sublayer=sublayer.kind,
        role=role,
    )


def check_width(path: Path, tensor: Tensor, width: int, side: str) -> None:
    """Raise a `PathError` naming the point where a tensor does not have the width the layout promised."""
    if tensor.shape[-1] != width:
        raise PathError(
            "a path does not fit its point",
            expected=f"last dimension {width} at the {side}",
            got=f"shape {tuple(tensor.shape)}",
            where=f"{path.kind} at {path.site.tap} (block {path.site.block_index}, {path.site.sublayer})",
            fix="attach with a sample batch of the kind you train on",
        )


def per_token(gate: Tensor, rows: Tensor, where: str) -> Tensor:
    """Gates (n, g) of n examples spread over the rows of a tensor (..., width), an equal run for each: (rows, g).

    Raises:
        PathError: the rows are not those of n examples.
    """
    n = gate.shape[0]
    if not holds_examples(rows, n):
        raise PathError(
            "task ids do not match the batch",
            expected=f"a multiple of {n} rows (one run per example), examples first",
            got=f"shape {tuple(rows.shape)}",
            where=where,
            fix="pass one task id per example; packed batches, and points that carry no examples (relative positions), "
            "need one task per batch",
        )
    return gate.repeat_interleave(rows.numel() // rows.shape[-1] // n, dim=0)


def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Parameters of paths that run together, side by side; a single one as it is, at no copy."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim)


def joined_gates(paths: Sequence[Path], gates: Sequence[Tensor | None], target: Tensor) -> Tensor | None:
    """Gates of paths that run together, side by side: (g,), or (rows of target, g) where one differs by example. That
    of a single path keeps its width, 1 or `units`; of several each is as wide as its path.

    Raises:
        PathError: see `per_token`.
    """
    rows = [
        gate if gate is None or gate.dim() == 1 else per_token(gate, target, str(path.site.tap))
        for path, gate in zip(paths, gates, strict=True)
    ]
    given = [gate for gate in rows if gate is not None]
    if len(rows) == 1 or not given:
        return rows[0]
    count = max((gate.shape[0] for gate in given if gate.dim() == 2), default=0)
    wide = []
    for gate, path in zip(rows, paths, strict=True):
        gate = given[0].new_ones(path.units) if gate is None else gate.expand(*gate.shape[:-1], path.units)
        wide.append(gate.expand(count, -1) if count and gate.dim() == 1 else gate)
    return torch.cat(wide, -1)


def holds_examples(rows: Tensor, n: int) -> bool:
    """Whether a tensor (..., width) can hold an equal run of rows for each of n examples: they come first, or as tokens
    in a row.
    """
    leading = rows.shape[:-1] if rows.dim() < 3 else rows.shape[:1]
    return leading.numel() % n == 0


def resized(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    """`value` as a parameter of its own that learns if `parameter` did."""
    return nn.Parameter(value.detach().clone(), requires_grad=parameter.requires_grad)


def new_parameter(*shape: int, bound: float = 0.0, generator: torch.Generator | None = None) -> nn.Parameter:
    """fp32 parameter, uniform in (-bound, bound), or zeros; drawn on the CPU so that every machine starts alike."""
    value = torch.zeros(shape)
    if bound:
        value.uniform_(-bound, bound, generator=generator)
    return nn.Parameter(value)
