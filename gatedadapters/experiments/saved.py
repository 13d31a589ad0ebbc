"""The description of a saved adapter."""

from __future__ import annotations

from pathlib import Path

from gatedadapters.errors import ArtifactError
from gatedadapters.experiments.outputs import ALLOCATE_CONFIG
from gatedadapters.reporting.tables import format_table
from gatedadapters.safe_files import file_errors
from gatedadapters.structure import Structure
from gatedadapters.structure.folder import STRUCTURE, WEIGHTS, adapter_folder, read_origin
from gatedadapters.structure.origin import Origin


@file_errors("read or write a file", "show")
def show(folder: str | Path, *, png: str | Path | None = None, diff: str | Path | None = None) -> str:
    """Describe a saved adapter, as `gatedadapters show` does: its structure, what its tasks share, and its size.

    Args:
        folder: folder of the adapter, output folder of a run that saved one, id of a repository on the hub, or a JSON
            file of a structure.
        png: a file to draw the structure in.
        diff: another adapter. The text then lists what changes from the first to this one instead.

    Raises:
        ArtifactError: there is no readable structure, or the weights are missing.
    """
    place = _adapter_folder(folder)
    structure = Structure.load(place)
    if diff is not None:
        other = _adapter_folder(diff)
        changes = "\n".join(structure.diff(Structure.load(other))) or "the same paths and units"
        parts = [f"from {place}\n  to {other}", changes]
    else:
        parts = [str(structure)]
        if len(structure.tasks) > 1:
            parts.append(sharing_table(structure))
        parts.append(_facts(place, structure))
    if png is not None:
        from gatedadapters.inspection import save_png  # imported here: matplotlib takes long to import

        save_png(structure, png)
        parts.append(f"drawn in {png}")
    return "\n\n".join(parts)


def sharing_table(structure: Structure) -> str:
    """Parameters by task, parameters by the number of tasks that use them, and the overlap of every pair of tasks."""
    sharing = structure.sharing()
    rows = [[f"used by {task}", f"{count:,}"] for task, count in sharing["params_per_task"].items()]
    rows += [[f"used by {n} task(s)", f"{count:,}"] for n, count in sharing["params_used_by_n_tasks"].items()]
    rows += [[f"overlap of {pair}", f"{share:.0%}"] for pair, share in sharing["overlap"].items()]
    return format_table(["sharing", "parameters"], rows)


def _adapter_folder(folder: str | Path) -> Path:
    """The folder of a saved adapter, the file of an allocation, or a file of a structure itself."""
    if (Path(folder) / ALLOCATE_CONFIG).is_file():
        return Path(folder) / STRUCTURE
    return Path(folder) if Path(folder).is_file() else adapter_folder(folder)


def _facts(folder: Path, structure: Structure) -> str:
    """Lines about what the adapter was made for and with, its cost, and the sizes of its files."""
    lines = [
        f"made for    {structure.fingerprint.model_class}, search space {structure.space.name}, seed {structure.seed}",
        f"made with   {', '.join(f'{name} {version}' for name, version in structure.created_with.items())}",
        f"flops       {structure.flops:,.0f} per token, forward",
    ]
    origin = read_origin(folder)[1] if folder.is_dir() else None
    if origin is not None:
        lines += _origin_lines(origin)
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


def _origin_lines(origin: Origin) -> list[str]:
    """Lines about the base, the labels of the tasks, and the training, as far as they are known."""
    lines = []
    if origin.base_model_name_or_path is not None:
        revision = f", revision {origin.revision}" if origin.revision else ""
        lines.append(f"base        {origin.base_model_name_or_path}{revision}")
    lines += [f"labels      {task.name}: {', '.join(task.labels)}" for task in origin.tasks if task.labels]
    if origin.training:
        lines.append("training    " + ", ".join(f"{name} {value}" for name, value in origin.training.items()))
    return lines
