"""Exported adapters are read by others, peft and a plain reader, as what they are; the rest is refused by name."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exchange import compacted, loaded_by_peft, output, space
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.pytorch_utils import Conv1D

import gatedadapters as ga
from gatedadapters.errors import ArtifactError, TaskError
from gatedadapters.testing.backbones import FAMILIES, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks by the old name

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NO_ROUTERS = {"kind": "lora", "rank": 6, "at": {"exclude": r"(mlp\.gate|router|experts|mixer\.out_proj)$"}}
# Of these families peft takes the names of dense and shared feed-forward maps for experts of older releases.
RESERVED = {"deepseek_v3", "qwen3_next"}
ATTENTION = {"kind": "lora", "rank": 6, "at": {"sublayers": ["attention", "mixer"]}}


def config_of(folder: Path) -> dict[str, object]:
    data: dict[str, object] = json.loads((folder / CONFIG).read_text())
    return data


# -- norms, tables of token ids, rows ---------------------------------------------------------------------------------

NORM = {"kind": "norm"}
LORA = {"kind": "lora", "rank": 4}
TABLE = {"kind": "lora", "rank": 4, "at": {"sublayers": ["embedding"]}}
ROWS = {"kind": "rows", "tokens": ["3-60"]}
SCALES = {"kind": "scale"}


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # peft says so of every norm, also of its own targets
@pytest.mark.parametrize(
    ("family", "head", "paths", "kind"),
    [
        ("bert", "classification", [NORM], "LN_TUNING"),
        ("llama", "base", [NORM], "LN_TUNING"),  # the final norm's name ends like the others'
        ("gemma", "lm", [NORM], "LN_TUNING"),  # it stores gains minus 1
        ("qwen3", "lm", [NORM, LORA], "LORA"),
        ("bert", "classification", [NORM, SCALES], "IA3"),
        ("llama", "lm", [TABLE, LORA], "LORA"),
        ("llama", "lm", [ROWS], "TRAINABLE_TOKENS"),
        ("llama", "lm", [ROWS, LORA, NORM], "LORA"),
    ],
)
def test_peft_computes_the_same_with_norms_tables_and_rows(
    tmp_path: Path, family: str, head: str, paths: list[dict[str, object]], kind: str
) -> None:
    model, batch = tiny(family, head=head)
    before = output(model, batch)
    adapters = compacted(model, batch, *paths, share=0.7)
    assert {path.kind for path in adapters.paths.values()} == {str(path["kind"]) for path in paths}
    expected = output(model, batch)
    assert (expected - before).abs().max() > 1e-3
    ga.export_peft(adapters, tmp_path / "peft")
    assert config_of(tmp_path / "peft")["peft_type"] == kind
    found = output(loaded_by_peft(tiny(family, head=head)[0], tmp_path / "peft"), batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


class Scaled(nn.Embedding):
    """As in Gemma 3; peft looks for the same attribute."""

    def __init__(self) -> None:
        super().__init__(99, 32)
        self.embed_scale = torch.tensor(5.5)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


@pytest.mark.parametrize("paths", [[TABLE], [ROWS]])
def test_a_table_that_scales_what_it_looks_up_is_exported_for_what_it_is(
    tmp_path: Path, paths: list[dict[str, object]]
) -> None:
    def built() -> tuple[nn.Module, dict[str, Tensor]]:
        model, batch = tiny("llama", head="lm")
        table = Scaled()
        table.weight.data.copy_(model.model.embed_tokens.weight)
        model.model.embed_tokens = table
        return model.eval(), batch

    model, batch = built()
    adapters = compacted(model, batch, *paths, share=0.7)
    expected = output(model, batch)
    ga.export_peft(adapters, tmp_path / "peft")
    found = output(loaded_by_peft(built()[0], tmp_path / "peft"), batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "paths", "words"),
    [
        ("bert", [{"kind": "bias"}], "no bias adapters(.|\n)*merge_and_detach"),
        ("bert", [{"kind": "elements"}, LORA], "no elements adapters"),
        ("bert", [LORA, SCALES], "of one kind"),
        ("bart", [ROWS], "tied(.|\n)*untie"),
        ("llama", [{"kind": "rows", "tokens": ["4-9"], "at": {"sublayers": ["outside"]}}], "no such rows"),
        ("llama", [NORM, LORA], "name ends like one"),
    ],
)
def test_what_peft_cannot_hold_of_the_small_kinds_is_refused_by_name(
    tmp_path: Path, family: str, paths: list[dict[str, object]], words: str
) -> None:
    model, batch = tiny(family, head="lm" if "rows" in str(paths) else "base")
    adapters = compacted(model, batch, *paths, share=0.9)
    with pytest.raises(ArtifactError, match=words):
        ga.export_peft(adapters, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


# -- LoRA --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_the_same_on_every_family(tmp_path: Path, family: str) -> None:
    model, batch = tiny(family)
    before = output(model, batch)
    adapters = compacted(model, batch, ATTENTION if family in RESERVED else NO_ROUTERS)
    expected = output(model, batch)
    ga.export_peft(adapters, tmp_path / "peft")
    found = output(loaded_by_peft(tiny(family)[0], tmp_path / "peft"), batch)
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("head", ["lm", "classification"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "qwen2_moe"])
def test_peft_computes_the_same_logits_task_heads_included(tmp_path: Path, family: str, head: str) -> None:
    model, batch = tiny(family, head=head)
    adapters = compacted(model, batch, NO_ROUTERS)
    assert bool(adapters.head_names) == (head == "classification")
    expected = output(model, batch)
    ga.export_peft(adapters, tmp_path / "peft")
    ranks = set(config_of(tmp_path / "peft")["rank_pattern"].values())  # type: ignore[attr-defined]
    assert len(ranks) > 1
    found = output(loaded_by_peft(tiny(family, head=head)[0], tmp_path / "peft"), batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def add_by_plain_reader(model: nn.Module, folder: Path) -> None:
    """Reads the folder as a server does that knows no patterns: one scale, lora_alpha / r, for all modules."""
    config = config_of(folder)
    scale = float(config["lora_alpha"]) / float(config["r"])  # type: ignore[arg-type]
    tensors = load_file(folder / WEIGHTS)
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        change = scale * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        assert len(tensors[name]) <= int(config["r"])  # type: ignore[call-overload]
        module.weight += change.t() if isinstance(module, Conv1D) else change


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "qwen2_moe"])
def test_a_reader_that_ignores_the_patterns_computes_the_same(tmp_path: Path, family: str) -> None:
    model, batch = tiny(family, head="lm")
    adapters = compacted(model, batch, NO_ROUTERS)
    expected = output(model, batch)
    ga.export_peft(adapters, tmp_path / "peft")
    config = config_of(tmp_path / "peft")
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    assert config["r"] == config["lora_alpha"]
    assert (config["bias"], config["modules_to_save"], config["use_rslora"], config["use_dora"]) == (
        "none",
        None,
        False,
        False,
    )
    plain, _ = tiny(family, head="lm")
    add_by_plain_reader(plain, tmp_path / "peft")
    torch.testing.assert_close(output(plain, batch), expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(
    ("family", "paths"),
    [
        ("mixtral", ({"kind": "weight_lora", "rank": 3},)),
        ("gpt_oss", ({"kind": "lora", "rank": 4}, {"kind": "weight_lora", "rank": 2})),
        ("qwen3_moe", ({"kind": "lora", "rank": 2}, {"kind": "weight_lora", "rank": 3})),
    ],
)
def test_experts_become_target_parameters_and_come_back(
    tmp_path: Path, family: str, paths: tuple[dict[str, object], ...]
) -> None:
    model, batch = tiny(family, head="lm")
    adapters = compacted(model, batch, *paths)
    ours = output(model, batch)
    ga.export_peft(adapters, tmp_path / "peft")
    wrapped = loaded_by_peft(tiny(family, head="lm")[0], tmp_path / "peft")
    torch.testing.assert_close(output(wrapped, batch), ours, atol=1e-5, rtol=1e-4)
    with adapters.disabled():
        assert (output(model, batch) - ours).abs().max() > 1e-3
    again, _ = tiny(family, head="lm")
    ga.import_peft(again, tmp_path / "peft", batch)
    torch.testing.assert_close(output(again, batch), ours, atol=1e-5, rtol=1e-4)


def test_paths_that_share_a_module_become_one(tmp_path: Path) -> None:
    model, batch = tiny("bert")
    adapters = compacted(model, batch, {"kind": "lora", "rank": 3}, {"kind": "lora", "rank": 5}, share=0.9)
    assert len(adapters.paths) > len({path.site.write.module for path in adapters.paths.values()})
    expected = output(model, batch)
    ga.export_peft(adapters, tmp_path / "peft")
    found = output(loaded_by_peft(tiny("bert")[0], tmp_path / "peft"), batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


class Twins(nn.Module):
    """A stack, and another of the same names within a part: peft compares the ends of names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = tiny("bert")[0].encoder
        self.other = nn.Module()
        self.other.encoder = tiny("bert", seed=1)[0].encoder

    def forward(self, hidden: Tensor) -> Tensor:
        value: Tensor = self.other.encoder(self.encoder(hidden)[0])[0]
        return value


