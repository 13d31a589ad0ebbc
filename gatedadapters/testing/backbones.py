"""Tiny random backbones of many families, for tests of this package and of new paths, scores and perturbations.

Widths differ wherever the family allows it (hidden 32, feed-forward 48 or 64, keys and values 16, experts 24). So code
that confuses two roles fails with a wrong shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 99
LABELS = 3

_Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Family:
    """How to build a model of one family: class prefix, configuration values, class suffix of each head."""

    prefix: str
    config: _Values
    heads: Mapping[str, str]
    encoder_decoder: bool = False


_TOKENS: _Values = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_CLASSES: Mapping[str, str] = {"classification": "ForSequenceClassification"}
_LM: _Values = {"lm": "ForCausalLM"}
_MASKED = {**_CLASSES, "lm": "ForMaskedLM"}
_CAUSAL = {**_CLASSES, "lm": "ForCausalLM"}
_SEQ2SEQ = {**_CLASSES, "lm": "ForConditionalGeneration"}

_PLAIN: _Values = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_GROUPED: _Values = {**_PLAIN, "num_key_value_heads": 2, "head_dim": 8}
_ODD_HEADS: _Values = {**_GROUPED, "head_dim": 10}
_EXPERTS: _Values = {
    **_GROUPED,
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
}
_SMALL_EXPERTS: _Values = {
    **_GROUPED,
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
    "num_experts": 4,
    "moe_intermediate_size": 24,
}
_MAMBA2: _Values = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 4,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
}
_BERT: _Values = {**_PLAIN, "intermediate_size": 64, "type_vocab_size": 2}
_ROBERTA: _Values = {**_BERT, "pad_token_id": 1, "bos_token_id": 0}
_GPT: _Values = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "n_positions": 64}


def _encoder(prefix: str, config: _Values) -> _Family:
    return _Family(prefix, config, _MASKED)


def _decoder(prefix: str, config: _Values) -> _Family:
    return _Family(prefix, config, _CAUSAL)


_FAMILIES: Mapping[str, _Family] = {
    # encoders
    "bert": _encoder("Bert", _BERT),
    "roberta": _encoder("Roberta", _ROBERTA),
    "xlm-roberta": _encoder("XLMRoberta", _ROBERTA),
    "electra": _encoder("Electra", {**_BERT, "embedding_size": 24}),
    "mpnet": _encoder("MPNet", _ROBERTA),
    "distilbert": _encoder(
        "DistilBert",
        {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
    ),
    "deberta_v2": _encoder(
        "DebertaV2",
        {
            **_BERT,
            "relative_attention": True,
            "position_buckets": 6,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "share_att_key": False,
            "type_vocab_size": 0,
            "position_biased_input": False,
        },
    ),
    "modernbert": _encoder("ModernBert", {**_PLAIN, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}),
    "albert": _encoder("Albert", {**_BERT, "embedding_size": 24, "num_hidden_layers": 4}),
    # decoders
    "gpt2": _Family("GPT2", _GPT, {**_CLASSES, "lm": "LMHeadModel"}),
    "gptj": _decoder("GPTJ", {**_GPT, "rotary_dim": 4}),
    "gpt_neox": _decoder("GPTNeoX", _PLAIN),
    "opt": _decoder("OPT", {**_PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 24}),
    "bloom": _decoder("Bloom", {"hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "falcon": _decoder("Falcon", {**_PLAIN, "ffn_hidden_size": 48, "multi_query": True}),
    "phi": _decoder("Phi", _PLAIN),
    "llama": _decoder("Llama", _GROUPED),
    "mistral": _decoder("Mistral", {**_GROUPED, "sliding_window": 4}),
    "qwen2": _decoder("Qwen2", {**_PLAIN, "num_key_value_heads": 2}),
    "qwen3": _decoder("Qwen3", _ODD_HEADS),
    "gemma": _decoder("Gemma", _ODD_HEADS),
    "gemma2": _decoder("Gemma2", {**_ODD_HEADS, "sliding_window": 4}),
    "phi3": _decoder("Phi3", {**_PLAIN, "num_key_value_heads": 2}),
    # mixtures of experts: the experts are fused three-dimensional parameters
    "mixtral": _decoder("Mixtral", _EXPERTS),
    "qwen2_moe": _decoder("Qwen2Moe", {**_SMALL_EXPERTS, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": _decoder("Qwen3Moe", _SMALL_EXPERTS),
    "gpt_oss": _decoder("GptOss", {**_EXPERTS, "intermediate_size": 32, "sliding_window": 4}),
    "deepseek_v3": _decoder(
        "DeepseekV3",
        {
            **_PLAIN,
            "num_hidden_layers": 2,
            "num_key_value_heads": 4,
            "q_lora_rank": 12,
            "kv_lora_rank": 10,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 6,
            "v_head_dim": 5,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "olmoe": _Family("Olmoe", {**_EXPERTS, "num_experts": 4}, _LM),
    "phimoe": _Family("Phimoe", _EXPERTS, _LM),
    "llama4": _Family(
        "Llama4Text",
        {
            **_GROUPED,
            "num_hidden_layers": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 40,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8,
        },
        {},
    ),
    "jetmoe": _Family(
        "JetMoe",
        {
            **_PLAIN,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "kv_channels": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        _LM,
    ),
    # state space and hybrid
    "mamba": _Family(
        "Mamba",
        {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "intermediate_size": 64,
            "state_size": 4,
            "time_step_rank": 6,
        },
        _LM,
    ),
    "falcon_mamba": _Family(
        "FalconMamba",
        {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 64, "state_size": 4, "time_step_rank": 6},
        _LM,
    ),
    "mamba2": _Family(
        "Mamba2",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 4,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 4,
        },
        _LM,
    ),
    "bamba": _Family("Bamba", {**_GROUPED, **_MAMBA2, "num_hidden_layers": 2, "attn_layer_indices": [1]}, _LM),
    "zamba2": _Family(
        "Zamba2",
        {
            **_PLAIN,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_d_state": 4,
            "mamba_ngroups": 1,
            "chunk_size": 4,
            "num_mem_blocks": 2,
            "use_shared_attention_adapter": True,
            "adapter_rank": 6,
        },
        _LM,
    ),
    "granitemoehybrid": _Family(
        "GraniteMoeHybrid",
        {**_EXPERTS, **_MAMBA2, "shared_intermediate_size": 40, "layer_types": ["mamba", "attention"]},
        _LM,
    ),
    "nemotron_h": _Family(
        "NemotronH",
        {
            **_GROUPED,
            "layers_block_type": ["mamba", "attention", "moe"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 4,
            "n_groups": 1,
            "chunk_size": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 40,
            "n_group": 1,
            "topk_group": 1,
        },
        _LM,
    ),
    "lfm2_moe": _Family(
        "Lfm2Moe", {**_SMALL_EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}, _LM
    ),
    "recurrent_gemma": _Family(
        "RecurrentGemma",
        {
            **_PLAIN,
            "num_key_value_heads": 1,
            "lru_width": 32,
            "attention_window_size": 8,
            "block_types": ["recurrent", "recurrent", "attention"],
        },
        _LM,
    ),
    "jamba": _decoder(
        "Jamba",
        {
            **_GROUPED,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 4,
            "mamba_dt_rank": 6,
            "use_mamba_kernels": False,
        },
    ),
    "qwen3_next": _decoder(
        "Qwen3Next",
        {
            **_SMALL_EXPERTS,
            "shared_expert_intermediate_size": 40,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 6,
            "linear_value_head_dim": 5,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    # encoder-decoders
    "t5": _Family(
        "T5",
        {
            "d_model": 32,
            "d_kv": 10,
            "d_ff": 48,
            "num_layers": 2,
            "num_decoder_layers": 3,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
        },
        _SEQ2SEQ,
        encoder_decoder=True,
    ),
    "bart": _Family(
        "Bart",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 64,
        },
        _SEQ2SEQ,
        encoder_decoder=True,
    ),
}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)


def heads(family: str) -> tuple[str, ...]:
    """The heads ``tiny`` can build for ``family``, ``"base"`` first."""
    return ("base", *_FAMILIES[family].heads)


def tiny(family: str, *, head: str = "base", seed: int = 0, **config: Any) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A tiny random model in evaluation mode and a batch for it, the same on every call.

    Args:
        family: One of ``FAMILIES``.
        head: ``"base"``, ``"classification"`` (``LABELS`` classes) or ``"lm"``, where the family has it.
        seed: Of the weights and the batch; the global random state does not change.
        **config: Values of the configuration that replace the family's.

    Returns:
        The model, and ``input_ids`` and ``attention_mask`` (2, 8), plus ``decoder_input_ids`` for
        encoder-decoders, (2, 6) or with a classification head (2, 8). No labels.

    Raises:
        KeyError: the family, or this head of it, is not in the zoo.
    """
    if family not in _FAMILIES:
        raise KeyError(f"no family {family!r}; there are {', '.join(FAMILIES)}")
    record = _FAMILIES[family]
    if head not in heads(family):
        raise KeyError(f"{family} has no head {head!r}; it has {', '.join(heads(family))}")
    config_class = getattr(transformers, f"{record.prefix}Config")
    model_class = getattr(transformers, record.prefix + ("Model" if head == "base" else record.heads[head]))
    values = {**_TOKENS, "vocab_size": VOCABULARY, "num_labels": LABELS, **record.config, **config}
    made = config_class(**values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cast(PreTrainedModel, model_class(made).eval())
        # BART's classification head reads the hidden state at the end-of-sequence token.
        ids = torch.randint(3, VOCABULARY, (2, 8))
        ids[:, -1] = made.eos_token_id
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if record.encoder_decoder:
            # It takes the position of that token from the encoder's input, so both lengths must be equal.
            decoder_ids = torch.randint(3, VOCABULARY, (2, 8 if head == "classification" else 6))
            decoder_ids[:, -1] = made.eos_token_id
            batch["decoder_input_ids"] = decoder_ids
    return model, batch
