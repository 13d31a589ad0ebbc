"""Whether a model divides its loss by the number of items that the Trainer counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

COUNT = "num_items_in_batch"
"""The argument that transformers' Trainer passes to a model: items of all micro-batches of a step."""


@torch.no_grad()
def divides_by_count(model: nn.Module, inputs: Mapping[str, Any], count: Tensor | int) -> bool | None:
    """Whether `model` divides its loss by `num_items_in_batch`, found by calling it with `count` and with twice that.

    transformers takes `**kwargs` in the signature of `forward` for a yes. Many models accept such arguments and return
    the mean over the micro-batch all the same: their loss would then count k times under accumulation over k
    micro-batches. The model runs in evaluation mode; its modes and the random state are restored.

    Args:
        model: accepts `num_items_in_batch`.
        inputs: a batch with labels.
        count: number of items, positive.

    Returns:
        None if this batch does not tell, because its loss is 0 or not finite (no label counts, for example).
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        losses = []
        for number in (count, 2 * count):
            # A model may draw random numbers in evaluation too; both calls have to draw the same.
            with torch.random.fork_rng(devices=_cuda_devices(model)):
                output = model(**{**inputs, COUNT: number})
            found = output["loss"] if isinstance(output, Mapping) else output[0]
            losses.append(float(found.float().mean()))
    finally:
        for module, mode in modes:
            module.training = mode
    once, twice = map(torch.tensor, losses)
    if not once.isfinite() or not twice.isfinite() or not once:
        return None
    return not torch.isclose(once, twice, rtol=1e-3, atol=0.0).item()


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    devices = {parameter.device for parameter in model.parameters()}
    return [device for device in devices if device.type == "cuda"]
