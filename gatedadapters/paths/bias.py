"""Bias: one learned shift per feature.

References:
    Ben Zaken et al. 2022 (BitFit), arXiv 2106.10199: tuning the biases alone. Here every selected linear map gets a
    shift, also one that has no bias itself.
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


class BiasOptions(PathOptions):
    """A shift on the `side` of every selected linear map; a path is one unit, kept or dropped whole.

    It merges into a map that has a bias. A merge into a map without one is refused: there is no place to store it.
    """

    kind: Literal["bias"] = "bias"
    side: Side = "output"


class Bias(Affine):
    """h + z b; b (features,) is zero at start."""

    kind = "bias"
    stage = 2

    def __init__(self, site: Site, options: BiasOptions, generator: torch.Generator | None = None) -> None:
        super().__init__(site, options, generator)
        self.shift = new_parameter(site.width_out)

    @classmethod
    def sites(cls, options: PathOptions, layout: Layout) -> Iterator[Site | SkippedSite]:
        """One side of every selected linear map."""
        assert isinstance(options, BiasOptions)
        return map_sites(options, layout, tap=options.side, write=options.side, kind=cls.kind)

    @classmethod
    def cost(cls, site: Site, options: PathOptions) -> tuple[int, int, float]:
        """One unit: the whole vector."""
        return 1, site.width_out, site.width_out * site.traffic

    def effective(self) -> tuple[Tensor | None, Tensor | None]:
        """No s, and b."""
        return None, self.shift
