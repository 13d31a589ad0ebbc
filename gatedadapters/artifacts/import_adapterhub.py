"""An adapter of AdapterHub as gated paths on its model.

References:
    Poth et al. 2023 (Adapters), arXiv 2311.11077: the library, and where its bottlenecks lie. Pfeiffer et al. 2020
    (AdapterHub), arXiv 2007.07779.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath

import torch
from torch import Tensor, nn

from gatedadapters.artifacts.adapterhub_folder import (
    HEAD_CONFIG,
    AdapterHubFolder,
    BottleneckRecord,
    HeadRecord,
    LoraRecord,
    read_adapterhub,
)
from gatedadapters.artifacts.parts import Part, Places, attach_parts
from gatedadapters.backbone import Block, Layout, Sublayer, discover
from gatedadapters.config import GateConfig
from gatedadapters.errors import ArtifactError
from gatedadapters.paths import Point, Site
from gatedadapters.paths.bottleneck import ACTIVATIONS, ParallelOptions, SerialOptions
from gatedadapters.paths.lora import LoRAOptions
from gatedadapters.paths.scale import ScaleOptions
from gatedadapters.supernet.adapters import Adapters
from gatedadapters.supernet.attach import DEFAULT_TASK, check_no_adapters


@dataclass(frozen=True)
class _Place:
    """Where a bottleneck lies in a block: the module that holds it there, and the norm of its sub-layer."""

    holder: str
    norm: str


@dataclass(frozen=True)
class _Wiring:
    """The bottlenecks of a family.

    Attributes:
        attention: beside the attention.
        feed_forward: beside the feed-forward.
        norm_after: whether blocks normalise after the residual addition; else the norms come first.
    """

    attention: _Place
    feed_forward: _Place
    norm_after: bool


_BERT = _Wiring(_Place("attention.output", "attention.output.LayerNorm"), _Place("output", "output.LayerNorm"), True)
_LLAMA = _Wiring(
    _Place("attention_adapters", "input_layernorm"), _Place("output_adapters", "post_attention_layernorm"), False
)
_WIRING: Mapping[str, _Wiring] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), _BERT),
    **dict.fromkeys(("llama", "mistral"), _LLAMA),
    "distilbert": _Wiring(
        _Place("attention_adapters", "sa_layer_norm"), _Place("output_adapters", "output_layer_norm"), True
    ),
    "gpt2": _Wiring(_Place("attention_adapters", "ln_1"), _Place("output_adapters", "ln_2"), False),
}


@dataclass(frozen=True)
class _Head:
    """What a classifier of transformers computes, in the words of AdapterHub's heads, and the maps that do it."""

    layers: int
    activation: str | None
    pooled: bool
    maps: tuple[str, ...]


_LAYER_OF_HEAD = re.compile(r"heads\.[^.]+\.(?P<layer>[0-9]{1,3})\.(?P<leaf>weight|bias)")
_TWO = _Head(2, "tanh", False, ("classifier.dense", "classifier.out_proj"))
_HEADS: Mapping[str, tuple[_Head, ...]] = {
    "BertForSequenceClassification": (
        _Head(2, "tanh", False, ("bert.pooler.dense", "classifier")),
        _Head(1, None, True, ("classifier",)),
    ),
    "RobertaForSequenceClassification": (_TWO,),
    "XLMRobertaForSequenceClassification": (_TWO,),
    "DistilBertForSequenceClassification": (_Head(2, "relu", False, ("pre_classifier", "classifier")),),
}


