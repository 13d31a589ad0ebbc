"""The blocks of some families, written out by hand.

Each function is what one block computes from its input `x`, given whether its feed-forward sub-layer is dropped and a
mask that is put on the inner activation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

Mask = Callable[[Tensor], Tensor]


def llama(block: Any, x: Tensor, drop: bool, mask: Mask, **kw: Any) -> Tensor:
    h = x + block.self_attn(hidden_states=block.input_layernorm(x), **kw)[0]
    if drop:
        return h
    n = block.post_attention_layernorm(h)
    return h + block.mlp.down_proj(mask(F.silu(block.mlp.gate_proj(n)) * block.mlp.up_proj(n)))


def gemma2(block: Any, x: Tensor, drop: bool, mask: Mask, **kw: Any) -> Tensor:
    h = x + block.post_attention_layernorm(block.self_attn(hidden_states=block.input_layernorm(x), **kw)[0])
    if drop:
        return h
    n = block.pre_feedforward_layernorm(h)
    a = mask(F.gelu(block.mlp.gate_proj(n), approximate="tanh") * block.mlp.up_proj(n))
    return h + block.post_feedforward_layernorm(block.mlp.down_proj(a))


def bert(block: Any, x: Tensor, drop: bool, mask: Mask, *args: Any, **kw: Any) -> Tensor:
    h = block.attention(x, *args, **kw)[0]  # its norm included
    if drop:
        return h
    return block.output.LayerNorm(h + block.output.dense(mask(F.gelu(block.intermediate.dense(h)))))


def bart_encoder(block: Any, x: Tensor, drop: bool, mask: Mask, attention_mask: Tensor, **kw: Any) -> Tensor:
    h = block.self_attn_layer_norm(x + block.self_attn(x, attention_mask=attention_mask, **kw)[0])
    return h if drop else block.final_layer_norm(h + block.fc2(mask(F.gelu(block.fc1(h)))))


def gpt2(
    block: Any, x: Tensor, drop: bool, mask: Mask, past: Any = None, attention_mask: Any = None, *args: Any, **kw: Any
) -> Tensor:
    names = ("encoder_hidden_states",)
    kw |= {"past_key_values": past, "attention_mask": attention_mask}
    h = x + block.attn(block.ln_1(x), **{k: v for k, v in kw.items() if k not in names})[0]
    return h if drop else h + block.mlp.c_proj(mask(F.gelu(block.mlp.c_fc(block.ln_2(h)), approximate="tanh")))


def gptj(block: Any, x: Tensor, drop: bool, mask: Mask, **kw: Any) -> tuple[Tensor, None]:
    n = block.ln_1(x)
    h = x + block.attn(hidden_states=n, **kw)[0]
    if drop:
        return h, None
    return h + block.mlp.fc_out(mask(F.gelu(block.mlp.fc_in(n), approximate="tanh"))), None


def gpt_neox(block: Any, x: Tensor, drop: bool, mask: Mask, **kw: Any) -> Tensor:
    h = x + block.attention(block.input_layernorm(x), **kw)[0]
    a = F.gelu(block.mlp.dense_h_to_4h(block.post_attention_layernorm(x)))
    return h if drop else h + block.mlp.dense_4h_to_h(mask(a))


def phi(block: Any, x: Tensor, drop: bool, mask: Mask, **kw: Any) -> Tensor:
    n = block.input_layernorm(x)
    h = x + block.self_attn(hidden_states=n, **kw)[0]
    return h if drop else h + block.mlp.fc2(mask(F.gelu(block.mlp.fc1(n), approximate="tanh")))


def opt(block: Any, x: Tensor, drop: bool, mask: Mask, **kw: Any) -> Tensor:
    h = x + block.self_attn(hidden_states=block.self_attn_layer_norm(x), **kw)[0]
    if drop:
        return h
    flat = h.flatten(0, 1)
    return (flat + block.fc2(mask(F.relu(block.fc1(block.final_layer_norm(flat)))))).view_as(h)


def t5(block: Any, x: Tensor, drop: bool, mask: Mask, *args: Any, **kw: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    given = dict(zip(("attention_mask", "position_bias", "memory", "memory_mask", "memory_bias"), args, strict=False))
    cache = kw.pop("past_key_values", None)
    kw.pop("use_cache", None), kw.pop("output_attentions", None)
    h, bias, _ = block.layer[0](x, given["attention_mask"], given["position_bias"], past_key_values=cache, **kw)
    cross = None
    if len(block.layer) == 3:
        h, cross, _ = block.layer[1](
            h,
            key_value_states=given["memory"],
            attention_mask=given["memory_mask"],
            position_bias=given["memory_bias"],
            past_key_values=cache,
            **kw,
        )
    if not drop:
        n, inner = block.layer[-1].layer_norm(h), block.layer[-1].DenseReluDense
        h = h + inner.wo(mask(F.gelu(inner.wi_0(n), approximate="tanh") * inner.wi_1(n)))
    return h, bias, cross


def moe(block: Any, x: Tensor, drop: bool, mask: Mask, **kw: Any) -> Tensor:
    h = x + block.self_attn(hidden_states=block.input_layernorm(x), **kw)[0]
    return h if drop else h + block.mlp(block.post_attention_layernorm(h))


ORACLES: dict[str, Callable[..., Any]] = {
    "llama": llama,
    "qwen3": llama,
    "gemma2": gemma2,
    "bert": bert,
    "roberta": bert,
    "gpt2": gpt2,
    "gptj": gptj,
    "gpt_neox": gpt_neox,
    "phi": phi,
    "opt": opt,
    "t5": t5,
    "qwen2_moe": moe,
    "mixtral": moe,
}
