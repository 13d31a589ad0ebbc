"""Norm: learned changes of the gains of normalisations, and of their shifts.

References:
    Zhao et al. 2024 (LN tuning), arXiv 2312.11420: tuning the norms alone adapts a language model. Qi et al. 2022,
    arXiv 2211.08682: the same in encoders.
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
from gatedadapters.paths.placing import selected
from gatedadapters.paths.site import Point, Site, SkippedSite


class NormOptions(PathOptions):
    """Gains at every selected norm; a path is one unit, kept or dropped whole.

    Norms are selected like linear maps: by the sub-layer that they belong to, by their block, by their role (`norm`,
    `q_norm`, `k_norm`, ...). Unlike maps, those outside the blocks (of embeddings, the final one) are selected too
    unless `at` names other sub-layers or blocks.

    Attributes:
        shift: learn shifts beside the gains, at norms that have them.
    """

    kind: Literal["norm"] = "norm"
    shift: bool = True


class Norm(Affine):
    """h (1 + z s) + z b at the output of a norm; s and b (features,) are zero at start, b only where the norm shifts.

    The same function as a norm with the gain g (1 + z s) and the shift c (1 + z s) + z b, whatever way the norm stores
    its gain (Gemma stores g - 1).
    """

    kind = "norm"

    def __init__(self, site: Site, options: NormOptions, generator: torch.Generator | None = None) -> None:
        super().__init__(site, options, generator)
        self.gain = new_parameter(site.width_out)
        if site.shifts and options.shift:
            self.shift = new_parameter(site.width_out)

    @classmethod
    def sites(cls, options: PathOptions, layout: Layout) -> Iterator[Site | SkippedSite]:
        """The output of every selected norm."""
        for block, sublayer, norm in layout.norms():
            if not selected(options, layout, block, sublayer, norm.name, norm.role):
                continue
            if norm.channels_first:
                yield SkippedSite(cls.kind, norm.name, "its features are not the last dimension")
                continue
            point = Point(norm.name, "output")
            yield Site(
                point,
                point,
                norm.width,
                norm.width,
                block.name,
                block.index,
                sublayer.kind,
                norm.role,
                norm.traffic,
                shifts=norm.shifts,
            )

    @classmethod
    def cost(cls, site: Site, options: PathOptions) -> tuple[int, int, float]:
        """One unit: the gains, and the shifts where there are some."""
        assert isinstance(options, NormOptions)
        vectors = 2 if site.shifts and options.shift else 1
        return 1, vectors * site.width_out, (1.0 + vectors) * site.width_out * site.traffic

    def effective(self) -> tuple[Tensor | None, Tensor | None]:
        """s, and b where the norm shifts."""
        return self.gain, getattr(self, "shift", None)
