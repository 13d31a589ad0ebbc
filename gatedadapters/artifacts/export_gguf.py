"""Compact LoRA structures as one GGUF file that llama.cpp loads beside its own file of the base."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from gatedadapters.artefact_files import check_finite
from gatedadapters.artifacts.export_peft import low_rank_maps, paths_of_task
from gatedadapters.errors import ArtifactError
from gatedadapters.paths import LoRA
from gatedadapters.safe_files import file_errors
from gatedadapters.supernet.adapters import Adapters
from gatedadapters.supernet.merging import table_factor


@dataclass(frozen=True)
class _Family:
    """How llama.cpp stores a family of transformers.

    Attributes:
        architecture: its name there.
        interleaved: maps whose outputs it stores in another order: of each head, the halves that a rotation pairs lie
            side by side in transformers, one by one there; and the field of the configuration with the number of heads.
    """

    architecture: str
    interleaved: Mapping[str, str]


_LLAMA = _Family("llama", {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"})
_FAMILIES: Mapping[str, _Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    **{name: _Family(name, {}) for name in ("qwen2", "qwen3", "gemma", "phi3", "gpt2")},
}


def export_gguf(adapters: Adapters, file: str | FilePath, *, task: str | None = None, overwrite: bool = False) -> None:
    """Write a compact structure of LoRA as a GGUF file for llama.cpp (`--lora FILE`, or a server's `lora_adapters`).

    It goes with any GGUF file of the same base, quantised or not. Ranks may differ: llama.cpp divides by the rank of
    each matrix, and B is multiplied with it, so that what is added is B A. A table of token ids may be among the maps.
    Needs the package `gguf`.

    Args:
        adapters: compact, attached to a Llama, Mistral, Qwen2, Qwen3, Gemma, Phi-3 or GPT-2 of transformers.
        file: a new file, by habit of suffix `.gguf`.
        task: which task's adapter, where there are several.
        overwrite: replace the file, in one step.

    Raises:
        ArtifactError: `gguf` is not installed, the adapters are not compact, the family is another one, a kind is none
            that llama.cpp knows, or the file exists. Nothing is written.
        TaskError: unknown task.
        FileAccessError: the file system refuses.
    """
    gguf = _package()
    paths = paths_of_task(adapters, task, where="export_gguf")
    foreign = sorted({f"{path.kind} at {path.site.write}" for path, _ in paths if type(path) is not LoRA})
    if foreign:
        raise ArtifactError(
            "llama.cpp adds LoRA alone to a model",
            expected="lora paths",
            got=", ".join(foreign[:3]),
            where="export_gguf",
            fix="merge into the model with adapters.merge_and_detach, save it, and convert it with llama.cpp's "
            "convert_hf_to_gguf.py; or search in a space of lora paths",
        )
    heads = adapters.head_names
    if heads:
        raise ArtifactError(
            "llama.cpp takes no trained heads with a LoRA",
            expected="adapters without heads",
            got=", ".join(heads[:3]),
            where="export_gguf",
            fix="merge into the model with adapters.merge_and_detach, save it, and convert it with llama.cpp's "
            "convert_hf_to_gguf.py",
        )
    family, tensors = _tensors(gguf, adapters.model, low_rank_maps(paths))
    rank = max(up.shape[1] for name, up in tensors.items() if name.endswith(".lora_b"))
    for name in [name for name in tensors if name.endswith(".lora_b")]:  # llama.cpp multiplies with alpha / rank
        tensors[name] = tensors[name] * (tensors[name].shape[1] / rank)
    check_finite(tensors, where="export_gguf", fix="train again with a lower rate")
    target = FilePath(file)
    if target.exists() and not overwrite:
        raise ArtifactError(
            "the file exists already",
            expected="a new file",
            got=target.name,
            where=target,
            fix="give another name, or overwrite it: overwrite=True, on the command line --overwrite",
        )
    with file_errors("write the file", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            _write(gguf, part, family.architecture, tensors, alpha=float(rank))
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


def _package() -> Any:
    try:
        return import_module("gguf")
    except ImportError as error:
        raise ArtifactError(
            "this format is written by a package that is not installed",
            expected="the package gguf",
            got=str(error),
            where="export_gguf",
            fix="pip install gatedadapters[llamacpp]",
        ) from None


def _tensors(
    gguf: Any, model: nn.Module, maps: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[_Family, dict[str, Tensor]]:
    """Both matrices of every map, by llama.cpp's names and in its order of rows."""
    config = getattr(model, "config", None)
    family = _FAMILIES.get(getattr(config, "model_type", ""))
    if family is None:
        raise ArtifactError(
            "llama.cpp's order of weights is not known for this family",
            expected=f"a model of type {', '.join(_FAMILIES)}",
            got=f"{type(model).__name__} of type {getattr(config, 'model_type', None)}",
            where="export_gguf",
            fix="write it with export_peft, and convert it with llama.cpp's convert_lora_to_gguf.py",
        )
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)  # type: ignore[union-attr]
    weights = {id(parameter): name for name, parameter in model.named_parameters()}
    prefix = getattr(model, "base_model_prefix", "")
    found: dict[str, Tensor] = {}
    for module, (down, up) in maps.items():
        # A base alone is stored under the names of the whole model.
        spellings = (module, f"{prefix}.{module}")
        name = next(filter(None, (names.get_name(f"{each}.weight", (".weight",)) for each in spellings)), None)
        owner = model.get_submodule(module)
        shared = weights[id(owner._parameters["weight"])].rpartition(".")[0]
        if name is None or (shared != module):
            raise ArtifactError(
                "llama.cpp has no such map of its own",
                expected=f"a map of a {family.architecture} that shares its weight with none",
                got=module + (f", tied to {shared}" if shared != module else ""),
                where="export_gguf",
                fix="leave it out of the search space (at: exclude)",
            )
        heads = family.interleaved.get(module.rpartition(".")[2])
        if heads is not None:
            up = _interleaved(up, getattr(config, heads))
        if isinstance(owner, nn.Embedding):  # a table's rows are tokens, and so are those of its A
            down, up = down.t(), up / table_factor(owner, module)
        found[f"{name}.lora_a"], found[f"{name}.lora_b"] = down.float(), up.float()
    return family, found


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows (out, rank) in llama.cpp's order: of each head, one from the first half, one from the second, and so on."""
    halves: Tensor = rows.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def _write(gguf: Any, file: FilePath, architecture: str, tensors: Mapping[str, Tensor], *, alpha: float) -> None:
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, value in tensors.items():
        writer.add_tensor(name, value.detach().to("cpu", torch.float32).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