def import_adapterhub(
    model: nn.Module,
    folder: str | FilePath,
    sample: Mapping[str, Tensor] | None = None,
    *,
    head: bool = True,
    tasks: Sequence[str] = (DEFAULT_TASK,),
    gates: GateConfig | None = None,
    heads: Sequence[str] | None = None,
    seed: int = 0,
) -> Adapters:
    """Attach an adapter that the adapters library saved as gated paths, every hidden unit and every rank a unit.

    The model then computes what the adapters library does; train on with a budget, or choose with `discretize`, then
    `compact`.

    | AdapterHub | here |
    |---|---|
    | Houlsby (`double_seq_bn`) | `serial` at the output of attention and feed-forward |
    | Pfeiffer (`seq_bn`) | `serial` that reads and changes the sum with the residual, normalised where a norm follows |
    | parallel (`par_bn`) | `parallel` |
    | LoRA | `lora` |
    | IA3 | `scale` |
    | a classification head | the classifier of the model, and BERT's pooler |

    Scales and gains of norms are multiplied into the weights. The bias of an up-projection becomes one more hidden
    unit, which reads nothing and is always on. Bottlenecks are known for BERT, RoBERTa, XLM-R, ELECTRA, DistilBERT,
    GPT-2, Llama and Mistral; LoRA and IA3 for every family that keeps its queries, keys and values apart.

    Args:
        model: the model that the adapter was trained on, in its class of transformers; no adapters attached.
        folder: what `model.save_adapter(folder, name, use_safetensors=True)` wrote.
        sample: a batch that runs through the model; a default is made for token models.
        head: take the prediction head, too, where the folder has one.
        tasks: names of the tasks, each with gates of its own.
        gates: how they are drawn; with `init` at its default or higher each is 1 in evaluation at the start.
        heads: parameters of the model to train and save along; default as in `attach`.
        seed: of gates and gate noise.

    Raises:
        ArtifactError: the folder is none of AdapterHub, a file is pickled, truncated or foreign, its configuration has
            no counterpart here, or the model is another one; what, is said.
        AttachError: the model already has adapters, or no such heads.
        LayoutError: see `attach`.

    The model is left untouched by all of them.
    """
    check_no_adapters(model)
    read = read_adapterhub(folder)
    saved = _head(model, read, read.head) if head and read.head is not None else {}
    layout = discover(model, sample)
    with torch.no_grad():
        maker = _bottlenecks if isinstance(read.record, BottleneckRecord) else _low_rank
        parts = list(maker(model, layout, read))
    return attach_parts(
        model,
        parts,
        layout,
        description="the modules and sizes of an adapter of AdapterHub",
        saved=saved,
        tasks=tasks,
        gates=gates,
        heads=heads,
        seed=seed,
        where=read.where,
    )


# -- LoRA and IA3 ------------------------------------------------------------------------------------------------------


def _low_rank(model: nn.Module, layout: Layout, read: AdapterHubFolder) -> Iterator[Part]:
    record, places = read.record, Places(layout, read.where)
    assert isinstance(record, LoraRecord)
    named = _named(model, read, {name for name, _ in model.named_modules()})
    order = {name: index for index, name in enumerate(places.order())}
    for name in sorted(named, key=lambda name: order.get(name, -1)):
        own = named[name]
        if record.composition_mode == "scale":
            if own.keys() != {"lora_B"} or own["lora_B"].dim() != 2 or own["lora_B"].shape[1] != 1:
                raise _unfit(read, f"{name}: lora_B (out, 1)", _shapes(own))
            site, factors = places.side(name, "output"), own["lora_B"][:, 0] * record.alpha
            if len(factors) != site.width_out:
                raise _unfit(read, f"{name}: {site.width_out} factors", _shapes(own))
            yield Part(ScaleOptions(), site, {"shift": factors - 1})
            continue
        site = places.at_map(name)
        shapes = {"lora_A": (record.r, site.width_in), "lora_B": (site.width_out, record.r)}
        if {key: tuple(value.shape) for key, value in own.items()} != shapes:
            raise _unfit(read, f"{name}: lora_A {shapes['lora_A']}, lora_B {shapes['lora_B']}", _shapes(own))
        up = own["lora_B"] * (record.alpha / record.r)
        yield Part(LoRAOptions(rank=record.r), site, {"down": own["lora_A"], "up": up})


# -- bottlenecks -------------------------------------------------------------------------------------------------------


