"""Methods that peft brings, as arms of `search_quality`: AdaLoRA, and LoRA with EVA's ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import AdaLoraConfig, EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import TrainerCallback

import gatedadapters as ga

BATCH = 16


def adalora(model: Any, cell: Any, data: Any, collate: Any) -> dict[str, Any]:
    """AdaLoRA from rank 8 to an average of rank 1, allocating after every step, with its orthogonality penalty."""
    config = AdaLoraConfig(
        init_r=8,
        target_r=1,
        lora_alpha=8,
        tinit=round(0.1 * cell.steps),
        tfinal=round(0.35 * cell.steps),
        deltaT=5,
        total_step=cell.steps,
        target_modules=_block_maps(model),
    )
    model.backbone = get_peft_model(model.backbone, config)
    model.register_forward_hook(OrthogonalityPenalty())
    return {"callbacks": [Allocate()]}


class OrthogonalityPenalty:
    """peft adds it to a loss that the wrapped model returns; a bare encoder returns none, so it is added here."""

    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        """Forward hook of the classifier."""
        if output.loss is not None:
            named = module.named_parameters()
            products = [p @ p.T if "lora_A" in n else p.T @ p for n, p in named if "lora_A" in n or "lora_B" in n]
            output.loss = output.loss + 0.5 * sum(torch.norm(c - torch.eye(len(c))) for c in products) / len(products)
        return output


class Allocate(TrainerCallback):
    """Calls what AdaLoRA needs after each optimiser step, before gradients are cleared."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        """Steps count from 0 here."""
        model.backbone.base_model.update_and_allocate(state.global_step)


def eva(model: Any, cell: Any, data: Any, collate: Any) -> dict[str, Any]:
    """Rank 1 on average, redistributed by the variance that activations explain, initialised by their directions."""
    config = LoraConfig(
        r=1,
        lora_alpha=1,
        target_modules=_block_maps(model),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=8.0),
    )
    names = ("input_ids", "attention_mask")
    batches = [collate([data[i + j] for j in range(BATCH)]) for i in range(0, 512, BATCH)]
    model.backbone = get_peft_model(model.backbone, config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(
        model.backbone,
        [{name: batch[name] for name in names} for batch in batches],
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda layer_input, model_input, name: layer_input[0].flatten(0, -2),
        show_progress_bar=False,
    )
    return {}


def _block_maps(model: Any) -> list[str]:
    return [linear.name for _, _, linear in ga.discover(model.backbone).maps()]


def peft_ranks(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(ranks in use, parameters of a rank) of every module peft adapted."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            down, up = module.lora_A["default"], module.lora_B["default"]
            down, up = getattr(down, "weight", down), getattr(up, "weight", up)
            extra = module.lora_E["default"] if hasattr(module, "lora_E") else None
            ranks = len(down) if extra is None else int((extra != 0).sum())
            found[name] = (ranks, down.shape[1] + up.shape[0] + (extra is not None))
    return found


PEFT_ARMS: dict[str, Callable[..., dict[str, Any]]] = {"adalora": adalora, "eva": eva}
