"""A weight plus a low-rank product that is never added up.

Experts multiply with their stacked weights inside one module, in ways that differ by family and implementation. Only
that module knows which token goes to which expert. It gets a `LowRankSum` in place of the weight. The sum intercepts
each product with the weight and adds the low-rank part to the result. So cost and memory grow with the number of
tokens, not with the size of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from gatedadapters.paths.low_rank import in_its_own_type, low_rank

_ASKED_OF_BASE = frozenset(
    {"shape", "dtype", "device", "layout", "ndim", "size", "dim", "numel", "stride", "data_ptr", "element_size"}
    | {"is_cuda", "is_meta", "is_floating_point", "is_contiguous", "__len__"}
)
_MATMULS = frozenset({"matmul", "__matmul__", "mm", "bmm"})


class LowRankSum:
    """base + left @ right, for torch's functions. Matrix products stay low-rank; other functions get the dense sum.

    Args:
        base: (*batch, p, q), or another `LowRankSum` of that shape. Products have its dtype.
        left: (*batch, p, r).
        right: (*batch, r, q).
    """

    def __init__(self, base: Tensor | LowRankSum, left: Tensor, right: Tensor) -> None:
        self.base, self.left, self.right = base, left, right
        self._each: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None

    def dense(self) -> Tensor:
        """The sum as a tensor, in base's dtype."""
        base = self.base.dense() if isinstance(self.base, LowRankSum) else self.base
        with in_its_own_type(base):
            return (base + self.left @ self.right).to(base.dtype)

    def transpose(self, first: int, second: int) -> LowRankSum | Tensor:
        """The transpose: a `LowRankSum` if the last two dimensions are swapped, else dense."""
        if {first % self.left.ndim, second % self.left.ndim} != {self.left.ndim - 2, self.left.ndim - 1}:
            return self.dense().transpose(first, second)
        base = cast(Any, self.base.transpose(-2, -1))
        return type(self)(base, self.right.transpose(-2, -1), self.left.transpose(-2, -1))

    def __getitem__(self, index: Any) -> LowRankSum | Tensor:
        """One expert or several; `index` addresses the first dimension."""
        if isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0 and self.left.ndim == 3):
            if self._each is None:  # an index would fill a whole stack with zeros in each backward
                self._each = self.left.unbind(0), self.right.unbind(0)
            left, right = self._each
            return type(self)(cast(Any, self.base[index]), left[int(index)], right[int(index)])
        if isinstance(index, Tensor) and index.ndim == 1:
            return type(self)(cast(Any, self.base[index]), self.left[index], self.right[index])
        return self.dense()[index]

    def __matmul__(self, x: Tensor) -> Tensor:
        return self._before(x)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") and name not in _ASKED_OF_BASE:
            raise AttributeError(name)
        return getattr(self.base if name in _ASKED_OF_BASE else self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called for every torch function with such a weight among its arguments."""
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if len(args) >= 2 and not isinstance(args[0], LowRankSum) and isinstance(args[1], LowRankSum):
            x, weight = args[:2]
            if func is F.linear:
                return weight._linear(x, *args[2:], **kwargs)
            if name in _MATMULS and not kwargs:
                return weight._after(x, torch.matmul)
            if "grouped_mm" in name and {key for key, value in kwargs.items() if value is not None} <= {"offs"}:
                return weight._grouped(x, func, *args[2:], **kwargs)
        elif name == "baddbmm" and len(args) == 3 and isinstance(args[2], LowRankSum) and not kwargs:
            added, x, weight = args
            y = func(added, x, weight.base)
            return y + weight._through(x, y, torch.bmm, weight.left, weight.right)
        elif name in _MATMULS and len(args) == 2 and isinstance(args[1], Tensor) and not kwargs:
            return args[0]._before(args[1])
        whole = tree_map(lambda leaf: leaf.dense() if isinstance(leaf, LowRankSum) else leaf, (tuple(args), kwargs))
        return func(*whole[0], **whole[1])

    def _linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = F.linear(x, cast(Any, self.base), bias)
        if self.left.ndim == 2:
            return low_rank(x, y, self.right, self.left, None)
        return y + self._through(x, y, torch.matmul, self.right.mT, self.left.mT)

    def _after(self, x: Tensor, multiply: Callable[..., Tensor]) -> Tensor:
        """The product x @ self."""
        y = multiply(x, cast(Any, self.base))
        if self.left.ndim == 2:
            return low_rank(x, y, self.left.t(), self.right.t(), None)
        return y + self._through(x, y, multiply, self.left, self.right)

    def _before(self, x: Tensor) -> Tensor:
        """The product self @ x."""
        y = torch.matmul(cast(Any, self.base), x)
        with in_its_own_type(y):
            return y + self.left.to(y.dtype) @ (self.right.to(y.dtype) @ x.to(y.dtype))

    def _grouped(self, x: Tensor, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The product of rows sorted by expert; `offs` holds the end of each expert's rows."""
        y = func(x, self.base, *args, **kwargs)
        spare = -self.left.shape[-1] % 8  # grouped kernels need rows of a multiple of 16 bytes
        left, right = F.pad(self.left, (0, spare)), F.pad(self.right, (0, 0, 0, spare))
        return y + self._through(x, y, lambda a, b: func(a, b, *args, **kwargs), left, right)

    def _through(self, x: Tensor, y: Tensor, multiply: Callable[..., Tensor], first: Tensor, then: Tensor) -> Tensor:
        with in_its_own_type(y):
            return multiply(multiply(x.to(y.dtype), first.to(y.dtype)), then.to(y.dtype))
