"""How does accuracy after pruning respond to the sparsity weight, to noise in training and to perturbed test data?

Claims under test, after paper 1 (arXiv 2509.03057), whose base model is unknown, so that shapes are compared and not
values: accuracy is best at a middle sparsity weight and falls off above it; it is almost flat up to 10 % of noise. The
gated structure, uniform LoRA of the same size and full fine-tuning are measured in one study, each with its own
learning rate.

    python benchmarks/robustness.py run       # the trials that are missing; a killed run goes on where it stopped
    python benchmarks/robustness.py report    # tables, and report.html, report.md and pictures from what is stored

Everything lies in benchmarks/results/robustness: the study is `robustness.yaml`, its storage a journal.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gatedadapters.studies import Curve, Study
from gatedadapters.studies.results import MEAN

HERE = Path(__file__).parent
CONFIG, STORE = HERE / "robustness.yaml", HERE / "results" / "robustness"
JOURNAL, REPORT = STORE / "study.journal", STORE / "report"


def study() -> Study:
    """The stored study."""
    STORE.mkdir(parents=True, exist_ok=True)
    return Study.load(CONFIG, storage=JOURNAL)


def claims(curves: list[Curve]) -> str:
    """What became of the claims, from the curves of mean accuracy."""
    lines = []
    for curve in (c for c in curves if c.task == MEAN and len(c.points) > 1):
        first, best = curve.points[0], max(curve.points, key=lambda point: point.score)
        if curve.factor == "penalty.weight":
            last = curve.points[-1]
            lines.append(
                f"sparsity weight, {curve.side}: best at {best.value:g} ({100 * best.score:.1f} %, {best.params:,.0f} "
                f"parameters), {100 * (last.score - best.score):+.1f} points at {last.value:g} ({last.params:,.0f})"
            )
        else:
            steps = [f"{100 * (p.score - first.score):+.1f} at {float(p.value):.0%}" for p in curve.points[1:]]
            lines.append(f"{curve.factor}, {curve.side}: {', '.join(steps)} (points against {100 * first.score:.1f} %)")
    return "\n".join(lines)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "report"))
    options = parser.parse_args()
    found = study()
    if options.command == "run":
        found.run()
    print(found, claims(found.curves()), found.report(REPORT, overwrite=True).relative_to(HERE.parent), sep="\n\n")


if __name__ == "__main__":
    sys.exit(main())
