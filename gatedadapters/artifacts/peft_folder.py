"""Reading a peft adapter's folder: what it says, checked, as values by module. Nothing in it is executed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatedadapters.artefact_files import is_finite, opened, read_all
from gatedadapters.artifacts.export_peft import BACKBONE, COMPUTED, CONFIG, PREFIX, TENSORS, WEIGHTS, config_digest
from gatedadapters.artifacts.peft_records import (
    Ia3Record,
    LoraRecord,
    PeftRecord,
    TrainableTokensRecord,
    VeraRecord,
    read_record,
    refused,
    scale,
)
from gatedadapters.errors import ArtifactError
from gatedadapters.patterns import Pattern
from gatedadapters.safe_files import file_errors

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_LORA = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "table A",
    "lora_embedding_B": "table B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",  # as peft wrote it before 0.15
    "base_layer.weight": "base",
    "token_adapter.trainable_tokens_delta": "rows",
}
# How the keys of each type of adapter end, after the name of the module, and what they are.
_ENDS: Mapping[str, Mapping[str, str]] = {
    "LORA": _LORA,
    "IA3": {"ia3_l": "factors"},
    "VERA": {"vera_lambda_b": "b", "vera_lambda_d": "d"},
    "LN_TUNING": {"ln_tuning_layers.weight": "weight", "ln_tuning_layers.bias": "bias"},
    "TRAINABLE_TOKENS": {"trainable_tokens_delta": "rows", "base_layer.weight": "base"},
}
_INNER = ".base_layer"  # peft wraps a module once for each parameter of it
_MOST_INNER = 16  # more parameters than one module of any model has


@dataclass(frozen=True)
class Matrices:
    """The low-rank map of one module: down (rank, in), up (out, rank), the scale folded into `up`; both fp32.

    Attributes:
        down: at a table of token ids the input is the vocabulary.
        up: see above.
        magnitude: of DoRA, (out,): the norm that each row of the sum with the weight gets.
    """

    down: Tensor
    up: Tensor
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Stacks:
    """The low-rank maps of one parameter that may hold several experts.

    Attributes:
        down: (experts x rank, in), expert by expert.
        up: (out, rank x experts), rank by rank, without its scale.
    """

    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class PeftFolder:
    """A peft adapter as its folder holds it. All values are fp32, by the name that the folder gives their module.

    Attributes:
        where: the folder.
        record: what `adapter_config.json` says of it.
        config: `adapter_config.json` as it stands there.
        maps: low-rank maps at linear maps.
        tables: low-rank maps at tables of token ids.
        parameters: low-rank maps at parameters; of several in one module, outermost, hence last, first.
        inputs: factors of the inputs of maps.
        outputs: factors of the outputs of maps.
        norms: weight and bias of norms, which take the place of the model's.
        rows: tokens, sorted, and the rows that take the place of the table's.
        base: weights of the model itself that peft stored with the adapter.
        heads: tensors of the modules to save, by their own name.
        backbone: digest of the backbone's values where `export_peft` wrote it; peft itself writes none.
    """

    where: Path
    record: PeftRecord
    config: dict[str, Any]
    maps: dict[str, Matrices] = field(default_factory=dict)
    tables: dict[str, Matrices] = field(default_factory=dict)
    parameters: dict[str, list[Stacks]] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    rows: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)
    backbone: str | None = None

    def modules(self) -> set[str]:
        """Names of all modules that it holds values for."""
        parts = (self.maps, self.tables, self.parameters, self.inputs, self.outputs, self.norms, self.rows)
        return {name for part in parts for name in part}

    def forgotten(self, names: Iterable[str]) -> list[str]:
        """Which of these names of modules the folder targets without holding weights for them."""
        held = self.modules()
        with _matching(self.where):
            return [name for name in names if name not in held and _targets(self.record, name)]

    def targets_parameter(self, name: str) -> bool:
        """Whether `target_parameters` names this parameter: by its whole name, or by how it ends."""
        assert isinstance(self.record, LoraRecord)
        return any(name == given or name.endswith(f".{given}") for given in self.record.target_parameters or ())

    def scale_of(self, name: str, rank: int) -> float:
        """What the LoRA at a module or a parameter multiplies B A with.

        Raises:
            ArtifactError: the configuration says another rank.
        """
        assert isinstance(self.record, LoraRecord)
        with _matching(self.where):
            return _scale(self.record, name, rank, self.where)


@file_errors("read the peft adapter", "its folder")
def read_peft(folder: str | Path, *, verify: bool = True) -> PeftFolder:
    """Read the folder of a LoRA, an IA3, VeRA, LN tuning or trainable tokens adapter.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        verify: check the digests that `export_peft` stored; peft itself writes none.

    Raises:
        ArtifactError: no such folder, a pickled, truncated or foreign file, a key too many or too few, or something
            that has no counterpart here (trained biases, other types of adapters, ...); it is named.
    """
    where = Path(folder)
    record, config = read_record(where)
    file = _weights(where)
    with opened(file) as weights:
        metadata = weights.metadata() or {}
    if verify and metadata.get(COMPUTED, config_digest(config)) != config_digest(config):
        raise refused(
            "the configuration was changed since it was exported",
            f"digest {metadata[COMPUTED]:.40}",
            f"digest {config_digest(config)}",
            where / CONFIG,
            "restore the folder; if you changed it on purpose, pass verify=False",
        )
    stored, _ = read_all(file, digest=metadata.get(TENSORS) if verify else None)
    tensors = {name.removeprefix(PREFIX): value for name, value in stored.items()}
    found = PeftFolder(where, record, config, backbone=metadata.get(BACKBONE))
    pieces: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if value.dtype not in _TYPES or not is_finite(value):
            raise refused(
                "a weight that is no finite number",
                "finite float32, bfloat16 or float16",
                f"{value.dtype} {name}",
                where,
            )
        module, what = _split(record.peft_type, name)
        if what is not None:
            pieces.setdefault(module, {})[what] = value.float()
        elif name in ("base_model.vera_A", "base_model.vera_B") and isinstance(record, VeraRecord):
            shared[name[-1]] = value.float()
        elif _saves(record, name):
            found.heads[name] = value
        else:
            raise _unknown_key(record, name, where)
    with _matching(where):
        for module, own in pieces.items():
            _take(found, module, own, shared)
        at_modules = (*found.maps, *found.inputs, *found.outputs, *found.norms)
        strangers = [name for name in at_modules if _targets(record, name) is False]
    if not found.modules():
        raise refused("there is no adapter in it", f"weights of a {record.peft_type} adapter", "none", where / WEIGHTS)
    if strangers:
        raise refused(
            "weights for a module that the configuration does not target",
            f"modules that target_modules names: {config.get('target_modules')}",
            ", ".join(strangers[:3]),
            where,
        )
    return found


def _split(kind: str, name: str) -> tuple[str, str | None]:
    """The module and what of it a key holds; None if it is no key of this type of adapter."""
    for end, what in _ENDS[kind].items():
        if name.endswith(f".{end}"):
            return name[: -len(end) - 1], what
    return name, None


def _take(found: PeftFolder, name: str, own: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> None:
    """Put what the file holds of one module where it belongs.

    Raises:
        ArtifactError: a part is missing or has another shape.
    """
    record, where = found.record, f"{name} in {found.where}"
    own = dict(own)
    base = own.pop("base", None)
    if base is not None:
        found.base[f"{name}.weight"] = base
    rows = own.pop("rows", None)
    if rows is not None:
        found.rows[name] = _rows(record, name, rows, where)
    if not own:
        return
    if isinstance(record, LoraRecord):
        _take_lora(found, name, own, where)
    elif isinstance(record, VeraRecord):
        found.maps[name] = _vera(record, own, shared, where)
    elif isinstance(record, Ia3Record):
        factors = own["factors"]
        if factors.dim() != 2 or 1 not in factors.shape:
            raise refused("factors of another shape", "(out, 1) or (1, in)", str(tuple(factors.shape)), where)
        (found.outputs if factors.shape[1] == 1 else found.inputs)[name] = factors.flatten()
    else:
        found.norms[name] = own


def _take_lora(found: PeftFolder, name: str, own: dict[str, Tensor], where: str) -> None:
    record = found.record
    assert isinstance(record, LoraRecord)
    table = own.keys() & {"table A", "table B"}
    sides = ("table A", "table B") if table else ("A", "B")
    if not own.keys() >= set(sides):
        held = next((f"lora_{side[-1]}" for side in sides if side in own), "a magnitude")
        other = next(side for side in sides if side not in own)
        raise refused("half of a LoRA is missing", f"lora_{other[-1]}", f"{held} alone", where)
    down, up, magnitude = own.pop(sides[0]), own.pop(sides[1]), own.pop("magnitude", None)
    if own or (magnitude is not None) != bool(record.use_dora) or (table and magnitude is not None):
        got = "none" if magnitude is None else "a magnitude"
        raise refused("a LoRA with other parts than it should have", f"use_dora: {record.use_dora}", got, where)
    if down.dim() != 2 or up.dim() != 2 or len(down) != up.shape[1]:
        raise refused(
            "A and B do not fit", "A (rank, in), B (out, rank)", f"A {tuple(down.shape)}, B {tuple(up.shape)}", where
        )
    depth = 0
    while name.endswith(_INNER) and depth < _MOST_INNER:
        name, depth = name[: -len(_INNER)], depth + 1
    if depth or _has_parameters(record, name):
        stacks = found.parameters.setdefault(name, [])
        stacks.extend([Stacks(torch.empty(0, 0), torch.empty(0, 0))] * (depth + 1 - len(stacks)))
        stacks[depth] = Stacks(down, up)
        return
    up = up * _scale(record, name, len(down), found.where)
    if not is_finite(up):
        raise refused("a scale is too large", "finite values of B times it", "infinity", where)
    (found.tables if table else found.maps)[name] = Matrices(down, up, magnitude)


def _vera(record: VeraRecord, own: Mapping[str, Tensor], shared: Mapping[str, Tensor], where: str) -> Matrices:
    """diag(b) B diag(d) A, as a low-rank map."""
    if shared.keys() != {"A", "B"}:
        raise refused(
            "the random matrices are missing",
            "vera_A and vera_B",
            ", ".join(sorted(shared)) or "neither",
            where,
            "save it again with peft's save_projection=True",
        )
    down, up = shared["A"], shared["B"]
    if own.keys() != {"b", "d"} or own["d"].shape != (record.r,) or own["b"].dim() != 1:
        got = ", ".join(f"{name} {tuple(value.shape)}" for name, value in sorted(own.items()))
        raise refused("the vectors of a module do not fit", f"lambda_d ({record.r},), lambda_b (out,)", got, where)
    if down.dim() != 2 or up.dim() != 2 or len(down) < record.r or up.shape[1] < record.r or len(up) < len(own["b"]):
        got = f"A {tuple(down.shape)}, B {tuple(up.shape)}"
        raise refused("the random matrices are too small", f"rank {record.r}, {len(own['b'])} outputs", got, where)
    return Matrices(own["d"][:, None] * down[: record.r], own["b"][:, None] * up[: len(own["b"]), : record.r])


def _rows(record: PeftRecord, name: str, values: Tensor, where: str) -> tuple[list[int], Tensor]:
    """The tokens of a table, sorted, and their rows."""
    if isinstance(record, TrainableTokensRecord):
        tokens: list[int] | None = record.token_indices
    else:
        assert isinstance(record, LoraRecord)
        given = record.trainable_token_indices or []
        if isinstance(given, dict):
            tokens = next((own for key, own in given.items() if name == key or name.endswith(f".{key}")), None)
        else:
            tokens = given
    if not tokens or len(set(tokens)) != len(tokens) or values.dim() != 2 or len(values) != len(tokens):
        expected = f"{len(tokens)} rows, one a token" if tokens else "tokens for it in the configuration"
        raise refused("the rows are not those of the tokens", expected, str(tuple(values.shape)), where)
    order = sorted(range(len(tokens)), key=tokens.__getitem__)
    return [tokens[index] for index in order], values[order]


def _weights(where: Path) -> Path:
    path = where / WEIGHTS
    if not path.is_file():
        pickled = [name for name in ("adapter_model.bin", "adapter_model.pt") if (where / name).is_file()]
        raise refused(
            "the weights are missing",
            WEIGHTS,
            f"{pickled[0]}, a pickled file" if pickled else "no such file",
            where,
            "pickled files are never opened: save it again with peft as safetensors" if pickled else "copy all of it",
        )
    return path


def _scale(record: LoraRecord, name: str, rank: int, where: Path) -> float:
    expected = _of_module(record.rank_pattern or {}, name, record.r)
    if rank != expected:
        raise refused("the configuration says another rank", f"rank {expected}", f"rank {rank}", f"{name} in {where}")
    return scale(record, rank, _of_module(record.alpha_pattern or {}, name, record.lora_alpha))


def _of_module(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """Values by module: the first key that, as a regular expression, is the end of the module's name."""
    for key, value in pattern.items():
        if _matches(rf"(.*\.)?({key})", name):
            return value
    return default


