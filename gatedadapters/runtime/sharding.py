"""Models whose weights are spread over several processes by FSDP2 (`torch.distributed.fsdp.fully_shard`).

The backbone is sharded, and the values of a sparse delta with it, see `masking.tuned`. Adapters and gates are not:
every process holds all of them. They are a few percent of the backbone, structures and folds need them whole, and FSDP
would round gates to the type of its mixed precision. So `replicate` hides what the library adds from `fully_shard`,
whether it is called before or after `attach`, and gradients are exchanged at the `EndOfBackward`.

What is done with a sharded weight outside a forward pass is done on all processes together: `whole` gathers it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from gatedadapters.errors import AttachError, GatedAdaptersError, TrainingError

if dist.is_available():
    from torch.distributed._composable.contract import REGISTRY_KEY, RegistryItem
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

T = TypeVar("T")
_CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."
_DO = "shard with FSDP2: accelerate config with fsdp_version: 2, or torch.distributed.fsdp.fully_shard"


def is_sharded(model: nn.Module, *, itself: bool = False) -> bool:
    """Whether `fully_shard` was called on the model or on a part of it; with `itself`, on the module alone."""
    modules = (model,) if itself else model.modules()
    return dist.is_available() and any(isinstance(module, FSDPModule) for module in modules)


def reshard(model: nn.Module) -> None:
    """Free the whole weights that FSDP keeps after a forward pass, so that `parameters()` are the shards again."""
    if dist.is_available():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def replicate(module: nn.Module) -> None:
    """Let every process hold all of `module`: `fully_shard` leaves alone what torch's `replicate` has marked."""
    if dist.is_available():
        vars(module)[REGISTRY_KEY] = {"replicate": RegistryItem()}


def replicated(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model inside modules that `replicate` has marked."""
    marked = (m for m in model.modules() if dist.is_available() and "replicate" in vars(m).get(REGISTRY_KEY, ()))
    return list(dict.fromkeys(parameter for module in marked for parameter in module.parameters()))


def home_of(model: nn.Module) -> torch.device:
    """The device on which a sharded model computes; where its shards are offloaded to the CPU, that is another one."""
    for parameter in model.parameters():
        if is_shard(parameter):
            kind = parameter.device_mesh.device_type  # type: ignore[attr-defined]
            if kind == "cpu":
                return torch.device(kind)
            return torch.device(kind, torch.get_device_module(kind).current_device())
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def without_mark(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a module to pickle, without the mark of `replicate`: its key is another in every process."""
    return {name: value for name, value in state.items() if not dist.is_available() or name != REGISTRY_KEY}


def class_name(model: nn.Module) -> str:
    """Name of the model's class; `fully_shard` gives its instances a class of their own, derived from it."""
    kinds = type(model).__mro__
    return next(kind for kind in kinds if not (dist.is_available() and issubclass(kind, FSDPModule))).__name__


def plain_name(name: str) -> str:
    """The name of a parameter or module without FSDP's wrappers for activation checkpointing."""
    return name.replace(_CHECKPOINT_WRAPPER, "")


# -- sharded tensors ---------------------------------------------------------------------------------------------------


def is_shard(tensor: object) -> bool:
    """Whether this process holds a part of the tensor alone."""
    return dist.is_available() and isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All values of a tensor, without a gradient; of a sharded one by gathering it, so every process has to call this.

    A tensor that is not sharded is returned as it is.
    """
    if not is_shard(tensor):
        return tensor
    gathered: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return gathered


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, which shares its memory; the tensor itself if it is not sharded."""
    if not is_shard(tensor):
        return tensor
    held: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return held


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """The part of `value`, which every process holds whole, that belongs where `local(like)` is."""
    if not is_shard(like):
        return value
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    placed: Tensor = distribute_tensor(value, mesh, placements, src_data_rank=None).to_local()
    return placed


def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """A value that every process holds whole, as a tensor of which each keeps an equal share, over the processes of
    `like`, which is sharded.
    """
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    spread: Tensor = distribute_tensor(value.to(mesh.device_type), mesh, placements, src_data_rank=None)
    return spread


def mean_of(value: Tensor, like: Tensor) -> Tensor:
    """The mean over the processes of what each holds whole, spread over them as `like` is; all call this."""
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    summed = DTensor.from_local(value / mesh.size(), mesh, [Partial()] * mesh.ndim, run_check=False)
    spread: Tensor = summed.redistribute(placements=placements)
    return spread


def rows_held(tensor: Tensor) -> tuple[int, int]:
    """Which rows of the first dimension this process holds: from the first number to before the second.

    Raises:
        AttachError: the tensor is spread along another dimension, or along several.
    """
    if not is_shard(tensor):
        return 0, len(tensor) if tensor.dim() else 1
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    start, count = 0, len(tensor)
    for dim, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        if type(placement) is not Shard or placement.dim != 0:
            raise AttachError(
                "a weight is spread over the processes along another dimension than its first",
                expected="the default of fully_shard, Shard(0)",
                got=str(placements),
                where="a sharded weight",
                fix="call fully_shard without shard_placement_fn",
            )
        each = -(-count // mesh.size(dim))
        begin = min(count, each * mesh.get_local_rank(dim))
        start, count = start + begin, min(each, count - begin)
    return start, start + count


# -- processes that work together --------------------------------------------------------------------------------------


def groups_of(model: nn.Module) -> list[Any]:
    """The process groups over which the model is spread, one for each dimension of its mesh."""
    for parameter in model.parameters():
        if is_shard(parameter):
            mesh = parameter.device_mesh  # type: ignore[attr-defined]
            return [mesh.get_group(dim) for dim in range(mesh.ndim)]
    return [dist.group.WORLD]


def on_first(together: bool, write: Callable[[], T]) -> T | None:
    """Call `write` on the first process alone, and let all processes wait for it and share its failure.

    Args:
        together: whether several processes are here; False calls `write` in this one.
        write: what writes files.

    Returns:
        What `write` returned, None on the other processes.

    Raises:
        Exception: what `write` raised. On the other processes, an error of the same kind with the same message.
    """
    if not (together and _several()):
        return write()
    failure: BaseException | None = None
    result = None
    if dist.get_rank() == 0:
        try:
            result = write()
        except Exception as error:
            failure = error
    told: list[Any] = [None if failure is None else (type(failure), str(failure))]
    dist.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[0] is not None:
        kind, message = told[0]
        raise _alike(kind, message, "process 0")
    return result


def all_must(do: Callable[[], None]) -> None:
    """Call `do` on every process. If it fails on one, it fails on all, so that none waits for another.

    Raises:
        Exception: what `do` raised here, or else an error of the same kind as on the first process where it failed.
    """
    if not _several():
        do()
        return
    failure: BaseException | None = None
    try:
        do()
    except Exception as error:
        failure = error
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, None if failure is None else (type(failure), str(failure)))
    if failure is not None:
        raise failure
    for rank, other in enumerate(told):
        if other is not None:
            kind, message = other
            raise _alike(kind, message, f"process {rank}")


def first_alike(found: Sequence[T], model: nn.Module) -> Sequence[T]:
    """What the first process that found something has found, on all processes of a sharded model.

    Args:
        found: what this process found.
        model: the model.
    """
    if not (_several() and is_sharded(model)):
        return found
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, list(found))
    return next((other for other in told if other), [])


