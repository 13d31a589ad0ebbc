"""Elements: learned changes of a few single weights of a map, the sparse delta as a candidate path.

A masked backbone competes with adapters in this way, under one budget and with the same gates.

The positions of the elements are fixed before training. Without data they are the largest weights (`score: magnitude`),
chosen when a search space is attached. With data, `Adapters.choose_elements` takes any importance score.

References:
    Ansell et al. 2022 (LT-SFT), arXiv 2110.07560: sparse differences of the weights compose. Guo et al. 2021 (diff
    pruning), arXiv 2012.07463: gates over differences of single weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gatedadapters.backbone import Layout
from gatedadapters.backbone.quantized import dequantized
from gatedadapters.config import PathOptions
from gatedadapters.errors import PathError
from gatedadapters.paths.base import (
    Path,
    check_widths,
    does_not_fit,
    join_parameters,
    new_parameter,
    per_token,
    resized,
)
from gatedadapters.paths.placing import map_sites
from gatedadapters.paths.site import Site, SkippedSite
from gatedadapters.paths.sparse_product import sparse_product


class ElementsOptions(PathOptions):
    """Changes of `k` single weights of every selected linear map, in units of `chunk` elements.

    A unit holds the `chunk` most useful elements, the next unit the next most useful ones, and so on: with one gate an
    element a model would have hundreds of thousands of gates, each with too little evidence. A unit costs `chunk`
    parameters. The budget counts values, as it does for all kinds, not positions: a Structure holds those as gaps, in
    4 to 7 characters an element.

    Attributes:
        k: number of elements of each map; a multiple of `chunk`. Time grows with tokens * k: at 1,000 elements a
            path takes about as long as LoRA of rank 8, from some 4,000 on nearly as long as the map itself.
        chunk: number of elements of a unit.
        score: which elements before any data is seen: the largest weights, or random ones. Weights whose values cannot
            be read (packed by a quantiser in a way of its own, or on the meta device) get random ones.
        gaps: in a Structure, the positions of each unit's elements: the first position in the flattened (out, in)
            matrix, then the distance from each to the next. None in a search.
    """

    kind: Literal["elements"] = "elements"
    k: int = Field(64, gt=0)
    chunk: int = Field(16, gt=0)
    score: Literal["magnitude", "random"] = "magnitude"
    gaps: tuple[tuple[int, ...], ...] | None = None

    @model_validator(mode="after")
    def _whole_chunks(self) -> ElementsOptions:
        if self.k % self.chunk:
            raise ValueError(f"k must be a multiple of chunk, not {self.k} of {self.chunk}")
        if self.gaps is not None:
            if [len(own) for own in self.gaps] != [self.chunk] * self.size:
                raise ValueError(f"gaps must name {self.chunk} positions for each of {self.size} units")
            if any(gap < (number > 0) for own in self.gaps for number, gap in enumerate(own)):
                raise ValueError("gaps must name positions in rising order")
        return self

    @property
    def size(self) -> int:
        """Number of units."""
        return self.k // self.chunk

    def resized(self, size: int) -> Self:
        """The same with another number of units, not yet at positions."""
        return self.model_copy(update={"k": size * self.chunk, "gaps": None})

    def select(self, units: Sequence[int]) -> Self:
        """The options of the kept units, with their positions."""
        gaps = None if self.gaps is None else tuple(self.gaps[unit] for unit in units)
        return self.model_copy(update={"k": len(units) * self.chunk, "gaps": gaps})

    def at_positions(self, positions: Tensor) -> Self:
        """The same with the positions of its units, (units, chunk), each row in rising order."""
        first = torch.zeros_like(positions[:, :1])
        rows = positions.diff(dim=1, prepend=first).tolist()
        return self.model_copy(update={"gaps": tuple(map(tuple, rows)), "k": positions.numel()})


def largest(matrix: Tensor, k: int) -> Tensor:
    """Positions in the flattened matrix of its k largest elements, the largest first; of equals the earlier one.

    They all lie in the k rows with the largest maxima, so one quick pass finds those, and only their elements are
    compared: five times as fast as `topk` of the whole matrix.

    Args:
        matrix: (rows, columns), without NaN.
        k: at most its number of elements.
    """
    rows = matrix.amax(1).sort(descending=True, stable=True).indices[:k].sort().values
    found = matrix[rows]
    threshold = found.flatten().topk(k).values[-1]
    row, column = (found >= threshold).nonzero().unbind(1)  # in the order of their positions
    order = found[row, column].sort(descending=True, stable=True).indices[:k]
    return (rows[row] * matrix.shape[1] + column)[order]


class Elements(Path):
    """h = W x + S x; S holds `values` (k,) at `positions` (k,) of the flattened (out, in) matrix, and zeros elsewhere.

    A gate multiplies the values of its unit.
    """

    kind = "elements"

    positions: Tensor

    def __init__(self, site: Site, options: ElementsOptions, generator: torch.Generator | None = None) -> None:
        super().__init__(site, options, generator)
        self.chunk, total = options.chunk, site.width_in * site.width_out
        if options.gaps is not None:
            found = torch.tensor([list(accumulate(own)) for own in options.gaps], dtype=torch.long).view(-1)
        elif options.k <= total:
            # One in each of k parts of the weight, so that they are distinct; the parts are dealt to the units in turn.
            ends = torch.arange(options.k + 1, device="cpu") * total // options.k
            draws = torch.rand(options.k, dtype=torch.float64, generator=generator, device="cpu")
            drawn = ends[:-1] + (draws * ends.diff()).long()
            found = drawn.view(self.chunk, -1).t().reshape(-1)
        else:
            raise self._misplaced(f"{options.k} elements")
        self._check(found)
        self._open: int | None = None  # units that are computed; None is all
        self.register_buffer("positions", found)
        self.values = new_parameter(len(found))

    @classmethod
    def sites(cls, options: PathOptions, layout: Layout) -> Iterator[Site | SkippedSite]:
        """Every selected linear map that has as many elements; the path reads its input and adds to its output."""
        assert isinstance(options, ElementsOptions)
        for site in map_sites(options, layout, tap="input", write="output", kind=cls.kind):
            if isinstance(site, Site) and site.width_in * site.width_out < options.k:
                reason = f"its {site.width_in * site.width_out} weights are fewer than {options.k} elements"
                yield SkippedSite(cls.kind, site.write.module, reason)
            else:
                yield site

    @classmethod
    def cost(cls, site: Site, options: PathOptions) -> tuple[int, int, float]:
        """Units are chunks of elements; positions are not counted."""
        assert isinstance(options, ElementsOptions)
        return options.size, options.chunk, 2.0 * options.chunk * site.traffic

    @property
    def units(self) -> int:
        """Number of chunks."""
        return len(self.values) // self.chunk

    @contextmanager
    def narrowed(self, units: int) -> Iterator[None]:
        """A context in which only the first units are computed: the time of a path grows with its elements."""
        self._open = units
        try:
            yield
        finally:
            self._open = None

    def effective(self) -> Tensor:
        """The values as they are added to the weights, (k,)."""
        return self.values

    @torch.no_grad()
    def learned(self) -> Tensor:
        """Norm of each unit's values."""
        size: Tensor = self.effective().view(-1, self.chunk).norm(dim=1)
        return size

    def choose_by(self, scores: Tensor) -> None:
        """Set the elements to those of the highest scores; see `choose`.

        Args:
            scores: importance of each element, in the shape of the weight as it is stored.

        Raises:
            PathError: another shape, or scores that are not finite.
        """
        site = self.site
        shape = (site.width_in, site.width_out) if site.transposed else (site.width_out, site.width_in)
        if tuple(scores.shape) != shape or not torch.stack(scores.aminmax()).isfinite().all():
            got = f"shape {tuple(scores.shape)}, {int((~scores.isfinite()).sum())} not finite"
            fix = "score the model that the adapters are attached to"
            raise does_not_fit(self, site.write, f"a finite score of each weight, {shape}", got, fix)
        self.choose(largest(scores.t() if site.transposed else scores, len(self.values)))

    def start_from(self, module: nn.Module) -> None:
        """Take the positions of the largest weights, if the options ask for them and the weights can be read."""
        if cast(ElementsOptions, self.options).score == "magnitude":
            weight = dequantized(module)
            if weight is not None and weight.dim() == 2:
                self.choose_by(weight.abs())

    @torch.no_grad()
    def choose(self, positions: Tensor) -> None:
        """Set the elements, before training: what they have learnt so far is set to zero.

        Args:
            positions: (k,) distinct positions in the flattened (out, in) matrix, the most useful first.

        Raises:
            PathError: there are not k of them, or they repeat or lie outside the matrix.
        """
        found = positions.detach().to(self.positions).view(-1)
        if found.shape != self.positions.shape:
            raise self._misplaced(f"{len(found)} positions")
        self._check(found)
        self.positions.copy_(found.view(-1, self.chunk).sort(1).values.view(-1))
        self.values.zero_()

    def forward(self, tapped: Tensor, target: Tensor, gate: Tensor | None) -> Tensor:
        """Add S x to the target."""
        return self.forward_together([self], tapped, target, [gate])

    @classmethod
    def forward_together(
        cls, paths: Sequence[Path], tapped: Tensor, target: Tensor, gates: Sequence[Tensor | None]
    ) -> Tensor:
        """Gather the columns that the elements read, multiply by the values, and add up by row."""
        several = cast(Sequence[Elements], paths)
        site = several[0].site
        check_widths(several[0], tapped, target)
        counts = [path._computed for path in several]
        positions = join_parameters([path.positions[:n] for path, n in zip(several, counts, strict=True)])
        gated = [path._gated(gate, target) for path, gate in zip(several, gates, strict=True)]
        values = [own[..., :n] for own, n in zip(gated, counts, strict=True)]
        if any(own.dim() == 2 for own in values):  # gates that differ by example
            count = target.numel() // target.shape[-1]
            values = [own.expand(count, -1) for own in values]
        rows, columns = positions // site.width_in, positions % site.width_in
        return sparse_product(tapped, target, join_parameters(values, -1), rows, columns)

    @property
    def _computed(self) -> int:
        """Elements that are computed."""
        return len(self.values) if self._open is None else self._open * self.chunk

    def _gated(self, gate: Tensor | None, target: Tensor) -> Tensor:
        """The values multiplied by the gates of their units, (k,), or (rows of target, k)."""
        if gate is None:
            return self.effective()
        if gate.dim() == 2:
            gate = per_token(gate, target, str(self.site.tap))
        wide = gate.expand(*gate.shape[:-1], self.units).repeat_interleave(self.chunk, -1)
        return self.effective() * wide

    @torch.no_grad()
    def scale_units(self, scale: Tensor) -> None:
        """Multiply the values."""
        self.values.mul_(scale.to(self.values).repeat_interleave(self.chunk))

    def merge_into(self, weight: Tensor, bias: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + S."""
        values = self.effective().to(weight)
        if gate is not None:
            values = values * gate.to(weight).expand(self.units).repeat_interleave(self.chunk)
        positions = self.positions.to(weight.device)
        return weight.reshape(-1).index_add(0, positions, values).view(weight.shape), bias

    def select_units(self, keep: Tensor) -> None:
        """Keep these chunks."""
        self.values = resized(self.values, self.values.view(-1, self.chunk)[keep].view(-1))
        self.positions = self.positions.view(-1, self.chunk)[keep].view(-1)

    def options_of(self, units: Sequence[int]) -> PathOptions:
        """The options of a path that keeps only these units, with their positions."""
        options = cast(ElementsOptions, self.options)
        return options.at_positions(self.positions.view(-1, self.chunk)).select(units)

    def _check(self, positions: Tensor) -> None:
        total = self.site.width_in * self.site.width_out
        if positions.is_meta:
            return
        if len(positions.unique()) != len(positions) or int(positions.min()) < 0 or int(positions.max()) >= total:
            raise self._misplaced(f"positions {int(positions.min())}..{int(positions.max())}, or one twice")

    def _misplaced(self, got: str) -> PathError:
        site = self.site
        return PathError(
            "these elements do not fit the weight",
            expected=f"{getattr(self.options, 'k', 0)} distinct positions below {site.width_in * site.width_out}",
            got=got,
            where=f"{self.kind} at {site.write.module}",
            fix="choose as many positions as the path has elements, or offer a smaller k",
        )
