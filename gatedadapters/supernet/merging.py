"""Compact adapters folded into the backbone's own weights, and out of them again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatedadapters.backbone.quantized import is_quantized
from gatedadapters.errors import ArtifactError, AttachError
from gatedadapters.paths import Norm, Path
from gatedadapters.paths.low_rank import in_its_own_type
from gatedadapters.reporting import html
from gatedadapters.reporting.tables import format_table
from gatedadapters.runtime.forward import parameter_of, with_tensors
from gatedadapters.runtime.sharding import is_shard, local, part_of, reshard, whole

_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge changed, what it lost in rounding, and the originals that undo it.

    Attributes:
        task: whose adapters were merged.
        drift: by parameter, |stored - exact| / |exact - original| in the Frobenius norm: the share of the adapter's
            change that rounding to the weight's type lost. 0 is exact; at 1 the rounding is as large as the change.
            In float32 about 1e-6; in bfloat16 a few percent or more, the more the smaller the change.
        bytes: of the originals that `unmerge` puts back, beside the model in memory until then; 0 if none are kept.
        originals: the values that the weights had before, by parameter; empty if none are kept.
    """

    task: str
    drift: dict[str, float]
    bytes: int
    originals: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def worst(self) -> float:
        """The largest drift."""
        return max(self.drift.values(), default=0.0)

    def exchange(self, model: nn.Module) -> None:
        """Let the merged values and the originals change places: pointers move, no value is copied."""
        _exchange(model, self.originals)

    def _rows(self) -> list[list[str]]:
        return [[name, f"{value:.2%}"] for name, value in sorted(self.drift.items(), key=lambda item: -item[1])]

    def __str__(self) -> str:
        return format_table(["merged parameter", "drift"], self._rows())

    def _repr_html_(self) -> str:
        return html.table(["merged parameter", "drift"], self._rows())


@torch.inference_mode(False)
@torch.no_grad()
def merge(model: nn.Module, paths: Mapping[str, Path], task: str, index: int, *, keep: bool) -> Merged:
    """Add what compact paths do to the weights they sit at, in place.

    Args:
        model: the backbone.
        paths: compact paths by key.
        task: the name of the task whose routing counts.
        index: its position among the tasks.
        keep: keep the originals, so that the merge can be undone; False lets them go one by one.

    Raises:
        AttachError: a weight is shared, quantised, on the meta device, tuned by a sparse delta, or of a module that
            computes more than a linear map.
        PathError: a path is of a kind that no weight can stand in for.
        ArtifactError: a merged value would not be finite.

    Nothing is changed by any of them.
    """
    reshard(model)
    places = _places(model, paths)
    drift: dict[str, float] = {}
    for place in places:  # everything is computed once and thrown away: what fails, fails before anything has changed
        for parameter, value, lost in place.results(index):
            _check_not_tuned(model, parameter)
            _check_finite(parameter, value)
            drift[parameter] = lost
    originals: dict[str, Tensor] = {}
    try:
        for place in places:
            for parameter, value, _ in place.results(index):
                target, part = parameter_of(model, parameter), part_of(value, parameter_of(model, parameter))
                if keep:
                    originals[parameter] = target.data if part is value else local(target).clone()
                if part is value:
                    target.data = value
                else:  # FSDP holds the memory of a shard
                    local(target).copy_(part)
    except BaseException:
        _exchange(model, originals)
        raise
    return Merged(task, drift, sum(t.numel() * t.element_size() for t in originals.values()), originals)


@torch.no_grad()
def merged_values(model: nn.Module, paths: Mapping[str, Path], index: int) -> dict[str, Tensor]:
    """What a merge would store, by parameter; nothing is changed. Arguments and errors are those of `merge`."""
    reshard(model)
    return {name: value for place in _places(model, paths) for name, value, _ in place.results(index)}


def _exchange(model: nn.Module, others: dict[str, Tensor]) -> None:
    reshard(model)
    for name, other in others.items():
        parameter = parameter_of(model, name)
        if is_shard(parameter):
            others[name] = local(parameter).clone()
            local(parameter).copy_(other)
        else:
            others[name], parameter.data = parameter.data, other.to(parameter.device, parameter.dtype)


