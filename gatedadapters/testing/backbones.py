"""Tiny random backbones of many families, for tests here and for anyone who writes a path, a score or a perturbation.

Widths are all distinct (hidden 32, feed-forward 48 or 64, keys and values 16 where the family allows), so that a
confusion of roles shows up as a wrong shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 99
_TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
_HEADS: Mapping[str, str] = {"classification": "ForSequenceClassification", "lm": "ForCausalLM"}


@dataclass(frozen=True, slots=True)
class _Family:
    """How to build one family: class prefix, configuration values, and the class suffix of each head."""

    prefix: str
    config: Mapping[str, Any]
    base: str = "Model"
    heads: Mapping[str, str] = field(default_factory=lambda: MappingProxyType(dict(_HEADS)))
    encoder_decoder: bool = False


_ENCODER = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
    type_vocab_size=2,
)
_DECODER = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
)
_GROUPED = _DECODER | dict(num_key_value_heads=2, head_dim=8)
_EXPERTS = _GROUPED | dict(num_hidden_layers=2, num_experts_per_tok=2)
_MASKED = {"classification": "ForSequenceClassification", "lm": "ForMaskedLM"}
_GPT = dict(n_embd=32, n_layer=3, n_head=4, n_inner=48, n_positions=64)
_NO_HEADS: dict[str, str] = {}
_CAUSAL = {"lm": "ForCausalLM"}

_FAMILIES: dict[str, _Family] = {
    # encoders
    "bert": _Family("Bert", _ENCODER, heads=_MASKED),
    "roberta": _Family("Roberta", _ENCODER | dict(pad_token_id=1, bos_token_id=0), heads=_MASKED),
    "xlm-roberta": _Family("XLMRoberta", _ENCODER | dict(pad_token_id=1, bos_token_id=0), heads=_MASKED),
    "electra": _Family("Electra", _ENCODER | dict(embedding_size=24), heads=_MASKED),
    "mpnet": _Family("MPNet", _ENCODER | dict(pad_token_id=1, bos_token_id=0), heads=_MASKED),
    "distilbert": _Family(
        "DistilBert",
        dict(dim=32, n_layers=3, n_heads=4, hidden_dim=64, max_position_embeddings=64),
        heads=_MASKED,
    ),
    "deberta_v2": _Family(
        "DebertaV2",
        _ENCODER
        | dict(
            relative_attention=True,
            position_buckets=6,
            pos_att_type=["p2c", "c2p"],
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            type_vocab_size=0,
            position_biased_input=False,
        ),
        heads=_MASKED,
    ),
    "modernbert": _Family(
        "ModernBert",
        _DECODER
        | dict(
            local_attention=8,
            cls_token_id=1,
            sep_token_id=2,
        ),
        heads=_MASKED,
    ),
    "albert": _Family("Albert", _ENCODER | dict(embedding_size=24, num_hidden_layers=4), heads=_MASKED),
    # decoders
    "gpt2": _Family("GPT2", _GPT, heads={"classification": "ForSequenceClassification", "lm": "LMHeadModel"}),
    "gptj": _Family("GPTJ", _GPT | dict(rotary_dim=4)),
    "gpt_neox": _Family("GPTNeoX", _DECODER),
    "opt": _Family(
        "OPT",
        dict(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            ffn_dim=48,
            max_position_embeddings=64,
            word_embed_proj_dim=24,
        ),
    ),
    "bloom": _Family("Bloom", dict(hidden_size=32, n_layer=3, n_head=4)),
    "falcon": _Family(
        "Falcon",
        dict(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            ffn_hidden_size=48,
            multi_query=True,
            parallel_attn=True,
        ),
    ),
    "phi": _Family("Phi", _DECODER),
    "llama": _Family("Llama", _GROUPED),
    "mistral": _Family("Mistral", _GROUPED | dict(sliding_window=4)),
    "qwen2": _Family("Qwen2", _DECODER | dict(num_key_value_heads=2)),
    "qwen3": _Family("Qwen3", _GROUPED | dict(head_dim=10)),
    "gemma": _Family("Gemma", _GROUPED | dict(head_dim=10)),
    "gemma2": _Family("Gemma2", _GROUPED | dict(head_dim=10, sliding_window=4)),
    "phi3": _Family("Phi3", _DECODER | dict(num_key_value_heads=2)),
    # mixtures of experts: the experts are fused three-dimensional parameters
    "mixtral": _Family("Mixtral", _EXPERTS | dict(num_local_experts=4)),
    "qwen2_moe": _Family(
        "Qwen2Moe",
        _EXPERTS | dict(num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=40),
    ),
    "qwen3_moe": _Family("Qwen3Moe", _EXPERTS | dict(num_experts=4, moe_intermediate_size=24)),
    "gpt_oss": _Family("GptOss", _EXPERTS | dict(num_local_experts=4, sliding_window=4)),
    "deepseek_v3": _Family(
        "DeepseekV3",
        _DECODER
        | dict(
            num_hidden_layers=2,
            first_k_dense_replace=1,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            n_group=1,
            topk_group=1,
            q_lora_rank=12,
            kv_lora_rank=10,
            qk_rope_head_dim=4,
            qk_nope_head_dim=6,
            v_head_dim=5,
            num_key_value_heads=4,
        ),
    ),
    # state space and hybrid
    "mamba": _Family(
        "Mamba",
        dict(
            hidden_size=32,
            num_hidden_layers=3,
            state_size=4,
            intermediate_size=64,
            conv_kernel=4,
            time_step_rank=6,
        ),
        heads=_CAUSAL,
    ),
    "mamba2": _Family(
        "Mamba2",
        dict(
            hidden_size=32,
            num_hidden_layers=2,
            state_size=4,
            num_heads=8,
            head_dim=8,
            n_groups=1,
            chunk_size=4,
        ),
        heads=_CAUSAL,
    ),
    "jamba": _Family(
        "Jamba",
        _GROUPED
        | dict(
            num_hidden_layers=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=4,
            num_experts_per_tok=2,
            mamba_d_state=4,
            mamba_dt_rank=6,
            use_mamba_kernels=False,
        ),
    ),
    "qwen3_next": _Family(
        "Qwen3Next",
        _EXPERTS
        | dict(
            num_experts=4,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=6,
            linear_value_head_dim=5,
            layer_types=["linear_attention", "full_attention"],
        ),
    ),
    # encoder-decoders
    "t5": _Family(
        "T5",
        dict(
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_decoder_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        ),
        heads={"classification": "ForSequenceClassification", "lm": "ForConditionalGeneration"},
        encoder_decoder=True,
    ),
    "bart": _Family(
        "Bart",
        dict(
            d_model=32,
            encoder_layers=2,
            decoder_layers=3,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=64,
            max_position_embeddings=64,
        ),
        heads={"classification": "ForSequenceClassification", "lm": "ForConditionalGeneration"},
        encoder_decoder=True,
    ),
}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)


def tiny(family: str, *, head: str = "base", seed: int = 0) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A tiny random model in evaluation mode and a batch for it, the same on every call.

    Args:
        family: One of ``FAMILIES``.
        head: ``"base"``, ``"classification"`` (3 labels) or ``"lm"``, where the family has it.
        seed: Of the weights and the batch; the global random state is left alone.

    Returns:
        The model, and ``input_ids`` and ``attention_mask`` (2, 8), plus ``decoder_input_ids`` for
        encoder-decoders, (2, 6) or with a classification head (2, 8).

    Raises:
        KeyError: the family, or this head of it, is not in the zoo.
    """
    if family not in _FAMILIES:
        raise KeyError(f"no family {family!r}; there are {', '.join(FAMILIES)}")
    record = _FAMILIES[family]
    if head != "base" and head not in record.heads:
        raise KeyError(f"{family} has no head {head!r}; it has base, {', '.join(record.heads)}")
    config_class = getattr(transformers, f"{record.prefix}Config")
    model_class = getattr(
        transformers, record.prefix + (record.base if head == "base" else record.heads[head])
    )
    config = config_class(**(_TOKENS | dict(vocab_size=VOCABULARY, num_labels=3) | dict(record.config)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cast(PreTrainedModel, model_class(config).eval())
        ids = torch.randint(3, VOCABULARY, (2, 8))
        ids[:, -1] = config.eos_token_id
        batch = {"input_ids": ids}
        if record.encoder_decoder:
            # Classification heads look for the end of the sequence where the encoder's input has it.
            length = 8 if head == "classification" else 6
            batch["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, length))
            batch["decoder_input_ids"][:, -1] = config.eos_token_id
    if "mamba" not in family:
        batch["attention_mask"] = torch.ones_like(ids)
    return model, batch