@pytest.mark.parametrize("kind", ["lora", "scale"])
def test_modules_whose_names_end_alike_are_told_apart(tmp_path: Path, kind: str) -> None:
    model, batch = Twins().eval(), {"hidden": torch.randn(2, 5, 32)}
    adapters = compacted(model, batch, {"kind": kind, "at": {"include": "^encoder"}}, share=0.5)
    expected = model(**batch)
    ga.export_peft(adapters, tmp_path / "peft")
    found = loaded_by_peft(Twins().eval(), tmp_path / "peft")(**batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


# -- scales ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_scales_become_ia3(tmp_path: Path, family: str) -> None:
    model, batch = tiny(family, head="lm")
    paths: tuple[dict[str, object], ...] = (
        {"kind": "scale", "side": "output", "at": {"sublayers": ["attention"]}},
        {"kind": "scale", "side": "output", "at": {"sublayers": ["attention"]}},  # twice: factors multiply
        {"kind": "scale", "side": "input", "at": {"sublayers": ["feed_forward"], "roles": ["down"]}},
    )
    before = output(model, batch)
    adapters = compacted(model, batch, *paths, share=0.9)
    expected = output(model, batch)
    ga.export_peft(adapters, tmp_path / "peft")
    assert config_of(tmp_path / "peft")["feedforward_modules"]
    found = output(loaded_by_peft(tiny(family, head="lm")[0], tmp_path / "peft"), batch)
    assert (expected - before).abs().max() > 1e-4
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


# -- tasks and heads ---------------------------------------------------------------------------------------------------


def test_each_of_several_tasks_is_exported_by_itself_heads_included(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return ga.MultiTaskClassifier(tiny("bert")[0], {"mood": 2, "topic": 4}, dropout=0.0).eval()

    model, batch = build(), tiny("bert")[1]
    adapters = compacted(model, batch | {"task_ids": torch.tensor([0, 1])}, tasks=("mood", "topic"))
    with pytest.raises(ArtifactError, match=r"no routing by task[\s\S]*mood, topic[\s\S]*task="):
        ga.export_peft(adapters, tmp_path / "all")
    with pytest.raises(TaskError, match=r"mood, topic[\s\S]*'weather'"):
        ga.export_peft(adapters, tmp_path / "all", task="weather")
    for index, task in enumerate(("mood", "topic")):
        batch["task_ids"] = torch.full((2,), index)
        ga.export_peft(adapters, tmp_path / task, task=task)
        expected = output(model, batch)
        assert config_of(tmp_path / task)["modules_to_save"] == ["heads.mood", "heads.topic"]
        found = output(loaded_by_peft(build(), tmp_path / task), batch)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    sizes = [
        sum(v.numel() for n, v in load_file(tmp_path / t / WEIGHTS).items() if "lora_" in n) for t in ("mood", "topic")
    ]
    assert adapters.structure is not None
    assert sum(sizes) < 2 * adapters.structure.params
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mood", "topic"]


def test_heads_that_peft_cannot_hold_are_refused(tmp_path: Path) -> None:
    model, batch = tiny("llama", head="lm")
    model.lm_head.weight = model.model.embed_tokens.weight
    adapters = ga.attach(model, space(), batch, heads=("model.embed_tokens",))
    adapters.compact()
    with pytest.raises(ArtifactError, match=r"cannot hold these task heads[\s\S]*lm_head.weight, which is tied to one"):
        ga.export_peft(adapters, tmp_path / "peft")
    assert list(tmp_path.iterdir()) == []


# -- what is refused ---------------------------------------------------------------------------------------------------

BOTTLENECK: dict[str, object] = {"kind": "serial", "width": 4}
INNER: dict[str, object] = {"kind": "scale", "side": "input"}
OUTER: dict[str, object] = {"kind": "scale", "side": "output"}
LORA: dict[str, object] = {"kind": "lora", "rank": 4}
AT_WEIGHTS: dict[str, object] = {"kind": "weight_lora", "rank": 2}


@pytest.mark.parametrize(
    ("family", "paths", "says"),
    [
        ("bert", (BOTTLENECK,), ["peft has no serial adapters", "serial at encoder.layer.0.", "adapters.save"]),
        ("bert", (LORA, BOTTLENECK), ["peft has no serial adapters", "lora at encoder"]),
        ("bert", (LORA, OUTER), ["a peft adapter is of one kind", "lora at", "scale at"]),
        ("bert", (INNER, OUTER), ["IA3 scales one side", "both", "encoder.layer.0.attention.self.query"]),
        ("mamba", (AT_WEIGHTS,), ["adapts parameters of modules that", "weight_lora at layers.0.mixer.", "exclude"]),
        ("qwen3_next", (NO_ROUTERS,), ["it reserves their names", "gate_proj", "layers.0.mlp.shared_expert"]),
        ("mamba", (LORA,), ["it reserves their names", "out_proj", "layers.0.mixer.out_proj"]),
    ],
)
def test_what_peft_cannot_express_is_refused_by_name(
    tmp_path: Path, family: str, paths: tuple[dict[str, object], ...], says: list[str]
) -> None:
    model, batch = tiny(family)
    adapters = compacted(model, batch, *paths, share=1.0)
    with pytest.raises(ArtifactError) as caught:
        ga.export_peft(adapters, tmp_path / "peft")
    for part in [*says, "expected:", "got:", "where:", "fix:"]:
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def gated(adapters: ga.Adapters) -> ga.Adapters:
    ga.detach(model := adapters.model)
    return ga.attach(model, space())


def emptied(adapters: ga.Adapters) -> ga.Adapters:
    again = gated(adapters)
    assert again.bank is not None
    with torch.no_grad():
        again.bank.log_alpha.fill_(-4.0)
    again.compact()
    return again


def broken(adapters: ga.Adapters) -> ga.Adapters:
    with torch.no_grad():
        next(iter(adapters.paths.values())).up[0, 0] = math.nan  # type: ignore[union-attr, index, operator]
    return adapters


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (gated, r"only compact[\s\S]*gates over 18[\s\S]*compact\(\) first"),
        (emptied, r"nothing to export[\s\S]*larger budget"),
        (broken, r"not finite[\s\S]*lora_B.weight"),
    ],
)
def test_adapters_in_no_state_to_be_exported_are_refused(
    tmp_path: Path, change: Callable[[ga.Adapters], ga.Adapters], says: str
) -> None:
    adapters = change(compacted(*tiny("bert")))
    with pytest.raises(ArtifactError, match=says):
        ga.export_peft(adapters, tmp_path / "peft")
    assert list(tmp_path.iterdir()) == []