def check_alike(values: Mapping[str, object], where: str) -> None:
    """Check that all processes hold the same values; every process has to call this.

    Args:
        values: what has to be the same, by what it is; compared as text.
        where: for the error.

    Raises:
        TrainingError: on every process, naming what differs and where.
    """
    if not _several():
        return
    own = {name: str(value) for name, value in values.items()}
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, own)
    for name in own:
        found = [other.get(name, "nothing") for other in told]
        if len(set(found)) > 1:
            rank = next(r for r, value in enumerate(found) if value != found[0])
            raise TrainingError(
                f"the processes differ in {name}",
                expected=f"{_short(found[0])} as on process 0",
                got=f"{_short(found[rank])} on process {rank}",
                where=where,
                fix="start every process with the same script, arguments, seed, data and releases of the libraries",
            )


def digest(state: Mapping[str, Any] | Sequence[str]) -> str:
    """A digest of names, and of the values of tensors that every process holds whole."""
    found = hashlib.sha256()
    for name in state:
        found.update(f"{name};".encode())
        value = state[name] if isinstance(state, Mapping) else None
        if isinstance(value, Tensor) and not is_shard(value) and not value.is_meta:
            found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def in_a_group() -> bool:
    """Whether this process belongs to a group of processes, of any number."""
    return dist.is_available() and dist.is_initialized()


def _several() -> bool:
    return in_a_group() and dist.get_world_size() > 1


def _alike(kind: type[Exception], message: str, where: str) -> Exception:
    """An error like the one of another process."""
    text = f"{where}: {message}"
    return kind(text) if issubclass(kind, GatedAdaptersError | OSError | ValueError) else RuntimeError(text)


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."


class EndOfBackward:
    """Exchanges gradients between the processes at the end of each backward pass.

    Args:
        groups: see `groups_of`.
        exchange: called then, on every process.
    """

    def __init__(self, groups: Sequence[Any], exchange: Callable[[], None]) -> None:
        self.groups, self.exchange = groups, exchange
        self._backward = -1

    def follow(self, output: Any) -> bool:
        """Wait for the backward pass through what a model returned; whether any of it needs a gradient."""
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        for tensor in tensors:
            tensor.register_hook(self._begins)
        return bool(tensors)

    def _begins(self, grad: Tensor) -> None:
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward = backward
            torch.autograd.Variable._execution_engine.queue_callback(self.exchange)


