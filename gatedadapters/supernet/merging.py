"""Compact adapters folded into the backbone's own weights, and out of them again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatedadapters.errors import ArtifactError, AttachError, TaskError, TrainingError
from gatedadapters.paths import Path
from gatedadapters.paths.low_rank import in_its_own_type
from gatedadapters.reporting import html
from gatedadapters.reporting.tables import format_table

if TYPE_CHECKING:
    from gatedadapters.supernet.adapters import Adapters

_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge changed, and what it lost in rounding.

    Attributes:
        task: whose adapters were merged.
        drift: by parameter, |stored - exact| / |exact - original| in the Frobenius norm: the share of the adapter's
            change that rounding to the weight's type lost. 0 is exact; at 1 the rounding is as large as the change.
            In float32 about 1e-6; in bfloat16 a few percent or more, the more the smaller the change.
        bytes: of the originals that `unmerge` puts back, beside the model in memory until then; 0 if none are kept.
    """

    task: str
    drift: dict[str, float]
    bytes: int

    @property
    def worst(self) -> float:
        """The largest drift."""
        return max(self.drift.values(), default=0.0)

    def _rows(self) -> list[list[str]]:
        return [[name, f"{value:.2%}"] for name, value in sorted(self.drift.items(), key=lambda item: -item[1])]

    def __str__(self) -> str:
        return format_table(["merged parameter", "drift"], self._rows())

    def _repr_html_(self) -> str:
        return html.table(["merged parameter", "drift"], self._rows())


@torch.inference_mode(False)
@torch.no_grad()
def merge(adapters: Adapters, task: str | None, *, keep: bool) -> MergeReport:
    """See `Adapters.merge`; with `keep` False the originals are let go one by one, and `unmerge` has none."""
    index = _task_index(adapters, task)
    name = adapters.tasks[index]
    if adapters.merged is not None:
        if adapters.merged.task != name:
            raise AttachError(
                "other adapters are merged",
                expected=f"task {adapters.merged.task!r} again, or none",
                got=repr(name),
                where="merge",
                fix="call adapters.unmerge() first",
            )
        return adapters.merged
    adapters.check_alone()
    places = _places(adapters)
    drift: dict[str, float] = {}
    for place in places:  # everything is computed once and thrown away: what fails, fails before anything has changed
        for parameter, value, lost in place.results(index):
            _check_not_tuned(adapters.model, parameter)
            _check_finite(parameter, value)
            drift[parameter] = lost
    kept = adapters.replaced
    try:
        for place in places:
            for parameter, value, _ in place.results(index):
                target = _parameter(adapters.model, parameter)
                if keep:
                    kept[parameter] = target.data
                target.data = value
    except BaseException:
        exchange(adapters)
        kept.clear()
        raise
    adapters.merged = MergeReport(name, drift, sum(t.numel() * t.element_size() for t in kept.values()))
    return adapters.merged


def unmerge(adapters: Adapters) -> None:
    """See `Adapters.unmerge`."""
    _check_enabled(adapters)
    exchange(adapters)
    adapters.replaced.clear()
    adapters.merged = None


def exchange(adapters: Adapters) -> None:
    """Let the merged values and the originals change places: pointers move, no value is copied."""
    for name, other in adapters.replaced.items():
        parameter = _parameter(adapters.model, name)
        adapters.replaced[name], parameter.data = parameter.data, other.to(parameter.device, parameter.dtype)


def check_call(adapters: Adapters, task: str, routed: int | Tensor | None) -> None:
    """Raise where a forward pass of a merged model would not give what it asks for: other tasks, or learning."""
    index = adapters.tasks.index(task)
    if routed is not None and bool((torch.as_tensor(routed) != index).any()):
        raise TaskError(
            "one task's adapters are merged into the weights, and the batch holds another's",
            expected=f"task ids of {task!r} ({index}) alone",
            got=routed,
            where="forward",
            fix="call adapters.unmerge() first",
        )
    if adapters.training and torch.is_grad_enabled() and adapters.weight_parameters():
        raise TrainingError(
            "merged adapters do not learn: their paths do not run",
            expected="unmerged adapters, or evaluation",
            got="a forward pass in training mode, with gradients",
            where="forward",
            fix="call adapters.unmerge() to train on, or model.eval()",
        )