# -- files -------------------------------------------------------------------------------------------------------------


def test_half_precision_halves_the_file_and_rounds_once(tmp_path: Path) -> None:
    model, batch = tiny("bert")
    adapters = compacted(model, batch)
    ga.export_peft(adapters, tmp_path / "full")
    ga.export_peft(adapters, tmp_path / "half", dtype=torch.bfloat16)
    full, half = load_file(tmp_path / "full" / WEIGHTS), load_file(tmp_path / "half" / WEIGHTS)
    assert full.keys() == half.keys()
    assert all(torch.equal(half[name], value.bfloat16()) for name, value in full.items())
    with pytest.raises(ArtifactError, match=r"float32 or torch.bfloat16[\s\S]*float16"):
        ga.export_peft(adapters, tmp_path / "other", dtype=torch.float16)


@pytest.mark.parametrize(("dtype", "size", "rank"), [(torch.float32, 4, 4), (torch.bfloat16, 2, 8)])
def test_the_file_holds_the_parameters_and_at_most_two_percent_from_16_kilobytes_a_module_on(
    tmp_path: Path, dtype: torch.dtype, size: int, rank: int
) -> None:
    config = BertConfig(hidden_size=512, num_hidden_layers=2, num_attention_heads=8, intermediate_size=512)
    config.vocab_size = 100
    model = BertModel(config)
    adapters = ga.attach(model, space({"kind": "lora", "rank": rank}))
    structure = adapters.compact()
    assert structure.params == len(adapters.paths) * 2 * 512 * rank  # 16 kB a module
    ga.export_peft(adapters, tmp_path / "peft", dtype=dtype)
    adapters.save(tmp_path / "own", dtype=dtype)
    for file in (tmp_path / "peft" / WEIGHTS, tmp_path / "own" / "adapters.safetensors"):
        assert 1 <= file.stat().st_size / (size * structure.params) <= 1.02, file