@dataclass(frozen=True, slots=True)
class _Place:
    """One linear map, stack of experts' or norm, and the paths around it, in the order in which they are composed.

    The module works with (weight + offset) * factor: the gains of Gemma's norms have an offset of 1, tables of token
    ids in some families a factor.
    """

    name: str
    module: nn.Module
    leaf: str
    stored_out_first: bool
    paths: tuple[Path, ...]
    offset: int = 0
    factor: float = 1.0

    def results(self, task: int) -> Iterator[tuple[str, Tensor, float]]:
        """(parameter, merged value as it is to be stored, drift) of the weight, and of the bias where it changes."""
        weight, bias = whole(parameter_of(self.module, self.leaf)), _whole_bias(self.module)
        wide = _WIDER.get(weight.dtype, weight.dtype)
        if weight.device.type == "mps":  # has no float64
            wide = torch.float32
        old_weight = ((weight if self.stored_out_first else weight.t()).to(wide) + self.offset) * self.factor
        old_bias = None if bias is None else bias.to(wide)
        new_weight, new_bias = old_weight, old_bias
        with in_its_own_type(weight):
            for path in self.paths:
                gate = None if path.routing is None else path.routing[task]
                new_weight, new_bias = path.merge_into(new_weight, new_bias, gate)
        if new_bias is not None and bias is None:
            kinds = ", ".join(sorted({path.kind for path in self.paths}))
            raise AttachError(
                "a shift cannot be merged into a module without a bias: there is no place to store it",
                expected="a module with a bias",
                got=f"{type(self.module).__name__} without one, and a path of {kinds}",
                where=f"merge, {self.name}",
                fix="keep the adapters attached, or offer bias paths only at maps with a bias (at: roles, include)",
            )
        if new_weight is not old_weight:
            changed = new_weight / self.factor - self.offset
            stored = (changed if self.stored_out_first else changed.t()).to(weight.dtype).contiguous()
            compared = ((stored if self.stored_out_first else stored.t()).to(wide) + self.offset) * self.factor
            yield f"{self.name}.{self.leaf}", stored, _drift(compared, new_weight, old_weight)
        if bias is not None and new_bias is not None and new_bias is not old_bias:
            stored = new_bias.to(bias.dtype)
            yield f"{self.name}.bias", stored, _drift(stored.to(wide), new_bias, old_bias)


def _whole_bias(module: nn.Module) -> Tensor | None:
    bias = module._parameters.get("bias")
    return None if bias is None else whole(bias)


def _drift(stored: Tensor, exact: Tensor, original: Tensor | None) -> float:
    change = exact if original is None else exact - original
    error = float((stored - exact).norm())
    return error / float(change.norm()) if error else 0.0


def _places(model: nn.Module, paths: Mapping[str, Path]) -> list[_Place]:
    """Every linear map that has paths; raises where a merge would not compute what the paths do."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.device.type != "meta":
                owners.setdefault(_storage(tensor), []).append(f"{name}.{leaf}" if name else leaf)
    around: dict[tuple[str, str], list[Path]] = {}
    for _, path in sorted(paths.items(), key=lambda item: (item[1].stage, item[0])):
        around.setdefault((path.site.write.module, path.site.write.parameter or "weight"), []).append(path)
    places = []
    for (name, leaf), own in around.items():
        module, offset, factor = model.get_submodule(name), 0, 1.0
        if own[0].site.at_weight:  # these paths change the stored weight itself, whatever its module computes with it
            _check_plain(module._parameters.get(leaf), f"{name}.{leaf}")
            stored_out_first = True
        else:
            for path in own:  # a kind that no weight can stand in for says so, whatever module it writes at
                path.merge_into(torch.empty(path.site.width_out, path.site.width_in, device="meta"), None, None)
            if isinstance(own[0], Norm):
                stored_out_first, offset = True, gain_offset(module, name)
            elif own[0].site.reads_ids:
                stored_out_first, factor = False, table_factor(module, name)
            else:
                stored_out_first = _stored_out_first(module, name)
        for part in (leaf, "bias"):
            tensor = module._parameters.get(part)
            users = [] if tensor is None else owners.get(_storage(tensor), [])
            if len(users) > 1:
                raise AttachError(
                    "a weight is shared, and a merge would change all its users",
                    expected=f"{name}.{part} used once",
                    got=" and ".join(users),
                    where="merge",
                    fix="keep the adapters attached, untie the weights, or search without this point",
                )
        # At one module: first what happens at its output, then at its input; that acts on the weight from the right, so
        # what happens last there is merged first.
        inputs = [path for path in own if path.site.write.side == "input"]
        outputs = [path for path in own if path.site.write.side != "input"]
        places.append(_Place(name, module, leaf, stored_out_first, (*outputs, *reversed(inputs)), offset, factor))
    return places


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # wrapped tensors, such as quantised ones, have none of their own
        return id(tensor)


def _check_plain(weight: Tensor | None, name: str, dims: int = 2) -> Tensor:
    """All of the weight, which must be an ordinary floating-point tensor with values and at least `dims` dimensions."""
    if weight is not None and weight.device.type == "meta":
        raise AttachError(
            "a weight has no values yet",
            expected="a loaded backbone",
            got="the meta device",
            where=name,
            fix="load the backbone's weights, then merge",
        )
    weight = None if weight is None else whole(weight)
    if weight is None or type(weight.data) is not Tensor or weight.dim() < dims or is_quantized(weight):
        kind = "none" if weight is None else f"{type(weight.data).__name__}, {weight.dtype}, {tuple(weight.shape)}"
        raise AttachError(
            "only plain weights take a merge; this one is quantised, parametrised or of another kind",
            expected="a floating-point matrix" if dims > 1 else "a floating-point vector",
            got=kind,
            where=name,
            fix="keep the adapters attached, or load the backbone unquantised and call ga.merge_into(it, adapters)",
        )
    return weight


def _stored_out_first(module: nn.Module, name: str) -> bool:
    """Whether the weight is (out, in), found by asking the module: some classes store (in, out), some do more than a
    linear map does (a router that also ranks its experts).
    """
    weight, bias = _check_plain(module._parameters.get("weight"), f"{name}.weight"), _whole_bias(module)
    plain = module if not is_shard(module._parameters["weight"]) else _unsharded(module, weight, bias)
    for out_first in (True, False):
        matrix = weight if out_first else weight.t()
        rows = torch.linspace(-1, 1, 3 * matrix.shape[1], device=weight.device).sin().view(3, -1).to(weight.dtype)
        try:
            got = plain.forward(rows)
        except Exception:  # whatever it does with such rows, it is not this linear map
            continue
        expected = F.linear(rows, matrix, bias)
        comparable = isinstance(got, Tensor) and got.shape == expected.shape
        if comparable and (got - expected).abs().max() <= 0.02 * expected.abs().max():
            return out_first
    raise AttachError(
        "this module computes more than a linear map, and a merge would change the rest of it",
        expected="x W + b",
        got=type(module).__name__,
        where=name,
        fix="keep the adapters attached, or search without this point",
    )


def _unsharded(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The module with all of its sharded weight, to compute with."""
    return with_tensors(module, {"weight": weight} if bias is None else {"weight": weight, "bias": bias})


