"""What `adapter_config.json` of a peft adapter may say, one strict record for each type of adapter that can be held."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from gatedadapters.artefact_files import MOST_RECORD_BYTES, check_inside
from gatedadapters.artifacts.export_peft import CONFIG, WEIGHTS
from gatedadapters.artifacts.parts import not_here
from gatedadapters.errors import ArtifactError
from gatedadapters.safe_files import read_text
from gatedadapters.untrusted import load_json

# Fields that say how an adapter was made, or how it is stored, and do not change what it computes once it is trained.
_HARMLESS = frozenset({"auto_mapping", "peft_version", "inference_mode", "runtime_config"})
_WAYS_OUT = {
    "bias": "trained biases are part of the backbone; train the adapter with bias='none'",
    "layer_replication": "build the replicated backbone first",
    "lora_bias": "train the LoRA with lora_bias=False",
}
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "true", "True")


class PeftRecord(BaseModel):
    """The fields that say what an adapter computes, each of its one type; others are refused unless they are unset."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)

    harmless: ClassVar[frozenset[str]] = frozenset()

    peft_type: str
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None


class LoraRecord(PeftRecord):
    """LoRA, also with magnitudes (DoRA), at tables of token ids and at parameters, and with retrained tokens."""

    harmless = frozenset({"eva_config", "megatron_core", "qalora_group_size", "ephemeral_gpu_offload"})

    peft_type: Literal["LORA"]
    r: PositiveInt
    lora_alpha: PositiveFloat
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, PositiveFloat] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[NonNegativeInt] | dict[str, list[NonNegativeInt]] | None = None
    use_dora: bool | None = None
    use_rslora: bool | None = None
    fan_in_fan_out: bool | None = None
    lora_dropout: float | None = None
    init_lora_weights: bool | str | None = None


class Ia3Record(PeftRecord):
    """IA3: factors at the outputs of maps, or at the inputs of those in `feedforward_modules`."""

    peft_type: Literal["IA3"]
    feedforward_modules: str | list[str] | None = None
    fan_in_fan_out: bool | None = None
    init_ia3_weights: bool | None = None


class VeraRecord(PeftRecord):
    """VeRA: two random matrices for all modules, and two vectors for each."""

    peft_type: Literal["VERA"]
    r: PositiveInt
    fan_in_fan_out: bool | None = None
    vera_dropout: float | None = None
    d_initial: float | None = None
    init_weights: bool | None = None
    save_projection: bool | None = None
    projection_prng_key: int | None = None


class LnTuningRecord(PeftRecord):
    """LN tuning: norms with other gains and shifts."""

    peft_type: Literal["LN_TUNING"]


class TrainableTokensRecord(PeftRecord):
    """Other rows for some tokens."""

    peft_type: Literal["TRAINABLE_TOKENS"]
    token_indices: list[NonNegativeInt]
    init_weights: bool | None = None


RECORDS: Mapping[str, type[PeftRecord]] = {
    "LORA": LoraRecord,
    "IA3": Ia3Record,
    "VERA": VeraRecord,
    "LN_TUNING": LnTuningRecord,
    "TRAINABLE_TOKENS": TrainableTokensRecord,
}


def read_record(where: Path) -> tuple[PeftRecord, dict[str, Any]]:
    """The configuration in a folder, as a record and as it stands there.

    Raises:
        ArtifactError: there is none, it cannot be read, or it describes something that cannot be held; it is named.
    """
    path = where / CONFIG
    if not path.is_file():
        raise not_here("a peft adapter", (CONFIG, WEIGHTS), where)
    try:
        check_inside(path)
        config = load_json(read_text(path, most=MOST_RECORD_BYTES))
    except ArtifactError:
        raise
    except (OSError, ValueError) as error:
        raise refused("the configuration cannot be read", "a JSON object", str(error), path) from error
    given = config.get("peft_type") if isinstance(config, dict) else None
    kind = RECORDS.get(given) if isinstance(given, str) else None
    if not isinstance(config, dict) or kind is None:
        got = reprlib.repr(given) if isinstance(config, dict) else type(config).__name__
        fix = (
            "what changes weights can be merged into the backbone with peft (merge_and_unload), to search on that; "
            "prompts cannot: train one of these types"
        )
        if given is None and isinstance(config, dict) and "model_class" in config:
            fix = "AdapterHub's folders are read with import_adapterhub"
        raise refused("adapters of this type are not imported", f"peft_type {', '.join(RECORDS)}", got, path, fix)
    known = kind.model_fields.keys() | kind.harmless | _HARMLESS
    for field, value in config.items():
        if field not in known and value and (field, value) != ("bias", "none"):
            fix, got = _WAYS_OUT.get(field, "train the adapter without it"), f"{field}: {reprlib.repr(value)}"
            raise refused(f"this is more than a plain {given} adapter", f"{field} unset", got, path, fix)
    try:
        record = kind.model_validate(config)
    except ValidationError as error:
        found = error.errors()[0]
        field = ".".join(map(str, found["loc"]))
        raise refused(
            "a field of the configuration is not as peft writes it",
            f"{field}: {found['msg']}",
            reprlib.repr(found["input"]),
            path,
        ) from None
    if isinstance(record, LoraRecord) and record.init_lora_weights not in _PLAIN_STARTS:
        raise refused(
            "this LoRA changed its backbone at the start",
            "an ordinary start",
            f"init_lora_weights: {record.init_lora_weights!r}",
            path,
            "save it with peft's path_initial_model_for_weight_conversion, which makes it an ordinary LoRA",
        )
    return record, config


def scale(record: LoraRecord, rank: int, alpha: float) -> float:
    """What a LoRA multiplies B A with: alpha / r, or alpha / sqrt(r) where it is rank-stabilised."""
    return alpha / (math.sqrt(rank) if record.use_rslora else rank)


def refused(
    message: str, expected: str, got: str, where: object, fix: str = "restore the folder as it was saved"
) -> ArtifactError:
    """The error for a folder that cannot be read as it is."""
    return ArtifactError(message, expected=expected, got=got, where=where, fix=fix)
