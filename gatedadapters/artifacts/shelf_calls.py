"""What one forward call of a model with a shelf carries: which adapters work on which of its examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gatedadapters.errors import ArtifactError, PathError, TaskError
from gatedadapters.paths.base import holds_examples
from gatedadapters.runtime.call import Call
from gatedadapters.supernet.adapters import Adapters

Names = str | Sequence[str | None] | None
"""Whose adapters work: one name for all examples, or one per example; None is the backbone alone."""


class Rows:
    """Some of a batch's examples, where tensors hold an equal run of rows for each."""

    def __init__(self, examples: int, picked: tuple[int, ...], batch: int | None) -> None:
        self.examples, self.picked, self.batch = examples, picked, batch
        together = picked == tuple(range(picked[0], picked[0] + len(picked)))
        self.index: slice | list[int] = slice(picked[0], picked[-1] + 1) if together else list(picked)
        self._on: dict[torch.device, Tensor] = {}

    def __eq__(self, other: object) -> bool:
        mine = (self.examples, self.picked, self.batch)
        return isinstance(other, Rows) and mine == (other.examples, other.picked, other.batch)

    def __hash__(self) -> int:
        return hash((self.examples, self.picked, self.batch))

    def view(self, tensor: Tensor) -> Tensor:
        """(examples, rows of each, width)."""
        turned = tensor.dim() == 3 and tensor.shape[1] == self.batch != tensor.shape[0]  # positions first
        if turned or not holds_examples(tensor, self.examples):
            raise PathError(
                "adapter names do not match the batch",
                expected=f"a multiple of {self.examples} rows (one run each), examples first",
                got=f"shape {tuple(tensor.shape)}",
                where="adapter_names",
                fix="packed batches, models with positions first, and points that carry no examples (relative "
                "positions) need one name for all",
            )
        return tensor.reshape(self.examples, -1, tensor.shape[-1])

    def on(self, device: torch.device) -> slice | Tensor:
        """What indexes the examples of a tensor there; neighbours are a slice, which copies nothing."""
        if isinstance(self.index, slice):
            return self.index
        if device not in self._on:
            self._on[device] = torch.tensor(self.index, device=device)
        return self._on[device]

    def take(self, tensor: Tensor) -> Tensor:
        """These examples, (picked, rows of each, width)."""
        return self.view(tensor)[self.on(tensor.device)]


Groups = tuple[tuple[str, Adapters, Rows | None], ...]
"""Adapters at work, by name, and the examples that they work on; None for all."""


class ShelfCall(Call):
    """One forward call, as the shelf sees it.

    Attributes:
        members: (adapters, rows, call) of each set of adapters at work: None for all rows, and what it sees of the
            call. The adapters themselves, since a name may be given to others meanwhile.
        headed: whose task heads the model runs with; None for its own.
    """

    __slots__ = ("headed", "members")

    def __init__(self, members: tuple[tuple[Adapters, Rows | None, Call], ...], headed: Adapters | None) -> None:
        super().__init__(runs=bool(members))
        self.members, self.headed = members, headed

    def same_as(self, other: Call) -> bool:
        """Whether another call has the same settings."""
        return (
            isinstance(other, ShelfCall)
            and self.headed is other.headed
            and len(self.members) == len(other.members)
            and all(
                one[0] is two[0] and one[1] == two[1] and one[2].same_as(two[2])
                for one, two in zip(self.members, other.members, strict=True)
            )
        )


def fit(names: Sequence[Any], batch: int | None, *, exactly: bool) -> bool:
    """Whether there is a name for each example; unless `exactly`, each may stand for a run of them (beams)."""
    return len(names) > 0 and (batch is None or batch == len(names) or (not exactly and batch % len(names) == 0))


def put(old: Tensor, result: Tensor, rows: Rows, changed: Tensor) -> Tensor:
    """`result` with the rows of one member changed; copied from `old` by the first that changes something."""
    if result is old:
        result = old.clone(memory_format=torch.contiguous_format)
    rows.view(result)[rows.on(result.device)] = changed
    return result


def groups_of(
    names: Names, members: Mapping[str, Adapters], where: str = "adapter_names", batch: int | None = None
) -> Groups:
    """Who works on which examples.

    Args:
        names: one for all examples, or one per example.
        members: the adapters by name.
        where: what named them, for errors.
        batch: number of examples, as far as it is known.

    Raises:
        ArtifactError: unknown name.
        TaskError: a mixture with task heads.
    """
    distinct = dict.fromkeys([names] if names is None or isinstance(names, str) else names)
    for name in distinct:
        if name is not None:
            check_known(name, where, members)
    if names is None or isinstance(names, str) or len(distinct) == 1:
        return tuple((name, members[name], None) for name in distinct if name is not None)
    headed = [name for name in distinct if name is not None and members[name].head_names]
    if headed:
        raise TaskError(
            "the model runs with one set of task heads at a time",
            expected="adapters without task heads in a mixture",
            got=f"{', '.join(headed)} with heads of their own",
            where="adapter_names",
            fix="give each its own batch with shelf.using(name); attach(heads=()) trains and saves none",
        )
    return tuple(
        (name, members[name], Rows(len(names), tuple(i for i, other in enumerate(names) if other == name), batch))
        for name in distinct
        if name is not None
    )


def check_known(name: str, where: str, members: Mapping[str, Adapters]) -> None:
    """Check that there are adapters of this name.

    Raises:
        ArtifactError: there are none.
    """
    if name not in members:
        raise ArtifactError(
            "no such adapters on the shelf",
            expected=f"one of {', '.join(members) or 'none'}",
            got=repr(name),
            where=where,
            fix="call shelf.add(name, folder) first",
        )
