"""`python tests/attack`: attack the library with damaged input."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import runner  # noqa: E402 (found on the path above)


def main() -> int:
    """Run the cases that the options name, print every fault; exit code 1 if there was one."""
    parser = argparse.ArgumentParser(prog="python tests/attack", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="cases of each format (1000)")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="seed of the first case (0)")
    parser.add_argument("--only", action="append", help="attack this format, or run this scenario of kills (all)")
    parser.add_argument("--workers", type=int, default=2, help="processes (2)")
    parser.add_argument("--kills", type=int, metavar="N", help="kill N processes instead, while they save and train")
    parser.add_argument(
        "--long", type=int, metavar="N", help="take N steps and N/10 of what is slower; watch the memory"
    )
    options = parser.parse_args()
    if options.kills:
        import kills

        scenarios = chosen(parser, options.only, list(kills.SCENARIOS))
        return int(kills.run(options.kills, options.first, scenarios) > 0)
    if options.long:
        import long_runs

        return int(long_runs.run(options.long) > 0)
    failed = 0
    for name in chosen(parser, options.only, runner.formats()):
        answers = runner.run(name, range(options.first, options.first + options.cases), options.workers)
        print(f"{name}: {answers}", flush=True)
        failed += len(answers.faults)
    return int(failed > 0)


def chosen(parser: argparse.ArgumentParser, names: list[str] | None, known: list[str]) -> list[str]:
    """The names that were given, or all."""
    for name in names or ():
        if name not in known:
            parser.error(f"argument --only: {name!r} is none of {', '.join(known)}")
    return names or known


if __name__ == "__main__":
    sys.exit(main())
