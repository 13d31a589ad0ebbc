"""The state of gates, summarised by place, by block, by kind and by level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from gatedadapters.config import Budget
from gatedadapters.gates import GateBank
from gatedadapters.paths import Path
from gatedadapters.structure import column
from gatedadapters.supernet.adapters import Adapters

BlockColumn = tuple[int, str]  # (block, column)
Name = TypeVar("Name")
Floats = NDArray[np.floating[Any]]


class GateView:
    """A summary of the gates of adapters. `read` copies their state; the other methods summarise it.

    A place is a pair of block and column, where a column is a sub-layer, a role and a kind of path.

    Args:
        adapters: adapters with gates.
        bank: the gates.
        max_tags: above this number of places, `averages` has one value for each block and one for each column.

    Attributes:
        blocks, columns: rows and columns of heat maps, as in `Structure.grid`.
        kinds: kinds of the paths.
        sets: the tags of `averages`, and which units each tag averages.
        unit: the penalty's unit, in which costs are counted.
        probability: that a unit is open, (tasks, units).
        stays: 1 where a unit is open without noise, (tasks, units).
        log_alpha: (tasks, gates).
        any_task: the probability that at least one task has a unit open, (units,).
    """

    def __init__(self, adapters: Adapters, bank: GateBank, *, max_tags: int) -> None:
        self.adapters, self.bank = adapters, bank
        paths = [cast(Path, adapters.paths[group.key]) for group in bank.groups]
        indices = [path.site.block_index for path in paths]
        places = [column(path.site.sublayer, path.site.role, path.kind) for path in paths]
        self.blocks, self.columns = sorted(set(indices)), list(dict.fromkeys(places))
        self.kinds = list(dict.fromkeys(path.kind for path in paths))
        owner = bank.owner.cpu().numpy()
        self._cells = UnitGroups(list(zip(indices, places, strict=True)), owner)
        self._mix = UnitGroups([(index, path.kind) for index, path in zip(indices, paths, strict=True)], owner)
        self._levels = {
            level: np.flatnonzero([name[0] == level for name in bank.gate_names])
            for level in dict.fromkeys(name[0] for name in bank.gate_names)
        }
        digits = len(str(max(indices)))
        blocks = [f"{index:0{digits}d}" for index in indices]
        tags = [f"open block {block}/{place}" for block, place in zip(blocks, places, strict=True)]
        self.sets = [UnitGroups(tags, owner)]
        if len(self.sets[0].names) > max_tags:
            self.sets = [
                UnitGroups([f"open place/{place}" for place in places], owner),
                UnitGroups([f"open block/{block}" for block in blocks], owner),
            ]
        penalty = adapters.pressure.penalty if adapters.pressure is not None else None
        self.unit = penalty.unit if penalty is not None else "params"
        self._cost = bank.cost(self.unit).cpu().numpy()
        self.read()

    @torch.no_grad()
    def read(self) -> None:
        """Copy the state of the gates from the device, in one transfer."""
        bank = self.bank
        probability = (bank.kept > 0).float() if bank.frozen else bank.open_probability()
        parts = (probability, (bank.deterministic() > 0).float(), bank.log_alpha.detach())
        flat = torch.cat([part.flatten().float() for part in parts]).cpu().numpy()
        ends = np.cumsum([part.numel() for part in parts])[:-1]
        found = [piece.reshape(bank.tasks, -1) for piece in np.split(flat, ends)]
        self.probability, self.stays, self.log_alpha = found
        self.any_task = 1 - (1 - self.probability).prod(0)

    def averages(self) -> dict[str, float]:
        """By tag, the probability that at least one task has a unit open, as the mean over units."""
        return {tag: value for group in self.sets for tag, value in group.means(self.any_task).items()}

    def open(self, task: int) -> dict[BlockColumn, float]:
        """By place, the probability that a task has a unit open, as the mean over units."""
        return self._cells.means(self.probability[task])

    def mix(self) -> dict[BlockColumn, float]:
        """By block and kind, the share of the block's expected cost that paths of this kind take."""
        sums = self._mix.sums(self.any_task * self._cost)
        totals = dict.fromkeys(self.blocks, 0.0)
        for (block, _), value in sums.items():
            totals[block] += value
        return {place: value / totals[place[0]] if totals[place[0]] else 0.0 for place, value in sums.items()}

    def kind_shares(self) -> dict[str, float]:
        """By kind, its share of the expected cost."""
        shares = dict.fromkeys(self.kinds, 0.0)
        expected = self._mix.sums(self.any_task * self._cost)
        for (_, kind), value in expected.items():
            shares[kind] += value
        total = sum(shares.values())
        return {kind: value / total if total else 0.0 for kind, value in shares.items()}

    def costs(self) -> dict[str, float]:
        """Expected cost, cost of the units open without noise and, under a budget, the present target."""
        pressure = self.adapters.pressure
        found = {
            "expected_cost": float((self.any_task * self._cost).sum()),
            "real_cost": float((self.stays.max(0) * self._cost).sum()),
        }
        if pressure is not None and isinstance(pressure.penalty, Budget):
            found["target"] = pressure.target(self.bank)
        return found

    def task_shares(self) -> dict[str, float]:
        """By task, the expected share of the candidates' cost that the task uses; empty for a single task."""
        if len(self.adapters.tasks) == 1:
            return {}
        shares = (self.probability * self._cost).sum(-1) / self._cost.sum()
        return dict(zip(self.adapters.tasks, shares.tolist(), strict=True))

    @torch.no_grad()
    def penalties(self) -> dict[str, float]:
        """The present terms of the penalty and, under a budget, its multipliers."""
        pressure = self.adapters.pressure
        if pressure is None:
            return {}
        found = {name: float(term) for name, term in pressure.terms(self.bank).items()}
        if isinstance(pressure.penalty, Budget):
            multipliers = pressure.multipliers.tolist()
            found["multiplier"] = multipliers[0]
            if pressure.penalty.per_task is not None:
                found |= {f"multiplier {t}": m for t, m in zip(self.adapters.tasks, multipliers[1:], strict=True)}
        return found

    def closed_paths(self) -> float:
        """Share of the paths that forward passes of this step skip."""
        self.bank.refresh()
        return 1 - sum(self.bank.open_paths.values()) / len(self.bank.open_paths)

    def log_alphas(self) -> dict[str, Floats]:
        """By task and level of the hierarchy, the log alpha of each gate."""
        tasks = self.adapters.tasks if len(self.adapters.tasks) > 1 else ("",)
        return {
            f"{task} {level}".strip(): self.log_alpha[number, gates]
            for number, task in enumerate(tasks)
            for level, gates in self._levels.items()
        }


class UnitGroups(Generic[Name]):
    """Units in groups, each group with a name.

    Args:
        names: the name of each path's group.
        unit_owner: the path of each unit, (units,).
    """

    def __init__(self, names: Sequence[Name], unit_owner: NDArray[np.int64]) -> None:
        position = {name: number for number, name in enumerate(dict.fromkeys(names))}
        self.names = list(position)
        self._number = np.asarray([position[name] for name in names])[unit_owner]
        self._count = np.bincount(self._number, minlength=len(self.names))

    def sums(self, values: Floats) -> dict[Name, float]:
        """By name, the sum of `values` (units,) over the group."""
        found = np.bincount(self._number, weights=values, minlength=len(self.names))
        return dict(zip(self.names, found.tolist(), strict=True))

    def means(self, values: Floats) -> dict[Name, float]:
        """By name, the mean of `values` (units,) over the group."""
        found = np.bincount(self._number, weights=values, minlength=len(self.names)) / self._count
        return dict(zip(self.names, found.tolist(), strict=True))
