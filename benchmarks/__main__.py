"""Command line of all benchmarks: `python -m benchmarks NAME COMMAND`, from the root of the repository."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent


def benchmarks() -> dict[str, Path]:
    """The script of every benchmark by its name: that of a study's folder, or of a file in `costs/`."""
    studies = {path.parent.name: path for path in sorted(HERE.glob("studies/*/run.py"))}
    costs = {path.stem: path for path in sorted(HERE.glob("costs/*.py")) if path.stem != "__init__"}
    return studies | costs


def question(script: Path) -> str:
    """What a benchmark asks: the first line of its docstring, read without importing anything heavy."""
    return (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def main(arguments: Sequence[str]) -> None:
    """Hand the arguments to the benchmark that the first of them names; list all benchmarks where it names none."""
    scripts = benchmarks()
    if not arguments or arguments[0] not in scripts:
        width = max(map(len, scripts))
        listed = "\n".join(f"  {name:{width}}  {question(script)}" for name, script in scripts.items())
        sys.exit(f"usage: python -m benchmarks NAME COMMAND [--help]\n\n{listed}")
    module = ".".join(("benchmarks", *scripts[arguments[0]].relative_to(HERE).with_suffix("").parts))
    importlib.import_module(module).main(arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
