"""Bottleneck adapters, serial and parallel: up f(down h + bias) is added to the output of a sub-layer.

There is no bias after `up`: so every parameter belongs to one unit, and a closed unit adds exactly 0. Choose the
sub-layers with `at: {sublayers: ...}`. Adapters of other libraries that read what a LayerNorm returns become paths that
normalise what they read (`normalized`).

References:
    Houlsby et al. 2019, arXiv 1902.00751: serial, after attention and after the feed-forward. Pfeiffer et al. 2021,
    arXiv 2005.00247: serial, after the feed-forward only. He et al. 2022, arXiv 2110.04366: parallel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal, Self, cast

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from gatedadapters.backbone import Layout
from gatedadapters.config import PathOptions
from gatedadapters.config.base import Units
from gatedadapters.paths.base import Path, check_widths, join_gates, join_parameters, new_parameter, resized
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
    """A bottleneck of `width` hidden units; each is a unit of in + out + 1 parameters.

    Attributes:
        width: number of hidden units.
        activation: of the hidden units.
        normalized: read the vector less its mean over its standard deviation, with this number added to the variance,
            as a LayerNorm does before gains and shifts; None reads it as it is.
    """

    added = ("normalized",)

    width: Units = 16
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    normalized: Annotated[float, Field(ge=0, lt=1)] | None = None

    @property
    def size(self) -> int:
        """The width."""
        return self.width

    def resized(self, size: int) -> Self:
        """The same with another width."""
        return self.model_copy(update={"width": size})


class SerialOptions(BottleneckOptions):
    """Options of `Serial`, which reads the output of the sub-layer."""

    kind: Literal["serial"] = "serial"


class ParallelOptions(BottleneckOptions):
    """Options of `Parallel`, which reads the input of the sub-layer."""

    kind: Literal["parallel"] = "parallel"


class Bottleneck(Path):
    """target + up (z * f(down tapped + bias)); down (width, in), bias (width,), up (out, width)."""

    def __init__(self, site: Site, options: BottleneckOptions, generator: torch.Generator | None = None) -> None:
        super().__init__(site, options, generator)
        self.activation, self.normalized = ACTIVATIONS[options.activation], options.normalized
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
        """Add up (gate * f(down tapped + bias)) to the target."""
        return self.forward_together([self], tapped, target, [gate])

    @classmethod
    def forward_together(
        cls, paths: Sequence[Path], tapped: Tensor, target: Tensor, gates: Sequence[Tensor | None]
    ) -> Tensor:
        """Run one down- and one up-projection for all paths; the gates scale the activations between them."""
        several = cast(Sequence[Bottleneck], paths)
        if len({p.normalized for p in several}) > 1:  # they read different vectors
            return super().forward_together(paths, tapped, target, gates)
        first, dtype = several[0], target.dtype
        check_widths(first, tapped, target)
        rows, gate = target.reshape(-1, target.shape[-1]), join_gates(several, gates, target)
        down, bias = join_parameters([p.down for p in several]), join_parameters([p.bias for p in several])
        with in_its_own_type(target):
            tapped = tapped.to(dtype)
            if first.normalized is not None:
                tapped = F.layer_norm(tapped, tapped.shape[-1:], eps=first.normalized)
            hidden = F.linear(tapped, down.to(dtype), bias.to(dtype))
            hidden = hidden.reshape(-1, hidden.shape[-1])
            if len({p.activation for p in several}) == 1:
                hidden = first.activation(hidden)
            else:
                parts = hidden.split([p.units for p in several], 1)
                hidden = torch.cat([p.activation(part) for p, part in zip(several, parts, strict=True)], 1)
            if gate is not None:
                hidden = hidden * gate.to(dtype)
            return torch.addmm(rows, hidden, join_parameters([p.up for p in several], 1).to(dtype).t()).view(
                target.shape
            )

    def rate_factor(self, units: float) -> float:
        """2 / sqrt(width): as for ranks, twice as high because the activation lets about half of the inputs pass."""
        return 2 / math.sqrt(units)

    @torch.no_grad()
    def learned(self) -> Tensor:
        """Norms of the input and the output weights of each hidden unit, multiplied."""
        size: Tensor = self.up.norm(dim=0) * self.down.norm(dim=1)
        return size

    @torch.no_grad()
    def scale_units(self, scale: Tensor) -> None:
        """Multiply the columns of `up`."""
        self.up.mul_(scale.to(self.up))

    def select_units(self, keep: Tensor) -> None:
        """Keep these rows of `down` and `bias` and columns of `up`."""
        self.down, self.bias = resized(self.down, self.down[keep]), resized(self.bias, self.bias[keep])
        self.up = resized(self.up, self.up[:, keep])


class Serial(Bottleneck):
    """h + up f(down h + bias), h the output of a sub-layer before the residual addition."""

    kind = "serial"
    stage = 2

    @classmethod
    def sites(cls, options: PathOptions, layout: Layout) -> Iterator[Site | SkippedSite]:
        """The output of every selected sub-layer."""
        return sublayer_sites(options, layout, tap="output", kind=cls.kind)


class Parallel(Bottleneck):
    """sublayer(x) + up f(down x + bias), x the input of the sub-layer."""

    kind = "parallel"
    stage = 3

    @classmethod
    def sites(cls, options: PathOptions, layout: Layout) -> Iterator[Site | SkippedSite]:
        """Every selected sub-layer; the path reads its input and adds to its output."""
        return sublayer_sites(options, layout, tap="input", kind=cls.kind)
