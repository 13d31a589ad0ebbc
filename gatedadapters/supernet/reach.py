"""What share of a model a search space reaches, and what it leaves, with the reason and a way to change that."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from gatedadapters.backbone import Layout
from gatedadapters.backbone.layout import NEVER_CALLED
from gatedadapters.paths import Site, SkippedSite
from gatedadapters.reporting.tables import format_table
from gatedadapters.safe_files import listed
from gatedadapters.structure import column

NOT_ASKED_FOR = "not in the search space"
_BY_ELEMENTS = "tune elements of it: ga.score, ga.select(..., include=[NAME]), ga.apply_mask"


@dataclass(frozen=True)
class Unreached:
    """Matrices of one role at which no candidate stands.

    Attributes:
        role: sub-layer and role, such as `attn.q`; for weights that are not understood the name, with # for numbers.
        matrices: their number; each expert's counts.
        elements: of these matrices.
        reason: why none stands there.
        remedy: what to do so that one does, or that these weights are tuned otherwise.
    """

    role: str
    matrices: int
    elements: int
    reason: str
    remedy: str


@dataclass(frozen=True)
class Reach:
    """The part of a model at which candidates stand.

    A matrix is reached where a candidate stands at it: at what it reads, at what it returns, or at its weight. Tables
    of token ids and the heads that are trained as a whole do not count.

    Attributes:
        blocks: number of blocks with a candidate, and of all.
        matrices: the same of matrices; each expert's counts.
        elements: the same of the elements of these matrices.
        left: the matrices that are not reached, by role.
    """

    blocks: tuple[int, int]
    matrices: tuple[int, int]
    elements: tuple[int, int]
    left: tuple[Unreached, ...] = field(default=())

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layout: Layout,
        sites: Iterable[Site],
        skipped: Iterable[SkippedSite] = (),
        *,
        heads: Collection[str] = (),
    ) -> Reach:
        """Compare the sites of candidates with a layout.

        Args:
            model: of which the layout is.
            layout: the layout.
            sites: of the candidates.
            skipped: sites at which a candidate was to stand and does not fit.
            heads: parameters that are trained as a whole.
        """
        sites, reasons = list(sites), {site.module: site for site in skipped}
        at_weight = {(site.write.module, site.write.parameter) for site in sites if site.at_weight}
        beside = [site for site in sites if not site.at_weight and not site.is_sublayer]
        around = {point.module for site in beside for point in (site.tap, site.write)}
        hit = {site.block for site in sites}
        reached, elements, left = [0, 0], [0, 0], dict[tuple[str, str, str], list[int]]()

        def count(number: int, size: int, missed: tuple[str, str, str] | None) -> None:
            reached[1] += number
            elements[1] += size
            if missed is None:
                reached[0] += number
                elements[0] += size
            else:
                found = left.setdefault(missed, [0, 0])
                found[0] += number
                found[1] += size

        for _, sublayer, linear in (*layout.maps(), *layout.maps_outside()):
            if linear.kind == "embedding" or f"{linear.name}.{linear.parameter}" in heads:
                continue
            number = max(1, linear.experts)
            size = number * linear.in_features * linear.out_features
            role, missed = column(sublayer.kind, linear.role, "").strip(), None
            if linear.name not in around and (linear.name, linear.parameter) not in at_weight:
                where = f"at: {{sublayers: [{sublayer.kind}], roles: [{linear.role}]}}"
                kind = "weight_lora" if linear.host or linear.experts else "lora"
                reason, remedy = NOT_ASKED_FOR, f"add a path {{kind: {kind}, {where}}}"
                if linear.name in reasons:
                    reason = reasons[linear.name].reason
                missed = role, reason, remedy
            count(number, size, missed)
        for unknown in layout.unknown:
            value = model.get_parameter(unknown.name)
            if unknown.name not in heads:
                called = NEVER_CALLED not in unknown.reason
                remedy = _BY_ELEMENTS if called else "pass sample=, a batch for which the model calls them"
                role = re.sub(r"(?<=\.)\d+(?=\.)", "#", unknown.name)
                count(1, value.numel(), (role, unknown.reason, remedy))
        return cls(
            (sum(block.name in hit for block in layout.blocks), len(layout.blocks)),
            (reached[0], reached[1]),
            (elements[0], elements[1]),
            tuple(
                Unreached(role, number, size, reason, remedy) for (role, reason, remedy), (number, size) in left.items()
            ),
        )

    @property
    def summary(self) -> str:
        """One line."""
        share = self.elements[0] / self.elements[1] if self.elements[1] else 0.0
        return (
            f"reaches {self.blocks[0]} of {self.blocks[1]} blocks and {self.matrices[0]:,} of {self.matrices[1]:,} "
            f"matrices ({_percent(share)} of their elements)"
        )

    def table(self) -> str:
        """What is not reached, by role; "" if there is nothing."""
        if not self.left:
            return ""
        rows = [[each.role, f"{each.matrices:,}", f"{each.elements:,}"] for each in self.left]
        notes: dict[tuple[str, str], list[str]] = {}
        for each in self.left:
            notes.setdefault((each.reason, each.remedy), []).append(each.role)
        lines = [f"{reason} ({listed(roles)}): {remedy}" for (reason, remedy), roles in notes.items()]
        return "\n".join([format_table(["not reached", "matrices", "elements"], rows), *lines])

    def to_data(self) -> Mapping[str, Any]:
        """Plain data."""
        names = ("blocks", "matrices", "elements")
        shares = {name: {"reached": getattr(self, name)[0], "of": getattr(self, name)[1]} for name in names}
        return {**shares, "left": [vars(each) for each in self.left]}

    def __str__(self) -> str:
        return "\n\n".join(part for part in (self.summary, self.table()) if part)


def _percent(share: float) -> str:
    """Rounded down, so that 100 means all."""
    return f"{int(1000 * share) / 10:g} %"
