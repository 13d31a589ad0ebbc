"""Placement scores: the contract, and what each of them ranks first."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch.nn.functional import cross_entropy

import gatedadapters as ga
from gatedadapters.allocation import PlacementScore, place, placement_score, register, score_kinds
from gatedadapters.allocation.closing import Closing, marginal, shrunk
from gatedadapters.allocation.gain import Gain
from gatedadapters.allocation.gradients import leading_singular_values
from gatedadapters.allocation.groups import group_of
from gatedadapters.allocation.moved import Moved
from gatedadapters.errors import AllocationError, BudgetError
from gatedadapters.testing import PlacementScoreContract
from gatedadapters.testing.placement_contract import SPACE, probed

KINDS = ("norm", "lora")


class TestEveryScore(PlacementScoreContract):
    scores: ClassVar = [*score_kinds().values(), lambda: placement_score("mas")]


def space(*paths):
    return ga.SearchSpace.parse({"paths": list(paths)}, where="test")


LORA = space({"kind": "lora", "rank": 4})


def only_one_block_learns():
    """A model whose loss is that of a map in its first block: later blocks do not matter."""
    model, batches = probed("llama")
    target = "model.layers.0.mlp.down_proj"

    def loss(model, batch):
        seen = {}
        handle = model.get_submodule(target).register_forward_hook(lambda m, a, out: seen.update(out=out))
        try:
            model(input_ids=batch["input_ids"])
        finally:
            handle.remove()
        rows = seen["out"].flatten(0, 1)
        return (
            cross_entropy(rows, torch.zeros(len(rows), dtype=torch.long), reduction="none")
            .view(len(batch["input_ids"]), -1)
            .mean(1)
        )

    return model, batches, loss, target


@pytest.mark.parametrize("kind", ["moved", "consistency", "gradient", "fisher", "taylor", "gora", "rgn"])
def test_maps_that_the_loss_does_not_depend_on_are_worth_nothing(kind):
    model, batches, loss, target = only_one_block_learns()
    found = place(model, LORA, batches, score=kind, loss=loss)
    later = [key for key in found.worth if "layers/1" in key]
    assert later
    assert all(float(found.worth[key].abs().max()) == 0 for key in later)
    assert float(found.worth[f"{target.replace('.', '/')}:lora"][0, 0]) > 0


def test_gradient_of_a_weight_is_judged_by_its_singular_values():
    model, batches = probed("llama")
    found = place(model, LORA, batches, score="gradient")
    weight = model.get_submodule("model.layers.0.mlp.up_proj").weight
    total = torch.zeros_like(weight)
    for batch in batches:
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        each = cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none").mean(1)
        total += torch.autograd.grad(each.mean(), weight)[0]
    expected = torch.linalg.svdvals(total / len(batches))[:4]
    torch.testing.assert_close(found.worth["model/layers/0/mlp/up_proj:lora"][0], expected, rtol=5e-2, atol=0)


def test_consistency_estimates_the_squared_norm_of_the_true_gradient_without_bias():
    model, batches = probed("llama")
    norms = space({"kind": "norm"})
    grads = []
    adapters = ga.attach(model, norms)
    key, path = next(iter(adapters.typed_paths()))
    for batch in batches:
        model.eval()
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        each = cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none").mean(1)
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(each.mean(), list(path.parameters()))]))
    ga.detach(model)
    pairs = [float(a @ b) for i, a in enumerate(grads) for j, b in enumerate(grads) if i != j]
    expected = max(0.0, sum(pairs) / len(pairs)) ** 0.5
    found = place(model, norms, batches, score="consistency")
    assert float(found.worth[key][0, 0]) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_moved_ranks_units_by_the_size_of_what_they_learnt_whatever_they_cost():
    model, batches = probed("llama")
    seen = {}

    class Look(PlacementScore):
        kind = "look"

        def worth(self, probe):
            probe.warm_start()
            seen.update({key: float((path.up.norm() * path.down.norm()).detach()) for key, path in probe.paths.items()})
            return {key: torch.ones(1) for key in probe.paths}

    place(model, LORA, batches, score=Look())
    found = place(model, LORA, batches, score="moved")
    costs = {group.key: group.params for group in found.bank.groups}
    assert len(set(costs.values())) > 1
    for key, size in seen.items():
        assert float(found.worth[key][0, 0]) == pytest.approx(float(size) * costs[key], rel=1e-5)
    kept = found.structure(ga.Budget(params=int(max(costs.values())))).paths[0]
    assert kept.key == max(seen, key=lambda key: float(seen[key]))


def test_what_two_groups_are_worth_adds_up_to_what_all_candidates_gain():
    """With two groups the last marginal of one and the first of the other are the whole gain."""
    model, batches = probed("llama")
    two = space({"kind": "norm"}, {"kind": "lora", "rank": 1, "at": {"roles": ["up"]}})
    seen = {}

    class Look(Closing):
        def worth(self, probe):
            found = super().worth(probe)
            groups = {name: [key for key in probe.paths if group_of(probe.paths[key])[2] == name] for name in KINDS}
            seen["worth"] = {name: marginal(probe, keys) for name, keys in groups.items()}
            seen["gain"] = probe.held_out_losses(list(probe.paths)) - probe.held_out_losses()
            return found

    place(model, two, batches, score=Look(), seed=3, learning_rate=0.3)
    assert float(seen["gain"].abs().max()) > 1e-4
    torch.testing.assert_close(seen["worth"]["norm"] + seen["worth"]["lora"], seen["gain"], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(seen["worth"]["norm"], seen["worth"]["lora"])


def test_shrinkage_leaves_clear_differences_and_removes_noise():
    generator = torch.Generator().manual_seed(0)
    clear = torch.tensor([0.0, 1.0, 5.0])[:, None] + 0.01 * torch.randn(3, 50, generator=generator)
    torch.testing.assert_close(shrunk(clear), clear.mean(1), rtol=1e-3, atol=1e-3)
    noise = torch.randn(6, 50, generator=generator)
    assert shrunk(noise).std() < 0.5 * noise.mean(1).std()


def test_gains_of_all_groups_add_up_to_the_fall_of_the_loss():
    """With one batch again and again, what the steps took off its loss is the fall between the first and the last."""
    model, batches = probed("llama")
    seen = {}

    class Look(Gain):
        def worth(self, probe):
            seen["before"] = probe.held_out_losses().mean()
            found = super().worth(probe)
            seen["after"] = probe.held_out_losses().mean()
            seen["gains"] = {key: sum(gains) for key, gains in probe.gains.items()}
            return found

    place(model, SPACE, [batches[0]] * 80, score=Look(), probe_batches=80, learning_rate=2e-3)
    fell = float(seen["before"] - seen["after"])
    assert fell > 0.01
    assert sum(seen["gains"].values()) == pytest.approx(fell, rel=0.15)


def test_candidates_learn_as_fast_as_the_few_that_will_stay():
    """Adam moves every parameter by about its rate, so a tenth of the budget means a tenth of the movement."""
    moved: list[float] = []

    class Look(Moved):
        def worth(self, probe):
            found = super().worth(probe)
            learned = [p.detach() for path in probe.paths.values() for p in path.parameters()]
            moved.append(float(torch.cat([p.flatten() for p in learned]).abs().mean()))
            return found

    for share in (0.5, 0.05):
        model, batches = probed("bert")
        place(model, space({"kind": "norm"}), batches, budget=ga.Budget(fraction=share), score=Look(), seed=0)
    assert moved[1] == pytest.approx(0.1 * moved[0], rel=0.2)


def test_returns_that_diminish_spread_a_budget_over_groups():
    """Queries are worth twice as much: worths that add up take them first, diminishing ones also others."""
    model, batches = probed("llama")

    class AddsUp(PlacementScore):
        kind = "adds up"

        def worth(self, probe):
            return {key: torch.tensor([probe.unit_params[key] * (1.0 + ("q_proj" in key))]) for key in probe.paths}

    class Diminishes(AddsUp):
        returns = 0.5

    two = space(*({"kind": "lora", "rank": 2, "at": {"roles": [role]}} for role in ("q", "up")))
    linear, concave = (place(model, two, batches, score=score()) for score in (AddsUp, Diminishes))
    queries = [key for key in linear.worth if "q_proj" in key]
    firsts = ga.Budget(params=sum(group.params for group in linear.bank.groups if group.key in queries))
    only_queries, mixed = linear.structure(firsts), concave.structure(firsts)
    assert {path.key for path in only_queries.paths} == set(queries)
    spent = {name: sum(p.params for p in mixed.paths if name in p.key) for name in ("q_proj", "up_proj")}
    assert min(spent.values()) > 0
    assert linear.value(mixed) < linear.value(only_queries)
    first = 1 / (1 + 1 / 2)  # share of the worth of first ranks; second ones are worth half of them
    of_queries = sum(float(concave.worth[key].sum()) for key in queries)
    assert concave.value(only_queries) == pytest.approx(first**0.5 * of_queries, rel=1e-4)


def test_a_probe_that_helps_nowhere_leads_to_an_even_spread(caplog):
    model, batches = probed("llama")

    class Worse(Gain):
        def worth(self, probe):
            probe.warm_start()
            probe.gains = {key: [-1.0, -2.0, -1.0] for key in probe.gains}
            return super().worth(probe)

    found = place(model, SPACE, batches, score=Worse())
    assert "spread evenly" in caplog.text
    kept = found.structure(ga.Budget(fraction=0.3))
    assert {path.kind for path in kept.paths} == {path.kind for _, path in found.candidates.typed_paths()}


def test_leading_singular_values_are_those_of_each_expert():
    stack = torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(1))
    expected = torch.linalg.svdvals(stack)[:, :2].flatten()
    torch.testing.assert_close(leading_singular_values(stack, 2, 0), expected, rtol=2e-2, atol=0)


def test_several_tasks_have_worths_of_their_own():
    model, batches = probed("bert")
    other = [{**batch, "labels": 1 - batch["labels"]} for batch in batches[:4]]
    structure = ga.allocate(model, SPACE, {"a": batches, "b": other}, budget=ga.Budget(fraction=0.2))
    assert structure.tasks == ("a", "b")
    adapters = ga.attach(model, structure, tasks=("a", "b"))
    assert adapters.tasks == ("a", "b")


def test_a_score_of_ones_own_is_found_by_name_and_given_as_object():
    class First(PlacementScore):
        kind = "first-of-all"

        def worth(self, probe):
            keys = list(probe.paths)
            return {key: torch.tensor([1.0 if key == keys[0] else 0.1]) for key in keys}

    register(First)
    model, batches = probed("llama")
    for score in ("first-of-all", First()):
        assert place(model, LORA, batches, score=score).score == "first-of-all"


class Broken(PlacementScore):
    kind = "broken"

    def __init__(self, change):
        self.change = change

    def worth(self, probe):
        return self.change({key: torch.ones(1) for key in probe.paths})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v * float("nan") for k, v in w.items()}, "not finite"),
        (lambda w: {k: 0 * v for k, v in w.items()}, "worth anything"),
        (lambda w: dict(list(w.items())[1:]), "other candidates"),
        (lambda w: {k: torch.ones(3) for k in w}, "other units"),
    ],
)
def test_numbers_that_cannot_be_ranked_are_refused_and_nothing_stays_attached(change, message):
    model, batches = probed("llama")
    with pytest.raises(AllocationError, match=message):
        place(model, LORA, batches, score=Broken(change))
    ga.attach(model, LORA)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"score": "astrology"}, AllocationError, "no such placement score"),
        ({"batches": []}, AllocationError, "nothing to probe with"),
        ({"budget": ga.Budget(params=1)}, BudgetError, "."),
        ({"budget": ga.Budget(params=10**9)}, BudgetError, "larger than all candidates"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_stays_attached(arguments, error, message):
    model, batches = probed("llama")
    given = {"batches": batches, "budget": ga.Budget(fraction=0.5), **arguments}
    with pytest.raises(error, match=message):
        ga.allocate(model, LORA, given.pop("batches"), **given)
    ga.attach(model, LORA)


def test_labels_that_are_all_ignored_are_a_probe_without_gradient():
    model, batches = probed("llama")
    blank = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in batches]
    with pytest.raises(AllocationError, match=r"learns nothing|worth anything"):
        place(model, LORA, blank, score="moved")


def test_a_probe_under_the_callers_autocast_computes_with_what_it_has_learnt():
    """Autocast keeps the weights that it has cast until its context ends; without that memory nothing may differ."""
    learnt = []

    class Look(PlacementScore):
        kind = "look"

        def worth(self, probe):
            probe.warm_start()
            learnt.append({name: p.detach().clone() for name, p in probe.model.named_parameters() if p.requires_grad})
            return {key: torch.ones(1) for key in probe.paths}

    for remembers in (True, False):
        model, batches = probed("bert")
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=remembers):
            place(model, LORA, batches, score=Look(), heads=("classifier",))
    assert any(name.startswith("classifier") for name in learnt[0])
    assert all(torch.equal(value, learnt[1][name]) for name, value in learnt[0].items())
