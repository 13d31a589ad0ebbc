"""What an update will cost adapters, predicted from unlabelled text before any test."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gatedadapters.backbone.layout import undisturbed
from gatedadapters.masking.scores import Batch
from gatedadapters.supernet.adapters import Adapters, get_adapters
from gatedadapters.supernet.hooks import hidden_argument

TOKENS = 256  # of a batch, spread evenly: enough for a norm, and little memory


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums of squares over tokens at one site."""

    size: float
    moved: float
    added: float
    changed: float
    read: float
    read_moved: float
    both: float
    whole: float
    whole_moved: float


def site_sums(old: nn.Module, new: nn.Module, batches: Iterable[Batch]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    pairs = get_adapters(old), get_adapters(new)
    for batch in batches:
        before, after = (_recorded(adapters, batch) for adapters in pairs)
        for name, (x, y, c) in before.items():
            x2, y2, c2 = after[name]
            own = found.setdefault(name, {})

            def add(key: str, value: Tensor) -> None:
                own[key] = own.get(key, 0.0) + float(value.double().square().sum())

            add("x", x), add("y", y), add("c", c), add("z", y + c)
            add("dx", x2 - x), add("dy", y2 - y), add("dc", c2 - c), add("dz", y2 + c2 - y - c)
            add("c2", c2), add("y2", y2)
            own["cc"] = own.get("cc", 0.0) + float((c.double() * c2.double()).sum())
    return found


def _recorded(adapters: Adapters, batch: Batch) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    model = adapters.model
    modules = dict(model.named_modules())
    mask = batch.get("attention_mask")
    found: dict[str, list[Tensor]] = {}

    def rows(value: Any) -> Tensor:
        value = value if isinstance(value, Tensor) else value[0]
        flat = value.detach().float().flatten(0, -2)
        if mask is not None and mask.numel() == len(flat):
            flat = flat[mask.flatten().bool()]
        keep = torch.linspace(0, len(flat) - 1, min(TOKENS, len(flat))).long()
        return flat[keep].clone()

    handles = []
    names = {(p.site.write.module, p.site.write.side) for _, p in adapters.typed_paths()}
    for name, side in names:

        def first(
            m: nn.Module, args: Any, kwargs: Any, output: Any = None, key: str = f"{name}.{side}", side=side
        ) -> None:
            x = rows(hidden_argument(args, kwargs))
            found[key] = [x, x if side == "input" else rows(output)]

        def last(
            m: nn.Module, args: Any, kwargs: Any, output: Any = None, key: str = f"{name}.{side}", side=side
        ) -> None:
            value = rows(hidden_argument(args, kwargs)) if side == "input" else rows(output)
            found[key].append(value - found[key][1])

        if side == "input":
            handles.append(
                modules[name].register_forward_pre_hook(
                    lambda m, a, k, f=first: f(m, a, k), with_kwargs=True, prepend=True
                )
            )
            handles.append(
                modules[name].register_forward_pre_hook(lambda m, a, k, f=last: f(m, a, k), with_kwargs=True)
            )
        else:
            handles.append(modules[name].register_forward_hook(first, with_kwargs=True, prepend=True))
            handles.append(modules[name].register_forward_hook(last, with_kwargs=True))
    try:
        with undisturbed(model):
            output = model(**{k: v for k, v in batch.items() if k != "labels"})
    finally:
        for handle in handles:
            handle.remove()
    found["logits"] = [t := rows(output.logits.unsqueeze(0)), t, t * 0]
    return {k: tuple(v) for k, v in found.items()}
