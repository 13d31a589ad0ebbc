"""Methods of peft that the benchmarks compare with, each at every linear map of the blocks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    EvaConfig,
    LoraConfig,
    PeftConfig,
    ShiraConfig,
    SupertuningConfig,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import TrainerCallback

from benchmarks.common.models import block_maps


def rank_of_share(model: nn.Module, maps: Sequence[str], share: float) -> int:
    """The rank at which LoRA at `maps` has as many parameters as this share of their elements; at least 1."""
    shapes = [model.get_submodule(name).weight.shape for name in maps]
    return max(1, round(share * sum(a * b for a, b in shapes) / sum(a + b for a, b in shapes)))


def lora(model: nn.Module, rank: int, *, alpha: int | None = None, **options: Any) -> Any:
    """LoRA with `lora_alpha` = `alpha`, by default the rank."""
    return _wrapped(model, LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=block_maps(model), **options))


def shira(model: nn.Module, rank: int, *, seed: int | None = None) -> Any:
    """SHiRA: as many random elements of each map as LoRA of this rank has parameters there."""
    return _wrapped(model, ShiraConfig(r=rank, target_modules=block_maps(model), random_seed=seed))


def supertuning(model: nn.Module, sparsity: float) -> Any:
    """Super-Tuning, with this share of the elements frozen."""
    return _wrapped(model, SupertuningConfig(sparsity=sparsity, target_modules=block_maps(model)))


def _wrapped(model: nn.Module, config: PeftConfig) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config)


# -- methods that choose ranks, at the backbone of a classifier --------------------------------------------------------


def adalora(model: Any, steps: int) -> TrainerCallback:
    """AdaLoRA from rank 8 to an average of rank 1, with its orthogonality penalty.

    Returns:
        The callback that allocates ranks after every step of training.
    """
    config = AdaLoraConfig(
        init_r=8,
        target_r=1,
        lora_alpha=8,
        tinit=round(0.1 * steps),
        tfinal=round(0.35 * steps),
        deltaT=5,
        total_step=steps,
        target_modules=block_maps(model.backbone),
    )
    model.backbone = get_peft_model(model.backbone, config)
    model.register_forward_hook(OrthogonalityPenalty())
    return Allocate()


class OrthogonalityPenalty:
    """Adds AdaLoRA's penalty to the classifier's loss: peft adds it only to a loss that the wrapped model returns."""

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


def eva(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """LoRA with EVA: rank 1 on average, redistributed by the variance that activations explain, and initialised by
    the directions that explain it.

    Args:
        model: the classifier.
        batches: examples that activations are taken from.
    """
    config = LoraConfig(
        r=1,
        lora_alpha=1,
        target_modules=block_maps(model.backbone),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=8.0),
    )
    model.backbone = get_peft_model(model.backbone, config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(
        model.backbone,
        [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches],
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda layer_input, model_input, name: layer_input[0].flatten(0, -2),
        show_progress_bar=False,
    )


def ranks_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(ranks in use, parameters of a rank) of every module that peft adapted."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            down, up = module.lora_A["default"], module.lora_B["default"]
            down, up = getattr(down, "weight", down), getattr(up, "weight", up)
            extra = module.lora_E["default"] if hasattr(module, "lora_E") else None
            ranks = len(down) if extra is None else int((extra != 0).sum())
            found[name] = (ranks, down.shape[1] + up.shape[0] + (extra is not None))
    return found
