"""What one forward call of a model with a shelf carries: which adapters work on which of its examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gatedadapters.errors import PathError
from gatedadapters.paths.base import holds_examples
from gatedadapters.runtime.call import Call

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


class ShelfCall(Call):
    """One forward call, as the shelf sees it.

    Attributes:
        members: (name, rows, call) of each set of adapters at work: None for all rows, and what it sees of the call.
        headed: whose task heads the model runs with; None for its own.
    """

    __slots__ = ("headed", "members")

    def __init__(self, members: tuple[tuple[str, Rows | None, Call], ...], headed: str | None) -> None:
        super().__init__(runs=bool(members))
        self.members, self.headed = members, headed

    def same_as(self, other: Call) -> bool:
        """Whether another call has the same settings."""
        return (
            isinstance(other, ShelfCall)
            and self.headed == other.headed
            and len(self.members) == len(other.members)
            and all(
                one[:2] == two[:2] and one[2].same_as(two[2])
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
