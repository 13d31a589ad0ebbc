"""A stand-in for a weight with trainable elements. Forward passes use the weight; backward passes give gradients to the
selected elements alone.

The stand-in is an attribute of the module that owns the weight, and shadows the registered parameter. `module.weight`
finds the stand-in, while `parameters()`, `state_dict()`, optimisers, DDP and deep copies see the plain frozen
parameter. The stand-in intercepts the *operation* that uses the weight. So it also covers a weight that a parent module
reads, that is tied to another one, that is indexed by expert, or that a checkpointed block uses a second time.

The forward pass costs as much as with a plain frozen weight. In the backward pass, the dense gradient is
`grad_out^T x`. With few selected elements on a CPU, only the selected entries of this product are computed. Otherwise
the dense gradient of one tensor exists until its entries are gathered.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gatedadapters.errors import TrainingError

# Densities up to which computing the selected entries of a product is faster than the whole product and a gather.
# Measured on CPUs with maps of 512 x 512 to 8192 x 512; half-precision products are several times as fast as fp32 ones.
SAMPLED_UP_TO = {torch.float32: 0.06, torch.float64: 0.06, torch.bfloat16: 0.02, torch.float16: 0.02}

with warnings.catch_warnings():  # torch warns once per process that its CSR layout is in beta; take the warning here
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1))


class Pattern:
    """The selected elements of one tensor, which is seen as a matrix with the tensor's last dimension as its width.

    Entries are sorted by row and column, as in the CSR format.

    Attributes:
        shape: shape of the tensor.
        row_starts: (rows + 1,) int32, the position in `columns` at which each row begins.
        columns: (selected,) int32.
        width: columns of the matrix.
        rows: rows of the matrix.
    """

    def __init__(self, shape: Sequence[int], row_starts: Tensor, columns: Tensor) -> None:
        self.shape = tuple(shape)
        self.row_starts, self.columns = row_starts, columns
        self.width = self.shape[-1] if self.shape else 1  # a scalar is one row of one
        self.rows = len(row_starts) - 1

    @classmethod
    def of(cls, shape: Sequence[int], indices: Tensor) -> Pattern:
        """A pattern from sorted flat positions, (selected,) int64."""
        width = shape[-1] if shape else 1
        rows = torch.Size(shape).numel() // width
        counts = torch.bincount(indices // width, minlength=rows)
        starts = torch.zeros(rows + 1, dtype=torch.int32, device=indices.device)
        starts[1:] = counts.cumsum(0)
        return cls(shape, starts, (indices % width).to(torch.int32))

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def density(self) -> float:
        """Share of the elements that are selected."""
        return len(self) / max(1, self.rows * self.width)

    def entry_rows(self) -> Tensor:
        """The row of each entry, (selected,) int64."""
        starts = self.row_starts.long()
        return torch.repeat_interleave(
            torch.arange(self.rows, device=starts.device), starts.diff(), output_size=len(self)
        )

    def indices(self) -> Tensor:
        """Sorted flat positions, (selected,) int64."""
        return self.entry_rows().mul_(self.width).add_(self.columns)

    def gather(self, dense: Tensor) -> Tensor:
        """The selected elements of a tensor of this shape, (selected,)."""
        return dense.reshape(-1)[self.indices()]

    def part(self, index: int) -> tuple[Pattern, slice]:
        """The pattern of `tensor[index]`, for a tensor of three or more dimensions, and the slice of its entries."""
        each = self.rows // self.shape[0]
        starts = self.row_starts[index * each : (index + 1) * each + 1]
        where = slice(int(starts[0]), int(starts[-1]))
        return Pattern(self.shape[1:], starts - starts[0], self.columns[where]), where

    def to(self, device: torch.device) -> Pattern:
        """This pattern on another device."""
        return Pattern(self.shape, self.row_starts.to(device), self.columns.to(device))

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """The selected entries of `left^T right`, (selected,). The others are not computed where that is cheaper.

        Args:
            left: (tokens, rows).
            right: (tokens, width).
        """
        if left.device.type != "cpu" or self.density > SAMPLED_UP_TO.get(left.dtype, 0.0):
            return self.gather(left.T @ right)
        exact = torch.promote_types(left.dtype, torch.float32)
        zeros = torch.zeros(len(self), dtype=exact)
        # a tensor that holds the pattern; beta = 0 ignores its values
        pattern = torch.sparse_csr_tensor(
            self.row_starts, self.columns, zeros, (self.rows, self.width), check_invariants=False
        )
        left_rows = left.T.to(exact).contiguous()  # the kernel needs contiguous rows
        sampled: Tensor = torch.sparse.sampled_addmm(pattern, left_rows, right.to(exact), beta=0.0)
        return sampled.values()


class LiveWeight(Tensor):
    """The stand-in for `module._parameters[name]`. Gradients of its selected elements go to the values of `tuned`."""

    _module: nn.Module
    _name: str
    _tuned: Any

    @staticmethod
    def over(module: nn.Module, name: str, tuned: Any) -> LiveWeight:
        """A stand-in for a parameter of `module`, whose selected elements and their values are in `tuned`."""
        live = torch.empty(0).as_subclass(LiveWeight)  # never read: every operation uses the parameter itself
        live._module, live._name, live._tuned = module, name, tuned
        return live

    @property
    def _local_tensor(self) -> Tensor:
        raise TrainingError(
            "the mask was applied before the model was sharded, and FSDP takes its stand-ins for weights",
            expected="fully_shard or accelerator.prepare, then apply_mask",
            got="apply_mask first",
            where=f"{self._name} of a {type(self._module).__name__}",
            fix="apply the mask when the model is sharded; SelectiveTrainer and GatedTrainer do both in this order",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveWeight:
        with torch._C.DisableTorchFunctionSubclass():
            module, tuned = deepcopy(self._module, memo), deepcopy(self._tuned, memo)
        live = LiveWeight.over(module, self._name, tuned)
        memo[id(self)] = live
        return live

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return LiveWeight.over, (self._module, self._name, self._tuned)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func` with the parameter instead of the stand-in."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            rule = _RULES.get(func)
            if rule is not None and torch.is_grad_enabled():
                result = rule(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            return func(*(_without_stand_in(a) for a in args), **{k: _without_stand_in(v) for k, v in kwargs.items()})


def weight_of(live: LiveWeight) -> Tensor:
    """The parameter behind a stand-in, with the current values written into it."""
    return cast(Tensor, live._tuned.current(live._module._parameters[live._name]))


def _without_stand_in(value: Any) -> Any:
    """The argument without stand-ins. With gradients enabled, a weight becomes a tensor that gathers the gradient."""
    if isinstance(value, LiveWeight):
        weight = weight_of(value)
        return _gathering(value._tuned.leaf, weight, value._tuned.pattern) if torch.is_grad_enabled() else weight
    if isinstance(value, (tuple, list)) and any(isinstance(item, LiveWeight) for item in value):
        return type(value)(_without_stand_in(item) for item in value)
    return value


class _Gathering(torch.autograd.Function):
    """Returns the weight. Backward gathers the selected elements of its dense gradient, for their values."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, pattern: Pattern) -> Tensor:
        ctx.pattern, ctx.dtype = pattern, values.dtype
        return weight.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.pattern.gather(grad).to(ctx.dtype), None, None


