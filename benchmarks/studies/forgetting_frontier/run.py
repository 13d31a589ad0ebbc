"""What is lost in general when equally much of a domain is learned?

Claims under test: at an equal loss on the domain, the best importance mask raises the general loss at most 0.7 times as
much as a random mask of its size and as LoRA do; a small learning rate does not do as well by itself; and a protected
share that `select(keep_general=0.01)` finds keeps to it in nine runs of ten on text that it has not seen.

    python -m benchmarks forgetting_frontier run [--domains indonesian] [--arms full lora ...] [--seeds 0 1 2 3 4]
    python -m benchmarks forgetting_frontier run --rates 3e-4 1e-3 --shares 0.95 --steps 20 --limit 10 --choices
    python -m benchmarks forgetting_frontier keep [--seeds 0 1 2 3 4 5 6 7 8 9]   # shares found from a target
    python -m benchmarks forgetting_frontier table
    python -m benchmarks forgetting_frontier picture frontier.png

SmolLM2-135M learns Indonesian running text, or Chinese reviews. General ability is its loss on held-out English news
and fiction, with `--choices` also that on questions (CommonsenseQA). A cell is one training run: an arm, a rate, a
seed. It is measured after a quarter, a half and all of its steps, at a constant rate, so one run gives a piece of a
curve: loss on the domain against loss in general. An arm's curve is the lowest of its rates' curves at each loss on the
domain; arms are compared at equal loss on the domain, paired by seed. A killed run goes on where it stopped, and
several processes share the work.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common.command import carry_out, parser
from benchmarks.common.store import Result, claimed
from benchmarks.studies.forgetting_frontier.arms import Arm, prepared
from benchmarks.studies.forgetting_frontier.cells import DOMAINS, RATES, STEPS, STORE, Cell, KeepCell, cells_of
from benchmarks.studies.forgetting_frontier.keeping import compute_keep
from benchmarks.studies.forgetting_frontier.picture import picture
from benchmarks.studies.forgetting_frontier.problem import Problem, problem_of
from benchmarks.studies.forgetting_frontier.table import keep_table, table
from benchmarks.studies.placement.precision import autocast, precision
from gatedadapters.reporting.versions import versions

WARMUP = 2  # steps


def compute(cell: Cell) -> Result:
    """Train as a cell says, and measure on the way."""
    torch.manual_seed(cell.seed)
    problem = problem_of(cell.domain)
    began, cpu = time.perf_counter(), time.process_time()
    points: dict[str, Any] = {}
    with prepared(problem, cell) as arm:
        count, at_once = arm.count, arm.at_once
        chosen = time.process_time() - cpu
        for step in fitted(problem.model, arm, cell.rate, cell.steps):
            if step == cell.steps:
                arm.finish()
            if step == cell.steps or (step in cell.measured and not at_once):
                points[str(step)] = measured(problem, cell)
    return {
        "cell": asdict(cell),
        "points": points,
        "trained": count,
        "seconds": {
            "all": round(time.perf_counter() - began, 1),
            "cpu": round(time.process_time() - cpu, 1),
            "choose cpu": round(chosen, 1),
        },
        "precision": precision(),
        "versions": versions(),
    }


def fitted(model: nn.Module, arm: Arm, rate: float, steps: int) -> Any:
    """AdamW at a constant rate after a short warm-up, clipped; yields the number of steps after each of them."""
    groups = [group if isinstance(group, dict) else {"params": [group]} for group in arm.parameters]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(1, steps + 1):
        model.train()
        optimizer.zero_grad()
        with autocast():
            loss = arm.loss(model, next(arm.batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        yield step


def measured(problem: Problem, cell: Cell) -> dict[str, Any]:
    """Mean losses on held-out text, and with `choices` accuracy and loss on questions."""
    found: dict[str, Any] = {kind: round(loss, 6) for kind, loss in problem.measured().items()}
    if cell.choices:
        with autocast():
            found["choices"] = problem.choices()
    return found


def start_of(domain: str, *, choices: bool) -> Result:
    """The losses of the untouched model, measured once."""
    cell = Cell(domain, "start", 0.0, 0, choices=choices)

    def compute_start() -> Result:
        return {"start": domain, "points": {"0": measured(problem_of(domain), cell)}}

    return STORE.computed(f"{domain}-start{'-choices' * choices}", compute_start)


def run_all(options: argparse.Namespace) -> None:
    """Compute what is missing."""
    for domain in options.domains:
        print(domain, start_of(domain, choices=options.choices)["points"], flush=True)
        chosen = {"rates": options.rates, "shares": options.shares, "steps": options.steps, "choices": options.choices}
        for cell in list(cells_of(domain, options.arms, options.seeds, **chosen))[: options.limit]:
            with claimed(STORE.loose / f"{cell.name}.lock") as ours:
                if ours and STORE.read(cell.name) is None:
                    result = STORE.computed(cell.name, lambda cell=cell: compute(cell))
                    print(cell.name, result["points"], result["seconds"], flush=True)


def keep_all(options: argparse.Namespace) -> None:
    """Find shares from the target, as far as they are missing."""
    for domain in options.domains:
        for seed in options.seeds:
            cell = KeepCell(domain, seed)
            with claimed(STORE.loose / f"{cell.name}.lock") as ours:
                if ours and STORE.read(cell.name) is None:
                    result = STORE.computed(cell.name, lambda cell=cell: compute_keep(cell))
                    print(cell.name, {key: value for key, value in result.items() if key != "versions"}, flush=True)


def main(arguments: Sequence[str]) -> None:
    """See the module's docstring."""
    made = parser("forgetting_frontier", __doc__, "picture", "keep", threads=1)
    made.add_argument("file", nargs="?", type=Path, default=Path("frontier.png"), help="of the picture")
    made.add_argument("--domains", nargs="+", choices=DOMAINS, default=["indonesian"], help="default: indonesian")
    made.add_argument("--arms", nargs="+", choices=RATES, default=list(RATES), help="default: all")
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="default: five")
    made.add_argument("--rates", nargs="+", type=float, help="only these of each arm's; default: all")
    made.add_argument("--shares", nargs="+", type=float, help="only these protected shares; default: all")
    made.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    made.add_argument("--limit", type=int, help="cells; they come in a useful order")
    made.add_argument("--choices", action="store_true", help="also answer questions, which takes as long again")
    options = made.parse_args(arguments)
    if options.command == "picture":
        picture(options.file, options.steps)
    elif options.command == "keep":
        torch.set_num_threads(options.threads)
        keep_all(options)
        print(keep_table())
    else:
        carry_out(options, run=lambda: run_all(options), table=lambda: table(options.steps), pack=STORE.pack)
