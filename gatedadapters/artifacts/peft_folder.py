"""Reading a peft LoRA folder: what it says, checked, as matrices by module. Nothing in it is executed."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError
from torch import Tensor

from gatedadapters.artefact_files import MOST_RECORD_BYTES, check_inside, is_finite, opened, read_all
from gatedadapters.artifacts.export_peft import BACKBONE, COMPUTED, CONFIG, PREFIX, TENSORS, WEIGHTS, config_digest
from gatedadapters.errors import ArtifactError
from gatedadapters.patterns import Pattern
from gatedadapters.safe_files import file_errors, read_text
from gatedadapters.untrusted import load_json

_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# Fields that say how it was made, or how it is stored, and do not change what a trained LoRA computes.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "peft_version",
        "revision",
        "task_type",
        "inference_mode",
        "peft_type",
        "r",
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "use_rslora",
        "modules_to_save",
        "init_lora_weights",
        "eva_config",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
        "ephemeral_gpu_offload",
    }
)


class LoraRecord(BaseModel):
    """The fields of `adapter_config.json` that say what a LoRA computes, each of its one type. Others are kept."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)

    peft_type: Literal["LORA"]
    r: PositiveInt
    lora_alpha: PositiveFloat
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, PositiveFloat] | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    use_rslora: bool | None = None
    fan_in_fan_out: bool | None = None
    lora_dropout: float | None = None
    init_lora_weights: bool | str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None


_WAYS_OUT = {
    "bias": "trained biases are part of the backbone; train the LoRA with bias='none'",
    "use_dora": "merge it into the backbone with peft; DoRA is no low-rank map",
    "target_parameters": "name modules in target_modules; parameters without a module of their own are not imported",
    "layer_replication": "build the replicated backbone first",
    "trainable_token_indices": "train the LoRA without retrained tokens",
}
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "true", "True")


@dataclass(frozen=True)
class Matrices:
    """The low-rank map of one module: down (rank, in), up (out, rank), the scale folded into `up`; both fp32."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class PeftFolder:
    """A LoRA as its folder holds it.

    Attributes:
        where: the folder.
        maps: by the name of the module, as the folder has it.
        heads: tensors of the modules to save, by name.
        config: `adapter_config.json`.
        backbone: digest of the backbone's values where `export_peft` wrote it; peft itself writes none.
    """

    where: Path
    maps: dict[str, Matrices]
    heads: dict[str, Tensor]
    config: dict[str, Any]
    backbone: str | None

    def forgotten(self, names: Iterable[str]) -> list[str]:
        """Which of these names of modules the folder targets without holding weights for them."""
        with _matching(self.where):
            return [name for name in names if name not in self.maps and _targets(self.config, name)]


@file_errors("read the peft adapter", "its folder")
def read_peft(folder: str | Path, *, verify: bool = True) -> PeftFolder:
    """Read a LoRA folder: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        folder: the folder.
        verify: check the digests that `export_peft` stored; peft itself writes none.

    Raises:
        ArtifactError: no such folder, a pickled, truncated or foreign file, a key too many or too few, or something
            that a plain LoRA does not have (DoRA, trained biases, embeddings, ...); it is named.
    """
    where = Path(folder)
    config = _config(where)
    file = _weights(where)
    with opened(file) as weights:
        metadata = weights.metadata() or {}
    if verify and metadata.get(COMPUTED, config_digest(config)) != config_digest(config):
        raise _error(
            "the configuration was changed since it was exported",
            f"digest {metadata[COMPUTED]:.40}",
            f"digest {config_digest(config)}",
            where / CONFIG,
            "restore the folder; if you changed it on purpose, pass verify=False",
        )
    stored, _ = read_all(file, digest=metadata.get(TENSORS) if verify else None)
    tensors = {name.removeprefix(PREFIX): value for name, value in stored.items()}
    pairs: dict[str, dict[str, Tensor]] = {}
    heads: dict[str, Tensor] = {}
    for name, value in tensors.items():
        found = _KEY.fullmatch(name)
        if value.dtype not in _TYPES or not is_finite(value):
            raise _error(
                "a weight that is no finite number",
                "finite float32, bfloat16 or float16",
                f"{value.dtype} {name}",
                where,
            )
        if found is not None:
            pairs.setdefault(found["module"], {})[found["side"]] = value.float()
        elif _saves(config, name):
            heads[name] = value
        else:
            raise _unknown_key(name, where)
    if not pairs:
        raise _error("there is no LoRA in it", "lora_A and lora_B of a module", "none", where / WEIGHTS)
    with _matching(where):
        maps = {name: _matrices(config, name, pair, where) for name, pair in pairs.items()}
        strangers = [name for name in maps if _targets(config, name) is False]
    if strangers:
        raise _error(
            "weights for a module that the configuration does not target",
            f"modules that target_modules names: {config.get('target_modules')}",
            ", ".join(strangers[:3]),
            where,
        )
    return PeftFolder(where, maps, heads, config, metadata.get(BACKBONE))


def _config(where: Path) -> dict[str, Any]:
    """The configuration, if it describes a plain LoRA."""
    path = where / CONFIG
    if not path.is_file():
        got = "no such folder" if not where.exists() else f"no {CONFIG} in it"
        raise _error("this is not a peft adapter", f"a folder with {CONFIG} and {WEIGHTS}", got, where)
    try:
        check_inside(path)
        config = load_json(read_text(path, most=MOST_RECORD_BYTES))
    except ArtifactError:
        raise
    except (OSError, ValueError) as error:
        raise _error("the configuration cannot be read", "a JSON object", str(error), path) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        got = reprlib.repr(config.get("peft_type")) if isinstance(config, dict) else type(config).__name__
        raise _error("only LoRA is imported", "peft_type LORA", got, path)
    for field, value in config.items():
        inert = field in _HARMLESS or not value or (field, value) == ("bias", "none")
        if not inert:
            fix, got = _WAYS_OUT.get(field, "train the LoRA without it"), f"{field}: {reprlib.repr(value)}"
            raise _error("this is more than a plain LoRA", f"{field} unset", got, path, fix)
    try:
        LoraRecord.model_validate(config)
    except ValidationError as error:
        found = error.errors()[0]
        field = ".".join(map(str, found["loc"]))
        raise _error(
            "a field of the configuration is not as peft writes it",
            f"{field}: {found['msg']}",
            reprlib.repr(found["input"]),
            path,
        ) from None
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        fix = "save it with peft's path_initial_model_for_weight_conversion, which makes it an ordinary LoRA"
        raise _error(
            "this LoRA changed its backbone at the start",
            "an ordinary start",
            f"init_lora_weights: {start!r}",
            path,
            fix,
        )
    return config


def _weights(where: Path) -> Path:
    path = where / WEIGHTS
    if not path.is_file():
        pickled = [name for name in ("adapter_model.bin", "adapter_model.pt") if (where / name).is_file()]
        raise _error(
            "the weights are missing",
            WEIGHTS,
            f"{pickled[0]}, a pickled file" if pickled else "no such file",
            where,
            "pickled files are never opened: save it again with peft as safetensors" if pickled else "copy all of it",
        )
    return path


def _matrices(config: Mapping[str, Any], name: str, pair: Mapping[str, Tensor], where: Path) -> Matrices:
    """A and B of one module with its scale: alpha / r, or alpha / sqrt(r) where rank-stabilised."""
    if pair.keys() != {"A", "B"}:
        side, other = next(iter(pair)), "B" if "A" in pair else "A"
        raise _error("half of a LoRA is missing", f"lora_{other}", f"lora_{side} alone", f"{name} in {where}")
    rank = _of_module(_pattern(config, "rank_pattern"), name, config["r"])
    alpha = _of_module(_pattern(config, "alpha_pattern"), name, config["lora_alpha"])
    down, up = pair["A"], pair["B"]
    if down.dim() != 2 or up.dim() != 2 or len(down) != rank or up.shape[1] != rank:
        got = f"A {tuple(down.shape)}, B {tuple(up.shape)}"
        raise _error(
            "the configuration says another rank", f"A ({rank}, in), B (out, {rank})", got, f"{name} in {where}"
        )
    up = up * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    if not is_finite(up):
        raise _error("a scale is too large", "finite values of B times it", f"alpha {alpha:g}", f"{name} in {where}")
    return Matrices(down, up)


def _pattern(config: Mapping[str, Any], field: str) -> dict[str, Any]:
    return dict(config.get(field) or {})


def _of_module(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """Values by module: the first key that, as a regular expression, is the end of the module's name."""
    for key, value in pattern.items():
        if _matches(rf"(.*\.)?({key})", name):
            return value
    return default


