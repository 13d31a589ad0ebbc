"""A rewritten LoRA computes the same for peft, and for readers that know r and lora_alpha alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exchange import loaded_by_peft, output, peft
from safetensors.torch import load_file
from torch import Tensor, nn

import gatedadapters as ga
from gatedadapters.artifacts import normalise
from gatedadapters.cli.main import main
from gatedadapters.errors import ArtifactError
from gatedadapters.testing.backbones import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # peft asks by the old name
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MIXED: dict[str, Any] = {
    "r": 3,
    "lora_alpha": 12,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "rank_pattern": {"down_proj": 5, "layers.1.self_attn.q_proj": 2},
    "alpha_pattern": {"v_proj": 1, "layers.0.mlp.down_proj": 7},
}


def saved(folder: Path, family: str, **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """A LoRA with random weights, what peft computes with it, and the batch."""
    model, batch = tiny(family, head="lm")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "tokens_delta" in name:
                parameter.normal_(0, 0.2, generator=generator)
    wrapped.save_pretrained(folder)
    return output(wrapped, batch), batch


def strip(folder: Path) -> None:
    """Take the patterns away, as a reader does that does not know them."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}))


@pytest.mark.parametrize(
    "settings",
    [
        MIXED,
        {**MIXED, "use_rslora": True},
        {"r": 4, "lora_alpha": 32, "target_modules": ["embed_tokens", "q_proj"], "rank_pattern": {"q_proj": 2}},
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "trainable_token_indices": [7, 3]},
    ],
    ids=["patterns", "rank-stabilised", "table", "tokens"],
)
def test_peft_computes_the_same_before_and_after_with_and_without_patterns(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    expected, batch = saved(tmp_path / "lora", "llama", **settings)
    told = normalise(tmp_path / "lora", tmp_path / "new")
    for stripped in (False, True):
        if stripped:
            strip(tmp_path / "new")
        found = output(loaded_by_peft(tiny("llama", head="lm")[0], tmp_path / "new"), batch)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    downs = {len(v) for n, v in load_file(tmp_path / "new" / WEIGHTS).items() if "lora_A" in n or "embedding_A" in n}
    assert downs == {told.rank}


def test_without_it_a_reader_of_no_patterns_is_wrong(tmp_path: Path) -> None:
    same_ranks = {**MIXED, "rank_pattern": {}}
    expected, batch = saved(tmp_path, "llama", **same_ranks)
    strip(tmp_path)
    found = output(loaded_by_peft(tiny("llama", head="lm")[0], tmp_path), batch)
    assert (found - expected).abs().max() > 0.01


def test_experts_keep_their_layout(tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    expected, batch = saved(tmp_path / "lora", "mixtral", r=2, lora_alpha=6, **settings)
    normalise(tmp_path / "lora", tmp_path / "new")
    found = output(loaded_by_peft(tiny("mixtral", head="lm")[0], tmp_path / "new"), batch)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


# -- vLLM's arithmetic, replayed ---------------------------------------------------------------------------------------


def as_vllm(model: nn.Module, folder: Path) -> None:
    """Merge a LoRA into a model by what vLLM's loader documents: no vLLM runs here.

    Of `adapter_config.json` its helper reads r, lora_alpha, use_rslora, use_dora, bias and modules_to_save, and drops
    all others; it refuses DoRA and modules_to_save. The scale of every module is lora_alpha / r, or
    lora_alpha / sqrt(r), multiplied into B when the adapter is loaded; ranks beyond `max_lora_rank` are refused by r.

    References:
        vLLM, vllm/lora/peft_helper.py and vllm/lora/lora_weights.py.
    """
    config = json.loads((folder / CONFIG).read_text())
    assert not config.get("use_dora")
    assert not config.get("modules_to_save")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    tensors = load_file(folder / WEIGHTS)
    with torch.no_grad():
        for name in [name for name in tensors if name.endswith("lora_A.weight")]:
            down, up = tensors[name], tensors[name.replace("lora_A", "lora_B")] * scale
            assert len(down) <= config["r"]
            module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            module.weight += up @ down


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_vllms_arithmetic_computes_what_peft_does_with_mixed_ranks(tmp_path: Path, rank_stabilised: bool) -> None:
    expected, batch = saved(tmp_path / "lora", "llama", **MIXED, use_rslora=rank_stabilised)
    normalise(tmp_path / "lora", tmp_path / "new")
    model, _ = tiny("llama", head="lm")
    as_vllm(model, tmp_path / "new")
    torch.testing.assert_close(output(model, batch), expected, atol=2e-5, rtol=1e-4)


def test_vllms_arithmetic_computes_what_an_export_does_with_mixed_ranks(tmp_path: Path) -> None:
    from exchange import compacted

    model, batch = tiny("llama", head="lm")
    adapters = compacted(model, batch)
    assert len({path.units for _, path in adapters.typed_paths()}) > 2
    ga.export_peft(adapters, tmp_path / "peft")
    other, _ = tiny("llama", head="lm")
    as_vllm(other, tmp_path / "peft")
    torch.testing.assert_close(output(other, batch), output(model, batch), atol=2e-5, rtol=1e-4)


# -- the command, and what is refused ----------------------------------------------------------------------------------


def test_the_command_says_what_it_did_and_import_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected, batch = saved(tmp_path / "lora", "llama", **MIXED)
    assert main(["normalise", str(tmp_path / "lora")]) == 0
    told = capsys.readouterr().out
    assert "rank 5 at 9 modules, 6 of them padded" in told
    assert "scales of 0.333333 to 6 folded" in told
    model, _ = tiny("llama", head="lm")
    ga.import_peft(model, tmp_path / "lora-normalised", batch)
    torch.testing.assert_close(output(model, batch), expected, atol=2e-5, rtol=1e-4)
    assert main(["normalise", str(tmp_path / "lora")]) == 2
    assert "already holds an artefact" in capsys.readouterr().err
    assert main(["normalise", str(tmp_path / "lora"), "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("family", "config", "says"),
    [
        ("llama", lambda: peft.LoraConfig(use_dora=True, target_modules=["q_proj"]), "LORA with use_dora"),
        ("bert", lambda: peft.IA3Config(target_modules=["key"], feedforward_modules=[]), "IA3"),
        (
            "mixtral",
            lambda: peft.LoraConfig(
                target_modules=["q_proj"], target_parameters=["experts.down_proj"], rank_pattern={"q_proj": 2}
            ),
            "at parameters of model.layers.0.mlp.experts, with patterns",
        ),
    ],
    ids=["dora", "ia3", "patterns-of-parameters"],
)
def test_what_has_no_scale_to_fold_is_refused_and_nothing_is_written(
    tmp_path: Path, family: str, config: Any, says: str
) -> None:
    model, _ = tiny(family, head="lm")
    peft.get_peft_model(model, config()).save_pretrained(tmp_path / "given")
    with pytest.raises(ArtifactError) as caught:
        normalise(tmp_path / "given", tmp_path / "new")
    assert says in str(caught.value)
    assert "export_peft" in str(caught.value)
    assert not (tmp_path / "new").exists()
