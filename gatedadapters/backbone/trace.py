"""Watches one forward pass: which weights multiply which tensors, and which maps feed each other.

Every tensor carries *labels* that say where its values come from: the residual stream of a stack, or the outputs of
linear maps. The output of a linear map gets one new label. The output of any other operation gets the union of the
labels of its inputs. Three facts follow without a table of names:

* A map that reads a tensor labelled with the stream reads the hidden state.
* A map whose label arrives in the block's output, beside the stream, writes the hidden state.
* Maps that feed each other without the stream in between belong to one sub-layer.

Labels are kept per storage, so views and in-place operations need no special case. Operations are seen below autograd,
by a dispatch mode; so the trace also works on the meta device and inside expert modules without ``nn.Linear``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gatedadapters.backbone.quantized import parts
from gatedadapters.runtime.sharding import is_shard, is_sharded


@dataclass(frozen=True, slots=True)
class Map:
    """Label: the output of one weight matrix, ``parameter`` of module ``name``."""

    name: str
    parameter: str


@dataclass(frozen=True, slots=True)
class Stream:
    """Label: the hidden state that runs through the blocks of one container (a ``ModuleList``)."""

    stack: str


@dataclass(frozen=True, slots=True)
class Weight:
    """Label: the values of a parameter itself, possibly sliced, transposed or cast."""

    map: Map


@dataclass(frozen=True, slots=True)
class AttentionScore:
    """Label: a product of two activations; ``softmaxed`` once normalised into attention weights."""

    order: int
    left: frozenset[Map]
    right: frozenset[Map]
    softmaxed: bool = False


@dataclass(frozen=True, slots=True)
class Input:
    """Label: a floating-point tensor of the sample batch."""


Label = Map | Stream | Weight | AttentionScore | Input
Labels = frozenset[Label]
Maps = frozenset[Map]
NONE: Labels = frozenset()


@dataclass(slots=True)
class MapUse:
    """One multiplication of ``rows`` vectors, of width ``in_features`` and with the labels ``reads``, by a weight."""

    map: Map
    in_features: int
    out_features: int
    transposed: bool  # the weight is stored (in, out), not (out, in)
    rows: int
    reads: Labels
    block: str | None
    stack: str | None  # the stack running, or the last one that ran
    host: str  # the module that ran; it need not own the weight


@dataclass(slots=True)
class ModuleCall:
    """One call of a module inside a block. Shapes are those of its first input and its first output."""

    name: str
    started: int  # number of earlier uses of maps
    reads: Labels
    read_shape: tuple[int, ...]
    writes: Labels = NONE
    write_shape: tuple[int, ...] = ()
    normalises: bool = False  # it computed a mean, a variance or a norm itself


@dataclass(slots=True)
class NormUse:
    """One call of a module that normalises ``rows`` vectors of ``width`` features and multiplies them with gains."""

    name: str
    width: int
    rows: int
    shifts: bool  # it adds a vector of the same width
    channels_first: bool  # the features are not the last dimension
    reads: Labels
    block: str | None
    stack: str | None  # the stack running, or the last one that ran
    started: int  # number of earlier uses of maps


@dataclass(slots=True)
class EmbeddingUse:
    """One lookup of ``rows`` token ids in a table of ``vocabulary`` rows of ``width`` features."""

    name: str
    vocabulary: int
    width: int
    rows: int


@dataclass(slots=True)
class BlockCall:
    """One call of a block: the residual stream enters with ``shape`` and leaves with the labels ``writes``."""

    name: str
    stack: str
    shape: tuple[int, ...]
    calls: list[ModuleCall] = field(default_factory=list)  # in order of completion: inner modules come first
    writes: Labels = NONE
    residual: bool = False  # the stream left the block with the shape it had


@dataclass(slots=True)
class Attention:
    """One weighting of values by normalised query-key products; the maps whose outputs each of the three comes from."""

    block: str | None
    query: Maps
    key: Maps
    value: Maps


@dataclass(slots=True)
class Trace:
    """The record of one forward pass."""

    uses: list[MapUse] = field(default_factory=list)
    norms: list[NormUse] = field(default_factory=list)
    embeddings: list[EmbeddingUse] = field(default_factory=list)
    blocks: list[BlockCall] = field(default_factory=list)
    attention: list[Attention] = field(default_factory=list)
    links: list[Maps] = field(default_factory=list)  # maps that share a sub-layer
    activated: set[Map] = field(default_factory=set)  # passed through a non-linearity
    mixed: set[Map] = field(default_factory=set)  # combined along the tokens
    routed: set[Map] = field(default_factory=set)  # decided which experts run
    seen: set[Map] = field(default_factory=set)  # weights that took part in any operation
    called: set[str] = field(default_factory=set)  # modules that ran
    composite: set[str] = field(default_factory=set)  # modules that returned more than one tensor


_MIXING = {"convolution", "_convolution", "cumsum", "cumprod", "roll", "flip", "_fft_r2c", "_fft_c2c"}
_CHOOSING = {"topk", "sort", "argmax", "max"}
_NONLINEAR = {
    *("relu", "gelu", "silu", "sigmoid", "tanh", "elu", "leaky_relu", "hardswish", "hardtanh", "mish"),
    *("relu_", "gelu_", "silu_", "sigmoid_", "tanh_", "elu_", "softplus", "clamp_min", "log_sigmoid_forward"),
}
_ADDITIVE = {"add", "add_", "sub", "cat", "stack"}
_NORMALISING = {
    *("native_layer_norm", "native_group_norm", "native_batch_norm", "_fused_rms_norm", "rms_norm"),
    *("mean", "var", "var_mean", "std", "std_mean", "norm", "linalg_vector_norm", "rsqrt"),
}
_CHANNELS_FIRST = (nn.GroupNorm, nn.modules.batchnorm._NormBase)


def nested_tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested sequences and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from nested_tensors(part)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from nested_tensors(part)


def first_float_tensor(*values: Any) -> Tensor | None:
    """The first floating-point tensor with at least two dimensions in nested ``values``."""
    return next((tensor for tensor in nested_tensors(values) if tensor.is_floating_point() and tensor.dim() >= 2), None)


def _is_real(tensor: Tensor) -> bool:
    """Whether the tensor holds values, not indices; rotary embeddings may be complex."""
    return tensor.is_floating_point() or tensor.is_complex()


def maps_of(labels: Iterable[Label]) -> Maps:
    """The maps among ``labels``."""
    return frozenset(label for label in labels if isinstance(label, Map))


def has_stream(labels: Labels) -> bool:
    """Whether some of the values come from a residual stream."""
    return any(isinstance(label, Stream) for label in labels)


class Tracer(TorchDispatchMode):
    """A dispatch mode and module hooks, which fill a ``Trace``.

    Args:
        model: The model that will run.
        weights: The matrices to watch.
        containers: Modules that may be blocks, each with the name of its container, the stack.
    """

    supports_higher_order_operators = True  # flex attention is one

    def __init__(self, model: nn.Module, weights: Mapping[Map, Tensor], containers: Mapping[str, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self._containers = containers
        # Keyed by object, not by address: a freed address may be reused by a tensor that the mode does not see.
        self._labels: WeakKeyDictionary[UntypedStorage, Labels] = WeakKeyDictionary()
        self._owners: WeakKeyDictionary[UntypedStorage, list[Map]] = WeakKeyDictionary()
        self._ids: WeakKeyDictionary[UntypedStorage, bool] = WeakKeyDictionary()  # token ids of the sample
        self._tables: set[int] = set()  # weights that token ids were looked up in; tied ones are one table
        self._shapes = {key: weight.shape for key, weight in weights.items()}
        self._stack: list[ModuleCall] = []
        self._block: BlockCall | None = None
        self._last_stack: str | None = None
        self._order = 0
        for key, weight in weights.items():  # tied weights have several owners
            self._owners.setdefault(weight.untyped_storage(), []).append(key)
        for module in model.modules():  # tensors that the model holds have no labels
            for held in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
                for part in parts(held) if isinstance(held, Tensor) else ():
                    self._labels[part.untyped_storage()] = NONE
        self._handles = [
            handle
            for name, module in model.named_modules()
            for handle in (
                module.register_forward_pre_hook(self._entering(name), with_kwargs=True),
                module.register_forward_hook(self._leaving(name, module)),
            )
        ]

    def remove(self) -> None:
        """Remove the hooks and forget every tensor."""
        for handle in self._handles:
            handle.remove()
        self._labels.clear()

    def label_input(self, tensor: Tensor) -> None:
        """Label a floating-point tensor of the sample batch."""
        self._labels[tensor.untyped_storage()] = frozenset({Input()})

    def mark_ids(self, tensor: Tensor) -> None:
        """Remember that an integer tensor of the sample batch holds token ids."""
        self._ids[tensor.untyped_storage()] = True

    # ---------------------------------------------------------------- modules
    def _entering(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.trace.called.add(name)
            if is_sharded(module, itself=True):
                self._gathered(name, module)
            hidden = first_float_tensor(args, kwargs.get("hidden_states"), kwargs)
            if hidden is not None and self._block is None and name in self._containers:
                stack = self._containers[name]
                self._block = BlockCall(name, stack, tuple(hidden.shape))
                self._labels[hidden.untyped_storage()] = frozenset({Stream(stack)})
            shape = () if hidden is None else tuple(hidden.shape)
            call = ModuleCall(name, len(self.trace.uses), self._of(hidden), shape)
            self._stack.append(call)

        return hook

    def _gathered(self, name: str, module: nn.Module) -> None:
        """Take up the whole weights that FSDP has just put in the place of a module's shards."""
        for inner, part in module.named_modules(prefix=name):
            for leaf, held in part._parameters.items():
                if held is None or is_shard(held):
                    continue
                key = held.untyped_storage()
                if Map(inner, leaf) in self._shapes:
                    owners = self._owners.setdefault(key, [])
                    owners += [Map(inner, leaf)] if Map(inner, leaf) not in owners else []
                else:
                    self._labels[key] = NONE

    def _leaving(self, name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            while self._stack[-1].name != name:
                self._stack.pop()  # a module that raised an error, which was caught
            call, out = self._stack[-1], first_float_tensor(output)
            self._embedding(name, module, args, out)
            if not isinstance(output, Tensor):
                self.trace.composite.add(name)
            if out is not None:
                self._opaque_linear(name, module, call, out)
                call.writes, call.write_shape = self._of(out), tuple(out.shape)
                self._norm(module, call)
            self._stack.pop()
            block = self._block
            if block is None:
                return
            if name != block.name:
                block.calls.append(call)
                return
            block.writes = call.writes
            block.residual = call.write_shape == block.shape and Stream(block.stack) in call.writes
            self.trace.blocks.append(block)
            if out is not None:  # the next stack reads it as one hidden state
                self._labels[out.untyped_storage()] = frozenset({Stream(block.stack)})
            self._last_stack, self._block = block.stack, None

        return hook

    def _embedding(self, name: str, module: nn.Module, args: tuple[Any, ...], out: Tensor | None) -> None:
        """Record a module that looks token ids up in its only parameter, a table with a row for each."""
        own, ids = dict(module.named_parameters()), args[0] if args else None
        table = own.pop("weight", None)
        if own or table is None or table.dim() != 2 or not isinstance(ids, Tensor) or _is_real(ids) or out is None:
            return
        if out.shape != (*ids.shape, table.shape[1]):
            return
        if ids.untyped_storage() in self._ids or id(table) in self._tables:
            self._tables.add(id(table))
            self.trace.embeddings.append(EmbeddingUse(name, table.shape[0], table.shape[1], ids.numel()))

    def _norm(self, module: nn.Module, call: ModuleCall) -> None:
        """Record a module that normalises: its parameters are gains, and shifts at most, and it keeps the shape."""
        own, shape = dict(module.named_parameters()), call.read_shape
        gains, shifts = own.pop("weight", None), own.pop("bias", None)
        if gains is None or own or gains.dim() != 1 or call.write_shape != shape or not gains.is_floating_point():
            return
        if shifts is not None and shifts.shape != gains.shape:
            return
        # A kernel that the dispatcher does not show leaves only the name of the class to judge by.
        if not call.normalises and "norm" not in type(module).__name__.lower():
            return
        width = len(gains)
        last = shape[-1] == width and not isinstance(module, _CHANNELS_FIRST)
        if not last and width not in shape:
            return
        block, rows = self._block, torch.Size(shape).numel() // width
        name, stack = (None, self._last_stack) if block is None else (block.name, block.stack)
        use = NormUse(call.name, width, rows, shifts is not None, not last, call.reads, name, stack, call.started)
        self.trace.norms.append(use)

    def _opaque_linear(self, name: str, module: nn.Module, call: ModuleCall, out: Tensor) -> None:
        """Record a quantised or offloaded linear module, which multiplies with another tensor than its weight.

        Its attributes `in_features` and `out_features` tell that it is linear.
        """
        width_in, width_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if not isinstance(width_in, int) or not isinstance(width_out, int) or out.shape[-1] != width_out:
            return
        if any(use.map.name == name for use in self.trace.uses[call.started :]) or not call.read_shape:
            return
        rows = torch.Size(call.read_shape).numel() // width_in
        use = self._use(Map(name, "weight"), width_in, width_out, False, rows, call.reads)
        self._labels[out.untyped_storage()] = frozenset({use.map})

    # ------------------------------------------------------------- operations
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "overloadpacket", func).__name__
        tensors = list(nested_tensors((args, kwargs)))
        # A view of a tensor that is still empty does not read it, and neither does an operation that writes into it.
        view, writes = getattr(func, "is_view", False), getattr(getattr(func, "_schema", None), "is_mutable", False)
        # The labels are looked up before the operation runs: an in-place one changes those of its own input.
        known = [(tensor, self._of(tensor, guess=not (view or writes))) for tensor in tensors if _is_real(tensor)]
        out = _answer_on_meta(name, args) if tensors and tensors[0].is_meta else NotImplemented
        if out is NotImplemented:
            out = func(*args, **kwargs)
        labels = self._flow(name, args, known)
        inputs = {tensor.untyped_storage() for tensor in tensors}
        for made in nested_tensors(out):
            key = made.untyped_storage()
            if key in self._owners or "empty" in name or (view and key not in self._labels):
                continue  # a weight keeps its label; an empty tensor gets one when it is filled
            fresh = labels if _is_real(made) else NONE
            self._labels[key] = self._labels.get(key, NONE) | fresh if key in inputs else fresh
        return out

    def _of(self, tensor: Tensor | None, guess: bool = True) -> Labels:
        if tensor is None:
            return NONE
        key = tensor.untyped_storage()
        if key in self._owners:
            # Of the owners of a tied weight, take the one whose forward is running.
            running = {call.name for call in self._stack}
            owners = self._owners[key]
            return frozenset({Weight(next((o for o in owners if o.name in running), owners[0]))})
        if guess and key not in self._labels and self._block and tensor.dim() > 1 and _is_real(tensor):
            # A kernel that the dispatcher does not show made it: assume that it read everything its module computed.
            call = self._stack[-1]
            made = frozenset(use.map for use in self.trace.uses[call.started :])
            self._labels[key] = made or call.reads
        return self._labels.get(key, NONE)

    def _flow(self, name: str, args: Any, known: list[tuple[Tensor, Labels]]) -> Labels:
        """Return the labels of an operation's output, and record in the trace what the operation tells."""
        for _, labels in known:
            self.trace.seen.update(label.map for label in labels if isinstance(label, Weight))
        if name in _NORMALISING and self._stack:
            self._stack[-1].normalises = True
        if "mm" in name or name in ("mv", "addmv", "linear", "dot"):
            operands = args[1:3] if name.startswith(("add", "baddbmm")) else args[:2]
            return self._product(name, *operands)
        if any(part in name for part in ("scaled_dot_product", "attention", "flash_attn")):
            query, key, value = (maps_of(self._of(arg)) for arg in args[:3])
            return self._attend(query, key, value)
        if name.endswith("_like") or name.startswith("new_"):
            return NONE  # these read only the shape and dtype of their argument
        if len(known) == 1 and name != "embedding":
            union = known[0][1]  # a weight stays itself when cast, sliced, gathered or transposed
        else:
            union = frozenset().union(*(labels for _, labels in known))
            union = frozenset(label for label in union if not isinstance(label, Weight))
        if not union:
            return NONE
        if "softmax" in name:
            return frozenset(
                AttentionScore(label.order, label.left, label.right, True)
                if isinstance(label, AttentionScore)
                else label
                for label in union
            )
        if not has_stream(union):
            mixing = name in _MIXING or (name == "select" and self._is_one_token(*args[:2]))
            for happens, noted in (
                (mixing, self.trace.mixed),
                (name in _CHOOSING, self.trace.routed),
                (name in _NONLINEAR, self.trace.activated),
            ):
                if happens:
                    noted.update(maps_of(union))
        contributions = [maps for _, labels in known if not has_stream(labels) and (maps := maps_of(labels))]
        # A block itself may add the contributions of *different* sub-layers (parallel attention). All other operations
        # that combine maps happen within one sub-layer.
        inside = self._block is not None and self._stack[-1].name != self._block.name
        if len(contributions) > 1 and (inside or name not in _ADDITIVE):
            self.trace.links.append(frozenset().union(*contributions))
        return union

    def _is_one_token(self, tensor: Tensor, dim: int) -> bool:
        """Whether selecting along ``dim`` picks one position; a recurrence written as a loop does."""
        shape = self._block.shape if self._block else ()
        return len(shape) == 3 and tensor.dim() == 3 and dim % 3 == 1 and tensor.shape[:2] == shape[:2]

    def _product(self, name: str, left: Any, right: Any) -> Labels:
        from_left, from_right = self._of(left), self._of(right)
        for weight, labels, other, reads in (
            (right, from_right, left, from_left),
            (left, from_left, right, from_right),
        ):
            key = next((label.map for label in labels if isinstance(label, Weight)), None)
            if key is None or weight.dim() < 2:
                continue
            # As the right operand a matrix is (in, out); as the left one, or in `linear`, it is (out, in).
            rows_last = weight is left or name == "linear"
            width_in, width_out = (weight.shape[-1], weight.shape[-2]) if rows_last else weight.shape[-2:]
            stored = tuple(self._shapes[key][-2:])
            if {stored, stored[::-1]}.isdisjoint({(width_in, width_out)}):
                continue  # a reshaped tensor (XLNet's three-dimensional heads): not one matrix
            if other.shape[-1 if weight is right else max(-2, -other.dim())] != width_in:
                continue  # packed values, which the kernel reads as another matrix than their shape says
            transposed = stored == (width_in, width_out)
            if width_in == width_out:
                transposed = (weight.stride(-1) == 1) != rows_last
            use = self._use(key, width_in, width_out, transposed, other.numel() // width_in, reads)
            return frozenset({use.map})
        left_maps, right_maps = maps_of(from_left), maps_of(from_right)
        scores = [label for label in from_left if isinstance(label, AttentionScore) and label.softmaxed]
        if scores:
            first = min(scores, key=lambda score: score.order)
            return self._attend(first.left, first.right, right_maps, left_maps)
        union = frozenset(label for label in from_left | from_right if not isinstance(label, Weight))
        if left_maps and right_maps and not has_stream(union):
            self._order += 1
            self.trace.mixed |= left_maps | right_maps
            self.trace.links.append(left_maps | right_maps)
            union |= {AttentionScore(self._order, left_maps, right_maps)}
        return union

    def _attend(self, query: Maps, key: Maps, value: Maps, more: Maps = frozenset()) -> Labels:
        block = self._block.name if self._block else None
        self.trace.attention.append(Attention(block, query, key, value))
        union = query | key | value | more
        self.trace.links.append(union)
        return frozenset(union)

    def _use(self, key: Map, width_in: int, width_out: int, transposed: bool, rows: int, reads: Labels) -> MapUse:
        reads = frozenset(label for label in reads if not isinstance(label, Weight))
        block = self._block
        if block is not None and not reads:
            rows = 0  # these rows are relative positions, not tokens
        name, stack = (None, self._last_stack) if block is None else (block.name, block.stack)
        host = self._stack[-1].name if self._stack else ""
        use = MapUse(key, width_in, width_out, transposed, rows, reads, name, stack, host)
        self.trace.uses.append(use)
        if not has_stream(reads):
            self.trace.links.append(maps_of(reads) | {key})
        return use


def _answer_on_meta(name: str, args: Any) -> Any:
    """A plausible result of operations that need values, which meta tensors do not have; else NotImplemented."""
    if name == "_local_scalar_dense":
        return torch.zeros((), dtype=args[0].dtype).item()
    if name == "equal":
        return True
    if name == "nonzero":  # one expert is used, and it gets all tokens
        rows = 1 if args[0].dim() == 1 else args[0].numel()
        return torch.empty((rows, args[0].dim()), dtype=torch.int64, device="meta")
    if name == "unique_consecutive":  # all rows have equally many end-of-sequence tokens
        return args[0][:1], args[0][:0], args[0][:0]
    if (
        name == "index" and args[1] and args[1][0] is not None and args[1][0].dtype == torch.bool
    ):  # one element of each row
        mask = args[1][0]
        return args[0].new_empty((mask.shape[0], *args[0].shape[mask.dim() :]))
    if name == "_grouped_mm":  # on the meta device it accepts only bfloat16
        return args[0].new_empty((args[0].shape[0], args[1].shape[-1]))
    return NotImplemented
