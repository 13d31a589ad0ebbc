"""The gradient of every single example, from one backward pass for the whole batch.

The gradient of a linear map is a sum over tokens, `Σ_t grad_out_t x_t^T`. The part of the sum that runs over one
example's tokens is the gradient of that example. The same holds for biases and lookup tables. Other modules that own
parameters (norms, convolutions) are differentiated a second time by themselves, vectorised over examples. If a
parameter is used several times (tied, or shared between blocks), the parts of an example are added before they are
squared.

This needs to know where a tensor holds which example, and shapes alone do not tell. So the first two examples that
reach a parameter are also computed one by one. If the two results differ, this parameter is computed one example at a
time from then on. That happens for position tables shared by all examples, and for experts that mix the tokens of a
batch.
"""

from __future__ import annotations

import logging
import sys
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from gatedadapters.errors import MaskError
from gatedadapters.masking.scores.base import Batch, ScoringRun, check_finite, gradients
from gatedadapters.runtime.sharding import is_shard

logger = logging.getLogger(__name__)

Reduce = Callable[[Tensor], Tensor]
CHUNK_BYTES = 2**26


@dataclass
class Use:
    """One call of a module that owns parameters: its arguments and the gradient of its output."""

    module: nn.Module
    inputs: tuple[Any, ...]
    options: dict[str, Any]
    grad: Tensor | None = None


