"""Every registered path kind meets the contract."""

from __future__ import annotations

from gatedadapters.config import PathOptions
from gatedadapters.paths import path_kinds
from gatedadapters.paths.weight_lora import WeightLoRAOptions
from gatedadapters.testing import PathContract


class TestRegisteredKinds(PathContract):
    options = [PathOptions.registry[kind]() for kind in path_kinds() if kind != "weight_lora"]  # noqa: RUF012


class TestWeightLoRA(PathContract):
    options = WeightLoRAOptions(rank=3)
    families = ("mixtral", "gpt_oss", "qwen2_moe")