def _bottlenecks(model: nn.Module, layout: Layout, read: AdapterHubFolder) -> Iterator[Part]:
    record, wiring = read.record, _WIRING.get(read.model_type)
    assert isinstance(record, BottleneckRecord)
    if wiring is None:
        raise ArtifactError(
            "where the adapters library puts bottlenecks is not known here for this family",
            expected=f"one of {', '.join(_WIRING)}",
            got=repr(read.model_type[:60]),
            where=read.where,
            fix="train a LoRA or IA3 there, which are read for every family, or search for bottlenecks here",
        )
    wanted: dict[str, tuple[Block, str, _Place]] = {}
    for block in layout.blocks:
        for kind, place, there in (
            ("attention", wiring.attention, record.mh_adapter),
            ("feed_forward", wiring.feed_forward, record.output_adapter),
        ):
            if there and block.index not in record.leave_out:
                wanted[f"{block.name}.{place.holder}"] = block, kind, place
    named = _named(model, read, wanted.keys())
    absent = [name for name in wanted if name not in named]
    if absent:
        raise _unfit(read, f"a bottleneck at {', '.join(absent[:3])}, as the configuration says", "none")
    for name, (block, kind, place) in wanted.items():
        sublayer = next((sublayer for sublayer in block.sublayers if sublayer.kind == kind), None)
        if sublayer is None or sublayer.writer is None:
            raise _unfit(read, f"a {kind} sub-layer in {block.name}", "none whose output a module returns")
        yield _bottleneck(model, read, named[name], block, sublayer, f"{block.name}.{place.norm}", wiring.norm_after)


def _bottleneck(
    model: nn.Module,
    read: AdapterHubFolder,
    own: Mapping[str, Tensor],
    block: Block,
    sublayer: Sublayer,
    norm: str,
    norm_after: bool,
) -> Part:
    record, width = read.record, sublayer.width
    assert isinstance(record, BottleneckRecord)
    assert sublayer.writer is not None
    down, bias, up = _weights(read, own, record, width)
    activation = "silu" if record.non_linearity == "swish" else record.non_linearity
    if record.is_parallel:  # it reads the residual, which the norm reads where that comes first
        tap = Point(sublayer.reader or sublayer.name, "input") if norm_after else Point(norm, "input")
        site = _site(tap, Point(sublayer.writer, "output"), block, sublayer)
        return Part(ParallelOptions(width=len(bias), activation=activation), site, _values(down, bias, up))
    normalized = None
    if not record.original_ln_before:
        point = Point(sublayer.writer, "output")
    elif norm_after:
        # It reads what the norm makes of its input, and adds to that input. Gains and shifts go into its own weights.
        module = model.get_submodule(norm)
        if not isinstance(module, nn.LayerNorm) or any(value is None for value in module._parameters.values()):
            raise _unfit(read, f"a LayerNorm at {norm}", type(module).__name__)
        gain, offset = module.weight.float(), module.bias.float()
        bias, down = bias + down @ offset, down * gain
        point, normalized = Point(norm, "input"), float(module.eps)
    elif sublayer is block.sublayers[-1]:  # it reads and changes the sum, which the block returns
        point = Point(block.name, "output")
    else:
        raise ArtifactError(
            "an adapter that reads the sum after the attention, which no module returns in such blocks",
            expected="original_ln_before: false for adapters beside the attention",
            got="original_ln_before: true, mh_adapter: true",
            where=read.where,
            fix="train it with double_seq_bn (Houlsby) or with mh_adapter=False (Pfeiffer)",
        )
    options = SerialOptions(width=len(bias), activation=activation, normalized=normalized)
    return Part(options, _site(point, point, block, sublayer), _values(down, bias, up))