class _Product(torch.autograd.Function):
    """`x W^T + b` for a weight stored as (out, in), `x W + b` for one stored as (in, out); x has the shape (..., in).

    The result is bit for bit that of the replaced operation.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, x: Tensor, bias: Tensor | None, weight: Tensor, pattern: Pattern, run: _Run
    ) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))  # save for backward the type that was multiplied
        ctx.save_for_backward(x, weight)
        ctx.pattern, ctx.run, ctx.dtype = pattern, run, values.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return run(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        transposed = ctx.run is not _run_linear
        grad_values = grad_x = grad_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            flat = grad.reshape(-1, grad.shape[-1])
            if ctx.needs_input_grad[0]:
                inputs = x.reshape(-1, x.shape[-1]).to(grad.dtype)
                rows, columns = (inputs, flat) if transposed else (flat, inputs)
                grad_values = ctx.pattern.product(rows, columns).to(ctx.dtype)
            if ctx.needs_input_grad[1]:
                used = weight.to(grad.dtype)
                grad_x = (grad @ used.T if transposed else grad @ used).to(x.dtype)
            if ctx.needs_input_grad[2]:
                grad_bias = flat.sum(0).to(ctx.bias_dtype)
        return grad_values, grad_x, grad_bias, None, None, None


_Run = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _run_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _run_addmm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.addmm(cast(Tensor, bias), x, weight)


def _run_matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.matmul(x, weight)


class _Rows(torch.autograd.Function):
    """Rows of an embedding. Backward visits only the selected elements of rows that were looked up."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ids: Tensor, weight: Tensor, pattern: Pattern, padding: int) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.pattern, ctx.padding, ctx.dtype = pattern, padding, values.dtype
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        flat, grad = ids.reshape(-1).long(), grad.reshape(-1, grad.shape[-1])
        starts = pattern.row_starts.long()
        first, count = starts[flat], starts[flat + 1] - starts[flat]
        if ctx.padding >= 0:
            count = count * (flat != ctx.padding)
        token = torch.repeat_interleave(torch.arange(len(flat), device=flat.device), count)
        within = torch.arange(len(token), device=flat.device) - (count.cumsum(0) - count)[token]
        entry = first[token] + within
        picked = grad[token, pattern.columns[entry].long()].to(ctx.dtype)
        grad_values = torch.zeros(len(pattern), dtype=ctx.dtype, device=grad.device).index_add_(0, entry, picked)
        return grad_values, None, None, None, None


