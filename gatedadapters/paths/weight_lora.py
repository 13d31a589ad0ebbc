"""LoRA at a weight: for fused experts, routers, and weights that another module multiplies with.

Some maps have no module of their own whose input and output could be hooked:

- Since transformers 5 the experts of a block are one parameter (experts, out, in), not modules.
- A router multiplies and chooses experts in one module.
- Mamba's mixer multiplies with the weight of a child that it never calls.

These paths change the *weight* instead. While the module that uses the weight runs, it gets a `LowRankSum` in place of
the weight. Every expert has ranks of its own; a `parallel` bottleneck at the same sub-layer is shared by all experts.

References:
    Hu et al. 2021, arXiv 2106.09685: W + B A, here for each expert. Wang et al. 2024 (ESFT), arXiv 2407.01906: tuning
    a few chosen experts is enough.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, Self

import torch
from einops import rearrange
from torch import Tensor

from gatedadapters.backbone import Layout
from gatedadapters.config import PathOptions
from gatedadapters.config.base import Units
from gatedadapters.errors import PathError
from gatedadapters.paths.base import Path, does_not_fit, new_parameter
from gatedadapters.paths.lora import LoRA
from gatedadapters.paths.low_rank import in_its_own_type
from gatedadapters.paths.low_rank_sum import LowRankSum
from gatedadapters.paths.placing import selected_maps
from gatedadapters.paths.precision import widened
from gatedadapters.paths.site import Point, Site, SkippedSite


class WeightLoRAOptions(PathOptions):
    """LoRA of rank `rank` at every selected map without a module of its own, and at every expert of a stack.

    Each rank of each expert is a unit of in + out parameters.

    Attributes:
        rank: of every expert, in a search.
        experts: the expert of each unit, in a Structure, where experts may differ in rank; None in a search.
    """

    kind: Literal["weight_lora"] = "weight_lora"
    rank: Units = 8
    experts: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """The rank of every expert in a search; the number of units in a Structure."""
        return self.rank if self.experts is None else len(self.experts)

    def resized(self, size: int) -> Self:
        """The same options with another rank at every expert."""
        return self.model_copy(update={"rank": size, "experts": None})

    def select(self, units: Sequence[int]) -> Self:
        """The options of the kept units; units are counted expert by expert."""
        chosen = (unit // self.rank if self.experts is None else self.experts[unit] for unit in units)
        return self.model_copy(update={"experts": tuple(chosen)})


class WeightLoRA(LoRA):
    """W_e + up_e diag(z_e) down_e for every expert e; down (units, in), up (out, units).

    A unit is one rank of one expert. A plain matrix counts as a single expert.
    """

    kind = "weight_lora"

    expert: Tensor
    slot: Tensor

    def __init__(self, site: Site, options: WeightLoRAOptions, generator: torch.Generator | None = None) -> None:
        Path.__init__(self, site, options, generator)
        self.n_experts, experts = site.experts or 1, options.experts
        if experts is None:
            experts = tuple(e for e in range(self.n_experts) for _ in range(options.rank))
        if not experts or min(experts) < 0 or max(experts) >= self.n_experts:
            raise PathError(
                "units of experts that the model does not have",
                expected=f"units of experts 0..{self.n_experts - 1}",
                got=f"experts {experts}",
                where=f"{self.kind} at {site.write}",
                fix="use the structure on the model it was made for",
            )
        bound = 1 / math.sqrt(site.width_in)
        self.down = new_parameter(len(experts), site.width_in, bound=bound, generator=generator)
        self.up = new_parameter(site.width_out, len(experts))
        self._assign(experts)

    def _assign(self, experts: Sequence[int]) -> None:
        """Record the expert of each unit, and the number of each unit among those of its expert."""
        ranks = Counter(experts)
        self.experts, self.rank = tuple(experts), max(ranks.values())
        self.is_even = len(ranks) == self.n_experts and min(ranks.values()) == self.rank
        self.is_even &= self.experts == tuple(sorted(experts))
        for name, values in (("expert", experts), ("slot", _occurrences(experts))):
            index = torch.tensor(values, device=self.down.device)
            self.register_buffer(name, index, persistent=False)  # the options hold it too

    def rate_factor(self, units: float) -> float:
        """1 / sqrt(rank of an expert): the ranks of different experts do not add up."""
        return 1 / math.sqrt(max(1.0, units / self.n_experts))

    @classmethod
    def sites(cls, options: PathOptions, layout: Layout) -> Iterator[Site | SkippedSite]:
        """Every selected map without a module of its own, where `lora` cannot go."""
        for block, sublayer, linear in selected_maps(options, layout):
            if not linear.host:
                continue
            if not f"{linear.name}.".startswith(f"{linear.host}."):
                reason = f"used by {linear.host}, which does not contain it"
                yield SkippedSite(cls.kind, f"{linear.name}.{linear.parameter}", reason)
                continue
            weight = Point(linear.name, "weight", linear.parameter)
            yield Site(
                weight,
                weight,
                linear.in_features,
                linear.out_features,
                block.name,
                block.index,
                sublayer.kind,
                linear.role,
                linear.traffic,
                linear.experts,
                linear.transposed,
                linear.host,
            )

    @classmethod
    def cost(cls, site: Site, options: PathOptions) -> tuple[int, int, float]:
        """Units are ranks of single experts; flops assume that all experts get equally many tokens."""
        assert isinstance(options, WeightLoRAOptions)
        n_experts, params = site.experts or 1, site.width_in + site.width_out
        units = len(options.experts) if options.experts is not None else options.rank * n_experts
        return units, params, 2.0 * params * site.traffic / n_experts

    def forward(self, tapped: Tensor, target: Tensor, gate: Tensor | None) -> Tensor:
        """Return the weight plus the low-rank part, in the shape of the stored parameter.

        Args:
            tapped: not used; the same as target.
            target: the weight, of the site's `weight_shape`.
            gate: None, (units,) or (1,); it cannot differ by example, since weights have no examples.
        """
        return self.lazy(target, gate).dense()

    @classmethod
    def forward_together(
        cls, paths: Sequence[Path], tapped: Tensor, target: Tensor, gates: Sequence[Tensor | None]
    ) -> Tensor:
        """Run the paths one after the other: weights leave nothing to fuse."""
        for path, gate in zip(paths, gates, strict=True):
            target = path(tapped, target, gate)
        return target

    def lazy(self, weight: Tensor | LowRankSum, gate: Tensor | None) -> LowRankSum:
        """Return the result of `forward` as a sum that is not added up; see there for arguments.

        Raises:
            PathError: the weight has another shape, or the gate differs by example.
        """
        site = self.site
        if tuple(weight.shape) != site.weight_shape:
            expected, got = f"a weight of shape {site.weight_shape}", f"shape {tuple(weight.shape)}"
            raise does_not_fit(self, site.write, expected, got, "attach to the backbone as it is now")
        if gate is not None and gate.dim() != 1:
            got = f"gates of shape {tuple(gate.shape)}"
            raise does_not_fit(self, site.write, "the gates of one task", got, "run one task at a time")
        up, down = self.factors(gate)
        if not site.experts:
            up, down = up[0], down[0]
        return LowRankSum(weight, down.mT, up.mT) if site.transposed else LowRankSum(weight, up, down)

    def factors(self, gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The factors of all experts, padded with zeros to the largest rank r.

        Returns:
            up, multiplied by the gate, (experts, out, r); down, (experts, r, in).
        """
        down, up = self.down, self.up.t()
        with in_its_own_type(up):
            if gate is not None:
                up = up * gate.to(up.dtype).expand(self.units)[:, None]
            return self._stack(up).mT, self._stack(down)

    def delta(self, gate: Tensor | None = None) -> Tensor:
        """The low-rank part itself, in the shape of the stored parameter, float32."""
        up, down = self.factors(gate)
        with in_its_own_type(up):
            product = up @ down if self.site.experts else (up @ down)[0]
        return product.mT if self.site.transposed else product

    def merge_into(self, weight: Tensor, bias: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return weight + `delta`; `weight` has the site's `weight_shape`."""
        return weight + self.delta(gate).to(weight), bias

    def _stack(self, rows: Tensor) -> Tensor:
        """Rows of the units, (units, width), by expert, (experts, r, width), padded with zeros."""
        if self.is_even:
            return rearrange(rows, "(expert r) width -> expert r width", expert=self.n_experts)
        return rows.new_zeros(self.n_experts, self.rank, rows.shape[1]).index_put((self.expert, self.slot), rows)

    @torch.no_grad()
    def condense(self, keep: Tensor, scale: Tensor) -> None:
        """Approximate the gated map of each expert as well as its kept ranks can; see `LoRA.condense`."""
        up, down = self.factors(scale)
        q_up, r_up = torch.linalg.qr(widened(up))
        q_down, r_down = torch.linalg.qr(widened(down).mT)
        u, s, v = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
        length = widened(self.down).norm(dim=1).mean()
        left, right = (q_up @ u) * (s / length)[:, None], (q_down @ v.mT) * length  # (experts, out or in, r)
        new_up, new_down = torch.zeros_like(self.up), self.down.clone()
        experts = [self.experts[unit] for unit in keep.tolist()]
        pairs = list(zip(experts, _occurrences(experts), strict=True))
        held = torch.tensor([direction < s.shape[1] for _, direction in pairs], dtype=torch.bool, device=s.device)
        expert, direction = torch.tensor(pairs, dtype=torch.long, device=s.device).view(-1, 2)[held].t()
        keep = keep[held.to(keep.device)]  # a small map has fewer singular values than ranks
        new_up[:, keep] = left[expert, :, direction].t().to(new_up)
        new_down[keep] = right[expert, :, direction].to(new_down)
        self.up.copy_(new_up)
        self.down.copy_(new_down)

    def select_units(self, keep: Tensor) -> None:
        """Keep these rows of `down`, columns of `up`, and their experts."""
        super().select_units(keep)
        self._assign([self.experts[unit] for unit in keep.tolist()])


def _occurrences(values: Sequence[int]) -> list[int]:
    """For each value the number of equal values before it: (3, 3, 5, 3) -> [0, 1, 0, 2]."""
    seen = Counter[int]()
    result = []
    for value in values:
        result.append(seen[value])
        seen[value] += 1
    return result
