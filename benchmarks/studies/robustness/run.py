"""How does accuracy after pruning respond to the sparsity weight, to noise in training and to perturbed test data?

Claims under test, after paper 1 (arXiv 2509.03057), whose base model is unknown, so that shapes are compared and not
values: accuracy is best at a middle sparsity weight and falls off above it; it is almost flat up to 10 % of noise. The
gated structure, uniform LoRA of the same size and full fine-tuning are measured in one study, each with its own
learning rate.

    python -m benchmarks robustness run            # the trials that are missing; a killed run goes on where it stopped
    python -m benchmarks robustness table          # prints the table from what is stored
    python -m benchmarks robustness report [DIR]   # writes report.html, report.md and pictures

The study is `robustness.yaml`. While it runs, its storage is a journal in `benchmarks/scratch/robustness`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.command import carry_out, parser
from benchmarks.studies.robustness.table import table
from benchmarks.studies.robustness.trials import FOLDER, pack, study


def run_all() -> None:
    """Run the trials that are missing."""
    study().run()


def main(arguments: Sequence[str]) -> None:
    """See the module's docstring."""
    made = parser("robustness", __doc__, "report")
    made.add_argument("folder", nargs="?", type=Path, default=FOLDER / "report", help="of the report")
    options = made.parse_args(arguments)
    if options.command == "report":
        print(study().report(options.folder))
    else:
        carry_out(options, run=run_all, table=lambda: table(study()), pack=pack)
