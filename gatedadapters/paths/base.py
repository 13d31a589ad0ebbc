"""The contract of a path, and what the path kinds share.

To add a path kind:

1. Write one file in this folder with a subclass of `PathOptions` that fixes `kind`.
2. Beside it, write a subclass of `Path` with that `kind`, its parameters and the abstract methods below.
3. Register the class in `paths/__init__.py`, or outside this package with `@gatedadapters.paths.register`.
4. Test it with a subclass of `gatedadapters.testing.PathContract`.
5. Name its kind in a search space.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from gatedadapters.backbone import Layout
from gatedadapters.config import PathOptions
from gatedadapters.errors import PathError
from gatedadapters.paths.site import Point, Site, SkippedSite


class Path(nn.Module, ABC):
    """One candidate adapter at one site.

    Its parameters are divided into `units` (ranks, hidden widths; 1 for a path that is kept whole). Every parameter
    belongs to exactly one unit, and all units cost the same number of parameters and of flops, so the cost of a path is
    a sum over its units.

    The contract, which `gatedadapters.testing.PathContract` checks:

    - At start the model's output is unchanged.
    - A gate of 0 gives the backbone's output exactly; a gate of 1 gives the output of the ungated path.
    - Gates get gradient once the path is non-zero.
    - `scale_units` and `select_units` compute what gates of those values computed.
    - `cost` counts the parameters exactly.
    - `merge_into` returns a linear map that computes the same, or raises.

    Attributes:
        kind: name in search spaces and artefacts.
        stage: order of the paths that write at one point; lower stages run first.
        routing: which units each task uses, (tasks, units) of 0 and 1, after compaction for several tasks; else None.
    """

    kind: ClassVar[str]
    stage: ClassVar[int] = 0

    routing: Tensor | None

    def __init__(self, site: Site, options: PathOptions, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.site, self.options = site, options
        self.register_buffer("routing", None)

    @classmethod
    @abstractmethod
    def sites(cls, options: PathOptions, layout: Layout) -> Iterator[Site | SkippedSite]:
        """The sites that `options.at` selects in `layout`, in order of the blocks, and those that had to be skipped."""

    @classmethod
    @abstractmethod
    def cost(cls, site: Site, options: PathOptions) -> tuple[int, int, float]:
        """Count the cost without building the path.

        Returns:
            Number of units, parameters of one unit, and flops of one unit per token (forward; multiply-add = 2).
        """

    @property
    @abstractmethod
    def units(self) -> int:
        """Present number of units."""

    def start_from(self, module: nn.Module) -> None:
        """Called once where a search space is attached, with the module at `site.write`.

        Kinds that start from what the module holds override this; by default nothing happens.
        """

    def options_of(self, units: Sequence[int]) -> PathOptions:
        """The options of a path that keeps only these units (positions, sorted), as a Structure records them."""
        return self.options.select(units)

    @abstractmethod
    def forward(self, tapped: Tensor, target: Tensor, gate: Tensor | None) -> Tensor:
        """Compute the new value at the write side.

        Args:
            tapped: value at the tap, (..., width_in); at a table of token ids, the ids, (...).
            target: value at the write side, (..., width_out).
            gate: None if fully open; (g,) for the whole batch; or (n, g) for its n examples, whose rows follow each
                other in equal runs in target's leading dimensions. g is `units` or 1.

        Returns:
            A tensor of target's shape and dtype.
        """

    def rate_factor(self, units: float) -> float:
        """The factor on the common learning rate that suits this kind; one rate then serves all kinds and sizes.

        Under Adam every parameter moves by about the rate in a step, whatever its gradient. So a kind's factor says how
        large its parameters are when they have learnt something, and how many of them add up in one output. The
        factors were measured; `docs/results.md` shows the best rates by kind, width and rank.

        Args:
            units: number of units that learn together; for gated candidates, of those that the budget will keep.
        """
        return 1.0

    @property
    def weight_added_to(self) -> str | None:
        """Name of the backbone's weight that this path adds a map to; None if it changes values alone."""
        return None

    @contextmanager
    def narrowed(self, units: int) -> Iterator[None]:
        """A context in which only the first units are open, so that a kind need not compute the others.

        By default nothing happens: closed units add nothing anyway.
        """
        yield

    def learned(self) -> Tensor:
        """The size of what each unit has learnt, (units,), 0 at the start; by default the norm of all parameters.

        Kinds with parameters that are not zero at the start, or with several units, override this.
        """
        with torch.no_grad():
            return torch.stack([p.square().sum() for p in self.parameters()]).sum().sqrt()[None]

    @abstractmethod
    def scale_units(self, scale: Tensor) -> None:
        """Multiply the contribution of each unit by `scale`, (units,), in place, as gates of these values do."""

    def condense(self, keep: Tensor, scale: Tensor) -> None:
        """Fix the gates at `scale`, (units,), and let only the units `keep` (indices) contribute, in place.

        By default the contribution of the other units is lost. Kinds whose units are interchangeable override this to
        move as much of it as possible into the units kept. If the other units contribute nothing, the function
        computed must not change.
        """
        kept = torch.zeros_like(scale)
        kept[keep] = scale[keep]
        self.scale_units(kept)

    @abstractmethod
    def select_units(self, keep: Tensor) -> None:
        """Replace the parameters by new, smaller ones that hold only the units `keep` (indices)."""

    @classmethod
    def joined(cls, paths: Sequence[Path]) -> Sequence[Path]:
        """As few paths as contribute the sum of what several contribute, of this kind and at one place.

        By default they stay as they are. Kinds of which one path can hold several override this.

        Args:
            paths: one or more; they may be changed and returned.
        """
        return paths

    def merge_into(self, weight: Tensor, bias: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return one linear map that computes the same as the map at `site.write` together with this path.

        Kinds that are linear override this; the default raises.

        Args:
            weight: (out, in), the weight at `site.write`, in a dtype precise enough for the sum; not changed.
            bias: (out,), or None; not changed.
            gate: None if fully open, else (units,) or (1,).

        Returns:
            The new weight and bias, in the dtype of `weight`.

        Raises:
            PathError: this kind is not linear.
        """
        raise PathError(
            f"a {self.kind} path cannot be merged: it is not a linear map",
            expected="kinds that are linear maps, such as lora and scale",
            got=f"{self.kind} at {self.site.write}",
            where="merge",
            fix="keep the adapters attached, or search a space without this kind and merge what it finds",
        )

    @classmethod
    def forward_together(
        cls, paths: Sequence[Path], tapped: Tensor, target: Tensor, gates: Sequence[Tensor | None]
    ) -> Tensor:
        """Run several paths of this kind that share a tap and a write side; overridden by kinds that can fuse them.

        Args:
            paths: the paths, all of this class.
            tapped: as for `forward`.
            target: as for `forward`.
            gates: the gate of each path, as for `forward`.
        """
        for path, gate in zip(paths, gates, strict=True):
            target = path(tapped, target, gate)
        return target

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.site.tap} -> {self.site.write}, units={self.units}"


def check_widths(path: Path, tapped: Tensor, target: Tensor) -> None:
    """Check the last dimensions of the tensors at the tap and at the write side.

    Raises:
        PathError: one differs from the width that the layout found; names the point.
    """
    site = path.site
    if site.reads_ids and site.tap.side == "input":
        if tapped.shape != target.shape[:-1] or tapped.is_floating_point():
            expected, got = f"token ids of shape {tuple(target.shape[:-1])}", f"{tapped.dtype}, {tuple(tapped.shape)}"
            raise does_not_fit(path, site.tap, expected, got, "attach with a sample batch of the kind you train on")
        tapped = tapped.new_empty(1, device="meta").expand(site.width_in)
    for point, tensor, width in ((site.tap, tapped, site.width_in), (site.write, target, site.width_out)):
        if tensor.shape[-1] != width:
            fix = "attach with a sample batch of the kind you train on"
            raise does_not_fit(path, point, f"last dimension {width}", f"shape {tuple(tensor.shape)}", fix)


def does_not_fit(path: Path, point: Point, expected: str, got: str, fix: str) -> PathError:
    """The error for a tensor that a path cannot work on at one of its points."""
    return PathError(
        "a path does not fit its point",
        expected=expected,
        got=got,
        where=f"{path.kind} at {point} (block {path.site.block_index}, {path.site.sublayer})",
        fix=fix,
    )


def per_token(gate: Tensor, rows: Tensor, where: str) -> Tensor:
    """Repeat the gates of n examples for their rows.

    Args:
        gate: (n, g).
        rows: (..., width); its leading dimensions hold an equal run of rows for each example, see `holds_examples`.
        where: the point, for errors.

    Returns:
        (rows, g): the gate of each row of `rows`, flattened to two dimensions.

    Raises:
        PathError: the rows cannot be those of n examples.
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


def join_parameters(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Concatenate parameters of paths that run together; a single one is returned without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim)


def join_gates(paths: Sequence[Path], gates: Sequence[Tensor | None], target: Tensor) -> Tensor | None:
    """Concatenate the gates of paths that run together.

    Args:
        paths: the paths.
        gates: the gate of each path, as for `Path.forward`.
        target: (..., width), the value at the write side.

    Returns:
        (g,), or (rows of target, g) if a gate differs by example; None if all paths are fully open. g is the sum of the
        paths' units. The gate of a single path keeps its own width, `units` or 1.

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
    """Whether a tensor can hold n examples, each with an equal run of rows.

    In a tensor (examples, ..., width) the first dimension counts the examples; in one of shape (tokens, width) the
    tokens of an example follow each other.
    """
    leading = rows.shape[:-1] if rows.dim() < 3 else rows.shape[:1]
    return leading.numel() % n == 0


def join_units(paths: Sequence[Path], dims: Mapping[str, int]) -> Path:
    """The first path with the units of all of them; `dims` is the dimension of each parameter that counts units."""
    first = paths[0]
    for name, dim in dims.items():
        value = torch.cat([getattr(path, name) for path in paths], dim)
        setattr(first, name, resized(getattr(first, name), value))
    return first


def resized(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    """A new parameter with a copy of `value`; it requires a gradient if `parameter` does."""
    return nn.Parameter(value.detach().clone(), requires_grad=parameter.requires_grad)


def new_parameter(*shape: int, bound: float = 0.0, generator: torch.Generator | None = None) -> nn.Parameter:
    """An fp32 parameter, uniform in (-bound, bound), or zeros by default.

    It is drawn on the CPU, so that every device starts from the same values.
    """
    value = torch.empty(shape)
    if not value.is_meta:  # values take time, and there are none
        value.uniform_(-bound, bound, generator=generator) if bound else value.zero_()
    return nn.Parameter(value)
