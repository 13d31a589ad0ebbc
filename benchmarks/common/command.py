"""The command line that the benchmarks share: `run`, `table` and `pack`."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def parser(name: str, description: str | None, *more: str, threads: int | None = None) -> argparse.ArgumentParser:
    """A parser of the three commands.

    Args:
        name: of the benchmark.
        description: its docstring, of which the first line is shown.
        more: further commands.
        threads: default of `--threads`; without one there is no such option.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}", description=(description or "").partition("\n")[0]
    )
    made.add_argument("command", choices=("run", "table", "pack", *more))
    if threads is not None:
        made.add_argument("--threads", type=int, default=threads, help="of torch; default: %(default)s")
    return made


def carry_out(
    options: argparse.Namespace, *, run: Callable[[], None], table: Callable[[], str], pack: Callable[[], str]
) -> None:
    """Carry out one of the three commands.

    Args:
        options: parsed by `parser`.
        run: computes what is missing; the tables are printed afterwards.
        table: makes the tables from the stored results.
        pack: moves loose results into the packed file, and says so.
    """
    if options.command == "pack":
        print(pack())
        return
    if options.command == "run":
        if "threads" in options:
            import torch  # tables do without it

            torch.set_num_threads(options.threads)
        run()
    print(table())
