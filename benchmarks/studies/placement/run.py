"""Which structure of a given size is best, and which score knows it beforehand?

Claims under test: at sizes where structure matters, no fixed guess (a kind, a role, an even spread) is the best in
every regime; and a score that is found in seconds, before any training, ranks structures of equal size by the loss that
they reach (Kendall's tau of 0.5 or more, or 70 % of what two seeds agree on), so that its pick loses at most 20 % of
what lies between a random structure and the best. Every structure is trained at one rate, which suits all kinds of
path. Scores may be tuned on `smollm2-id-35k` and `tweets-1536`; the other regimes are the test.

    python -m benchmarks placement run [--regimes smollm2-id-35k ...] [--limit 30]   # trains structures
    python -m benchmarks placement score [--regimes ...] [--scores moved ...] [--seeds 0 1 2]
    python -m benchmarks placement arms [--regimes ...] [--seeds 0 1 2]              # the library's choices and rivals
    python -m benchmarks placement frontier [--regimes ...] [--seeds 0 1 2]          # sizes: predicted and retrained
    python -m benchmarks placement cost --regimes smollm2-id-35k                     # seconds, on a quiet machine
    python -m benchmarks placement table

A killed run goes on where it stopped, and several processes share the work: each takes what nobody else computes.
Two processes of one thread finish earlier than one process of two.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, set_seed

import gatedadapters as ga
from benchmarks.common.command import carry_out, parser
from benchmarks.common.store import Result, claimed
from benchmarks.studies.placement.cells import (
    COMMON_RATE,
    GUESSES,
    LIBRARY,
    POINT_RATES,
    SEEDS,
    STORE,
    AnyCell,
    ArmCell,
    Cell,
    CostCell,
    FrontierCell,
    PointCell,
    ScoreCell,
    arm_cell,
    cells_of,
    rates_of,
    read,
    tuned,
)
from benchmarks.studies.placement.judging import packed, predictions
from benchmarks.studies.placement.precision import autocast, precision
from benchmarks.studies.placement.regimes import REGIMES, Problem, Regime
from benchmarks.studies.placement.rivals import PEFT
from benchmarks.studies.placement.scores import names, placement
from benchmarks.studies.placement.structures import made
from benchmarks.studies.placement.table import tables
from gatedadapters.reporting.versions import versions
from gatedadapters.structure import Structure

EVA_BATCHES = 4
BUDGETS = 8  # of a frontier

# -- one cell ----------------------------------------------------------------------------------------------------------


def compute(cell: Cell | ArmCell, regime: Regime, structure: Structure | None) -> Result:
    """Train one structure, or search one if there is none, and measure it on all held-out texts.

    The model is left as it was.
    """
    search: dict[str, Any] = {}
    if structure is None:
        assert isinstance(cell, ArmCell)
        search = {"budget": ga.Budget(params=regime.size), "prior": cell.score}
    began, cpu = time.perf_counter(), time.process_time()
    with fitted(regime, structure, cell.seed, cell.rate, **search) as adapters:
        trained = time.perf_counter()
        losses, right = measured(regime.problem)
        found = outcome(losses, right, adapters.structure.params, began, trained, cpu)
    return {"cell": asdict(cell), **found, "kinds": params_by_kind(adapters.structure)}


@contextmanager
def fitted(regime: Regime, structure: Structure | None, seed: int, rate: float, **search: Any) -> Iterator[ga.Adapters]:
    """A context in which the regime's model has trained adapters: a structure, or all candidates and a search."""
    problem = regime.problem
    problem.reset(seed)
    given = regime.search_space if structure is None else structure
    adapters = ga.attach(problem.model, given, heads=problem.heads, seed=seed)
    try:
        trainer = ga.GatedTrainer(
            problem.model,
            regime.arguments(rate, seed, bf16=precision() == "bf16"),
            train_dataset=problem.items(seed),
            data_collator=problem.collate,
            compute_loss_func=problem.trainer_loss,
            **search,
        )
        trainer.train()
        trainer.accelerator.unwrap_model(problem.model, keep_fp32_wrapper=False)  # it wraps `forward` in autocast
        yield adapters
    finally:
        ga.detach(problem.model)
        problem.model.zero_grad()


def outcome(
    losses: Tensor, right: Tensor | None, params: int, began: float, trained: float, cpu: float
) -> dict[str, Any]:
    """What is stored of a training that began, ended and used the processor at these times."""
    return {
        "loss": float(losses.mean()),
        "accuracy": None if right is None else float(right.float().mean()),
        "params": params,
        "seconds": {
            "train": round(trained - began, 1),
            "measure": round(time.perf_counter() - trained, 1),
            "cpu": round(time.process_time() - cpu, 1),
        },
        "precision": precision(),
        "losses": packed(losses.numpy()),
        "versions": versions(),
    }