def _targets(record: PeftRecord, name: str) -> bool | None:
    """Whether the configuration targets this module; None where that takes more than its name."""
    depends = record.layers_to_transform or record.layers_pattern or record.exclude_modules
    if depends or not record.target_modules or record.target_modules == "all-linear":
        return None
    if any(_matches(rf"(.*\.)?{module}(\..*)?", name) for module in record.modules_to_save or ()):
        return False
    return _is_named(record.target_modules, name)


def _is_named(targets: str | list[str] | None, name: str) -> bool:
    """Whether a module is named: by an expression for its whole name, or by how its name ends."""
    if isinstance(targets, str):
        return _matches(targets, name)
    return any(name == target or name.endswith(f".{target}") for target in targets or ())


def _has_parameters(record: LoraRecord, name: str) -> bool:
    """Whether the LoRA at this module is one at a parameter of it."""
    owners = [target.rpartition(".")[0] for target in record.target_parameters or ()]
    return any(name == owner or name.endswith(f".{owner}") if owner else not _targets(record, name) for owner in owners)


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
        raise refused(
            "a regular expression cannot be matched", "few ways to match", str(error), where / CONFIG, fix
        ) from None


def _saves(record: PeftRecord, name: str) -> bool:
    """Whether a parameter lies within a module to save: peft takes every module whose name ends like that."""
    return any(f"{module}." in name for module in record.modules_to_save or ())


def _unknown_key(record: PeftRecord, name: str, where: Path) -> ArtifactError:
    what = {"lora_B.bias": "a bias of lora_B", ".bias": "a trained bias"}
    kind = next((text for part, text in what.items() if part in name), f"a key of no {record.peft_type} adapter")
    return refused(
        "a weight that has no place in such an adapter",
        f"{', '.join(_ENDS[record.peft_type])} and modules_to_save",
        f"{name} ({kind})",
        where / WEIGHTS,
        "restore the file, or train the adapter without it",
    )
