"""Scale: one learned factor per feature.

References:
    Liu et al. 2022 (IA3), arXiv 2205.05638: factors on keys, values and the inner activation of the feed-forward.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from gatedadapters.backbone import Layout
from gatedadapters.config import PathOptions
from gatedadapters.paths.base import Path, check_widths, new_parameter, per_token
from gatedadapters.paths.placing import map_sites
from gatedadapters.paths.site import Side, Site, SkippedSite


class ScaleOptions(PathOptions):
    """Factors on the `side` of every selected linear map; a path is one unit, kept or dropped whole.

    IA3 is two candidates: `side: output` at keys and values, and `side: input` at the feed-forward's down map.
    """

    kind: Literal["scale"] = "scale"
    side: Side = "output"


class Scale(Path):
    """h (1 + z s); s (features,) is zero at start. Other libraries store the factor 1 + s."""

    kind = "scale"
    stage = 1

    def __init__(self, site: Site, options: ScaleOptions, generator: torch.Generator | None = None) -> None:
        super().__init__(site, options, generator)
        self.shift = new_parameter(site.width_out)

    @classmethod
    def sites(cls, options: PathOptions, layout: Layout) -> Iterator[Site | SkippedSite]:
        """One side of every selected linear map."""
        assert isinstance(options, ScaleOptions)
        return map_sites(options, layout, tap=options.side, write=options.side, kind=cls.kind)

    @classmethod
    def cost(cls, site: Site, options: PathOptions) -> tuple[int, int, float]:
        """One unit: the whole vector."""
        return 1, site.width_out, 2.0 * site.width_out * site.traffic

    @property
    def units(self) -> int:
        """Always 1."""
        return 1

    def forward(self, tapped: Tensor, target: Tensor, gate: Tensor | None) -> Tensor:
        """Multiply the target by 1 + gate * shift."""
        return self.forward_together([self], tapped, target, [gate])

    @classmethod
    def forward_together(
        cls, paths: Sequence[Path], tapped: Tensor, target: Tensor, gates: Sequence[Tensor | None]
    ) -> Tensor:
        """Multiply once, by the product of all factors."""
        several = cast(Sequence[Scale], paths)
        check_widths(several[0], tapped, target)
        factors = [
            1 + (path.shift if gate is None else gate * path.shift) for path, gate in zip(several, gates, strict=True)
        ]
        factor = functools.reduce(torch.mul, factors)
        if factor.dim() == 2:
            factor = per_token(factor, target, str(several[0].site.tap))
        rows = target.reshape(-1, target.shape[-1])
        return (rows * factor.to(target.dtype)).view(target.shape)

    @torch.no_grad()
    def scale_units(self, scale: Tensor) -> None:
        """Multiply the shift."""
        self.shift.mul_(scale.to(self.shift))

    def merge_into(self, weight: Tensor, bias: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Multiply rows of the weight and the bias by 1 + gate * shift, or columns if the input is scaled."""
        shift = self.shift.to(weight)
        factor = 1 + (shift if gate is None else gate.to(weight) * shift)
        if self.site.write.side == "input":
            return weight * factor, bias
        return factor[:, None] * weight, None if bias is None else factor * bias

    def select_units(self, keep: Tensor) -> None:
        """Do nothing: there is one unit, and it is kept."""
