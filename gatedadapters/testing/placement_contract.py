"""The contract of a placement score, as a test class to inherit from.

In a test file of your own, with pytest::

    class TestMyScore(PlacementScoreContract):
        scores = MyScore
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from gatedadapters.allocation import PlacementScore, place
from gatedadapters.config import Budget, SearchSpace
from gatedadapters.supernet.attach import attach, detach
from gatedadapters.testing.backbones import VOCABULARY, tiny

SPACE = SearchSpace.parse(
    {
        "paths": [
            {"kind": "lora", "rank": 4},
            {"kind": "norm"},
            {"kind": "bias"},
            {"kind": "scale"},
            {"kind": "elements", "k": 32, "chunk": 16},
            {"kind": "parallel", "width": 4},
        ]
    },
    where="PlacementScoreContract",
)


class PlacementScoreContract:
    """Tests of what every placement score guarantees, on tiny backbones and a space with every kind of unit.

    Attributes:
        scores: the class of the score to test (or a function that makes one), or several.
        families: backbones, among `gatedadapters.testing.FAMILIES`.
    """

    scores: ClassVar[Callable[[], PlacementScore] | Sequence[Callable[[], PlacementScore]]]
    families: ClassVar[Sequence[str]] = ("bert", "llama")

    @classmethod
    def pytest_generate_tests(cls, metafunc: Any) -> None:
        """Run every test for every score and, if it has an argument `family`, for every family."""
        if "make" in metafunc.fixturenames:
            offered = list(cls.scores) if isinstance(cls.scores, Sequence) else [cls.scores]
            metafunc.parametrize("make", offered, ids=[getattr(made, "__name__", str(made)) for made in offered])
        if "family" in metafunc.fixturenames:
            metafunc.parametrize("family", cls.families)

    def test_every_unit_has_a_finite_worth(self, make: Callable[[], PlacementScore], family: str) -> None:
        """In the shape (tasks, units) of every candidate; not all are equal."""
        model, batches = probed(family)
        placement = place(model, SPACE, batches, score=make(), probe_batches=8)
        bank = placement.candidates.bank
        assert bank is not None
        assert set(placement.worth) == set(bank.slices)
        for group in bank.groups:
            assert placement.worth[group.key].shape == (1, group.units)
            assert bool(torch.isfinite(placement.worth[group.key]).all())
        assert len({float(values.max()) for values in placement.worth.values()}) > 1

    def test_structures_meet_any_budget_exactly(self, make: Callable[[], PlacementScore], family: str) -> None:
        """They never exceed it, and what is left over would not pay for the cheapest unit that was left out."""
        model, batches = probed(family)
        placement = place(model, SPACE, batches, score=make(), probe_batches=8)
        bank = placement.candidates.bank
        assert bank is not None
        for share in (0.02, 0.2, 1.0):
            limit = int(share * bank.dense_cost())
            structure = placement.structure(Budget(params=limit))
            assert structure.params <= limit
            kept = sum(len(path.kept) for path in structure.paths)
            if kept < sum(group.units for group in bank.groups):
                kept_units = {(path.key, unit) for path in structure.paths for unit in path.kept}
                left_out = min(
                    group.params
                    for group in bank.groups
                    if any((group.key, unit) not in kept_units for unit in range(group.units))
                )
                assert limit - structure.params < left_out

    def test_the_model_is_left_as_it_was(self, make: Callable[[], PlacementScore], family: str) -> None:
        """Values, modes, gradients, hooks and `requires_grad` flags, also if the probe fails half-way."""
        model, batches = probed(family)
        model.train()
        list(model.parameters())[-1].requires_grad_(False)
        before = _state(model)
        place(model, SPACE, batches, score=make(), probe_batches=8)
        assert _state(model) == before
        if make().needs_data:
            broken = [batches[0], {**batches[0], "input_ids": batches[0]["input_ids"] + VOCABULARY}]
            try:
                place(model, SPACE, broken, score=make(), probe_batches=8)
            except IndexError:
                assert _state(model) == before
            else:
                raise AssertionError("tokens outside the vocabulary were accepted")

    def test_equal_calls_give_equal_structures(self, make: Callable[[], PlacementScore]) -> None:
        """Also for batches from a generator, and whatever was drawn before."""
        model, batches = probed("bert")
        once = place(model, SPACE, batches, score=make(), probe_batches=8)
        torch.rand(7)
        again = place(model, SPACE, iter(batches), score=make(), probe_batches=8)
        for key, values in once.worth.items():
            assert torch.equal(values, again.worth[key]), key

    def test_the_structure_can_be_trained(self, make: Callable[[], PlacementScore], family: str) -> None:
        """It attaches to the model, and gradients reach every path."""
        model, batches = probed(family)
        structure = place(model, SPACE, batches, score=make(), probe_batches=8).structure(Budget(fraction=0.1))
        adapters = attach(model, structure)
        model(**batches[0]).loss.backward()
        for key, path in adapters.typed_paths():
            assert any(p.grad is not None for p in path.parameters()), key
        detach(model)


def probed(family: str) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A tiny model that learns something, and eight batches for it."""
    head = "lm" if family == "llama" else "classification"
    model, sample = tiny(family, head=head)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(8):
        batch: dict[str, Any] = {
            key: value.repeat(2, *[1] * (value.dim() - 1)) for key, value in sample.items() if key != "labels"
        }
        batch["input_ids"] = torch.randint(3, VOCABULARY, batch["input_ids"].shape, generator=generator)
        batch["labels"] = batch["input_ids"] if head == "lm" else (batch["input_ids"][:, 0] % 2)
        batches.append(batch)
    return model, batches


def _state(model: nn.Module) -> list[Any]:
    """Everything that a probe might leave behind, in values that compare."""
    return [
        [(name, value.tolist()) for name, value in model.state_dict().items()],
        [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        [(name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()],
    ]
