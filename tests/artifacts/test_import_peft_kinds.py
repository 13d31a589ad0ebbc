"""Adapters of peft other than a plain LoRA at linear maps become paths that compute what peft computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from exchange import output, peft
from safetensors.torch import load_file, save_file
from torch import nn

import gatedadapters as ga
from gatedadapters.artifacts import singular_values
from gatedadapters.artifacts.peft_folder import read_peft
from gatedadapters.errors import ArtifactError
from gatedadapters.testing.backbones import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # peft asks by the old name
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),  # peft of the norms it tunes
    pytest.mark.filterwarnings(
        "ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"
    ),  # peft uses those of parameters
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], **settings})


def saved(folder: Path, family: str, config: Any, *, head: str = "lm", tied: bool = False) -> Any:
    """Save an adapter with random values, and return what peft computes with it, the batch, and its own model."""
    model, batch = tiny(family, head=head)
    if tied:
        tie(model)
    generator = torch.Generator().manual_seed(0)
    wrapped = peft.get_peft_model(model, config).eval()
    marks = ("lora_", "ia3_", "vera_lambda", "ln_tuning_layers", "tokens_delta", "modules_to_save")
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if any(mark in name for mark in marks):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    wrapped.save_pretrained(folder)
    return output(wrapped, batch), batch


def tie(model: nn.Module) -> None:
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight


TOKENS = tiny("llama", head="lm")[1]["input_ids"].unique()[[5, 1, 3]].tolist()  # tokens that the batch holds
ADAPTERS: dict[str, tuple[str, Callable[[], Any], set[str]]] = {
    "table": ("llama", lambda: lora(target_modules=["embed_tokens", "q_proj"]), {"lora"}),
    "scaled_table": ("gemma2", lambda: lora(target_modules=["embed_tokens"]), {"lora"}),
    "head": ("llama", lambda: lora(target_modules=["lm_head", "v_proj"]), {"lora"}),
    "retrained_tokens": ("llama", lambda: lora(trainable_token_indices=TOKENS), {"lora", "rows"}),
    "tokens_by_table": ("llama", lambda: lora(trainable_token_indices={"embed_tokens": TOKENS}), {"lora", "rows"}),
    "trainable_tokens": ("llama", lambda: peft.TrainableTokensConfig(token_indices=TOKENS), {"rows"}),
    "dora": ("llama", lambda: lora(use_dora=True, target_modules=["q_proj", "down_proj"]), {"lora", "scale"}),
    "dora_with_biases": (
        "bert",
        lambda: lora(use_dora=True, target_modules=["query", "value"]),
        {"lora", "scale", "bias"},
    ),
    "dora_transposed": (
        "gpt2",
        lambda: lora(use_dora=True, target_modules=["c_attn"], fan_in_fan_out=True),
        {"lora", "scale", "bias"},
    ),
    "ia3": (
        "bert",
        lambda: peft.IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
        {"scale"},
    ),
    "vera": ("llama", lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "k_proj", "down_proj"]), {"lora"}),
    "norms": ("bert", lambda: peft.LNTuningConfig(target_modules=["LayerNorm"]), {"norm"}),
    "norms_stored_less_1": ("gemma2", lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]), {"norm"}),
    "experts": (
        "mixtral",
        lambda: lora(
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            rank_pattern={"experts.down_proj": 2},
            alpha_pattern={"experts.gate_up_proj": 9},
        ),
        {"lora", "weight_lora"},
    ),
    "one_of_the_experts_parameters": (
        "gpt_oss",
        lambda: lora(target_parameters=["experts.gate_up_proj"], use_rslora=True),
        {"lora", "weight_lora"},
    ),
    "parameter_of_a_linear_map": (
        "llama",
        lambda: lora(target_modules=[], target_parameters=["mlp.down_proj.weight"]),
        {"lora"},
    ),
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", ADAPTERS)
def test_it_computes_what_peft_does_and_comes_off_again(tmp_path: Path, name: str) -> None:
    family, config, kinds = ADAPTERS[name]
    expected, batch = saved(tmp_path / "peft", family, config())
    model, _ = tiny(family, head="lm")
    plain = output(model, batch)
    assert (expected - plain).abs().max() > 5e-4
    adapters = ga.import_peft(model, tmp_path / "peft", batch)
    assert {path.kind for _, path in adapters.typed_paths()} == kinds
    torch.testing.assert_close(output(model, batch), expected, atol=2e-5, rtol=1e-4)
    assert singular_values(adapters).shape == adapters._gates().kept.shape
    adapters.compact()
    adapters.save(tmp_path / "own")
    ga.detach(model)
    assert torch.equal(output(model, batch), plain)
    ga.load_adapters(model, tmp_path / "own")
    torch.testing.assert_close(output(model, batch), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [lambda: lora(trainable_token_indices=TOKENS)], ids=["lora"])
def test_tokens_of_a_tied_table_change_at_both_ends(tmp_path: Path, config: Callable[[], Any]) -> None:
    expected, batch = saved(tmp_path, "llama", config(), tied=True)
    model, _ = tiny("llama", head="lm")
    tie(model)
    adapters = ga.import_peft(model, tmp_path, batch)
    assert {path.site.write.module for _, path in adapters.typed_paths() if path.kind == "rows"} == {
        "model.embed_tokens",
        "lm_head",
    }
    torch.testing.assert_close(output(model, batch), expected, atol=2e-5, rtol=1e-4)


# -- what is refused ---------------------------------------------------------------------------------------------------


def tensors_changed(part: str, rule: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = {n: (rule(v) if part in n else v) for n, v in load_file(folder / WEIGHTS).items()}
        save_file({n: v.contiguous() for n, v in found.items() if v is not None}, folder / WEIGHTS)

    return change


def configured(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(data | changes))

    return change


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("table", tensors_changed("base_layer", lambda v: v + 1), ["has others", "embed_tokens", "resize_token"]),
        ("retrained_tokens", configured(trainable_token_indices=[3, 7]), ["rows are not those", "2 rows"]),
        ("retrained_tokens", configured(trainable_token_indices=[3, 7, 7]), ["rows are not those"]),
        ("retrained_tokens", configured(trainable_token_indices=[3, 7, 400]), ["another model", "token 400"]),
        ("retrained_tokens", configured(trainable_token_indices=["3"]), ["trainable_token_indices", "as peft writes"]),
        ("trainable_tokens", configured(token_indices=[-1, 2, 3]), ["token_indices.0", "greater than or equal to 0"]),
        ("dora", tensors_changed("magnitude", lambda v: None), ["other parts", "use_dora: True", "none"]),
        ("dora", tensors_changed("magnitude", lambda v: v[1:]), ["another model", "31 magnitudes", "32 outputs"]),
        ("ia3", tensors_changed("ia3_l", lambda v: v.flatten()), ["factors of another shape", "(out, 1) or (1, in)"]),
        ("ia3", tensors_changed("ia3_l", lambda v: v.repeat(2, 1)), ["factors"]),
        ("vera", tensors_changed("vera_A", lambda v: None), ["random matrices are missing", "save_projection=True"]),
        ("vera", tensors_changed("lambda_d", lambda v: v[1:]), ["vectors of a module do not fit", "lambda_d (4,)"]),
        ("vera", tensors_changed("vera_B", lambda v: v[:8]), ["random matrices are too small"]),
        ("norms", tensors_changed("ln_tuning_layers.bias", lambda v: None), ["another model", "a norm", "LayerNorm"]),
        ("experts", tensors_changed("experts.lora_A", lambda v: v[1:]), ["A and B do not fit"]),
        ("experts", configured(target_parameters=["experts.down_proj"]), ["another model", "2 parameters"]),
        ("experts", configured(r=4), ["another rank"]),
        ("head", configured(peft_type="ADALORA"), ["of this type are not imported", "ADALORA"]),
        ("head", configured(peft_type=["LORA"]), ["of this type are not imported"]),
    ],
)
def test_damage_is_one_error_and_the_model_is_left_alone(
    tmp_path: Path, name: str, damage: Callable[[Path], None], says: list[str]
) -> None:
    family, config, _ = ADAPTERS[name]
    _, batch = saved(tmp_path, family, config())
    damage(tmp_path)
    model, _ = tiny(family, head="lm")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ArtifactError) as caught:
        ga.import_peft(model, tmp_path, batch)
    for part in [*says, "expected:", "got:", "fix:"]:
        assert part in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not hasattr(model, "gated_adapters")


ODD: list[Any] = [None, -1, 1e308, "(a|aa)+$", ["(a+)+$"], {"a": [1]}, True]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", ["experts", "ia3", "vera", "trainable_tokens"])
def test_every_field_may_hold_anything_and_is_read_or_refused(tmp_path: Path, name: str) -> None:
    family, config, _ = ADAPTERS[name]
    saved(tmp_path, family, config())
    plain = json.loads((tmp_path / CONFIG).read_text())
    for field in plain:
        for value in ODD:
            (tmp_path / CONFIG).write_text(json.dumps(plain | {field: value}))
            with suppress(ArtifactError):
                read_peft(tmp_path)


@pytest.mark.parametrize("depth", [17, 5000])
def test_a_name_that_is_wrapped_over_and_over_costs_nothing(tmp_path: Path, depth: int) -> None:
    _, batch = saved(tmp_path, "mixtral", ADAPTERS["experts"][1]())
    found = {
        n.replace("experts.base_layer", f"experts{'.base_layer' * depth}"): v for n, v in tensors(tmp_path).items()
    }
    save_file(found, tmp_path / WEIGHTS)
    with pytest.raises(ArtifactError, match="another model"):
        ga.import_peft(tiny("mixtral", head="lm")[0], tmp_path, batch)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def test_a_gain_of_zero_that_learnt_something_is_refused(tmp_path: Path) -> None:
    _, batch = saved(tmp_path, "bert", ADAPTERS["norms"][1]())
    model, _ = tiny("bert", head="lm")
    nn.init.zeros_(model.bert.encoder.layer[1].output.LayerNorm.weight)
    with pytest.raises(ArtifactError, match="no factor leads there"):
        ga.import_peft(model, tmp_path, batch)