def _targets(config: Mapping[str, Any], name: str) -> bool | None:
    """Whether the configuration targets this module; None where that takes more than its name."""
    targets = config.get("target_modules")
    depends = any(config.get(field) for field in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    if depends or not targets or targets == "all-linear":
        return None
    if any(_matches(rf"(.*\.)?{module}(\..*)?", name) for module in config.get("modules_to_save") or ()):
        return False
    if isinstance(targets, str):
        return _matches(targets, name)
    return any(name == target or name.endswith(f".{target}") for target in targets)


_compiled = lru_cache(maxsize=4096)(Pattern)  # a folder may name every module of a model by an expression of its own


def _matches(expression: str, name: str) -> bool:
    """Whether a regular expression of the configuration is the whole name of a module."""
    return _compiled(expression).fullmatch(name)


@contextmanager
def _matching(where: Path) -> Iterator[None]:
    """A context in which a regular expression that cannot be matched is an ArtifactError."""
    try:
        yield
    except ArtifactError:
        raise
    except ValueError as error:
        fix = "name the modules in a list, or leave out repeats within repeats"
        raise _error(
            "a regular expression cannot be matched", "few ways to match", str(error), where / CONFIG, fix
        ) from None


def _saves(config: Mapping[str, Any], name: str) -> bool:
    """Whether a parameter lies within a module to save: peft takes every module whose name ends like that."""
    return any(f"{module}." in name for module in config.get("modules_to_save") or ())


def _unknown_key(name: str, where: Path) -> ArtifactError:
    what = {
        "lora_embedding_": "LoRA of an embedding",
        "lora_magnitude_vector": "DoRA",
        "lora_B.bias": "a bias of lora_B",
        ".bias": "a trained bias",
    }
    kind = next((text for part, text in what.items() if part in name), "a key of no LoRA")
    return _error(
        "a weight that no plain LoRA has",
        "lora_A.weight, lora_B.weight and modules_to_save",
        f"{name} ({kind})",
        where / WEIGHTS,
        "restore the file, or train the LoRA without it",
    )


def _error(
    message: str, expected: str, got: str, where: object, fix: str = "restore the folder as it was saved"
) -> ArtifactError:
    return ArtifactError(message, expected=expected, got=got, where=where, fix=fix)