class PerExample:
    """Adds `reduce(gradient of an example)` to the totals, for every example of every batch.

    Args:
        run: the model and the parameters to score.
        reduce: an elementwise function, from (examples, *shape) to the same shape.
    """

    def __init__(self, run: ScoringRun, reduce: Reduce) -> None:
        self.run, self.reduce = run, reduce
        everything = set(run.parameters)
        sharded = any(is_shard(parameter) for parameter in run.parameters.values())  # a use sees no shard
        self.one_by_one = everything if sharded else set[str]()  # parameters that are computed one example at a time
        self.unknown = everything - self.one_by_one  # parameters whose gradients have not been compared yet
        self.owned = _owned(run)
        self.largest = 0.0  # largest mean size of a gradient among those compared

    def add(self, batch: Batch) -> None:
        """Add the gradients of all examples of a batch.

        Raises:
            MaskError: see `ScoringRun.losses`, or a gradient is not finite.
        """
        examples = size_of(batch)
        if examples == 1:
            self._add_one_by_one(batch, self.run.parameters, self._add_to_total)
            return
        if self.unknown and len(self.unknown) == len(self.run.parameters):
            self._compare(batch)
        together = set(self.run.parameters) - self.unknown - self.one_by_one
        failed, reached = set[str](), set[str]()
        if together or self.unknown:
            failed, reached = self._add_together(batch, together, self._add_to_total)
        self.one_by_one |= failed
        late = self.unknown & reached  # for example an expert that got its first tokens
        if self.one_by_one or late:
            self._add_one_by_one(batch, self.one_by_one | late, self._add_to_total)
        if late:
            self._compare(batch)

    def finish(self) -> None:
        """Turn the sums into means over examples."""
        for total in self.run.totals.values():
            total /= self.run.examples
        self.run.details["one_by_one"] = sorted(self.one_by_one)

    def _add_to_total(self, name: str, part: Tensor) -> None:
        total = self.run.totals[name]
        total += part.to(total)

    def _compare(self, batch: Batch) -> None:
        """Compute the gradients of two examples in both ways, and find the parameters for which the results differ.

        The results are compared by their products with a random direction, so that no second copy is held.
        """
        two = slice_batch(batch, 0, 2)
        sums: list[dict[str, float]] = [{}, {}]

        def projection(into: dict[str, float]) -> Callable[[str, Tensor], None]:
            def use(name: str, part: Tensor) -> None:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                direction = torch.rand(part.shape, generator=generator).to(part)
                into[name] = into.get(name, 0.0) + float((part * direction).sum(dtype=torch.float64))

            return use

        failed, _ = self._add_together(two, self.unknown, projection(sums[0]))
        self._add_one_by_one(two, self.unknown, projection(sums[1]))
        loose = any(p.element_size() < 4 for p in self.run.parameters.values())
        sizes = {name: self.run.parameters[name].numel() for name in self.unknown}
        each = {name: [found.get(name, 0.0) / size for found in sums] for name, size in sizes.items()}
        precision = min(torch.finfo(p.dtype).eps for p in self.run.parameters.values())
        self.largest = max(self.largest, *(max(pair) for pair in each.values()))
        noise = 1e-4 * precision * self.largest  # the gradient of a key's bias is rounding errors alone
        tolerance = 5e-2 if loose else 1e-3
        differ = failed | {n for n, (a, b) in each.items() if abs(a - b) > tolerance * max(a, b) + noise}
        if differ:
            logger.info("gradients of single examples one by one for %s", ", ".join(sorted(differ)))
        self.one_by_one |= differ
        self.unknown -= differ | {name for name, pair in each.items() if any(pair)}

    # -- one by one ----------------------------------------------------------------------------------------------------

    def _add_one_by_one(self, batch: Batch, names: Any, use: Callable[[str, Tensor], None]) -> None:
        wanted = dict.fromkeys(names)
        for index in range(size_of(batch)):
            losses = self.run.losses(slice_batch(batch, index, index + 1))
            with gradients(self.run, lambda name, grad: use(name, self.reduce(grad)), wanted):
                losses.sum().backward()
            for name, parameter in self.run.parameters.items():
                if name not in wanted:
                    parameter.grad = None

    # -- together ------------------------------------------------------------------------------------------------------

    def _add_together(
        self, batch: Batch, names: set[str], use: Callable[[str, Tensor], None]
    ) -> tuple[set[str], set[str]]:
        """Returns the parameters that failed, and the unknown parameters that got a gradient."""
        pass_, reached = _Pass(self, names, batch, use), set[str]()

        def free_gradient(name: str, parameter: Tensor) -> None:
            if name in self.unknown and parameter.grad is not None and bool(parameter.grad.any()):
                reached.add(name)
            parameter.grad = None

        with ExitStack() as stack:
            for module in self.owned:
                stack.callback(module.register_forward_hook(pass_.record, with_kwargs=True).remove)
            losses = self.run.losses(batch)
            pass_.recording = False
            for name, parameter in self.run.parameters.items():
                stack.callback(parameter.register_post_accumulate_grad_hook(partial(free_gradient, name)).remove)
            losses.sum().backward()
        pass_.finish()
        return pass_.failed, reached