_gathering: Callable[..., Tensor] = _Gathering.apply
_product: Callable[..., Tensor] = _Product.apply
_rows: Callable[..., Tensor] = _Rows.apply


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    return _multiplied(x, weight, bias, _run_linear)


def _addmm(bias: Any, x: Any, weight: Any, **scales: Any) -> Any:
    return NotImplemented if scales else _multiplied(x, weight, bias, _run_addmm)


def _matmul(x: Any, weight: Any) -> Any:
    return _multiplied(x, weight, None, _run_matmul)


def _multiplied(x: Any, weight: Any, bias: Any, run: _Run) -> Any:
    if not isinstance(weight, LiveWeight) or isinstance(x, LiveWeight) or x.dim() < 2:
        return NotImplemented
    parameter = weight_of(weight)
    if parameter.dim() != 2:
        return NotImplemented
    tuned = weight._tuned
    return _product(tuned.leaf, x, _without_stand_in(bias), parameter, tuned.pattern, run)


def _embedding(
    ids: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None or scale_grad_by_freq:
        return NotImplemented
    parameter = weight_of(weight)
    padding = -1 if padding_idx is None else padding_idx % len(parameter)
    return _rows(weight._tuned.leaf, ids, parameter, weight._tuned.pattern, padding)


class _TunedPart:
    """The selected elements of `tensor[index]`, as part of those of the whole tensor."""

    def __init__(self, whole: Any, index: int) -> None:
        self.pattern, where = whole.pattern.part(index)
        self.leaf = whole.leaf[where]

    def current(self, weight: Tensor) -> Tensor:
        return weight


def _getitem(live: Any, index: Any) -> Any:
    """Indexing one expert's matrix in a fused parameter gives a stand-in again."""
    if not isinstance(live, LiveWeight):
        return NotImplemented
    parameter = weight_of(live)
    single = isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0 and index.dtype == torch.int64)
    if parameter.dim() != 3 or not single:
        return NotImplemented
    at = int(index) % len(parameter)
    holder = nn.Module()
    holder._parameters["weight"] = parameter[at]  # type: ignore[assignment]
    return LiveWeight.over(holder, "weight", _TunedPart(live._tuned, at))


_RULES: Mapping[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    F.embedding: _embedding,
    Tensor.__getitem__: _getitem,
}
