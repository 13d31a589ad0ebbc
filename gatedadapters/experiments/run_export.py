"""The run `export`: a saved adapter in the format of another library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from gatedadapters.artifacts import export_gguf, export_peft
from gatedadapters.experiments.progress import silence_transformers
from gatedadapters.experiments.run_predict import load
from gatedadapters.safe_files import file_errors

Format = Literal["peft", "gguf"]
_WRITERS: dict[str, Callable[..., Any]] = {"peft": export_peft, "gguf": export_gguf}


@file_errors("read or write a file of the run", "export")
def export(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    to: Format = "peft",
    task: str | None = None,
    model: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a saved adapter for another library.

    Args:
        folder: what `Adapters.save` wrote, the output folder of a run that saved an adapter, or the id of a repository
            on the hub.
        out: the new folder (peft) or file (gguf). Default: beside `folder`, or here for an id, its name with `-peft` or
            `.gguf`.
        to: `peft`, which inference servers read as well, or `gguf` for llama.cpp.
        task: which task's adapter, where there are several.
        model: the base, in place of the one that the folder names: a folder, an id on the hub or `bundled:NAME`.
        overwrite: replace what `out` holds.

    Returns:
        Where it was written.

    Raises:
        GatedAdaptersError: see `load`, `export_peft` and `export_gguf`.
    """
    silence_transformers()
    loaded = load(folder, model=model, device="cpu")
    if out is None:
        place = Path(folder) if Path(folder).exists() else Path(Path(folder).name)
        out = place.with_name(place.resolve().name + {"peft": "-peft", "gguf": ".gguf"}[to])
    _WRITERS[to](loaded.adapters, out, task=task, overwrite=overwrite)
    return Path(out)
