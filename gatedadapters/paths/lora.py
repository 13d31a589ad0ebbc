"""LoRA: a low-rank map beside a linear map.

References:
    Hu et al. 2021, arXiv 2106.09685: h = W x + B A x, A random, B zero. The paper's scale alpha / r is 1 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, Self, cast

import torch
from pydantic import Field
from torch import Tensor

from gatedadapters.backbone import Layout
from gatedadapters.config import PathOptions
from gatedadapters.paths.base import Path, check_width, joined_gates, new_parameter, resized, side_by_side
from gatedadapters.paths.low_rank import low_rank
from gatedadapters.paths.placing import map_sites
from gatedadapters.paths.precision import widened
from gatedadapters.paths.site import Site, SkippedSite


class LoRAOptions(PathOptions):
    """`rank` candidates at every selected linear map; each rank is a unit of in + out parameters."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(8, gt=0)

    @property
    def size(self) -> int:
        """The rank."""
        return self.rank

    def resized(self, size: int) -> Self:
        """The same with another rank."""
        return self.model_copy(update={"rank": size})


class LoRA(Path):
    """h = W x + up (z * (down x)); down (rank, in), up (out, rank)."""

    kind = "lora"
    stage = 0

    def __init__(self, site: Site, options: LoRAOptions, generator: torch.Generator | None = None) -> None:
        super().__init__(site, options, generator)
        # kaiming_uniform with a = sqrt(5), as in the authors' code: uniform in 1 / sqrt(fan_in)
        self.down = new_parameter(options.rank, site.width_in, bound=1 / math.sqrt(site.width_in), generator=generator)
        self.up = new_parameter(site.width_out, options.rank)

    @classmethod
    def sites(cls, options: PathOptions, layout: Layout) -> Iterator[Site | SkippedSite]:
        """Every selected linear map: reads its input, adds to its output."""
        return map_sites(options, layout, tap="input", write="output", kind=cls.kind, instead="weight_lora")

    @classmethod
    def cost(cls, site: Site, options: PathOptions) -> tuple[int, int, float]:
        """Units are ranks."""
        params = site.width_in + site.width_out
        return options.size, params, 2.0 * params * site.traffic

    @property
    def units(self) -> int:
        """The rank."""
        return self.down.shape[0]

    def forward(self, tapped: Tensor, target: Tensor, gate: Tensor | None) -> Tensor:
        """Adds up (gate * (down tapped)) to the target."""
        return self.forward_together([self], tapped, target, [gate])

    @classmethod
    def forward_together(
        cls, paths: Sequence[Path], tapped: Tensor, target: Tensor, gates: Sequence[Tensor | None]
    ) -> Tensor:
        """One down- and one up-projection for all of them, the gates scaling the bottleneck."""
        several = cast(Sequence[LoRA], paths)
        first = several[0]
        check_width(first, tapped, first.site.width_in, "input")
        check_width(first, target, first.site.width_out, "output")
        down, up = side_by_side([p.down for p in several]), side_by_side([p.up for p in several], 1)
        return low_rank(tapped, target, down, up, joined_gates(several, gates, target))

    @torch.no_grad()
    def scale_units(self, scale: Tensor) -> None:
        """Baked into `up`."""
        self.up.mul_(scale.to(self.up))

    def merge_into(self, weight: Tensor, bias: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + up diag(gate) down."""
        up = self.up.to(weight)
        return weight + (up if gate is None else up * gate.to(weight)) @ self.down.to(weight), bias

    @torch.no_grad()
    def condense(self, keep: Tensor, scale: Tensor) -> None:
        """The best approximation of the gated map by as many ranks as are kept (Eckart-Young): its leading singular
        directions. Rows of `down` keep their mean length, so that a rank that held nothing can still learn.
        """
        q_up, r_up = torch.linalg.qr(widened(self.up) * widened(scale))
        q_down, r_down = torch.linalg.qr(widened(self.down).t())
        u, s, v = torch.linalg.svd(r_up @ r_down.t())
        keep = keep[: len(s)]  # more ranks than the map has (a router of few experts) hold nothing
        count, length = len(keep), widened(self.down).norm(dim=1).mean().clamp(min=1e-30)  # imported ones may hold 0
        up, down = torch.zeros_like(self.up), self.down.clone()
        up[:, keep] = ((q_up @ u)[:, :count] * (s[:count] / length)).to(up)
        down[keep] = ((q_down @ v.t())[:, :count].t() * length).to(down)
        self.up.copy_(up)
        self.down.copy_(down)

    def select_units(self, keep: Tensor) -> None:
        """Rows of what reads, columns of `up`."""
        self.down, self.up = resized(self.down, self.down[keep]), resized(self.up, self.up[:, keep])