def gain_offset(module: nn.Module, name: str) -> int:
    """What a norm adds to its weight to get its gains, found by asking it: 0, or 1 where it stores gains minus 1."""
    weight, bias = _check_plain(module._parameters.get("weight"), f"{name}.weight", 1), _whole_bias(module)
    rows = torch.linspace(-1, 1, 3 * len(weight), device=weight.device).sin().view(3, -1).to(weight.dtype)

    shifts = torch.zeros_like(weight) if bias is None else bias

    def output(gains: Tensor, shifts: Tensor) -> Tensor:
        tensors = {"weight": gains} if bias is None else {"weight": gains, "bias": shifts}
        return cast(Tensor, with_tensors(module, tensors).forward(rows)).float()

    for offset in (0, 1):
        try:
            at_zero, at_one = (output(torch.full_like(weight, gain), 0 * shifts) for gain in (0, 1))
            got = output(weight, shifts)
        except Exception:  # whatever it does with such rows, it is not this function
            break
        expected = (at_one - at_zero) * (weight.float() + offset) + shifts.float()
        if got.shape == expected.shape and (got - expected).abs().max() <= 0.02 * expected.abs().max():
            return offset
    raise AttachError(
        "this norm computes more than gains and shifts, and a merge would change the rest of it",
        expected="normed * weight + bias, or normed * (1 + weight) + bias",
        got=type(module).__name__,
        where=name,
        fix="keep the adapters attached, or search without this point",
    )


def table_factor(module: nn.Module, name: str) -> float:
    """What a table of token ids multiplies its rows with, found by asking it: 1, or a number for all rows."""
    weight = _check_plain(module._parameters.get("weight"), f"{name}.weight")
    row = int(weight.abs().sum(1).argmax())  # the first row may be zero, for padding
    plain = module if not is_shard(module._parameters["weight"]) else _unsharded(module, weight, None)
    got = cast(Tensor, plain.forward(torch.tensor([row], device=weight.device)))[0].double()
    held = weight[row].double()
    factor = float(got @ held / (held @ held))
    if (got - factor * held).abs().max() > 0.02 * got.abs().max():
        raise AttachError(
            "this table computes more than a lookup, and a merge would change the rest of it",
            expected="rows of the weight, or a multiple of them",
            got=type(module).__name__,
            where=name,
            fix="keep the adapters attached, or search without this point",
        )
    return 1.0 if abs(factor - 1) < 1e-3 else factor


def _check_not_tuned(model: nn.Module, name: str) -> None:
    path, _, leaf = name.rpartition(".")
    if leaf in model.get_submodule(path).__dict__:
        raise AttachError(
            "a sparse delta tunes elements of a weight that a merge would change",
            expected="weights of the backbone's own",
            got=f"{name} in the delta's mask",
            where="merge",
            fix="delta.merge() or .remove() first",
        )


def _check_finite(name: str, value: Tensor) -> None:
    if not bool(value.isfinite().all()):
        raise ArtifactError(
            "a merged weight would not be finite",
            expected=f"values that {value.dtype} holds",
            got=f"{int((~value.isfinite()).sum())} of {value.numel()} not finite",
            where=name,
            fix="check the adapter's and the backbone's weights; in float16 a large one may overflow",
        )