def _weights(
    read: AdapterHubFolder, own: Mapping[str, Tensor], record: BottleneckRecord, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Down, its bias and up, the scale multiplied in, with the hidden unit that stands for the bias of `up`."""
    own = dict(own)
    scale = torch.tensor(record.scaling) if isinstance(record.scaling, float) else own.pop("scaling", torch.empty(0))
    hidden = own["adapter_up.weight"].shape[-1] if "adapter_up.weight" in own else 0
    shapes = {
        "adapter_down.0.weight": (hidden, width),
        "adapter_down.0.bias": (hidden,),
        "adapter_up.weight": (width, hidden),
        "adapter_up.bias": (width,),
    }
    found = {name: tuple(value.shape) for name, value in own.items()}
    if found != shapes or scale.numel() not in (1, width):
        expected = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise _unfit(read, expected, _shapes(own) + f", {scale.numel()} factors")
    down, bias = own["adapter_down.0.weight"], own["adapter_down.0.bias"]
    up, shift = scale.view(-1, 1) * own["adapter_up.weight"], scale.flatten() * own["adapter_up.bias"]
    activation = "silu" if record.non_linearity == "swish" else record.non_linearity
    always_on = float(ACTIVATIONS[activation](torch.ones(())))
    down, bias = torch.cat([down, torch.zeros(1, width)]), torch.cat([bias, torch.ones(1)])
    return down, bias, torch.cat([up, shift[:, None] / always_on], 1)


def _values(down: Tensor, bias: Tensor, up: Tensor) -> dict[str, Tensor]:
    return {"down": down, "bias": bias, "up": up}


def _site(tap: Point, write: Point, block: Block, sublayer: Sublayer) -> Site:
    width, calls = sublayer.width, float(block.calls)
    return Site(tap, write, width, width, block.name, block.index, sublayer.kind, "", calls)


# -- heads and names ---------------------------------------------------------------------------------------------------


def _head(model: nn.Module, read: AdapterHubFolder, head: HeadRecord) -> dict[str, Tensor]:
    """The values of a prediction head by the model's own parameters."""
    tensors = read.head_tensors
    if not any(name.startswith("heads.") for name in tensors):
        return dict(tensors)  # of a class of transformers, whose names they have
    known = _HEADS.get(type(model).__name__, ())
    activation = head.activation_function if head.layers > 1 else None
    asked = head.head_type, head.layers, activation, head.use_pooler
    fitting = [own for own in known if asked == ("classification", own.layers, own.activation, own.pooled)]
    layers = _layers_of_head(read) if fitting else {}
    if not fitting or len(layers) != head.layers:
        raise ArtifactError(
            "this prediction head has no counterpart in this model",
            expected="; ".join(
                f"{own.layers} layers, {own.activation or 'no activation'}, use_pooler {own.pooled}" for own in known
            )
            or "a BERT, RoBERTa, XLM-R or DistilBERT ForSequenceClassification",
            got=f"{head.head_type}, {head.layers} layers, {activation}, use_pooler {head.use_pooler}, for a "
            f"{type(model).__name__}",
            where=read.where / HEAD_CONFIG,
            fix="take the adapter alone with head=False, and train a head of the model's own",
        )
    in_order = zip(fitting[0].maps, sorted(layers), strict=True)
    return {f"{module}.{leaf}": value for module, layer in in_order for leaf, value in layers[layer].items()}


def _layers_of_head(read: AdapterHubFolder) -> dict[int, dict[str, Tensor]]:
    """Weight and bias of each map, by its number."""
    layers: dict[int, dict[str, Tensor]] = {}
    for name, value in read.head_tensors.items():
        parts = _LAYER_OF_HEAD.fullmatch(name)
        if parts is None:
            raise _unfit(read, "weights of a head, heads.NAME.LAYER.weight and .bias", name[:60])
        layers.setdefault(int(parts["layer"]), {})[parts["leaf"]] = value
    return layers


def _named(model: nn.Module, read: AdapterHubFolder, known: Collection[str]) -> dict[str, dict[str, Tensor]]:
    """What the folder holds by the model's names: its own, or those with another name of the backbone in front."""
    held, own = read.modules, getattr(model, "base_model_prefix", "")
    bare = {name: name.partition(".")[2] for name in held}
    within = (
        {name: f"{own}.{rest}" for name, rest in names.items()} for names in ({name: name for name in held}, bare)
    )
    for change in ({name: name for name in held}, bare, *within):
        if all(new in known for new in change.values()):
            return {change[name]: value for name, value in held.items()}
    raise _unfit(read, f"modules {', '.join(sorted(held)[:3])}", f"a {type(model).__name__} without them")


def _shapes(own: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in sorted(own.items())) or "nothing"


def _unfit(read: AdapterHubFolder, expected: str, got: str) -> ArtifactError:
    return ArtifactError(
        "this adapter was trained on another model, or its folder is damaged",
        expected=expected,
        got=got,
        where=read.where,
        fix="build the model that it was trained on, see model_name in its adapter_config.json",
    )
