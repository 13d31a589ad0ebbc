"""The layout of a backbone: its blocks, sub-layers and linear maps, discovered by running one batch.

No model family has a table here. Data flow decides, and common names (query, key, gate) only break ties.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gatedadapters.backbone import roles
from gatedadapters.backbone.attached import unpacked
from gatedadapters.backbone.sample import default_sample, device_of
from gatedadapters.backbone.trace import (
    BlockCall,
    Label,
    Map,
    MapUse,
    ModuleCall,
    NormUse,
    Stream,
    Trace,
    Tracer,
    has_stream,
    maps_of,
)
from gatedadapters.errors import LayoutError
from gatedadapters.runtime.sharding import class_name


@dataclass(frozen=True, slots=True)
class LinearMap:
    """One weight matrix, or one stack of expert matrices, and its function.

    Attributes:
        name: Qualified name of the owning module, e.g. ``"encoder.layer.0.attention.self.query"``.
        kind: How the weight is stored: ``"linear"`` (out, in), ``"conv1d"`` (in, out), ``"experts"`` three
            dimensions, the expert first, ``"embedding"`` (in, out), where a token id stands for a vector with one 1.
        role: In attention ``q k v qkv kv o``, in a feed-forward ``up gate gate_up down router``, in a mixer
            ``in``, ``out`` and what its authors call the rest (``x``, ``dt``); outside the blocks ``tokens`` for the
            table of token ids, ``head`` for a map to the vocabulary; else ``other``.
        in_features: Width read.
        out_features: Width written.
        traffic: Vectors multiplied per token that enters the stack, summed over all calls of one forward: 1.0
            as a rule, 4.0 for a map of ALBERT's one block called four times, the experts per token for
            ``"experts"``, 0.0 for projections of relative positions.
        parameter: Name of the parameter inside the module.
        experts: Number of experts for kind ``"experts"``, else 0.
        transposed: Whether the last two dimensions are stored as (in, out).
        host: ``""`` if the owning module takes the map's input and returns its output. Else the module that does the
            multiplication among other things: a stack of experts, a router that also chooses among them, a state-space
            mixer that uses the weight of a child without calling it.
    """

    name: str
    kind: Literal["linear", "conv1d", "experts", "embedding"]
    role: str
    in_features: int
    out_features: int
    traffic: float = 1.0
    parameter: str = "weight"
    experts: int = 0
    transposed: bool = False
    host: str = ""


@dataclass(frozen=True, slots=True)
class Norm:
    """One normalisation with learned gains, whatever its class: it keeps the shape of what it reads.

    Attributes:
        name: Qualified name of the module.
        role: What it normalises: ``norm`` for the hidden state or a mixture of maps, else the role of the map whose
            output it reads, as in ``q_norm``, ``k_norm``, ``o_norm``.
        width: Number of gains; the width of a head for norms of queries and keys.
        shifts: Whether it adds a vector, too (``bias``).
        traffic: Vectors normalised per token that enters the stack; the number of heads for norms of queries.
        channels_first: Whether the features are not the last dimension (batch and group norms of images).
    """

    name: str
    role: str
    width: int
    shifts: bool
    traffic: float = 1.0
    channels_first: bool = False


@dataclass(frozen=True, slots=True)
class Sublayer:
    """Maps that together read the hidden state once and add one contribution to it.

    Attributes:
        kind: What it computes; ``"mixer"`` mixes tokens without attention (recurrence, convolution). `maps_outside`
            gives each map outside the blocks a sub-layer of kind ``"outside"``, or ``"embedding"``.
        name: Qualified name of the smallest module that owns all its maps.
        width: Hidden width read and written.
        reader: Module whose input (first tensor argument or ``hidden_states``) is the hidden state of this
            sub-layer: the first map that reads it, or the module around all maps if it is also the writer
            (mixtures of experts). ``None`` if no module takes that tensor.
        writer: Module whose output (a tensor, or the first of a tuple) is the contribution, before a norm
            on it (Gemma 2) and before the residual addition. ``None`` if no module returns that tensor.
        maps: Its maps in call order.
        norms: The norms that belong to it, in call order: those of its maps' outputs, and those of the hidden state
            that it reads; in blocks that normalise after the residual addition (BERT), those of its sum.
    """

    kind: roles.Kind
    name: str
    width: int
    reader: str | None
    writer: str | None
    maps: tuple[LinearMap, ...]
    norms: tuple[Norm, ...] = ()


@dataclass(frozen=True, slots=True)
class Block:
    """One repeated unit of a stack.

    Attributes:
        name: Qualified module name.
        index: Position in call order, counted over all stacks.
        stack: ``"encoder"`` or ``"decoder"``, ``""`` for a single stack, else the name of its container.
        calls: How often one forward calls it.
        sublayers: In call order.
    """

    name: str
    index: int
    stack: str
    calls: int
    sublayers: tuple[Sublayer, ...]


@dataclass(frozen=True, slots=True)
class Unknown:
    """A weight that is not part of the layout: its full parameter name, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Layout:
    """The blocks, maps and remaining weights; each matrix is in exactly one of ``blocks``, ``outside``, ``unknown``.

    Attributes:
        model_class: Name of the model's class.
        hidden_size: Width of the hidden state, in the last stack if they differ.
        blocks: In call order.
        outside: Maps outside the blocks (heads, poolers, embedding projections), role ``head`` or ``other``.
        unknown: Weights with two or more dimensions that are not linear maps, or that the sample did not reach.
        examples_first: Whether the first dimension of the hidden state counts examples; in XLNet it counts positions.
        outside_norms: Norms outside the blocks: of embeddings, the final one, of heads.
        embeddings: Tables that the sample's token ids were looked up in, role ``tokens``.
    """

    model_class: str
    hidden_size: int
    blocks: tuple[Block, ...]
    outside: tuple[LinearMap, ...]
    unknown: tuple[Unknown, ...]
    examples_first: bool = True
    outside_norms: tuple[Norm, ...] = ()
    embeddings: tuple[LinearMap, ...] = ()

    def maps(self) -> Iterator[tuple[Block, Sublayer, LinearMap]]:
        """All maps of all blocks, in call order."""
        for block in self.blocks:
            for sublayer in block.sublayers:
                for linear in sublayer.maps:
                    yield block, sublayer, linear

    def maps_outside(self) -> Iterator[tuple[Block, Sublayer, LinearMap]]:
        """The maps outside the blocks, each as a sub-layer of its own in a nameless block after the last.

        Tables of token ids come first.
        """
        for table in self.embeddings:
            sublayer = Sublayer("embedding", table.name, table.out_features, None, None, (table,))
            yield self._outside(sublayer), sublayer, table
        for linear in self.outside:
            ends = linear.name if linear.in_features == linear.out_features else None
            sublayer = Sublayer("outside", linear.name, linear.in_features, ends, ends, (linear,))
            yield self._outside(sublayer), sublayer, linear

    def norms(self) -> Iterator[tuple[Block, Sublayer, Norm]]:
        """All norms: those of the blocks, then those outside them, each as a sub-layer of kind ``outside``."""
        for block in self.blocks:
            for sublayer in block.sublayers:
                for norm in sublayer.norms:
                    yield block, sublayer, norm
        for norm in self.outside_norms:
            sublayer = Sublayer("outside", norm.name, norm.width, norm.name, norm.name, (), (norm,))
            yield self._outside(sublayer), sublayer, norm

    def _outside(self, sublayer: Sublayer) -> Block:
        """The nameless block after the last, with one thing that lies outside the blocks."""
        return Block("", len(self.blocks), "", 1, (sublayer,))

    def table(self) -> str:
        """The layout as text, one line a map."""
        lines = [f"{self.model_class}  hidden {self.hidden_size}"]
        for block in self.blocks:
            calls = f"  x{block.calls}" if block.calls > 1 else ""
            stack = f"  ({block.stack})" if block.stack else ""
            lines.append(f"block {block.index}  {block.name}{stack}{calls}")
            for sub in block.sublayers:
                ends = f"reads at {sub.reader or '-'}, writes at {sub.writer or '-'}"
                lines.append(f"  {sub.kind}  {sub.name}: {ends}")
                lines.extend(f"    {_row(linear, sub.name)}" for linear in sub.maps)
                lines.extend(f"    {_norm_row(norm, sub.name)}" for norm in sub.norms)
        for title, entries in (
            (
                "outside",
                [_row(linear, "") for linear in (*self.embeddings, *self.outside)]
                + [_norm_row(norm, "") for norm in self.outside_norms],
            ),
            ("unknown", [f"{entry.name}  ({entry.reason})" for entry in self.unknown]),
        ):
            lines.extend([title, *(f"  {entry}" for entry in entries)] if entries else [])
        return "\n".join(lines)


