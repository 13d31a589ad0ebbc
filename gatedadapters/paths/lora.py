"""LoRA: a low-rank map added to a linear map.

References:
    Hu et al. 2021, arXiv 2106.09685: h = W x + B A x, A random, B zero. The paper's scale alpha / r is 1 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, Self, cast

import torch
from torch import Tensor

from gatedadapters.backbone import Layout
from gatedadapters.config import PathOptions
from gatedadapters.config.base import Units
from gatedadapters.paths.base import Path, check_widths, join_gates, join_parameters, join_units, new_parameter, resized
from gatedadapters.paths.low_rank import looked_up, low_rank
from gatedadapters.paths.placing import map_sites
from gatedadapters.paths.precision import widened
from gatedadapters.paths.site import Site, SkippedSite


class LoRAOptions(PathOptions):
    """LoRA of rank `rank` at every selected linear map; each rank is a unit of in + out parameters.

    Tables of token ids are selected by `at: {sublayers: [embedding]}`, the map to the vocabulary by
    `at: {sublayers: [outside], roles: [head]}`. Where the two are tied, each is adapted by itself, since the weight
    that they share does not change; such a path cannot be merged.
    """

    kind: Literal["lora"] = "lora"
    rank: Units = 8

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
        # As in the authors' code: kaiming_uniform with a = sqrt(5), which is uniform in (-1, 1) / sqrt(fan_in). A token
        # id reads one column of `down`, so its fan-in is 1.
        bound = 1.0 if site.reads_ids else 1 / math.sqrt(site.width_in)
        self.down = new_parameter(options.rank, site.width_in, bound=bound, generator=generator)
        self.up = new_parameter(site.width_out, options.rank)

    @classmethod
    def sites(cls, options: PathOptions, layout: Layout) -> Iterator[Site | SkippedSite]:
        """Every selected linear map, tables of token ids included; the path reads its input and adds to its output."""
        return map_sites(options, layout, tap="input", write="output", kind=cls.kind, instead="weight_lora", ids=True)

    @classmethod
    def cost(cls, site: Site, options: PathOptions) -> tuple[int, int, float]:
        """Units are ranks."""
        params = site.width_in + site.width_out
        multiplied = site.width_out if site.reads_ids else params  # what a token id reads is looked up
        return options.size, params, 2.0 * multiplied * site.traffic

    @property
    def units(self) -> int:
        """The rank."""
        return self.down.shape[0]

    def forward(self, tapped: Tensor, target: Tensor, gate: Tensor | None) -> Tensor:
        """Add up (gate * (down tapped)) to the target."""
        return self.forward_together([self], tapped, target, [gate])

    @classmethod
    def forward_together(
        cls, paths: Sequence[Path], tapped: Tensor, target: Tensor, gates: Sequence[Tensor | None]
    ) -> Tensor:
        """Run one down- and one up-projection for all paths; the gates scale the bottleneck between them."""
        several = cast(Sequence[LoRA], paths)
        first = several[0]
        check_widths(first, tapped, target)
        down, up = join_parameters([p.down for p in several]), join_parameters([p.up for p in several], 1)
        gate = join_gates(several, gates, target)
        return (looked_up if first.site.reads_ids else low_rank)(tapped, target, down, up, gate)

    @property
    def weight_added_to(self) -> str | None:
        """The weight of the map."""
        return f"{self.site.write.module}.{self.site.write.parameter or 'weight'}"

    def rate_factor(self, units: float) -> float:
        """1 / sqrt(rank): the outputs of the ranks add up.

        References:
            Kalajdzievski 2023 (rsLoRA), arXiv 2312.03732: the scale alpha / sqrt(r) keeps learning stable in the rank.
        """
        return 1 / math.sqrt(units)

    @torch.no_grad()
    def learned(self) -> Tensor:
        """Norm of the rank-one map of each unit; at a table of token ids, of what it adds to a token on average."""
        size: Tensor = self.up.norm(dim=0) * self.down.norm(dim=1)
        return size / math.sqrt(self.site.width_in) if self.site.reads_ids else size

    @torch.no_grad()
    def scale_units(self, scale: Tensor) -> None:
        """Multiply the columns of `up`."""
        self.up.mul_(scale.to(self.up))

    def merge_into(self, weight: Tensor, bias: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + up diag(gate) down."""
        up = self.up.to(weight)
        return weight + (up if gate is None else up * gate.to(weight)) @ self.down.to(weight), bias

    @torch.no_grad()
    def condense(self, keep: Tensor, scale: Tensor) -> None:
        """Approximate the gated map as well as the kept ranks can: by its leading singular directions.

        Rows of `down` keep their mean length; so a rank whose singular value is 0 can still learn.

        References:
            Eckart, Young 1936: the truncated singular value decomposition is the best approximation of a given rank.
        """
        q_up, r_up = torch.linalg.qr(widened(self.up) * widened(scale))
        q_down, r_down = torch.linalg.qr(widened(self.down).t())
        u, s, v = torch.linalg.svd(r_up @ r_down.t())
        keep = keep[: len(s)]  # a small map (a router of few experts) has fewer singular values
        length = widened(self.down).norm(dim=1).mean().clamp(min=1e-30)  # imported adapters may hold only zeros
        count = len(keep)
        up, down = torch.zeros_like(self.up), self.down.clone()
        up[:, keep] = ((q_up @ u)[:, :count] * (s[:count] / length)).to(up)
        down[keep] = ((q_down @ v.t())[:, :count].t() * length).to(down)
        self.up.copy_(up)
        self.down.copy_(down)

    @classmethod
    def joined(cls, paths: Sequence[Path]) -> Sequence[Path]:
        """The ranks of all paths, one after the other."""
        return (join_units(paths, {"down": 0, "up": 1}),)

    def select_units(self, keep: Tensor) -> None:
        """Keep these rows of `down` and columns of `up`."""
        self.down, self.up = resized(self.down, self.down[keep]), resized(self.up, self.up[:, keep])
