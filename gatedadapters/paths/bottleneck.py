"""Bottleneck adapters, serial and parallel: up f(down h), added to what a sub-layer returns.

References:
    Houlsby et al. 2019, arXiv 1902.00751 (serial, after attention and feed-forward); Pfeiffer et al. 2021, arXiv
    2005.00247 (serial, after the feed-forward only): choose with `at: {sublayers: ...}`. He et al. 2022, arXiv
    2110.04366 (parallel). There is no bias after `up`: every parameter then belongs to one unit, and a closed unit adds
    exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Self, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from gatedadapters.backbone import Layout
from gatedadapters.config import PathOptions
from gatedadapters.paths.base import Path, check_width, joined_gates, new_parameter, resized, side_by_side
from gatedadapters.paths.low_rank import in_its_own_type
from gatedadapters.paths.placing import sublayer_sites
from gatedadapters.paths.site import Site, SkippedSite

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class BottleneckOptions(PathOptions):
    """`width` hidden units of 2 d + 1 parameters each."""

    width: int = Field(16, gt=0)
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"

    @property
    def size(self) -> int:
        """The width."""
        return self.width

    def resized(self, size: int) -> Self:
        """The same with another width."""
        return self.model_copy(update={"width": size})


class SerialOptions(BottleneckOptions):
    """Reads what the sub-layer returns."""

    kind: Literal["serial"] = "serial"


class ParallelOptions(BottleneckOptions):
    """Reads what the sub-layer reads."""

    kind: Literal["parallel"] = "parallel"


class Bottleneck(Path):
    """target + up (z * f(down tapped + bias)); down (width, in), bias (width,), up (out, width)."""

    def __init__(self, site: Site, options: BottleneckOptions, generator: torch.Generator | None = None) -> None:
        super().__init__(site, options, generator)
        self.activation = ACTIVATIONS[options.activation]
        bound = 1 / math.sqrt(site.width_in)
        self.down = new_parameter(options.width, site.width_in, bound=bound, generator=generator)
        self.bias = new_parameter(options.width)
        self.up = new_parameter(site.width_out, options.width)

    @classmethod
    def cost(cls, site: Site, options: PathOptions) -> tuple[int, int, float]:
        """Units are hidden units."""
        params = site.width_in + site.width_out + 1
        return options.size, params, 2.0 * params * site.traffic

    @property
    def units(self) -> int:
        """The width."""
        return self.down.shape[0]

    def forward(self, tapped: Tensor, target: Tensor, gate: Tensor | None) -> Tensor:
        """Adds up (gate * f(down tapped + bias)) to the target."""
        return self.forward_together([self], tapped, target, [gate])

    @classmethod
    def forward_together(
        cls, paths: Sequence[Path], tapped: Tensor, target: Tensor, gates: Sequence[Tensor | None]
    ) -> Tensor:
        """One down- and one up-projection for all, each with its activation; the gates scale what it gives."""
        several = cast(Sequence[Bottleneck], paths)
        first, dtype = several[0], target.dtype
        check_width(first, tapped, first.site.width_in, "input")
        check_width(first, target, first.site.width_out, "output")
        rows, gate = target.reshape(-1, target.shape[-1]), joined_gates(several, gates, target)
        down, bias = side_by_side([p.down for p in several]), side_by_side([p.bias for p in several])
        with in_its_own_type(target):
            hidden = F.linear(tapped.to(dtype), down.to(dtype), bias.to(dtype))
            hidden = hidden.reshape(-1, hidden.shape[-1])
            if len({p.activation for p in several}) == 1:
                hidden = first.activation(hidden)
            else:
                parts = hidden.split([p.units for p in several], 1)
                hidden = torch.cat([p.activation(part) for p, part in zip(several, parts, strict=True)], 1)
            if gate is not None:
                hidden = hidden * gate.to(dtype)
            return torch.addmm(rows, hidden, side_by_side([p.up for p in several], 1).to(dtype).t()).view(target.shape)

    @torch.no_grad()
    def scale_units(self, scale: Tensor) -> None:
        """Baked into `up`."""
        self.up.mul_(scale.to(self.up))

    def select_units(self, keep: Tensor) -> None:
        """Rows of what reads, columns of `up`."""
        self.down, self.bias = resized(self.down, self.down[keep]), resized(self.bias, self.bias[keep])
        self.up = resized(self.up, self.up[:, keep])


class Serial(Bottleneck):
    """h + up f(down h) on a sub-layer's output h, before the residual addition."""

    kind = "serial"
    stage = 2

    @classmethod
    def sites(cls, options: PathOptions, layout: Layout) -> Iterator[Site | SkippedSite]:
        """The output of every selected sub-layer."""
        return sublayer_sites(options, layout, tap="output", kind=cls.kind)


class Parallel(Bottleneck):
    """sublayer(x) + up f(down x), x being what the sub-layer reads."""

    kind = "parallel"
    stage = 3

    @classmethod
    def sites(cls, options: PathOptions, layout: Layout) -> Iterator[Site | SkippedSite]:
        """Every selected sub-layer: taps its input, adds to its output."""
        return sublayer_sites(options, layout, tap="input", kind=cls.kind)