def discover(model: nn.Module, sample: Mapping[str, Tensor] | None = None) -> Layout:
    """Discover how ``model`` is built by running ``sample`` through it.

    The model runs without gradients and in evaluation mode. It is left exactly as it was, also if discovery fails. It
    may be on the meta device.

    Args:
        model: Any module that runs as ``model(**sample)`` and contains a stack of residual blocks.
        sample: One batch, keys as the model's ``forward`` takes them. By default a row of token ids, or one
            blank image.

    Raises:
        LayoutError: The batch does not run, or no container of blocks carries a hidden state through.
    """
    names = {id(module): name for name, module in model.named_modules()}
    containers = {
        names[id(member)]: name
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        for member in module
        if any(True for _ in member.children())
    }
    if not containers:
        raise _no_blocks(model, "no nn.ModuleList or nn.Sequential of composite modules")
    try:
        batch: dict[str, Any] = default_sample(model) if sample is None else dict(sample)
    except LookupError as error:
        raise LayoutError(
            "there is no default batch for this model",
            expected="a model with token embeddings or an image size",
            got=error,
            where=type(model).__name__,
            fix="pass sample=, one batch as the model's forward takes it",
        ) from error
    weights = dict(_weights(model))
    with unpacked(model), undisturbed(model):
        while True:
            trace = _watch(model, batch, weights, containers)
            # A container whose members change the shape is not a stack, but one inside it may be (Swin).
            failed = {call.stack for call in trace.blocks if not call.residual}
            containers = {name: stack for name, stack in containers.items() if stack not in failed}
            if not any(stack.startswith(f"{bad}.") for stack in containers.values() for bad in failed):
                break
    calls = [call for call in trace.blocks if call.stack not in failed]
    if not calls:
        raise _no_blocks(model, "no container whose members take and return the same hidden state, plus something")
    first = next((value for value in batch.values() if isinstance(value, Tensor) and value.dim()), None)
    examples = 1 if first is None else len(first)
    positions_first = any(len(c.shape) == 3 and c.shape[1] == examples != c.shape[0] for c in calls)
    return replace(_Assembly(model, weights, trace, calls).layout(), examples_first=not positions_first)


