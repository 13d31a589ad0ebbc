"""Every registered path kind meets the contract."""

from __future__ import annotations

from gatedadapters.config import PathOptions
from gatedadapters.config.space import Where
from gatedadapters.paths import path_kinds
from gatedadapters.paths.bottleneck import SerialOptions
from gatedadapters.paths.lora import LoRAOptions
from gatedadapters.paths.rows import RowsOptions
from gatedadapters.paths.weight_lora import WeightLoRAOptions
from gatedadapters.testing import PathContract


class TestRegisteredKinds(PathContract):
    options = [PathOptions.registry[kind]() for kind in path_kinds() if kind not in ("weight_lora", "rows")]  # noqa: RUF012


class TestEmbeddings(PathContract):
    """At the table of token ids."""

    options = (
        LoRAOptions(rank=3, at=Where(sublayers=("embedding",))),
        RowsOptions(tokens=range(3, 40)),
    )
    families = ("bert", "llama", "bart")


class TestNormalizedBottlenecks(PathContract):
    options = SerialOptions(width=4, normalized=1e-5)
    families = ("bert",)


class TestWeightLoRA(PathContract):
    options = WeightLoRAOptions(rank=3)
    families = ("mixtral", "gpt_oss", "qwen2_moe")
