"""A new path is one file: this one adds an unknown kind and inherits every test of the contract."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from gatedadapters import SearchSpace, attach
from gatedadapters.backbone import Layout
from gatedadapters.config import PathOptions
from gatedadapters.paths import Path, Site, SkippedSite, register
from gatedadapters.paths.base import check_widths, per_token
from gatedadapters.paths.placing import sublayer_sites
from gatedadapters.testing import PathContract, tiny


class GroupedShiftOptions(PathOptions):
    kind: Literal["test-grouped-shift"] = "test-grouped-shift"
    groups: int = Field(4, gt=0)

    @property
    def size(self) -> int:
        return self.groups

    def resized(self, size: int) -> GroupedShiftOptions:
        return self.model_copy(update={"groups": size})


@register
class GroupedShift(Path):
    """h + sum over groups of z_g tanh(x . reads_g) writes_g: a group reads one number, writes one vector."""

    kind = "test-grouped-shift"
    stage = 5

    def __init__(self, site: Site, options: GroupedShiftOptions, generator: torch.Generator | None = None) -> None:
        super().__init__(site, options, generator)
        self.reads = nn.Parameter(torch.randn(options.groups, site.width_in, generator=generator))
        self.writes = nn.Parameter(torch.zeros(options.groups, site.width_out))

    @classmethod
    def sites(cls, options: PathOptions, layout: Layout) -> Iterator[Site | SkippedSite]:
        return sublayer_sites(options, layout, tap="input", kind=cls.kind)

    @classmethod
    def cost(cls, site: Site, options: PathOptions) -> tuple[int, int, float]:
        params = site.width_in + site.width_out
        return options.size, params, 2.0 * params * site.traffic

    @property
    def units(self) -> int:
        return len(self.reads)

    def forward(self, tapped: Tensor, target: Tensor, gate: Tensor | None) -> Tensor:
        check_widths(self, tapped, target)
        with torch.autocast(target.device.type, enabled=False):
            numbers = torch.tanh(F.linear(tapped.to(target.dtype), self.reads.to(target.dtype)))
            numbers = numbers.reshape(-1, self.units)
            if gate is not None:
                gate = gate if gate.dim() == 1 else per_token(gate, target, str(self.site.tap))
                numbers = numbers * gate.to(target.dtype)
            return target + (numbers @ self.writes.to(target.dtype)).view(target.shape)

    @torch.no_grad()
    def scale_units(self, scale: Tensor) -> None:
        self.writes.mul_(scale[:, None])

    def select_units(self, keep: Tensor) -> None:
        self.reads, self.writes = (nn.Parameter(p.detach()[keep].clone()) for p in (self.reads, self.writes))


class TestGroupedShift(PathContract):
    options = GroupedShiftOptions(groups=3)


def test_a_search_space_offers_the_new_kind_beside_the_others() -> None:
    space = SearchSpace.parse(
        {
            "paths": [
                {"kind": "test-grouped-shift", "groups": 2, "at": {"sublayers": ["feed_forward"]}},
                {"kind": "lora"},
            ]
        },
        where="test",
    )
    model, batch = tiny("llama")
    adapters = attach(model, space, batch)
    new = [path for path in adapters.paths.values() if isinstance(path, GroupedShift)]
    assert [path.units for path in new] == [2, 2, 2]
    model.train()(**batch)[0].sum().backward()
    assert all(path.writes.grad is not None and path.writes.grad.any() for path in new)