class _Assembly:
    """Builds the ``Layout`` from a ``Trace``."""

    def __init__(self, model: nn.Module, weights: dict[Map, Tensor], trace: Trace, calls: list[BlockCall]) -> None:
        self.model, self.weights, self.trace = model, weights, trace
        self.calls: dict[str, list[BlockCall]] = {}
        self.tokens: dict[str, int] = {}  # number of tokens that enter each stack
        for call in calls:
            self.calls.setdefault(call.name, []).append(call)
            self.tokens.setdefault(call.stack, torch.Size(call.shape[:-1]).numel())
        self.uses: dict[Map, list[MapUse]] = {}
        self.uses_in: dict[str | None, list[MapUse]] = {}  # by block
        for use in trace.uses:
            self.uses.setdefault(use.map, []).append(use)
            self.uses_in.setdefault(use.block, []).append(use)
        self.norms: dict[str, list[NormUse]] = {}
        for norm in trace.norms:
            self.norms.setdefault(norm.name, []).append(norm)
        self.idle = [key for key in weights if key not in self.uses]
        self.links: dict[Map, list[frozenset[Map]]] = {}  # those of each map
        for link in trace.links:
            for key in link:
                self.links.setdefault(key, []).append(link)
        self.reasons: dict[Map, str] = {}
        self.memories: set[str] = set()  # stacks read by the cross-attention of others

    def layout(self) -> Layout:
        found = [(calls[0].stack, name, len(calls), self._sublayers(calls)) for name, calls in self.calls.items()]
        crossing = {stack for stack, _, _, subs in found for sub in subs if sub.kind == "cross_attention"}

        def label(stack: str) -> str:
            if len(self.tokens) == 1:
                return ""
            return "decoder" if stack in crossing else "encoder" if stack in self.memories else stack

        blocks = tuple(
            Block(name, index, label(stack), calls, subs) for index, (stack, name, calls, subs) in enumerate(found)
        )
        placed = {Map(m.name, m.parameter) for block in blocks for sub in block.sublayers for m in sub.maps}
        embeddings = tuple(self._embeddings())
        vocabularies = {table.in_features for table in embeddings}
        outside = tuple(
            self._linear(key, "head" if self.uses[key][0].out_features in vocabularies else "other")
            for key in self.uses
            if key not in placed and key not in self.reasons
        )
        placed.update(self.uses.keys() - self.reasons.keys())
        unknown = tuple(
            Unknown(f"{key.name}.{key.parameter}".lstrip("."), self._reason(key))
            for key in self.weights.keys() | self.reasons.keys()
            if key not in placed
        )
        width = next(reversed(self.calls.values()))[0].shape[-1]
        placed_norms = {norm.name for block in blocks for sub in block.sublayers for norm in sub.norms}
        return Layout(
            class_name(self.model),
            width,
            blocks,
            outside,
            tuple(sorted(unknown, key=lambda entry: entry.name)),
            outside_norms=tuple(self._norm(name, "norm") for name in self.norms if name not in placed_norms),
            embeddings=embeddings,
        )

    def _embeddings(self) -> Iterator[LinearMap]:
        """The tables of token ids."""
        tokens = self._tokens(None)
        for name in dict.fromkeys(use.name for use in self.trace.embeddings):
            uses = [use for use in self.trace.embeddings if use.name == name]
            traffic = sum(use.rows for use in uses) / tokens
            yield LinearMap(name, "embedding", "tokens", uses[0].vocabulary, uses[0].width, traffic, transposed=True)

    def _sublayers(self, calls: list[BlockCall]) -> tuple[Sublayer, ...]:
        block, written = calls[0], frozenset[Map]().union(*(maps_of(call.writes) for call in calls))
        # A map shared between blocks belongs to the first that calls it.
        uses = [use for use in self.uses_in.get(block.name, ()) if self._home(use.map) == block.name]
        # In Llama 4 the router's output scales the input of the experts, so it feeds maps of the same module.
        scaling = [
            frozenset({key, use.map})
            for use in uses
            for key in maps_of(use.reads) - written
            if has_stream(use.reads) and _common([key.name, use.map.name]).startswith(f"{block.name}.")
        ]
        sublayers = []
        links = [link for use in uses for link in self.links.get(use.map, ())]
        found = roles.map_groups(uses, [*links, *scaling], written)
        # In Zamba 2 the shared transformer's output is added to the hidden state that a later sub-layer reads, but not
        # to that of the block. Such maps count as writers too.
        read = frozenset[Map]().union(*(maps_of(use.reads) for use in uses if has_stream(use.reads)))
        lent = {key for group in found if not group.writers for key in read & group.uses.keys()}
        written |= lent
        for group in (replace(group, writers=group.writers | (lent & group.uses.keys())) for group in found):
            if not group.writers:
                self.reasons |= dict.fromkeys(group.uses, f"its values do not reach the output of {block.name}")
                continue
            name = _common([key.name for key in group.uses])
            attention = roles.attention_of(group, self.trace, block.name)
            kind = roles.kind_of(group, attention, self.trace, block.stack, name)
            if kind == "cross_attention":
                reads = frozenset[Label]().union(*(use.reads for use in group.uses.values()))
                self.memories |= {label.stack for label in reads if isinstance(label, Stream)} - {block.stack}
            role = roles.roles_of(group, kind, attention, block.shape[-1], self.trace)
            reader, writer = self._ends(block, group, written, name)
            maps = tuple(self._linear(key, role[key]) for key in group.uses)
            maps += tuple(self._idle_experts(name, maps))
            sublayers.append(Sublayer(kind, name, block.shape[-1], reader, writer, maps))
        return self._with_norms(block.name, sublayers)

    def _with_norms(self, block: str, sublayers: list[Sublayer]) -> tuple[Sublayer, ...]:
        """The sub-layers of a block with the norms that belong to each."""
        place = {Map(m.name, m.parameter): (i, m.role) for i, sub in enumerate(sublayers) for m in sub.maps}
        steps = [(number, place[use.map][0]) for number, use in enumerate(self.trace.uses) if use.map in place]
        here = [uses for uses in self.norms.values() if self._norm_home(uses) == block]
        if not steps:
            return tuple(sublayers)
        # A norm of the hidden state that runs after all maps of the block: norms follow what they belong to.
        after = any(has_stream(use.reads) and use.started > steps[-1][0] for uses in here for use in uses)
        norms: list[list[Norm]] = [[] for _ in sublayers]
        for first, *_ in here:
            read = {place[key] for key in maps_of(first.reads) if key in place}
            before = [index for number, index in steps if number < first.started][-1:]
            later = [index for number, index in steps if number >= first.started][:1]
            role = "norm"
            if read and not has_stream(first.reads):
                index = max(index for index, _ in read)
                roles_read = {role for _, role in read} - {"other"}
                role = f"{roles_read.pop()}_norm" if len(roles_read) == 1 else role
            else:
                index = (before + later if after else later + before)[0]
            norms[index].append(self._norm(first.name, role))
        return tuple(replace(sub, norms=tuple(own)) for sub, own in zip(sublayers, norms, strict=True))

    def _norm_home(self, uses: list[NormUse]) -> str | None:
        return next((use.block for use in uses if use.block in self.calls), None)

    def _norm(self, name: str, role: str) -> Norm:
        uses = self.norms[name]
        first, home = uses[0], self._norm_home(uses)
        rows = sum(use.rows for use in uses)
        tokens = self._tokens(self.calls[home][0].stack if home else first.stack)
        return Norm(name, role, first.width, first.shifts, rows / tokens, first.channels_first)

    def _tokens(self, stack: str | None) -> int:
        """Number of tokens that enter a stack; for parts before all stacks those of the first."""
        return self.tokens.get(stack or "") or next(iter(self.tokens.values()))

    def _idle_experts(self, name: str, maps: tuple[LinearMap, ...]) -> Iterator[LinearMap]:
        """Experts that got no token. Their names differ only in a number from those of maps that were called."""
        twins = {(_numberless(m.name), m.parameter): m for m in maps}
        for key in self.idle:
            if key.name.startswith(f"{name}."):
                twin = twins.get((_numberless(key.name), key.parameter))
                if twin is not None:
                    yield replace(twin, name=key.name, traffic=0.0)

    def _home(self, key: Map) -> str | None:
        return next((use.block for use in self.uses[key] if use.block in self.calls), None)

    def _ends(
        self, block: BlockCall, group: roles.MapGroup, written: frozenset[Map], name: str
    ) -> tuple[str | None, str | None]:
        """Reader and writer: the smallest modules that take the hidden state and return the contribution."""
        stream, width = Stream(block.stack), block.shape[-1]

        def contributes(call: ModuleCall) -> bool:
            return (
                bool(call.write_shape)
                and call.write_shape[-1] == width
                and torch.Size(call.write_shape).numel() == torch.Size(block.shape).numel()
                and not has_stream(call.writes)
                and maps_of(call.writes) & written == group.writers
            )

        def reads(call: ModuleCall) -> bool:
            return stream in call.reads and call.read_shape[-1] == width

        # Inner modules come first. One that returns flattened tokens is taken only if none keeps the shape.
        writers = [call for call in block.calls if contributes(call)]
        writer = next((call for call in writers if call.write_shape == block.shape), writers[0] if writers else None)
        if writer is not None and reads(writer):
            return writer.name, writer.name
        owners = {key.name for key in group.uses}
        readers = sorted(filter(reads, block.calls), key=lambda call: call.started)
        reader = next((call.name for call in readers if call.name in owners), None)
        reader = reader or next((call.name for call in readers if f"{name}.".startswith(f"{call.name}.")), None)
        return reader, writer.name if writer else None

    def _linear(self, key: Map, role: str) -> LinearMap:
        uses, weight = self.uses[key], self.weights.get(key)
        home = self._home(key)
        stack = self.calls[home][0].stack if home else uses[0].stack
        tokens = self._tokens(stack)
        experts = weight.shape[0] if weight is not None and weight.dim() == 3 else 0
        plain = not experts and uses[0].host == key.name and key.name not in self.trace.composite
        return LinearMap(
            name=key.name,
            kind="experts" if experts else "conv1d" if uses[0].transposed else "linear",
            role=role,
            in_features=uses[0].in_features,
            out_features=uses[0].out_features,
            traffic=sum(use.rows for use in uses) / tokens,
            parameter=key.parameter,
            experts=experts,
            transposed=uses[0].transposed,
            host="" if plain else uses[0].host,
        )

    def _reason(self, key: Map) -> str:
        if key in self.reasons:
            return self.reasons[key]
        if key in self.trace.seen:
            return "used, but not as one matrix in a product"
        if key.name in self.trace.called:
            return "called, but its weight was not seen"
        takes = inspect.signature(self.model.forward).parameters
        hint = f", which has no {_GLOBAL}" if "global" in key.name and _GLOBAL in takes else ""
        return f"{NEVER_CALLED} by the sample{hint}"


