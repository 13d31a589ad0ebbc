"""How the held-out loss depends on the size: one structure for each of several budgets, from one supernet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gatedadapters.errors import BudgetError
from gatedadapters.reporting import html
from gatedadapters.reporting.tables import format_table
from gatedadapters.structure.structure import Structure


@dataclass(frozen=True)
class FrontierPoint:
    """One budget.

    Attributes:
        structure: what it keeps.
        loss: held-out loss of the supernet with only that open.
    """

    structure: Structure
    loss: float

    @property
    def params(self) -> int:
        """Parameters of the structure."""
        return self.structure.params


@dataclass(frozen=True)
class Frontier:
    """Size against held-out loss, smallest first.

    The losses are those of the supernet as it is trained now. Structures trained for themselves end lower; it is the
    order of the points, and where the curve flattens, that carries over.

    Attributes:
        points: one for each budget; the last keeps everything.
        base: held-out loss with everything closed.
    """

    points: tuple[FrontierPoint, ...]
    base: float

    @property
    def dense(self) -> float:
        """Held-out loss with all candidates open."""
        return self.points[-1].loss

    def within(self, share: float) -> FrontierPoint:
        """The smallest point that gains at least `1 - share` of what the dense candidates gain.

        Raises:
            BudgetError: the dense candidates gain nothing.
        """
        gain = self.base - self.dense
        if not gain > 0:  # NaN, too
            raise BudgetError(
                "the candidates gain nothing on held-out data, so no share of it can be kept",
                expected="a held-out loss below the backbone's",
                got=f"{self.dense:.4f} with all candidates, {self.base:.4f} without",
                where=f"Budget(within={share})",
                fix="give more batches to learn from, or a budget in params",
            )
        return next(point for point in self.points if self.base - point.loss >= (1 - share) * gain)

    def share(self, point: FrontierPoint) -> float:
        """The share that a point keeps of what the dense candidates gain; nan if they gain nothing."""
        gain = self.base - self.dense
        return (self.base - point.loss) / gain if gain > 0 else math.nan

    def table(self) -> str:
        """The points as text."""
        return format_table(_HEADER, self._rows())

    def to_data(self) -> dict[str, Any]:
        """The numbers as plain data, without the structures."""
        return {"base": self.base, "points": [{"params": p.params, "loss": p.loss} for p in self.points]}

    def _rows(self) -> list[list[str]]:
        shares = ["" if math.isnan(share) else f"{share:.0%}" for share in map(self.share, self.points)]
        rows = [[f"{p.params:,}", f"{p.loss:.4f}", share] for p, share in zip(self.points, shares, strict=True)]
        return [["0", f"{self.base:.4f}", "0%"], *rows]

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        shares = [0.0, *map(self.share, self.points)]
        bars = {(row, 2): min(max(share, 0.0), 1.0) for row, share in enumerate(shares) if not math.isnan(share)}
        return html.table(_HEADER, self._rows(), title="Size against held-out loss", bars=bars)


_HEADER = ["parameters", "held-out loss", "of the gain"]
