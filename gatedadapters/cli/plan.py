"""Count candidates, gates, parameters and memory of a model and a search space, without loading any weights."""

from __future__ import annotations

import argparse
import json

from gatedadapters import experiments
from gatedadapters.config import Budget


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id, a config.json, or bundled:NAME")
    parser.add_argument("space", metavar="SPACE", help="a preset or a YAML file")
    parser.add_argument("--tasks", type=int, default=1, help="number of tasks, each with gates of its own (1)")
    parser.add_argument("--processes", type=int, default=1, help="show the memory of each, sharded with FSDP2 (1)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of one process's micro-batch (4096)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--fraction", type=float, help="show what Budget(fraction=...) leaves")
    budget.add_argument("--params", type=int, help="show what Budget(params=...) leaves")
    budget.add_argument("--flops", type=float, help="show what Budget(flops=...) leaves")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    """Print the plan."""
    limits = {name: getattr(options, name) for name in ("fraction", "params", "flops")}
    given = any(value is not None for value in limits.values())
    budget = Budget.parse(limits, where="budget") if given else None
    plan = experiments.plan(
        options.model,
        options.space,
        tasks=options.tasks,
        budget=budget,
        processes=options.processes,
        tokens=options.tokens,
    )
    print(json.dumps(plan.to_data(), indent=1) if options.json else plan)
