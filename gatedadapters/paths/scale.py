"""Scale: one learned factor per feature.

References:
    Liu et al. 2022 (IA3), arXiv 2205.05638: factors on keys, values and the inner activation of the feed-forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from gatedadapters.backbone import Layout
from gatedadapters.config import PathOptions
from gatedadapters.paths.affine import Affine
from gatedadapters.paths.base import new_parameter
from gatedadapters.paths.placing import map_sites
from gatedadapters.paths.site import Side, Site, SkippedSite


class ScaleOptions(PathOptions):
    """Factors on the `side` of every selected linear map; a path is one unit, kept or dropped whole.

    IA3 is two candidates: `side: output` at keys and values, and `side: input` at the feed-forward's down map.
    """

    kind: Literal["scale"] = "scale"
    side: Side = "output"


class Scale(Affine):
    """h (1 + z s); s (features,) is zero at start. Other libraries store the factor 1 + s."""

    kind = "scale"

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

    def effective(self) -> tuple[Tensor | None, Tensor | None]:
        """s, and no b."""
        return self.shift, None
