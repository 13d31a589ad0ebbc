"""How the held-out loss depends on the size: one structure for each of several budgets, from one supernet."""

from __future__ import annotations

from dataclasses import dataclass

from gatedadapters.errors import BudgetError
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
        if gain <= 0:
            raise BudgetError(
                "the candidates gain nothing on held-out data, so no share of it can be kept",
                expected="a held-out loss below the backbone's",
                got=f"{self.dense:.4f} with all candidates, {self.base:.4f} without",
                where=f"Budget(within={share})",
                fix="give more batches to learn from, or a budget in params",
            )
        return next(point for point in self.points if self.base - point.loss >= (1 - share) * gain)

    def table(self) -> str:
        """The points as text."""
        gain = self.base - self.dense
        rows = [
            [f"{p.params:,}", f"{p.loss:.4f}", f"{(self.base - p.loss) / gain:.0%}" if gain > 0 else ""]
            for p in self.points
        ]
        return format_table(["parameters", "held-out loss", "of the gain"], [["0", f"{self.base:.4f}", "0%"], *rows])

    def __str__(self) -> str:
        return self.table()