def compute_arm(cell: ArmCell, regime: Regime) -> Result:
    """Choose a structure as the library does, and train it; or train a method of peft."""
    if cell.arm in PEFT:
        return compute_rival(cell, regime)
    if cell.arm == "searched":
        found = compute(cell, regime, None)
        return {"arm": found.pop("cell"), **found}
    began, cpu = time.perf_counter(), time.process_time()
    structure = allocated(regime, cell.seed, cell.score)
    chosen = {"choose": round(time.perf_counter() - began, 1), "choose cpu": round(time.process_time() - cpu, 1)}
    found = compute(cell, regime, structure)
    return {"arm": found.pop("cell"), **found, "seconds": {**chosen, **found["seconds"]}}


def allocated(regime: Regime, seed: int, score: str) -> Structure:
    """The structure that the library chooses before any training."""
    problem = regime.problem
    problem.reset(seed)
    with autocast():
        return ga.allocate(
            problem.model,
            regime.search_space,
            problem.batches(seed, regime.batch),
            budget=ga.Budget(params=regime.size),
            score=score,
            loss=problem.score_loss,
            heads=problem.heads,
            seed=seed,
            progress=False,
        )


def compute_cost(cell: CostCell, regime: Regime) -> Result:
    """Time an allocation, a search, and a plain training of what was found for as many steps."""
    times: dict[str, dict[str, float]] = {}

    def timed(what: str, action: Callable[[], Structure]) -> Structure:
        began, cpu = time.perf_counter(), time.process_time()
        found = action()
        times[what] = {
            "wall": round(time.perf_counter() - began, 2),
            "cpu": round(time.process_time() - cpu, 2),
        }
        return found

    def fit(structure: Structure | None, **search: Any) -> Structure:
        with fitted(replace(regime, steps=cell.steps), structure, cell.seed, COMMON_RATE, **search) as adapters:
            return adapters.structure

    regime.problem.items(cell.seed)  # loads the model and its data
    timed("allocate", lambda: allocated(regime, cell.seed, "gain"))
    found = timed("search", lambda: fit(None, budget=ga.Budget(params=regime.size)))
    timed("train", lambda: fit(found))
    return {"cost": asdict(cell), "times": times, "precision": precision(), "versions": versions()}


def compute_rival(cell: ArmCell, regime: Regime) -> Result:
    """Train a method of peft with transformers' own Trainer; the model is left as it was."""
    problem = regime.problem
    set_seed(cell.seed)
    began, cpu = time.perf_counter(), time.process_time()
    first = list(itertools.islice(problem.batches(cell.seed, regime.batch), EVA_BATCHES))
    wrapped, callbacks = PEFT[cell.arm](problem.model, first, regime.steps)
    try:
        trainer = Trainer(
            wrapped,
            regime.arguments(cell.rate, cell.seed, bf16=precision() == "bf16"),
            train_dataset=problem.items(cell.seed),
            data_collator=problem.collate,
            callbacks=callbacks,
        )
        trainer.train()
        trainer.accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        trained = time.perf_counter()
        losses, _ = measured(problem, wrapped)
        params = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    finally:
        wrapped.unload()
    return {"arm": asdict(cell), **outcome(losses, None, params, began, trained, cpu)}


@torch.no_grad()
def measured(problem: Problem, model: nn.Module | None = None) -> tuple[Tensor, Tensor | None]:
    """The loss of every held-out text, in float64, and whether the model is right.

    Args:
        problem: says what is measured.
        model: default: the problem's own.
    """
    model = problem.model if model is None else model
    model.eval()
    with autocast():
        parts = [problem.measure(model, batch) for batch in problem.held_out]
    right = [part for _, part in parts if part is not None]
    return torch.cat([losses for losses, _ in parts]).double(), torch.cat(right) if right else None


def params_by_kind(structure: Structure) -> dict[str, int]:
    """What a structure spends on each kind."""
    found: dict[str, int] = {}
    for path in structure.paths:
        found[path.kind] = found.get(path.kind, 0) + path.params
    return found


def compute_score(cell: ScoreCell, regime: Regime, structures: dict[str, Structure]) -> Result:
    """Score the candidates of a regime, and predict every structure from that."""
    began = time.perf_counter()
    with autocast():
        found = placement(cell.score, regime, cell.seed)
    seconds = time.perf_counter() - began
    return {
        "score": asdict(cell),
        "values": predictions(found, structures),
        "seconds": round(seconds, 1),
        "precision": precision(),
        "versions": versions(),
    }


def compute_frontier(cell: FrontierCell, regime: Regime) -> Result:
    """What one probe says of eight budgets."""
    problem = regime.problem
    problem.reset(cell.seed)
    began = time.perf_counter()
    with autocast():
        found = ga.allocation.place(
            problem.model,
            regime.search_space,
            problem.batches(cell.seed, regime.batch),
            frontier=BUDGETS,
            loss=problem.score_loss,
            heads=problem.heads,
            seed=cell.seed,
            progress=False,
        )
    (frontier,) = found.frontiers
    points = [{"params": p.params, "loss": p.loss, "structure": p.structure.to_json()} for p in frontier.points]
    seconds = round(time.perf_counter() - began, 1)
    return {"frontier": asdict(cell), "points": points, "base": frontier.base, "seconds": seconds}