def anywhere(flags: Sequence[Tensor], groups: Sequence[Any], home: torch.device) -> list[bool]:
    """Which of the flags, scalar tensors, is set on any process of the groups."""
    if not flags:
        return []
    found = torch.stack([flag.to(home) for flag in flags]).int()
    for group in groups:
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return [bool(flag) for flag in found.tolist()]  # the one host read


@torch.no_grad()
def average(parameters: Sequence[nn.Parameter], groups: Sequence[Any]) -> None:
    """Give replicated parameters the mean of all processes' gradients, as DistributedDataParallel does.

    Micro-batches may follow each other: the mean of gradients that are equal already is what they are. A parameter
    without a gradient on every process keeps none.

    Args:
        parameters: those that may have a gradient, the same on every process.
        groups: see `groups_of`.
    """
    if not parameters:
        return
    home = parameters[0].device
    held = torch.tensor([float(p.grad is not None) for p in parameters], device=home)
    parts = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).float() for p in parameters]
    flat = torch.cat([held, *parts])
    for group in groups:
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
    shares, values = flat[: len(held)].tolist(), flat[len(held) :].split([p.numel() for p in parameters])
    for parameter, share, value in zip(parameters, shares, values, strict=True):
        if share:
            parameter.grad = value.view_as(parameter).to(parameter.dtype).clone()


# -- what is not supported ---------------------------------------------------------------------------------------------


def check_layout_of_weights(model: nn.Module, *, attached: bool = False) -> None:
    """Check how the weights are spread over processes, if they are.

    Args:
        model: the model.
        attached: whether adapters are in it already, so that wrappers for checkpointing may have come.

    Raises:
        AttachError: by DeepSpeed ZeRO-3, by FSDP of the first version, or by a tensor-parallel plan; or FSDP's
            checkpointing was applied, weights are to be loaded on the first process alone, or they are quantised in a
            way that FSDP2 cannot shard.
    """
    for found, message, fix in _unsupported(model, attached):
        raise AttachError(
            message, expected="weights that are whole, or sharded with FSDP2", got=found, where="the model", fix=fix
        )
    if is_sharded(model):
        check_shardable(model)


def check_shardable(model: nn.Module) -> None:
    """Check that FSDP2 can shard the weights, if they are quantised: the 4-bit values of bitsandbytes alone.

    Raises:
        AttachError: it cannot shard them; names the first one.
    """
    for name, parameter in model.named_parameters():
        parts = is_traceable_wrapper_subclass(parameter) and not is_shard(parameter)
        if parts or parameter.dtype == torch.int8:
            raise AttachError(
                "FSDP2 cannot shard these quantised weights",
                expected="weights in floating point, or in the 4 bits of bitsandbytes",
                got=f"{type(parameter).__name__}, {parameter.dtype}",
                where=name,
                fix="load with BitsAndBytesConfig(load_in_4bit=True) or without quantisation; or train without FSDP, "
                "which one process for each device (DistributedDataParallel) does",
            )


def _unsupported(model: nn.Module, attached: bool) -> Iterator[tuple[str, str, str]]:
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        message = "DeepSpeed ZeRO-3 has replaced the weights by placeholders, which adapters cannot follow"
        yield "parameters with ds_id", message, _DO
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        yield "FullyShardedDataParallel", "FSDP of the first version flattens the weights of a block into one", _DO
    plan = getattr(getattr(model, "config", None), "distributed_config", None)
    plans = (getattr(model, "tp_size", None), getattr(model, "_tp_size", None), getattr(plan, "tp_size", None))
    mixed = not is_sharded(model) and any(is_shard(p) for p in model.parameters())
    if mixed or any(isinstance(size, int) and size > 1 for size in plans):
        message = "a tensor-parallel plan cuts activations, too, and a path would see a part of them"
        yield "a tensor-parallel plan", message, f"load without tp_plan, and {_DO}"
    if not attached and any(_CHECKPOINT_WRAPPER in f"{name}." for name, _ in model.named_modules()):
        message = "FSDP's activation checkpointing has put wrappers between the blocks and their names"
        yield "CheckpointWrapper", message, "attach before accelerator.prepare, or use gradient_checkpointing_enable()"
    if not attached and is_sharded(model) and any(getattr(m, "quant_state", None) is not None for m in model.modules()):
        message = "4-bit weights that are sharded already do not run outside of the model, which attaching has to try"
        yield "quant_state beside shards", message, "attach first, then shard (a Trainer does)"
    if _is_set("ACCELERATE_USE_FSDP") and _is_set("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        message = "the weights are loaded on the first process alone, so that the others attach to another backbone"
        fix = "fsdp_cpu_ram_efficient_loading: false; what does not fit in memory is loaded with a DistributedConfig"
        yield "FSDP_CPU_RAM_EFFICIENT_LOADING", message, fix


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in {"1", "true", "yes", "y", "t", "on"}
