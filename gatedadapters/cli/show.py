"""Print the structure of a saved adapter, what its tasks share, and its size."""

from __future__ import annotations

import argparse
from pathlib import Path

from gatedadapters.errors import ArtifactError
from gatedadapters.reporting.tables import format_table
from gatedadapters.structure import Structure
from gatedadapters.structure.folder import STRUCTURE, WEIGHTS

ADAPTER = "adapter"  # its folder among the results of a search


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="a saved adapter, or the output folder of a search")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw it")
    parser.add_argument("--diff", type=Path, metavar="OTHER", help="list what changes from DIR to OTHER instead")


def run(options: argparse.Namespace) -> None:
    """Do it."""
    folder = _artefact(options.folder)
    structure = Structure.load(folder)
    if options.diff is not None:
        other = _artefact(options.diff)
        lines = structure.diff(Structure.load(other))
        print(f"from {folder}\n  to {other}\n")
        print("\n".join(lines) or "the same paths and units")
    else:
        print(structure)
        if len(structure.tasks) > 1:
            print(f"\n{sharing_table(structure)}")
        print(f"\n{_facts(folder, structure)}")
    if options.png is not None:
        from gatedadapters.inspection import save_png

        save_png(structure, options.png)
        print(f"\ndrawn in {options.png}")


def sharing_table(structure: Structure) -> str:
    """Parameters by task and by the number of tasks that use them, and the overlap of every pair."""
    sharing = structure.sharing()
    rows = [[f"used by {task}", f"{count:,}"] for task, count in sharing["params_per_task"].items()]
    rows += [[f"used by {n} task(s)", f"{count:,}"] for n, count in sharing["params_used_by_n_tasks"].items()]
    rows += [[f"overlap of {pair}", f"{share:.0%}"] for pair, share in sharing["overlap"].items()]
    return format_table(["sharing", "parameters"], rows)


def _artefact(folder: Path) -> Path:
    """The folder itself, or the adapter among the results of a search."""
    return folder / ADAPTER if (folder / ADAPTER / STRUCTURE).is_file() else folder


def _facts(folder: Path, structure: Structure) -> str:
    lines = [
        f"made for    {structure.fingerprint.model_class}, search space {structure.space.name}, seed {structure.seed}",
        f"made with   {', '.join(f'{name} {version}' for name, version in structure.created_with.items())}",
        f"flops       {structure.flops:,.0f} per token, forward",
    ]
    if structure.fingerprint.heads:
        lines.append(f"heads       {', '.join(structure.fingerprint.heads)}")
    if folder.is_dir():
        weights = folder / WEIGHTS
        if not weights.is_file():
            raise ArtifactError(
                "the weights are missing",
                expected=WEIGHTS,
                got=", ".join(sorted(path.name for path in folder.iterdir())),
                where=folder,
                fix="copy the whole folder",
            )
        sizes = {path.name: path.stat().st_size for path in (weights, folder / STRUCTURE)}
        lines.append("files       " + ", ".join(f"{name} {size:,} bytes" for name, size in sizes.items()))
    return "\n".join(lines)