def compute_point(cell: PointCell, regime: Regime, structure: Structure) -> Result:
    """Train a structure of a frontier by itself."""
    found = compute(Cell(cell.regime, "point", cell.seed, cell.rate), regime, structure)
    del found["cell"]
    return {"point": asdict(cell), **found}


# -- all of them -------------------------------------------------------------------------------------------------------


def run_all(options: argparse.Namespace) -> None:
    """Train the structures that are missing, regime by regime."""
    for name in options.regimes:
        regime = REGIMES[name]
        structures = made(regime)
        for cell in cells_of(name, list(structures), options.rate)[: options.limit]:
            result = if_missing(cell, compute, cell, regime, structures[cell.structure])
            if result is not None:
                print(f"{name} {cell.structure} seed {cell.seed}: {result['loss']:.4f} {result['seconds']}", flush=True)


def score_all(options: argparse.Namespace) -> None:
    """Compute the scores that are missing."""
    for name in options.regimes:
        regime = REGIMES[name]
        structures = made(regime)
        for seed, score in itertools.product(options.seeds, options.scores or names()):
            result = if_missing(
                ScoreCell(name, score, seed), compute_score, ScoreCell(name, score, seed), regime, structures
            )
            if result is not None:
                print(f"{name} {score} seed {seed}: {result['seconds']} s", flush=True)


def arms_all(options: argparse.Namespace) -> None:
    """Compute the arms that are missing: some seeds at every rate, the others at the rate that is best with these."""
    for name in options.regimes:
        regime = REGIMES[name]
        structures = made(regime)
        rivals = tuple(PEFT) if name.startswith("smollm2") else ()  # on encoders they have no such small sizes
        seeds = sorted(options.seeds, key=lambda seed: seed not in options.tune)
        for seed, arm in itertools.product(seeds, options.arms or (*LIBRARY, *GUESSES, *rivals)):
            best = tuned(name, arm)
            rates = rates_of(arm) if seed in options.tune else () if best is None else (best,)
            for cell in (arm_cell(name, arm, seed, rate) for rate in rates):
                if isinstance(cell, ArmCell):
                    result = if_missing(cell, compute_arm, cell, regime)
                else:
                    result = if_missing(cell, compute, cell, regime, structures[cell.structure])
                if result is not None:
                    print(f"{cell.name}: {result['loss']:.4f} {result['seconds']}", flush=True)


def frontier_all(options: argparse.Namespace) -> None:
    """Compute the frontiers that are missing, and train their structures."""
    for name, seed in itertools.product(options.regimes, options.seeds):
        regime, cell = REGIMES[name], FrontierCell(name, seed)
        if_missing(cell, compute_frontier, cell, regime)
        predicted = read(cell) or {"points": ()}
        places = [
            (number, PointCell(name, number, cell.seed, rate))
            for number in range(len(predicted["points"]))
            for rate in POINT_RATES
        ]
        missing = [(number, place) for number, place in places if read(place) is None]
        if missing and "structure" not in predicted["points"][0]:
            predicted = compute_frontier(cell, regime)  # what was packed has none
        for number, place in missing:
            point = predicted["points"][number]
            result = if_missing(place, compute_point, place, regime, Structure.from_json(point["structure"]))
            if result is not None:
                print(f"{place.name}: {point['loss']:.4f} predicted, {result['loss']:.4f} trained", flush=True)


def cost_all(options: argparse.Namespace) -> None:
    """Time what is missing."""
    for name, seed in itertools.product(options.regimes, options.seeds):
        if_missing(CostCell(name, seed), compute_cost, CostCell(name, seed), REGIMES[name])


def if_missing(cell: AnyCell, function: Callable[..., Result], *arguments: object) -> Result | None:
    """The new result of a cell that nobody has computed and nobody computes now; None of any other."""
    with claimed(STORE.loose / f"{cell.name}.lock") as ours:
        if not ours or read(cell) is not None:
            return None
        return STORE.computed(cell.name, lambda: function(*arguments))


def main(arguments: Sequence[str]) -> None:
    """See the module's docstring."""
    made_parser = parser("placement", __doc__, "score", "arms", "frontier", "cost", threads=1)
    made_parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES), help="default: all")
    made_parser.add_argument("--limit", type=int, help="cells of each regime; they come in a useful order")
    made_parser.add_argument("--rate", type=float, default=COMMON_RATE, help="default: %(default)s")
    made_parser.add_argument("--scores", nargs="+", help="default: all")
    made_parser.add_argument("--arms", nargs="+", help="default: all")
    made_parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of all but `run`; default: 0")
    made_parser.add_argument(
        "--tune",
        nargs="+",
        type=int,
        default=SEEDS[:1],
        help="of `arms`: seeds trained at every rate; default: 0",
    )
    options = made_parser.parse_args(arguments)
    further = {"score": score_all, "arms": arms_all, "frontier": frontier_all, "cost": cost_all}
    if options.command in further:
        torch.set_num_threads(options.threads)
        further[options.command](options)
        print(tables())
    else:
        carry_out(options, run=lambda: run_all(options), table=tables, pack=STORE.pack)
