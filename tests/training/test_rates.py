"""One learning rate for all kinds: every kind gets its multiple of it, in the Trainer and in loops of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recipes import arguments, classifier, gated_classifier, labelled

import gatedadapters as ga

KINDS = ga.SearchSpace.parse(
    {
        "gates": {"levels": ["rank"]},
        "paths": [
            {"kind": "lora", "rank": 4, "at": {"roles": ["q"]}},
            {"kind": "parallel", "width": 4, "at": {"sublayers": ["feed_forward"]}},
            {"kind": "norm"},
            {"kind": "bias", "at": {"roles": ["up"]}},
            {"kind": "elements", "k": 16, "chunk": 16, "at": {"roles": ["down"]}},
        ],
    },
    where="test",
)
WHOLE = {"lora": 1 / 2, "parallel": 2 / 2, "norm": 5.0, "bias": 5.0, "elements": 1.0}  # 1/sqrt(r), 2/sqrt(width), ...


def rates(adapters: ga.Adapters, groups: list[dict[str, Any]]) -> dict[str, float]:
    """The rate of each kind of path, `head` and `gate`; every parameter stands in exactly one group."""
    of = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(of) == sum(len(group["params"]) for group in groups)
    found: dict[str, set[float]] = {}
    for _, path in adapters.typed_paths():
        found.setdefault(path.kind, set()).update(of[id(p)] for p in path.parameters())
    found["head"] = {of[id(p)] for p in adapters.head_parameters()}
    found["gate"] = {of[id(p)] for p in adapters.gate_parameters()}
    assert all(len(values) == 1 for values in found.values()), found
    return {kind: values.pop() for kind, values in found.items()}


def test_groups_of_ones_own_have_the_factor_of_each_kind() -> None:
    adapters = ga.get_adapters(gated_classifier(space=KINDS))
    groups = adapters.parameter_groups(1e-2, gate_learning_rate=0.1, weight_decay=0.3)
    expected = {kind: 1e-2 * factor for kind, factor in WHOLE.items()} | {"head": 1e-2, "gate": 0.1}
    assert rates(adapters, groups) == pytest.approx(expected)
    gate = adapters.gate_parameters()[0]
    assert all(group["weight_decay"] == (0.0 if group["params"][0] is gate else 0.3) for group in groups)


def test_a_budget_counts_the_ranks_that_will_stay() -> None:
    adapters = ga.get_adapters(gated_classifier(space=KINDS))
    adapters.set_penalty(ga.Budget(fraction=0.5), total_steps=100)
    found = rates(adapters, adapters.parameter_groups(1.0))
    assert found["lora"] == pytest.approx(1 / 2**0.5, rel=0.1)  # about half of four ranks
    assert found["norm"] == pytest.approx(5.0)
    adapters.set_penalty(ga.Budget(fraction=0.01), total_steps=100)
    assert rates(adapters, adapters.parameter_groups(1.0))["lora"] == pytest.approx(1.0)  # never less than one


def test_the_trainers_groups_keep_the_factors_through_the_whole_schedule(tmp_path: Path) -> None:
    model = gated_classifier(space=KINDS)
    adapters = ga.get_adapters(model)
    steps, plan = 10, ga.Schedule(warmup=0.2, ramp=0.5, prune=0.6)
    trainer = ga.GatedTrainer(
        model, arguments(tmp_path), train_dataset=labelled([40]), budget=ga.Budget(fraction=0.5), schedule=plan
    )
    trainer.create_optimizer_and_scheduler(steps)
    assert trainer.optimizer is not None
    factors = WHOLE | {"lora": 1 / 2**0.5, "parallel": 2 / 2**0.5}
    for _ in range(steps):
        found = rates(adapters, trainer.optimizer.param_groups)
        for kind in WHOLE:  # the share of candidates that is open scales all kinds alike
            assert found[kind] / found["norm"] == pytest.approx(factors[kind] / 5.0, rel=0.1), kind
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    compact = classifier()
    ga.attach(compact, adapters.discretize(ga.Budget(fraction=0.5)))
    plain = ga.GatedTrainer(compact, arguments(tmp_path), train_dataset=labelled([40]))
    groups = plain.create_optimizer().param_groups
    own = ga.get_adapters(compact)
    of = {id(p): group["lr"] for group in groups for p in group["params"]}
    for _, path in own.typed_paths():
        expected = 1e-2 * path.rate_factor(path.units)
        assert [of[id(p)] for p in path.parameters()] == pytest.approx([expected] * len(list(path.parameters())))
    assert {of[id(p)] for p in own.head_parameters()} == {1e-2}
