"""Gates start from a probe on the first batches of a training, and the training proper does not notice the probe."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import (
    SPACE,
    arguments,
    assert_same,
    classifier,
    continued,
    gated_causal,
    gated_classifier,
    labelled,
    trained,
)
from torch import Tensor

import gatedadapters as ga
from gatedadapters.allocation import PlacementScore, score_kinds
from gatedadapters.errors import AllocationError, BudgetError, ConfigError, TrainingError
from gatedadapters.training.prior import probe_batches

LATE = ga.Schedule(warmup=0.5, ramp=0.8, prune=0.9)  # gates do not move in the first steps


class Even(PlacementScore):
    """All is worth the same, after a whole warm start: gates start even, as without a probe."""

    kind = "even"

    def worth(self, probe: Any) -> dict[str, Tensor]:
        probe.warm_start()
        return {key: torch.full((path.units,), probe.unit_params[key]) for key, path in probe.paths.items()}


class Downs(PlacementScore):
    """Only the maps of role `down` are useful."""

    kind = "downs"

    def worth(self, probe: Any) -> dict[str, Tensor]:
        return {key: torch.tensor([float(path.site.role == "down")]) for key, path in probe.paths.items()}


class Useless(PlacementScore):
    kind = "useless"

    def worth(self, probe: Any) -> dict[str, Tensor]:
        return {key: -torch.ones(1) for key in probe.paths}


def trainer_of(folder: Path, *, steps: int = 32, options: Any = None, **changes: Any) -> Any:
    torch.manual_seed(0)
    given = {"budget": ga.Budget(fraction=0.3), "schedule": LATE} if options is None else options
    return ga.GatedTrainer(
        gated_classifier({"a": 3, "b": 2}, dropout=0.2),
        arguments(folder, max_steps=steps),
        train_dataset=labelled([24, 24], [3, 2]),
        **given,
        **changes,
    )


def spread(adapters: ga.Adapters) -> dict[str, float]:
    """The mean log alpha of each path."""
    assert adapters.bank is not None
    return {
        key: float(adapters.bank.log_alpha.detach()[:, where].mean()) for key, where in adapters.bank.slices.items()
    }


def test_half_as_many_batches_as_steps_are_probed_at_most_24_and_nothing_of_short_trainings() -> None:
    assert [probe_batches(steps) for steps in (1, 31, 32, 40, 60, 10_000)] == [0, 0, 16, 20, 24, 24]


def test_gates_start_from_what_the_score_says_and_nothing_else_changes_that_it_did_not_train(
    tmp_path: Path,
) -> None:
    trainer = trainer_of(tmp_path, prior=Downs())
    model, adapters = trainer.model, trainer.adapters
    log_alpha = adapters.bank.log_alpha
    before, modes = trained(model), [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    trainer._start_gates()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    gates = {name for name in before if name.endswith(("log_alpha", "bank.beyond"))}
    assert_same(
        {k: v for k, v in trained(model).items() if k not in gates}, {k: v for k, v in before.items() if k not in gates}
    )
    assert log_alpha.requires_grad
    assert not adapters.bank.frozen
    assert all(p.grad is None for p in model.parameters())
    found = spread(adapters)
    role = {key: path.site.role for key, path in adapters.typed_paths()}
    downs = [value for key, value in found.items() if role[key] == "down"]
    others = [value for key, value in found.items() if role[key] != "down"]
    assert len(set(downs)) == 1
    assert downs[0] > adapters.bank.config.init > max(others)
    assert trainer.placement.score == "downs"


def test_candidates_and_heads_start_from_what_they_learnt_in_the_probe(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, prior=Even())
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer._start_gates()
    learnt = {id(p) for p in (*trainer.adapters.weight_parameters(), *trainer.adapters.head_parameters())}
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved - {"gated_adapters.bank.log_alpha"} == {
        name for name, p in trainer.model.named_parameters() if id(p) in learnt
    }
    assert len(set(spread(trainer.adapters).values())) == 1  # the score finds nothing to tell apart
    for _, path in trainer.adapters.typed_paths():
        first, *others = path.learned().tolist()
        assert first > 0
        assert not any(others)  # the first unit speaks for the others, which add less


def test_a_score_that_finds_nothing_useful_gives_the_training_without_a_probe_bit_for_bit(tmp_path: Path) -> None:
    found = {}
    for name, prior in (("useless", Useless()), ("plain", None)):
        options = {"budget": ga.Budget(fraction=0.3), "schedule": LATE.model_copy(update={"rewind": False})}
        rates = {
            "gate_learning_rate": 0.1
        }  # by default, gates are slower after a probe, and a prune is followed by a rise
        trainer = trainer_of(tmp_path / name, prior=prior, options=options, **rates)
        trainer.adapters.bank.log_alpha.data.fill_(trainer.adapters.bank.config.init)
        trainer.train()
        found[name] = trained(trainer.model)
        assert (trainer.placement is None) == (prior is None)
    assert_same(found["useless"], found["plain"])


def test_equal_trainings_probe_alike(tmp_path: Path) -> None:
    one, two = (trainer_of(tmp_path) for _ in range(2))
    for trainer in (one, two):
        trainer._start_gates()
    assert torch.equal(one.adapters.bank.log_alpha, two.adapters.bank.log_alpha)
    assert len(set(spread(one.adapters).values())) > 1


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (31, {"budget": ga.Budget(fraction=0.3), "schedule": LATE}),
        (40, {"budget": ga.Budget(fraction=0.3), "prior": None}),
        (40, {"penalty": ga.L0(weight=1.0)}),
        (40, {}),
    ],
    ids=["short", "no prior", "no budget", "no penalty"],
)
def test_where_a_probe_has_no_use_there_is_none(steps: int, options: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, steps=steps, options=options)
    before = trained(trainer.model)
    trainer._start_gates()
    assert_same(trained(trainer.model), before)
    assert trainer.placement is None


def test_a_second_training_of_the_same_gates_is_not_probed(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, options={"budget": ga.Budget(fraction=0.3), "schedule": ga.Schedule(prune=None)})
    trainer.train()
    log_alpha = trainer.adapters.bank.log_alpha.detach().clone()
    trainer._start_gates()
    assert torch.equal(trainer.adapters.bank.log_alpha, log_alpha)


def test_a_run_that_resumes_is_not_probed_again_and_ends_the_same(tmp_path: Path) -> None:
    saving: Any = {"save_strategy": "steps", "save_steps": 28}
    runs = []
    for resume in (False, True):
        torch.manual_seed(99 if resume else 0)
        trainer = ga.GatedTrainer(
            gated_classifier({"a": 3, "b": 2}, dropout=0.2),
            arguments(tmp_path, max_steps=32, **saving),
            train_dataset=labelled([24, 24], [3, 2]),
            budget=ga.Budget(fraction=0.3),
            schedule=ga.Schedule(warmup=0.2, ramp=0.9, prune=0.95),  # gates learn before and after step 28
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-28") if resume else None)
        assert (trainer.placement is None) == resume
        runs.append(trained(trainer.model))
    assert_same(runs[1], runs[0])


def test_metrics_that_a_trainer_notes_by_itself_do_not_show_the_probe(tmp_path: Path) -> None:
    class Noting(ga.GatedTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._metrics = {"train": defaultdict(list)}

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self._metrics["train"]["seen"].append(1.0)
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = trainer_of(tmp_path)
    noting = Noting(
        trainer.model, arguments(tmp_path, max_steps=32), train_dataset=labelled([24, 24], [3, 2]),
        budget=ga.Budget(fraction=0.3), schedule=LATE,
    )  # fmt: skip
    noting._start_gates()
    assert noting.placement is not None
    assert noting._metrics == {"train": {}}


def test_an_unknown_prior_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AllocationError, match="no such placement score") as caught:
        trainer_of(tmp_path, prior="astrology").train()
    assert all(kind in str(caught.value) for kind in score_kinds())


# -- a budget that is relative to what is gained -----------------------------------------------------------------------

WITHIN = ga.Budget(within=0.1)


def relative(folder: Path, budget: ga.Budget = WITHIN, **changes: Any) -> Any:
    """Ten steps on one text, again and again, so that candidates gain much."""
    torch.manual_seed(0)
    args = arguments(folder, **({"learning_rate": 3e-2} | changes))
    return ga.GatedTrainer(
        gated_causal(), args, train_dataset=continued(1) * 64, budget=budget, schedule=LATE, prior="closing"
    )


def test_a_relative_budget_becomes_the_size_that_the_probe_found(tmp_path: Path) -> None:
    trainer = relative(tmp_path)  # also where the training is short
    trainer.train()
    (frontier,) = trainer.placement.frontiers
    size = frontier.within(0.1).params
    assert size < frontier.points[-1].params
    penalty = trainer.adapters.pressure.penalty
    assert penalty.params <= size
    assert trainer.adapters.structure.params <= penalty.params
    assert trainer.adapters.structure.params > 0


@pytest.mark.parametrize(("reason", "prior"), [("prior=None", None), ("trained already", "closing")])
def test_a_relative_budget_without_a_probe_is_refused(reason: str, prior: str | None, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, options={"budget": WITHIN, "schedule": LATE}, prior=prior)
    if prior is not None:
        trainer.adapters.bank.draw()
    with pytest.raises(TrainingError, match="needs a probe") as caught:
        trainer.train()
    assert reason in str(caught.value)
    assert int(trainer.state.global_step) == 0


def test_a_run_with_a_relative_budget_does_not_resume_and_its_remedy_works(tmp_path: Path) -> None:
    first = relative(tmp_path, save_strategy="steps", save_steps=4)
    first.train()
    again = relative(tmp_path)
    with pytest.raises(TrainingError, match=r"Budget\(params"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    size = first.adapters.pressure.penalty.params
    exact = relative(tmp_path, ga.Budget(params=size))
    exact.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(trained(exact.model), trained(first.model))


def test_sizes_that_nobody_has_measured_are_refused_with_the_ways_to_measure_them() -> None:
    adapters, bare = ga.get_adapters(gated_classifier()), classifier()
    for refused in (
        lambda: adapters.discretize(WITHIN),
        lambda: adapters.set_penalty(WITHIN, total_steps=10),
        lambda: ga.attach(bare, SPACE, penalty=WITHIN, total_steps=10),
    ):
        with pytest.raises(BudgetError, match="only after a probe") as caught:
            refused()
        assert "ga.allocate" in str(caught.value)
        assert "frontier" in str(caught.value)
    assert not hasattr(bare, "gated_adapters")


def test_one_way_to_say_a_budget() -> None:
    assert ga.Budget.parse({"within": 0.02}, where="a file").within == 0.02
    for wrong in ({"within": 0.02, "params": 3}, {"within": 1.0}, {"within": 0.0}, {"within": math.nan}):
        with pytest.raises(ConfigError, match="within"):
            ga.Budget.parse(wrong, where="a file")
