"""Methods of peft at the size of a regime of SmolLM2: what somebody would choose who does not search.

Every function wraps the model in place, and returns the wrapped one and the callbacks that its training needs. LoRA of
rank 1 at every query map has 34,560 parameters, IA3 in 18 of the 30 blocks as many, all gains 35,136.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from peft import (
    AdaLoraConfig,
    EvaConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    get_peft_model,
    initialize_lora_eva_weights,
)
from torch import Tensor, nn
from transformers import TrainerCallback

Batches = Sequence[dict[str, Tensor]]
Wrapped = tuple[Any, list[TrainerCallback]]
QUERIES = ["q_proj"]
BLOCKS, ADAPTED = 30, 18  # of the model; of those that IA3 scales


def lora(model: nn.Module, batches: Batches, steps: int) -> Wrapped:
    """LoRA of rank 1 at the query maps."""
    return _wrapped(model, LoraConfig(r=1, lora_alpha=1, target_modules=QUERIES)), []


def ia3(model: nn.Module, batches: Batches, steps: int) -> Wrapped:
    """IA3 at keys, values and the inputs of the down maps, in blocks that are spread evenly."""
    blocks = "|".join(str(i * BLOCKS // ADAPTED) for i in range(ADAPTED))
    inside = rf".*layers\.({blocks})\.(self_attn\.[kv]_proj|mlp\.down_proj)"
    return _wrapped(model, IA3Config(target_modules=inside, feedforward_modules=r".*\.down_proj")), []


def norms(model: nn.Module, batches: Batches, steps: int) -> Wrapped:
    """LN tuning: all gains."""
    return _wrapped(model, LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "norm"])), []


def adalora(model: nn.Module, batches: Batches, steps: int) -> Wrapped:
    """AdaLoRA at the query maps, from rank 4 to rank 1 on average."""
    config = AdaLoraConfig(
        init_r=4,
        target_r=1,
        lora_alpha=4,
        tinit=round(0.1 * steps),
        tfinal=round(0.35 * steps),
        deltaT=2,
        total_step=steps,
        target_modules=QUERIES,
    )
    return _wrapped(model, config), [Allocate()]


def eva(model: nn.Module, batches: Batches, steps: int) -> Wrapped:
    """LoRA with EVA: rank 1 on average over the query maps, up to 2 where activations ask for it."""
    config = LoraConfig(
        r=1, lora_alpha=1, target_modules=QUERIES, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0)
    )
    wrapped = _wrapped(model, config, low_cpu_mem_usage=True)
    texts = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]
    initialize_lora_eva_weights(wrapped, texts, show_progress_bar=False)
    return wrapped, []


PEFT: dict[str, Callable[[nn.Module, Batches, int], Wrapped]] = {
    "peft-lora": lora,
    "peft-ia3": ia3,
    "peft-norms": norms,
    "peft-adalora": adalora,
    "peft-eva": eva,
}


class Allocate(TrainerCallback):
    """Calls what AdaLoRA needs after each optimiser step, before gradients are cleared."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        """Steps count from 0 here."""
        model.base_model.update_and_allocate(state.global_step)


def _wrapped(model: nn.Module, config: PeftConfig, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config, **options)
