"""What a score found: the worth of every candidate unit, from which a Structure of any budget follows at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gatedadapters.allocation.groups import grouped
from gatedadapters.config import Budget
from gatedadapters.config.penalty import Unit
from gatedadapters.errors import AllocationError, BudgetError
from gatedadapters.gates import GateBank
from gatedadapters.reporting import html
from gatedadapters.reporting.tables import format_table
from gatedadapters.structure import Structure
from gatedadapters.structure.frontier import Frontier
from gatedadapters.structure.structure import column
from gatedadapters.supernet.adapters import Adapters

GOLDEN = (5**0.5 - 1) / 2  # multiples of it, without their whole part, spread evenly however many there are


@dataclass(frozen=True)
class Placement:
    """The worth of every unit of a search space on a model.

    Attributes:
        score: kind of the score that found it.
        worth: by key of the path, (tasks, units): how much each unit adds for each task. Larger is better; units of 0
            and below are useless.
        candidates: of the search space, not in the model.
        seconds: time that the score took.
        frontiers: of each task, if `place` was asked for them.
        returns: see `PlacementScore`.
    """

    score: str
    worth: Mapping[str, Tensor]
    candidates: Adapters
    seconds: float = 0.0
    frontiers: tuple[Frontier, ...] = ()
    returns: float = 1.0

    def structure(self, budget: Budget) -> Structure:
        """The Structure that spends the budget on what is worth most for its cost.

        Raises:
            BudgetError: the budget does not pay for the cheapest unit, or exceeds the cost of all candidates.
        """
        bank = self.bank
        dense = bank.dense_cost(budget.unit)
        if budget.within is not None and self.frontiers:
            size = max(frontier.within(budget.within).params for frontier in self.frontiers)
            budget = Budget(params=size, per_task=budget.per_task)
        if budget.resolve(dense) > dense:
            raise BudgetError(
                "this budget is larger than all candidates together, so nothing is left to choose",
                expected=f"at most {dense:,.0f} {budget.unit}",
                got=f"{budget.resolve(dense):,.0f}",
                where="allocate(budget=)",
                fix="lower the budget, or offer larger candidates (ranks, widths) in the search space",
            )
        return self.candidates.discretize(budget, scores=self.for_their_cost(budget.unit))

    def for_their_cost(self, unit: Unit = "params") -> Tensor:
        """What all units add for their cost, if they are taken in the order of these numbers: (tasks, units), in the
        order of the gate bank.

        Within a group (one kind at one role) the most useful for its cost comes first, among equals the first units of
        paths, and among these blocks in an order of which every part is spread evenly.
        """
        bank = self.bank
        worth = torch.zeros(bank.tasks, bank.n_units)
        for key, where in bank.slices.items():
            values = self.worth[key]
            worth[:, where] = values if where.stop - where.start > 1 else values.sum(1, keepdim=True)
        cost = bank.cost(unit).clamp(min=1e-12).to(torch.float32)
        if self.returns == 1.0:
            return worth / cost
        for number, keys in enumerate(grouped(dict(self.candidates.typed_paths())).values()):
            places = [bank.slices[key] for key in keys]
            order = sorted(
                (within, (path * GOLDEN + number * GOLDEN**2) % 1, where.start + within)
                for path, where in enumerate(places)
                for within in range(where.stop - where.start)
            )
            own = torch.tensor([index for _, _, index in order])
            for row in worth:
                useful = row[own].clamp(min=0.0)
                first = (useful / cost[own]).sort(descending=True, stable=True).indices
                reached = useful[first].cumsum(0) / useful.sum().clamp(min=torch.finfo(row.dtype).tiny)
                gained = useful.sum() * reached.clamp(max=1.0).pow(self.returns)
                marginal = gained.diff(prepend=gained.new_zeros(1))
                row[own[first]] = torch.where(row[own[first]] > 0, marginal, row[own[first]])
        return worth / cost

    def value(self, structure: Structure) -> float:
        """What a structure's units are worth together, over all tasks; structures of one size can be compared.

        Raises:
            AllocationError: the structure keeps units of other candidates.
        """
        kept = {key: torch.zeros_like(values) for key, values in self.worth.items()}
        for record in structure.paths:
            values = self.worth.get(record.key)
            if values is None or values.shape[1] != record.of:
                raise AllocationError(
                    "this structure was made from other candidates",
                    expected="a structure of the search space and model that were scored",
                    got=f"path {record.key} with {record.of} units",
                    where="Placement.value",
                    fix="score this structure's own space",
                )
            tasks = self.candidates.tasks
            for task, units in record.units.items():
                kept[record.key][tasks.index(task), list(units)] = 1.0
        total = 0.0
        for keys in grouped(dict(self.candidates.typed_paths())).values():
            for own in range(len(self.candidates.tasks)):
                worth = torch.cat([self.worth[key][own] for key in keys])
                part = worth * torch.cat([kept[key][own] for key in keys])
                all_useful, useful = float(worth.clamp(min=0.0).sum()), float(part.clamp(min=0.0).sum())
                total += float(part.clamp(max=0.0).sum())
                total += all_useful * (useful / all_useful) ** self.returns if useful else 0.0
        return total

    def table(self, structure: Structure | None = None) -> str:
        """What candidates are worth, by sub-layer, role and kind, the most useful for its parameters first.

        Worths are summed over tasks. Those below 0 count as 0.

        Args:
            structure: show how many parameters it keeps of each row.
        """
        return format_table(*self._table(structure)[:2])

    def _repr_html_(self) -> str:
        header, rows, shares = self._table(None)
        bars = {(row, header.index("of the worth")): share for row, share in enumerate(shares)}
        return html.table(header, rows, title=f"Worth by the score {self.score}", bars=bars)

    def _table(self, structure: Structure | None) -> tuple[list[str], list[list[str]], list[float]]:
        """Header, rows, and the share of all worth in each row."""
        paths = dict(self.candidates.typed_paths())
        places = {key: column(path.site.sublayer, path.site.role, path.kind) for key, path in paths.items()}
        worth, params, kept = (dict.fromkeys(places.values(), 0.0) for _ in range(3))
        for group in self.bank.groups:
            worth[places[group.key]] += float(self.worth[group.key].clamp(min=0.0).sum())
            params[places[group.key]] += group.params * group.units
        for record in () if structure is None else structure.paths:
            kept[places[record.key]] += record.params
        total = sum(worth.values()) or 1.0
        rate = {place: worth[place] / params[place] for place in worth}
        best = max(rate.values()) or 1.0
        order = sorted(worth, key=lambda place: rate[place], reverse=True)
        header = ["place", "parameters", "of the worth", "for its size", *(["kept"] if structure is not None else [])]
        rows = [
            [
                place,
                f"{params[place]:,.0f}",
                f"{worth[place] / total:.1%}",
                f"{rate[place] / best:.3f}",
                *([f"{kept[place]:,.0f}"] if structure is not None else []),
            ]
            for place in order
        ]
        return header, rows, [worth[place] / total for place in order]

    @property
    def bank(self) -> GateBank:
        """The gates of the candidates."""
        bank = self.candidates.bank
        assert bank is not None
        return bank


def spread_over_units(values: Tensor, units: int) -> Tensor:
    """Extend the worths of a path's first units to all its units: the k-th that shares an entry is worth a k-th of it.

    Args:
        values: (n,); n divides `units`.
        units: number of units of the candidate.
    """
    each = units // len(values)
    later = 1.0 / torch.arange(1, each + 1)
    return (values.to(torch.float32)[:, None] * later).flatten()


def stack(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The worths of several tasks, by key, (tasks, units)."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
