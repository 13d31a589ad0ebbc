"""Adapters merged into another copy of their backbone, such as the original of a quantised one."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from gatedadapters.artifacts.load import load_adapters
from gatedadapters.structure.folder import Base
from gatedadapters.supernet.adapters import Adapters
from gatedadapters.supernet.merging import Merged


def merge_into(
    model: nn.Module, adapters: Adapters | str | Path, *, task: str | None = None, base: Base = "same"
) -> Merged:
    """Merge adapters into `model`, a plain copy of the backbone they were made for; it is a plain model afterwards.

    Packed weights take no merge. Adapters that were trained over a quantised backbone are merged into the original:

        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
        ga.merge_into(model, "out/searched")
        model.save_pretrained("out/merged")

    The adapters were trained to make up for the quantised weights' rounding, too, which the original does not have: its
    output differs a little from that of the quantised model with adapters.

    Args:
        model: the backbone in full precision, without adapters.
        adapters: compact ones, which stay as they are in their own model; or a folder they were saved in.
        task: the task to merge, where there are several.
        base: see `load_adapters`.

    Returns:
        What rounding lost, by weight.

    Raises:
        ArtifactError: the adapters are not compact, or `model` is another backbone; see `load_adapters`.
        AttachError, PathError, TaskError: see `Adapters.merge`.

    The backbone is left as it was by all of them.
    """
    if isinstance(adapters, Adapters):
        with TemporaryDirectory() as folder:
            adapters.save(Path(folder) / "adapters")
            return merge_into(model, Path(folder) / "adapters", task=task, base=base)
    loaded = load_adapters(model, adapters, base=base)
    try:
        return loaded.merge_and_detach(task)
    except BaseException:
        loaded.detach()
        raise
