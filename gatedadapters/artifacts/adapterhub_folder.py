"""Reading a folder that the adapters library saved (AdapterHub): what it says, checked. Nothing in it is executed."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError
from torch import Tensor

from gatedadapters.artefact_files import MOST_RECORD_BYTES, check_finite, check_inside, read_all
from gatedadapters.artifacts.parts import not_here
from gatedadapters.errors import ArtifactError
from gatedadapters.safe_files import file_errors, read_text
from gatedadapters.untrusted import load_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
HEAD_CONFIG, HEAD_WEIGHTS = "head_config.json", "model_head.safetensors"
_PICKLED = {WEIGHTS: "pytorch_adapter.bin", HEAD_WEIGHTS: "pytorch_model_head.bin"}
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)


_Name = Annotated[str, Field(min_length=1, max_length=200)]
_Parsed = TypeVar("_Parsed", bound=_Record)


class BottleneckRecord(_Record):
    """A bottleneck: Houlsby, Pfeiffer, parallel and what lies between. Other fields must be unset."""

    mh_adapter: bool
    output_adapter: bool
    non_linearity: Literal["relu", "gelu", "swish", "silu", "tanh"]
    original_ln_before: bool
    original_ln_after: Literal[True]
    residual_before_ln: Literal[True]
    is_parallel: bool = False
    scaling: float | Literal["learned", "channel"] = 1.0
    leave_out: list[NonNegativeInt] = []


class LoraRecord(_Record):
    """LoRA, or IA3 where it scales."""

    architecture: Literal["lora"]
    r: PositiveInt
    alpha: PositiveFloat
    composition_mode: Literal["add", "scale"]


class HeadRecord(_Record):
    """A prediction head of one or several linear maps."""

    head_type: _Name
    layers: PositiveInt
    activation_function: _Name | None = None
    use_pooler: bool = False
    num_labels: PositiveInt | None = None


class _Folder(_Record):
    name: _Name
    model_type: _Name
    config: dict[str, Any]
    version: Annotated[str, Field(max_length=200)] = ""


# Fields that say how an adapter was made, or where; those of Compacter say nothing as long as phm_layer is unset.
_HARMLESS = {
    BottleneckRecord: frozenset(
        {"init_weights", "init_weights_seed", "reduction_factor", "dropout", "stochastic_depth"}
        | {"inv_adapter_reduction_factor", "factorized_phm_W", "factorized_phm_rule", "hypercomplex_nonlinearity"}
        | {"learn_phm", "phm_bias", "phm_c_init", "phm_dim", "phm_init_range", "phm_rank", "shared_W_phm"}
        | {"shared_phm_rule"}
    ),
    LoraRecord: frozenset(
        {"init_weights", "init_weights_seed", "dropout", "dtype", "attn_matrices", "leave_out", "selfattn_lora"}
        | {"intermediate_lora", "output_lora"}
    ),
}


@dataclass(frozen=True)
class AdapterHubFolder:
    """An adapter as its folder holds it. All values are fp32, by the name that the folder gives their module.

    Attributes:
        where: the folder.
        model_type: the family that it is for.
        record: what its configuration says.
        modules: tensors by module, and within it by their own name (`adapter_up.weight`, `lora_A`).
        head: what the configuration of its prediction head says; None without one.
        head_tensors: of the head, by name.
    """

    where: Path
    model_type: str
    record: BottleneckRecord | LoraRecord
    modules: dict[str, dict[str, Tensor]]
    head: HeadRecord | None
    head_tensors: dict[str, Tensor]


@file_errors("read the adapter", "its folder")
def read_adapterhub(folder: str | Path) -> AdapterHubFolder:
    """Read a folder that `model.save_adapter(folder, name, use_safetensors=True)` wrote.

    Raises:
        ArtifactError: no such folder, a pickled, truncated or foreign file, a configuration of another kind, or a key
            of another adapter; it is named.
    """
    where = Path(folder)
    if (where / "adapter_fusion_config.json").is_file():
        raise refused(
            "a fusion of several adapters is not imported",
            "one adapter",
            "adapter_fusion_config.json",
            where,
            "give the folder of one of the adapters, without the fusion",
        )
    top = _parsed(_Folder, _json(where / CONFIG), where / CONFIG, harmless=None)
    kind = LoraRecord if top.config.get("architecture") == "lora" else BottleneckRecord
    other = top.config.get("architecture")
    if kind is BottleneckRecord and other is not None:
        raise refused(
            "adapters of this architecture are not imported",
            "bottlenecks (Houlsby, Pfeiffer, parallel), LoRA or IA3",
            f"architecture {reprlib.repr(other)}",
            where / CONFIG,
            "train one of these, or keep this one in the adapters library",
        )
    record = _parsed(kind, top.config, where / CONFIG, harmless=_HARMLESS[kind])
    assert isinstance(record, BottleneckRecord | LoraRecord)
    _check_version(top, record, where / CONFIG)
    modules: dict[str, dict[str, Tensor]] = {}
    mark = ".loras." if isinstance(record, LoraRecord) else ".adapters."
    for name, value in _tensors(where, WEIGHTS).items():
        module, found, rest = name.partition(f"{mark}{top.name}.")
        if not found or not module or not rest:
            raise refused("a weight of another adapter", f"MODULE{mark}{top.name}.WEIGHT", name, where / WEIGHTS)
        modules.setdefault(module, {})[rest] = value
    if not modules:
        raise refused("there is no adapter in it", f"weights of {top.name}", "none", where / WEIGHTS)
    head = None
    if (where / HEAD_CONFIG).is_file():
        given = _parsed(_Folder, _json(where / HEAD_CONFIG), where / HEAD_CONFIG, harmless=None)
        head = _parsed(HeadRecord, given.config, where / HEAD_CONFIG, harmless=None)
    tensors = {} if head is None else _tensors(where, HEAD_WEIGHTS)
    return AdapterHubFolder(where, top.model_type, record, modules, head, tensors)


def _check_version(top: _Folder, record: BottleneckRecord | LoraRecord, where: Path) -> None:
    """Raise where an early release computed something else than its configuration says today."""
    early = top.version.startswith(("adapters.0.", "adapters.1.0."))
    old_scale = early and isinstance(record, LoraRecord) and record.r != record.alpha
    old_gelu = not top.version and isinstance(record, BottleneckRecord) and record.non_linearity == "gelu"
    if old_scale or old_gelu:
        what = "alpha has no effect" if old_scale else "gelu is an approximation of it"
        raise refused(
            f"an early release of the adapters library wrote this one, in which {what}",
            "adapters 1.1 or later",
            f"version {top.version!r}",
            where,
            "load and save it once with adapters 1.1 or later, which converts it",
        )


def _json(path: Path) -> Any:
    if not path.is_file():
        raise not_here("a folder of AdapterHub", (path.name, WEIGHTS), path.parent)
    try:
        check_inside(path)
        return load_json(read_text(path, most=MOST_RECORD_BYTES))
    except ArtifactError:
        raise
    except (OSError, ValueError) as error:
        raise refused("the configuration cannot be read", "a JSON object", str(error), path) from error


def _parsed(kind: type[_Parsed], data: Any, where: Path, *, harmless: frozenset[str] | None) -> _Parsed:
    """A record of plain data; fields that it does not know must be unset, or `harmless`. None lets all of them be."""
    if isinstance(data, dict) and data.get("peft_type"):
        raise refused("this is a peft adapter", "a folder of AdapterHub", CONFIG, where, "read it with import_peft")
    known = kind.model_fields.keys() | (harmless or ())
    for field, value in data.items() if isinstance(data, dict) and harmless is not None else ():
        if field not in known and value:
            raise refused(
                "an adapter of a configuration that is not known here",
                f"{field} unset",
                f"{field}: {reprlib.repr(value)}",
                where,
                "train the adapter without it, or keep it in the adapters library",
            )
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        found = error.errors()[0]
        field = ".".join(map(str, found["loc"])) or "the whole"
        raise refused(
            "an adapter of a configuration that is not known here",
            f"{field}: {found['msg']}",
            reprlib.repr(found["input"]),
            where,
            "restore the folder; of bottlenecks, LoRA and IA3 not every variant has a counterpart here",
        ) from None


def _tensors(where: Path, name: str) -> dict[str, Tensor]:
    path = where / name
    if not path.is_file():
        pickled = (where / _PICKLED[name]).is_file()
        fix = "copy all of it"
        if pickled:
            fix = (
                "pickled files are never opened. If you trust it: safetensors.torch.save_file(torch.load("
                f"'{_PICKLED[name]}', weights_only=True), '{name}')"
            )
        got = f"{_PICKLED[name]}, a pickled file" if pickled else "no such file"
        raise refused("the weights are missing", name, got, where, fix)
    tensors, _ = read_all(path)
    for key, value in tensors.items():
        if value.dtype not in _TYPES:
            raise refused("a weight of another type", "float32, bfloat16 or float16", f"{value.dtype} {key}", path)
    check_finite(tensors, where=path, fix="restore the file, or train again")
    return {key: value.float() for key, value in tensors.items()}


def refused(
    message: str, expected: str, got: str, where: object, fix: str = "restore the folder as it was saved"
) -> ArtifactError:
    """The error for a folder that cannot be read as it is."""
    return ArtifactError(message, expected=expected, got=got, where=where, fix=fix)
