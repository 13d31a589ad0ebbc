"""From a folder back to adapters on a model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from gatedadapters.backbone.attached import unpacked
from gatedadapters.backbone.quantized import check_gradients_pass
from gatedadapters.structure.folder import Base, read
from gatedadapters.supernet.adapters import Adapters
from gatedadapters.supernet.attach import adapters_of, check_no_adapters, find_heads, install


def load_adapters(
    model: nn.Module,
    folder: str | Path,
    *,
    base: Base = "same",
    revision: str | None = None,
    verify: bool = True,
    allow_nonfinite: bool = False,
) -> Adapters:
    """Attach saved adapters to the backbone they were made for, weights and task heads included.

    The result computes what the saved one did, bit for bit where it was saved in fp32. Everything is checked
    before the model is touched, and nothing in the files is executed. Adapters of a quantised backbone also load on the
    original in full precision, and the other way round.

    Args:
        model: with the same backbone and heads, no adapters attached.
        folder: what `Adapters.save` wrote, the output folder of a run that saved an adapter, or the id of a repository
            on the hub. Of a repository only these files are fetched, into the hub's cache, which also answers where
            there is no network.
        base: `"updated"` accepts a backbone of the same layout with other weights, a newer release of it, and records
            the one they came from in `Structure.lineage`. An artefact does not hold the configuration of its backbone:
            that two of equal shapes differ in their heads or non-linearities is what
            `gatedadapters.transfer.check_versions(old, new)` finds, where the old one is at hand.
        revision: branch, tag or commit of the repository; None takes the newest.
        verify: check the digests of the files, which tell damage. Artefacts of releases 0.1 and 0.2 have none; they
            load with a note in the log.
        allow_nonfinite: also load infinities and NaN.

    Raises:
        ArtifactError: there is no such repository, or it cannot be reached; the folder is no artefact, a file is
            truncated, foreign or damaged, a value is not finite, or the backbone is another one; it says whether its
            class, its shapes or its values differ.
        AttachError: the model already has adapters.
        PathError: the structure names a module that the model lacks.

    The model is left untouched by all of them.
    """
    check_no_adapters(model)
    with unpacked(model):
        saved = read(model, folder, base=base, revision=revision, verify=verify, allow_nonfinite=allow_nonfinite)
        check_gradients_pass(model)
        heads = find_heads(model, list(saved.heads))
        adapters = install(adapters_of(model, saved.structure, saved.paths), model, heads)
    adapters.origin = saved.origin
    with torch.no_grad():
        for name, parameter in zip(adapters.head_names, adapters.head_parameters(), strict=True):
            parameter.copy_(saved.heads[name])
    return adapters
