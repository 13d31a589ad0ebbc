"""What does a model forget while it learns a domain, and does a mask protect it?

Claims under test, at equal optimiser steps and with each arm's learning rate tuned on validation data, by the mean of
domain and general score, which is what an arm trades: tuning the elements that matter least in general loses less
general ability than a random mask of equal size; its domain score is no worse than LoRA's of equal size; and gates with
a mask under one budget do better than either alone. EWC's weight is not tuned.

    python -m benchmarks forgetting run [--studies grimm ...] [--arms zero full ...] [--seeds 0 1] [--protect 0.95]
    python -m benchmarks forgetting table
    python -m benchmarks forgetting picture forgetting.png

Decoder studies (SmolLM2-135M-Instruct): `grimm` and `friends` learn running text, `openbookqa`, `medmcqa` and `piqa`
learn answers to science, medical and physical questions (scored by the loss of the right answer and, as the domain's
task, by accuracy); general ability is the loss on held-out news (XSum) and the accuracy on a held-out task
(CommonsenseQA). Encoder study (MiniLM-L3): `encoder` first learns newsgroups in full, which is then what it must not
lose while it learns sentiment. Every score is on test data, an interval over seeds where there are several. A killed
run goes on where it stopped. Everything computes in fp32, so that machines without fast bf16 agree.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.common.command import carry_out, parser
from benchmarks.common.store import Result
from benchmarks.studies.forgetting.arms import tuned
from benchmarks.studies.forgetting.cells import ARMS, DECIDING, STORE, STUDIES, Cell, stored, tuned_rate
from benchmarks.studies.forgetting.picture import trade_off
from benchmarks.studies.forgetting.problems import problem_of
from benchmarks.studies.forgetting.table import table
from gatedadapters.reporting.versions import versions


def compute(cell: Cell) -> Result:
    """One cell, from the pretrained model to its scores."""
    torch.manual_seed(cell.seed)
    problem = problem_of(cell)
    began = time.perf_counter()
    model, count = tuned(problem, cell)
    seconds = time.perf_counter() - began
    return {
        "cell": asdict(cell),
        "scores": problem.scores(model, cell.split),
        "trained": count,
        "seconds": round(seconds, 1),
        "versions": versions(),
    }


def run(cell: Cell) -> Result:
    """The result of a cell, computed if nobody has."""
    return STORE.computed(cell.name, lambda: compute(cell))


def run_all(options: argparse.Namespace) -> None:
    """Compute what is missing: of each study and protected share, tune every arm, then go seed by seed."""
    for study in options.studies:
        encoder = study == "encoder"
        arms = options.arms or (ARMS if encoder else DECIDING)
        steps, test = (120, 600) if encoder else (30, 60)
        for protect in options.protect:
            shared = {"protect": protect, "steps": options.steps or steps, "test": options.test or test}
            rates = {arm: tuned_rate(study, arm, shared, run) for arm in arms}
            for seed in options.seeds or range(5 if encoder else 2):
                for arm, rate in rates.items():
                    assert rate is not None
                    result = run(Cell(study, arm, rate, seed, **shared))
                    print(study, protect, arm, f"seed {seed}", result["scores"], flush=True)


def main(arguments: Sequence[str]) -> None:
    """See the module's docstring."""
    made = parser("forgetting", __doc__, "picture", threads=2)
    made.add_argument("file", nargs="?", type=Path, default=Path("forgetting.png"), help="of the picture")
    made.add_argument("--studies", nargs="+", choices=STUDIES, default=[s for s in STUDIES if s != "friends"])
    made.add_argument("--arms", nargs="+", choices=ARMS, default=None, help="default: all on the encoder, else five")
    made.add_argument("--seeds", nargs="+", type=int, default=None, help="default: five on the encoder, else two")
    made.add_argument("--protect", nargs="+", type=float, default=[0.95], help="shares of frozen elements")
    made.add_argument("--steps", type=int, help="default: 120 on the encoder, else 30")
    made.add_argument("--test", type=int, help="test examples of each kind; default: 600 on the encoder, else 60")
    options = made.parse_args(arguments)
    if options.command == "picture":
        trade_off(stored(), ARMS, options.file)
    else:
        carry_out(options, run=lambda: run_all(options), table=table, pack=STORE.pack)
