"""Adapters and a sparse delta that were trained together, as one artefact."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from gatedadapters.artifacts.load import load_adapters
from gatedadapters.masking import SparseDelta, get_delta, load_delta
from gatedadapters.masking.delta import FILES as DELTA_FILES
from gatedadapters.reporting.tables import format_table
from gatedadapters.runtime.sharding import is_sharded
from gatedadapters.safe_files import check_free, whole_folder
from gatedadapters.structure.folder import FILES as ADAPTER_FILES
from gatedadapters.supernet.adapters import Adapters, get_adapters

ADAPTERS, DELTA = "adapters", "delta"


def save_joint(
    model: nn.Module,
    folder: str | Path,
    *,
    overwrite: bool = False,
    beside: bool = False,
    allow_nonfinite: bool = False,
) -> None:
    """Write the compact adapters and the delta of `model` into one folder, whole or not at all.

    Of a sharded model, every process calls this; the two parts are then written whole one after the other.

    Args:
        model: with both.
        folder: a new or an empty folder.
        overwrite: replace a joint artefact that the folder holds, in one step.
        beside: other files that the folder holds stay; an earlier artefact in it is replaced. Adapters that still have
            gates are saved as `Adapters.compacted` gives them.
        allow_nonfinite: also write infinities and NaN.

    Raises:
        AttachError: the model lacks adapters or a delta.
        ArtifactError: the adapters are not compact, a value is not finite and `allow_nonfinite` is False, or the folder
            is not free.
    """
    adapters, delta = get_adapters(model), get_delta(model)
    if beside or is_sharded(model):
        parts, replace = adapters.compacted() if beside else adapters, beside or overwrite
        parts.save(Path(folder) / ADAPTERS, overwrite=replace, allow_nonfinite=allow_nonfinite)
        delta.save(Path(folder) / DELTA, overwrite=replace, allow_nonfinite=allow_nonfinite)
        return
    for part, files in ((ADAPTERS, ADAPTER_FILES), (DELTA, DELTA_FILES)):
        check_free(Path(folder).resolve() / part, files, overwrite)  # what a user keeps in there is not replaced, too
    with whole_folder(folder, files={ADAPTERS, DELTA}, overwrite=overwrite) as new:
        adapters.save(new / ADAPTERS, allow_nonfinite=allow_nonfinite)
        delta.save(new / DELTA, allow_nonfinite=allow_nonfinite)


def load_joint(
    model: nn.Module, folder: str | Path, *, verify: bool = True, allow_nonfinite: bool = False
) -> tuple[Adapters, SparseDelta]:
    """Inverse of `save_joint`, on the backbone that both were trained on.

    Args:
        model: with that backbone.
        folder: what `save_joint` wrote.
        verify: see `load_adapters`.
        allow_nonfinite: see `load_adapters`.

    Raises:
        ArtifactError, AttachError, MaskError: see `load_adapters` and `load_delta`. The model is left as it was.
    """
    adapters = load_adapters(model, Path(folder) / ADAPTERS, verify=verify, allow_nonfinite=allow_nonfinite)
    try:
        delta = load_delta(model, Path(folder) / DELTA, verify=verify, allow_nonfinite=allow_nonfinite)
        return adapters, delta
    except BaseException:
        adapters.detach()
        raise


def budget_report(model: nn.Module) -> str:
    """Where a joint budget went: a table of parameters by sub-layer and role, of adapters and of tuned elements.

    Raises:
        AttachError: the model lacks adapters or a delta.
    """
    adapters, delta = get_adapters(model), get_delta(model)
    found: dict[str, list[int]] = {}
    for record in adapters.structure.paths if adapters.structure is not None else ():
        found.setdefault(record.site.role or record.site.sublayer, [0, 0])[0] += record.params
    mask = delta.mask
    for name in mask.names:
        found.setdefault(mask.roles[name] or "other", [0, 0])[1] += mask.count(name)
    total = sum(map(sum, found.values())) or 1
    rows = [[role, f"{a:,}", f"{b:,}", f"{(a + b) / total:.1%}"] for role, (a, b) in found.items()]
    sums = [sum(pair[side] for pair in found.values()) for side in (0, 1)]
    rows.append(["all", f"{sums[0]:,}", f"{sums[1]:,}", "100.0%"])
    return format_table(["role", "adapters", "tuned elements", "share"], rows)