class _Pass:
    """One forward and backward pass over a batch that records every use of every parameter."""

    def __init__(self, owner: PerExample, names: set[str], batch: Batch, use: Callable[[str, Tensor], None]) -> None:
        self.owner, self.names, self.examples, self.use = owner, names, size_of(batch), use
        self.lengths = _lengths(batch)
        self.recording = True
        self.uses: dict[str, list[Use]] = {}
        self.done: set[str] = set()
        self.failed: set[str] = set()

    def record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: record a use, and ask for the gradient of the output."""
        own = self._own(module)
        if not self.recording or not own:
            return None
        if not isinstance(output, Tensor):
            self.failed.update(own)
            return None
        changed = None
        kind = type(module).forward
        if kind is nn.Embedding.forward and args[0].dim() == 2 and len(args[0]) == 1 and self.examples > 1:
            # All examples share one row of positions. Give each its own copy, so that their gradients stay apart.
            ids = args[0].expand(self.examples, -1)
            output = changed = output.expand(self.examples, *output.shape[1:])
            args = (ids,)
        use = Use(module, args, kwargs)
        for name in own:
            self.uses.setdefault(name, []).append(use)
        if output.requires_grad:
            output.register_hook(lambda grad: self._receive(use, grad, own))
        return changed

    def _own(self, module: nn.Module) -> list[str]:
        return [name for name in self.owner.owned[module] if name in self.names]

    def _receive(self, use: Use, grad: Tensor, own: list[str]) -> None:
        use.grad = grad.detach()
        for name in own:
            if len(self.uses[name]) == 1:
                self._add_gradient(name)
        if all(name in self.done or name in self.failed for name in own):
            use.grad, use.inputs = None, ()

    def finish(self) -> None:
        """After the backward pass: add the gradients of parameters that were used several times."""
        for name in list(self.uses):
            if name not in self.done:
                self._add_gradient(name)

    @torch.no_grad()
    def _add_gradient(self, name: str) -> None:
        self.done.add(name)
        uses = [use for use in self.uses[name] if use.grad is not None]
        if not uses or name in self.failed:
            return
        parameter = self.owner.run.parameters[name]
        try:
            total = self._sum(parameter, uses)
        except (MaskError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
            self.failed.add(name)  # falls back to one example at a time, which is slower and always right
            return
        check_finite(name, total, self.owner.run)
        self.use(name, total)

    def _sum(self, parameter: nn.Parameter, uses: list[Use]) -> Tensor:
        """`Σ_examples reduce(gradient)` of one parameter, in its shape."""
        if len(uses) == 1 and type(uses[0].module).forward is nn.Embedding.forward:
            return self._table(parameter, uses[0])
        total = torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
        each = max(1, CHUNK_BYTES // max(1, total.numel() * total.element_size()))
        for start in range(0, self.examples, each):
            where = slice(start, min(start + each, self.examples))
            grads = sum(self._grads(parameter, use, where) for use in uses)
            assert isinstance(grads, Tensor)
            total += self.owner.reduce(grads).sum(0)
        return total

    def _grads(self, parameter: nn.Parameter, use: Use, where: slice) -> Tensor:
        """Gradients through one use, (examples in `where`, *shape)."""
        assert use.grad is not None
        kind, is_bias, transposed = type(use.module).forward, parameter.dim() == 1, _is_conv1d(use.module)
        if kind is nn.Linear.forward or transposed:
            out = self._by_example(use.grad)[where]
            if is_bias:
                return out.sum(1)
            inputs = self._by_example(use.inputs[0])[where].to(out.dtype)
            return inputs.mT @ out if transposed else out.mT @ inputs
        if kind is nn.Embedding.forward:
            ids, out = use.inputs[0][where], self._by_example(use.grad)[where]
            count, rows = len(ids), len(parameter)
            offsets = torch.arange(count, device=ids.device)[:, None] * rows
            grads = out.new_zeros(count * rows, parameter.shape[1])
            grads.index_add_(0, (ids.reshape(count, -1) + offsets).flatten(), out.reshape(-1, out.shape[-1]))
            grads = grads.view(count, rows, -1)
            padding = _padding(use.module)
            if padding is not None:
                grads[:, padding] = 0
            return grads
        return self._differentiate(parameter, use, where)

    def _table(self, parameter: nn.Parameter, use: Use) -> Tensor:
        """The sum for a lookup table that is used once. It visits only the rows that occur in the batch."""
        assert use.grad is not None
        ids, rows = use.inputs[0], len(parameter)
        if ids.shape[0] != self.examples:
            raise ValueError("examples are not the first dimension")
        numbered = (
            ids.reshape(self.examples, -1) + torch.arange(self.examples, device=ids.device)[:, None] * rows
        ).flatten()
        distinct, inverse = numbered.unique(return_inverse=True)
        flat = use.grad.reshape(-1, use.grad.shape[-1])
        sums = flat.new_zeros(len(distinct), flat.shape[1]).index_add_(0, inverse, flat)
        reduced = self.owner.reduce(sums)
        padding = _padding(use.module)
        if padding is not None:
            reduced[distinct % rows == padding] = 0
        return torch.zeros_like(parameter, dtype=reduced.dtype).index_add_(0, distinct % rows, reduced)

    def _differentiate(self, parameter: nn.Parameter, use: Use, where: slice) -> Tensor:
        """Gradients of any other module: differentiate the module by itself, for all examples at once."""
        grad = use.grad
        assert grad is not None
        own = next(key for key, value in use.module._parameters.items() if value is parameter)
        tensors, rebuild = _split(use.inputs, use.options)
        if any(len(t) != self.examples for t in (*tensors, grad)):
            raise ValueError("examples are not the first dimension")

        def one(grad_out: Tensor, *inputs: Tensor) -> Tensor:
            args, kwargs = rebuild([value.unsqueeze(0) for value in inputs])
            run = lambda value: functional_call(use.module, {own: value}, args, kwargs)  # noqa: E731
            found: Tensor = vjp(run, parameter.detach())[1](grad_out.unsqueeze(0))[0]
            return found

        with torch.enable_grad():
            found: Tensor = vmap(one)(grad[where], *(value.detach()[where] for value in tensors))
        return found

    def _by_example(self, value: Tensor) -> Tensor:
        """The value as (examples, tokens, width). It may also be (examples, width), or hold all tokens in one row."""
        each, rest = divmod(len(value), self.examples)
        if rest or (each > 1 and self.lengths and each not in self.lengths):  # an expert gets only some tokens
            raise ValueError("examples are not the first dimension")
        return value.reshape(self.examples, -1, value.shape[-1])


def _owned(run: ScoringRun) -> dict[nn.Module, list[str]]:
    """The modules that use scored parameters, with the names of these parameters.

    If a module shares a parameter with a module inside it (as heads share the bias of their decoder), the inner module
    counts as the user.
    """
    names = {id(parameter): name for name, parameter in run.parameters.items()}
    held: dict[nn.Module, list[str]] = {}
    for module in run.model.modules():
        below = {id(p) for child in module.children() for p in child.parameters()}
        own = [id(p) for p in module._parameters.values() if p is not None]
        found = [names[key] for key in own if key in names and key not in below]
        if found:
            held[module] = found
    return held


def _is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' transposed linear map. Does not import transformers."""
    library: Any = sys.modules.get("transformers.pytorch_utils")
    return library is not None and type(module).forward is library.Conv1D.forward