@dataclass(frozen=True, slots=True)
class _Place:
    """One linear map, or stack of experts', and the paths around it, in the order in which they are composed."""

    name: str
    module: nn.Module
    leaf: str
    stored_out_first: bool
    paths: tuple[Path, ...]

    def results(self, task: int) -> Iterator[tuple[str, Tensor, float]]:
        """(parameter, merged value as it is to be stored, drift) of the weight, and of the bias where it changes."""
        weight, bias = _parameter(self.module, self.leaf), self.module._parameters.get("bias")
        wide = _WIDER.get(weight.dtype, weight.dtype)
        if weight.device.type == "mps":  # has no float64
            wide = torch.float32
        old_weight = (weight if self.stored_out_first else weight.t()).to(wide)
        old_bias = None if bias is None else bias.to(wide)
        new_weight, new_bias = old_weight, old_bias
        with in_its_own_type(weight):
            for path in self.paths:
                gate = None if path.routing is None else path.routing[task]
                new_weight, new_bias = path.merge_into(new_weight, new_bias, gate)
        stored = (new_weight if self.stored_out_first else new_weight.t()).to(weight.dtype).contiguous()
        compared = stored if self.stored_out_first else stored.t()
        yield f"{self.name}.{self.leaf}", stored, _drift(compared.to(wide), new_weight, old_weight)
        if bias is not None and new_bias is not None and new_bias is not old_bias:
            stored = new_bias.to(bias.dtype)
            yield f"{self.name}.bias", stored, _drift(stored.to(wide), new_bias, old_bias)


def _drift(stored: Tensor, exact: Tensor, original: Tensor | None) -> float:
    change = exact if original is None else exact - original
    error = float((stored - exact).norm())
    return error / float(change.norm()) if error else 0.0


def _task_index(adapters: Adapters, task: str | None) -> int:
    if adapters.bank is not None:
        raise AttachError(
            "only compact adapters can be merged",
            expected="gates folded into the weights",
            got=f"gates over {len(adapters.paths)} candidate paths",
            where="merge",
            fix="call adapters.compact() first",
        )
    _check_enabled(adapters)
    if task is None and len(adapters.tasks) == 1:
        return 0
    if task not in adapters.tasks:
        raise TaskError(
            "one set of weights serves one task",
            expected=f"one of {', '.join(adapters.tasks)}",
            got=repr(task),
            where="merge(task=)",
            fix="name the task to merge, or keep the adapters attached for mixed batches",
        )
    return adapters.tasks.index(task)


def _check_enabled(adapters: Adapters) -> None:
    if not adapters.enabled:
        fix = "leave `with adapters.disabled()` first"
        raise AttachError("the adapters are disabled", where="merge / unmerge", fix=fix)


def _places(adapters: Adapters) -> list[_Place]:
    """Every linear map that has paths; raises where a merge would not compute what the paths do."""
    model = adapters.model
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.device.type != "meta":
                owners.setdefault(_storage(tensor), []).append(f"{name}.{leaf}" if name else leaf)
    around: dict[tuple[str, str], list[Path]] = {}
    for _, path in sorted(adapters.typed_paths(), key=lambda item: (item[1].stage, item[0])):
        around.setdefault((path.site.write.module, path.site.write.parameter or "weight"), []).append(path)
    places = []
    for (name, leaf), paths in around.items():
        module = model.get_submodule(name)
        if paths[0].site.at_weight:  # these paths change the stored weight itself, whatever its module computes with it
            _check_plain(module._parameters.get(leaf), f"{name}.{leaf}")
            stored_out_first = True
        else:
            for path in paths:  # a kind that no weight can stand in for says so, whatever module it writes at
                path.merge_into(torch.empty(path.site.width_out, path.site.width_in, device="meta"), None, None)
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
        # at one module: first what happens at its output, then at its input, which acts on the weight from the right
        ordered = sorted(paths, key=lambda path: path.site.write.side == "input")
        places.append(_Place(name, module, leaf, stored_out_first, tuple(ordered)))
    return places


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # wrapped tensors, such as quantised ones, have none of their own
        return id(tensor)


def _check_plain(weight: Tensor | None, name: str) -> Tensor:
    """The weight, which must be an ordinary floating-point tensor that has values."""
    if weight is not None and weight.device.type == "meta":
        raise AttachError(
            "a weight has no values yet",
            expected="a loaded backbone",
            got="the meta device",
            where=name,
            fix="load the backbone's weights, then merge",
        )
    if weight is None or type(weight.data) is not Tensor or weight.dim() < 2 or not weight.is_floating_point():
        kind = "none" if weight is None else f"{type(weight.data).__name__}, {weight.dtype}, {tuple(weight.shape)}"
        raise AttachError(
            "only plain matrices take a merge; this weight is quantised, sharded, parametrised or of another kind",
            expected="a floating-point matrix",
            got=kind,
            where=name,
            fix="keep the adapters attached, or load the backbone unquantised to merge",
        )
    return weight


def _stored_out_first(module: nn.Module, name: str) -> bool:
    """Whether the weight is (out, in), found by asking the module: some classes store (in, out), some do more than a
    linear map does (a router that also ranks its experts).
    """
    weight, bias = _check_plain(module._parameters.get("weight"), f"{name}.weight"), module._parameters.get("bias")
    for out_first in (True, False):
        matrix = weight if out_first else weight.t()
        rows = torch.linspace(-1, 1, 3 * matrix.shape[1], device=weight.device).sin().view(3, -1).to(weight.dtype)
        try:
            got = module.forward(rows)
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


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter itself, also where a sparse delta's stand-in hides it from `get_parameter`."""
    path, _, leaf = name.rpartition(".")
    return cast(nn.Parameter, model.get_submodule(path)._parameters[leaf])


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