def test_an_earlier_export_is_replaced_only_on_request_and_other_files_never(tmp_path: Path) -> None:
    model, batch = tiny("bert")
    adapters = compacted(model, batch)
    ga.export_peft(adapters, tmp_path / "peft")
    with safe_open(tmp_path / "peft" / WEIGHTS, framework="pt") as file:
        assert file.metadata()["format"] == "pt"  # what readers of the hub's files look for
    with pytest.raises(ArtifactError, match=r"already holds[\s\S]*overwrite=True"):
        ga.export_peft(adapters, tmp_path / "peft")
    ga.export_peft(adapters, tmp_path / "peft", overwrite=True)
    (tmp_path / "peft" / "README.md").write_text("mine")
    with pytest.raises(ArtifactError, match=r"do not belong[\s\S]*README.md"):
        ga.export_peft(adapters, tmp_path / "peft", overwrite=True)


def test_an_export_while_merged_belongs_to_the_backbone_alone(tmp_path: Path) -> None:
    model, batch = tiny("llama")
    adapters = compacted(model, batch)
    adapters.merge()
    merged = output(model, batch)
    ga.export_peft(adapters, tmp_path / "peft")
    assert torch.equal(output(model, batch), merged)
    fresh, _ = tiny("llama")
    ga.import_peft(fresh, tmp_path / "peft", batch)
    torch.testing.assert_close(output(fresh, batch), merged, rtol=1e-4, atol=1e-5)


def test_writing_needs_no_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny("bert")
    adapters = compacted(model, batch)
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it now fails
    ga.export_peft(adapters, tmp_path / "peft")
    assert (tmp_path / "peft" / WEIGHTS).is_file()
