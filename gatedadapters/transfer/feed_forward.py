"""The feed-forward sub-layers of a model: at which modules hooks can mask or drop them, and where they cannot."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gatedadapters.backbone import Block, Layout, Sublayer, discover
from gatedadapters.backbone.layout import undisturbed
from gatedadapters.backbone.sample import default_sample, device_of
from gatedadapters.errors import AttachError, LayoutError
from gatedadapters.supernet.adapters import get_adapters


@dataclass(frozen=True, slots=True)
class FeedForward:
    """One feed-forward sub-layer. Modules are given by their qualified names.

    Attributes:
        block: the block that the sub-layer is part of.
        name: the smallest module around the sub-layer.
        readers: the linear maps that read the hidden state. To drop the sub-layer they are given no tokens, so that
            everything up to the writer costs nothing. Empty for mixtures of experts: they run, and their output is
            thrown away.
        writer: the module that returns the sub-layer's contribution to the hidden state.
        norms: norms after the writer that belong to the sub-layer: on its contribution (Gemma 2), or on the sum of
            contribution and hidden state (BERT).
        normed: whether the first of `norms` is on the contribution alone.
        inner: linear maps whose input is the inner activation: act(W_g x) * (W_u x), or act(W_u x).
        activations: non-linearities inside fused experts. Their outputs are masked in place of the inner activation,
            which is the same for masks m of zeros and ones: (act(g) m) u = (act(g) u) m.
        no_drop: why the sub-layer cannot be dropped; empty if it can.
        no_mask: why the sub-layer cannot be masked; empty if it can.
    """

    block: str
    name: str
    readers: tuple[str, ...]
    writer: str
    norms: tuple[str, ...]
    normed: bool
    inner: tuple[str, ...]
    activations: tuple[str, ...]
    no_drop: str = ""
    no_mask: str = ""


def feed_forwards(model: nn.Module, sample: Mapping[str, Tensor] | None = None) -> tuple[FeedForward, ...]:
    """Every feed-forward sub-layer of a model. Adapters (of this library or of peft) may be attached to it.

    Args:
        model: any model whose layout can be discovered.
        sample: a batch that runs through the model; default: one is made for token models.

    Raises:
        LayoutError: no layout was found, or it has no feed-forward sub-layer.
    """
    try:
        backbone_alone: Any = get_adapters(model).disabled()
    except AttachError:
        backbone_alone = nullcontext()
    with backbone_alone:
        layout = discover(model, sample)
        order, normed_writers = _call_order(model, sample, layout)
    modules = dict(model.named_modules())
    found = tuple(
        _feed_forward(block, sublayer, modules, order[block.name], normed_writers)
        for block in layout.blocks
        for sublayer in block.sublayers
        if sublayer.kind == "feed_forward"
    )
    if not found:
        kinds = sorted({sublayer.kind for block in layout.blocks for sublayer in block.sublayers})
        raise LayoutError(
            "this model has no feed-forward sub-layer whose knowledge could be weakened",
            expected="blocks with a feed-forward sub-layer",
            got=f"sub-layers of kind {', '.join(kinds)} only",
            where=type(model).__name__,
            fix="train it as it is",
        )
    return found


def _feed_forward(
    block: Block,
    sublayer: Sublayer,
    modules: Mapping[str, nn.Module],
    order: dict[str, tuple[int, int]],
    normed_writers: set[tuple[str, str]],
) -> FeedForward:
    """Describe one feed-forward sub-layer; `order` and `normed_writers` are those of `_call_order`."""
    down = {_wrapper(m.name, modules) for m in sublayer.maps if m.role == "down" and m.kind != "experts"}
    fused = [m.name for m in sublayer.maps if m.role == "down" and m.kind == "experts"]
    maps = dict.fromkeys(_wrapper(m.name, modules) for m in sublayer.maps)
    writer = _wrapper(sublayer.writer, modules) if sublayer.writer else ""
    mixture = fused or any(m.role == "router" for m in sublayer.maps)
    readers = () if mixture or down != {writer} else tuple(name for name in maps if name != writer)
    activations, no_mask = [], ""
    for name in fused:
        inside = [child for child, module in modules[name].named_children() if not list(module.parameters())]
        activations += [f"{name}.{child}" for child in inside]
        if len(inside) != 1:
            no_mask = f"the inner activation of the fused experts {name} passes through no module of its own"
    if not down and not fused:
        no_mask = f"no map of {sublayer.name or block.name} reads an inner activation"
    norms, no_drop = [], "" if writer else f"no module returns what {sublayer.name or block.name} contributes"
    if writer:
        end = order[writer][1]
        norms = [n for n, (start, _) in order.items() if start > end and _is_norm(modules[n])]
        others = (m.name for other in block.sublayers if other is not sublayer for m in other.maps)
        if norms and any(order[name][0] > end for name in others if name in order):
            no_drop = f"another sub-layer follows {sublayer.name}: the norm {norms[0]} may be part of either"
    return FeedForward(
        block.name,
        sublayer.name,
        readers,
        writer,
        tuple(norms),
        bool(norms) and (writer, norms[0]) in normed_writers,
        tuple(sorted(down)),
        tuple(activations),
        no_drop,
        no_mask,
    )


def _call_order(
    model: nn.Module, sample: Mapping[str, Tensor] | None, layout: Layout
) -> tuple[dict[str, dict[str, tuple[int, int]]], set[tuple[str, str]]]:
    """Run the sample and record in which order modules are called.

    Returns:
        - By block and module, the numbers of the events at which the module's first call started and ended.
        - Each pair (writer, norm) of which the norm's input is the very tensor that the writer returned.
    """
    order: dict[str, dict[str, tuple[int, int]]] = {block.name: {} for block in layout.blocks}
    events, started = 0, dict[str, int]()
    written: dict[str, Tensor] = {}
    normed_writers: set[tuple[str, str]] = set()
    handles = []

    def watch(block: str, name: str, module: nn.Module) -> None:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal events
            events += 1
            started[name] = events
            if _is_norm(module) and args:
                normed_writers.update((writer, name) for writer, value in written.items() if value is args[0])

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal events
            events += 1
            order[block].setdefault(name, (started[name], events))
            if name in writers:
                written[name] = output if isinstance(output, Tensor) else output[0]

        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after))

    modules = dict(model.named_modules())
    writers = {_wrapper(s.writer, modules) for block in layout.blocks for s in block.sublayers if s.writer}
    device = device_of(model)
    batch = default_sample(model) if sample is None else sample
    batch = {name: value.to(device) for name, value in batch.items()}
    try:
        for block in layout.blocks:
            for name, module in modules.items():
                if name.startswith(f"{block.name}."):
                    watch(block.name, name, module)
        with undisturbed(model):
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return order, normed_writers


def _wrapper(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The module's name, or that of the peft adapter around it, so that masking and dropping include the adapter."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        around = ".".join(parts[:length])
        if "base_layer" in dict(modules[around].named_children()):
            return around
    return name


def _is_norm(module: nn.Module) -> bool:
    """Whether the module is a norm, judged by the name of its class."""
    return re.search("norm", type(module).__name__, re.IGNORECASE) is not None and not list(module.children())