NEVER_CALLED = "never called"
"""How the reason begins for a weight that the sample does not reach."""

_GLOBAL = "global_attention_mask"  # LED and Longformer have maps of their own for tokens that it marks

_SAYS_OTHER_IDS = re.compile("mask|type|position|label|task")
"""Names of a batch's integers that are no token ids."""


def _watch(model: nn.Module, batch: dict[str, Any], weights: dict[Map, Tensor], containers: dict[str, str]) -> Trace:
    """Run the batch once under a tracer."""
    device = device_of(model)
    batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    tracer = Tracer(model, weights, containers)
    try:
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                tracer.label_input(value)
            elif isinstance(value, Tensor) and not _SAYS_OTHER_IDS.search(name):
                tracer.mark_ids(value)
        with tracer:
            model(**batch)
    except Exception as error:
        shapes = ", ".join(f"{k} {list(v.shape)}" if isinstance(v, Tensor) else k for k, v in batch.items())
        raise LayoutError(
            "the sample batch does not run through the model",
            expected=f"{type(model).__name__}(**sample) to return",
            got=f"{type(error).__name__}: {error}",
            where=f"a batch of {shapes}",
            fix="pass sample=, one batch that the model runs on",
        ) from error
    finally:
        tracer.remove()
    return tracer.trace


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; training flags and random states are restored afterwards.

    Autocast is off: it replaces weights by copies, and by the same ones again in a second run, so that a layout found
    under it would depend on what ran before.
    """
    training = {module: module.training for module in model.modules()}
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        model.eval()
        device = device_of(model).type
        whole: AbstractContextManager[object] = nullcontext()
        if device != "meta":
            whole = torch.autocast(device, enabled=False)
        with torch.no_grad(), torch.random.fork_rng(devices=cuda), whole:
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


def _weights(model: nn.Module) -> Iterator[tuple[Map, Tensor]]:
    """Every matrix or stack of matrices; embeddings and the biases of experts are neither."""
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            for parameter, value in module.named_parameters(recurse=False):
                if value.dim() >= 2 and not parameter.endswith("bias"):
                    yield Map(name, parameter), value


def _common(names: list[str]) -> str:
    """The longest dotted prefix shared by ``names``."""
    first, last = min(parts := [name.split(".") for name in names]), max(parts)
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return ".".join(part for part, _ in shared)


def _numberless(name: str) -> str:
    """``"mlp.experts.3.w1"`` -> ``"mlp.experts.#.w1"``."""
    parent, _, last = name.rpartition(".")
    return f"{re.sub(r'[0-9]+', '#', parent)}.{last}"


def _row(linear: LinearMap, prefix: str) -> str:
    name = linear.name.removeprefix(prefix).lstrip(".") or linear.name
    name = name if linear.parameter == "weight" else f"{name}:{linear.parameter}"
    experts = f"{linear.experts} x " if linear.experts else ""
    traffic = "" if linear.traffic == 1 else f"  traffic {linear.traffic:g}"
    return f"{linear.role:<8} {name:<32} {experts}{linear.in_features} -> {linear.out_features}{traffic}"


def _norm_row(norm: Norm, prefix: str) -> str:
    name = norm.name.removeprefix(prefix).lstrip(".") or norm.name
    traffic = "" if norm.traffic == 1 else f"  traffic {norm.traffic:g}"
    return f"{norm.role:<8} {name:<32} {norm.width} gains{' and shifts' if norm.shifts else ''}{traffic}"


def _no_blocks(model: nn.Module, got: str) -> LayoutError:
    return LayoutError(
        "the model has no repeated blocks",
        expected="a container of blocks, each adding to a hidden state of constant width",
        got=got,
        where=type(model).__name__,
        fix="pass the backbone itself, or a sample= that runs through all of it; a model that keeps its features in "
        "another dimension than the last (SqueezeBERT) is tuned by elements: ga.score, ga.select, ga.apply_mask",
    )
