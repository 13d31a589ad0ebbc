"""The contract every candidate path meets, and what its implementations share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from gatedadapters.backbone import Layout
from gatedadapters.config import PathOptions
from gatedadapters.errors import PathError
from gatedadapters.paths.site import Site, SkippedSite


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
    def sites(cls, options: PathOptions, layout: Layout) -> Iterator[Site | SkippedSite]:
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


def side_by_side(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
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