def _padding(module: nn.Module) -> int | None:
    """The row of a lookup table that gets no gradient; None without one."""
    return cast(nn.Embedding, module).padding_idx


def _split(inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """The tensors among a call's arguments, and a function that puts other tensors in their places."""
    tensors = [v for v in (*inputs, *options.values()) if isinstance(v, Tensor)]

    def rebuild(values: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        queue = iter(values)
        args = tuple(next(queue) if isinstance(v, Tensor) else v for v in inputs)
        return args, {k: next(queue) if isinstance(v, Tensor) else v for k, v in options.items()}

    return tensors, rebuild


def size_of(batch: Batch) -> int:
    """Number of examples in a batch."""
    return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim() > 0), 1)


def slice_batch(batch: Batch, start: int, stop: int) -> dict[str, Any]:
    """The examples `start` to `stop` of a batch."""
    size = size_of(batch)
    return {
        key: value[start:stop] if isinstance(value, Tensor) and value.dim() > 0 and len(value) == size else value
        for key, value in batch.items()
    }


def _lengths(batch: Batch) -> set[int]:
    """The numbers of tokens that an example may have; empty if the batch does not tell, as with images."""
    examples = size_of(batch)
    shapes = [value.shape for value in batch.values() if isinstance(value, Tensor) and value.dim() > 1]
    tells = all(len(shape) < 4 and shape[0] == examples for shape in shapes)
    return {shape[1] for shape in shapes} if tells else set()
