"""What `save_pretrained` of a model does while adapters are attached to it."""

from __future__ import annotations

import inspect
import os
import warnings
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel

from gatedadapters.backbone.fingerprint import OWN_MODULES
from gatedadapters.runtime.sharding import is_sharded
from gatedadapters.supernet.merging import Merged
from gatedadapters.supernet.supernet import NAME


class Savable(Protocol):
    """`Adapters`, as far as saving goes."""

    merged: Merged | None

    def compacted(self) -> Savable:
        """A compact copy."""

    def save(self, folder: str | Path, *, beside: bool) -> None:
        """Write compact adapters."""


class OwnSaving:
    """An instance's own `save_pretrained`: it calls the class's, and writes the adapters beside what that wrote.

    transformers writes gates and candidates into the weights file, where only a resumed training finds them, and
    `from_pretrained` drops them. The files beside it are those of `Adapters.save`, so that `load_adapters(model,
    folder)` reads them. It stands in the instance's `__dict__`, as `OwnForward` does. Adapters of a shelf were loaded
    from folders of their own, and are not written.
    """

    def __init__(self, model: PreTrainedModel, adapters: Savable) -> None:
        self.model, self.adapters = model, adapters

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.model).save_pretrained.__get__(self.model))

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save the model and its adapters; the arguments are those of `save_pretrained`."""
        given = self.__signature__.bind(save_directory, *args, **kwargs).arguments
        more = given.pop("kwargs", {})
        push = given.pop("push_to_hub", False)
        hub = more | ({"token": given["token"]} if "token" in given else {})
        type(self.model).save_pretrained(self.model, **given, **({} if push else more))
        everywhere = is_sharded(self.model)  # saving is done together then, and writes on the first process
        if (everywhere or given.get("is_main_process", True)) and not os.path.isfile(save_directory):
            self.write_beside(Path(save_directory))
        if push:  # it saves into a folder of its own, through here again
            self.model.push_to_hub(hub.pop("repo_id", os.path.basename(save_directory)), **hub)

    def write_beside(self, folder: Path) -> None:
        """Write the adapters into `folder`, or warn of how they are saved where that would not load back."""
        tuned = [name for name in OWN_MODULES if name != NAME and hasattr(self.model, name)]
        if self.adapters.merged is not None:
            warnings.warn(
                f"the weights in {folder} contain the merged adapters, so these were not saved apart: call "
                "adapters.unmerge() before saving to get both, or merge_and_detach() for a plain model",
                stacklevel=3,
            )
        elif tuned:
            warnings.warn(
                f"the weights in {folder} contain the elements that a sparse delta tunes, so adapters do not load onto "
                "them: ga.save_joint(model, folder) saves both for the untuned backbone",
                stacklevel=3,
            )
        else:
            self.adapters.compacted().save(folder, beside=True)

    def install(self) -> None:
        """Let calls of the model's `save_pretrained` come here."""
        vars(self.model)["save_pretrained"] = self

    def remove(self) -> None:
        """Let calls go to the class again."""
        vars(self.model).pop("save_pretrained", None)
