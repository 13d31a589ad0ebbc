"""Sparse deltas: trainable values of the selected elements of a model's weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gatedadapters.artefact_files import DTYPES, check_finite, read_tensors, write_tensors
from gatedadapters.backbone.attached import apply_requires_grad, trained_originally
from gatedadapters.backbone.fingerprint import DELTA, Fingerprint, fingerprint
from gatedadapters.errors import ArtifactError, AttachError, MaskError, TrainingError
from gatedadapters.masking.checks import check_adapters, check_head_shapes, check_tensor, parameters_of
from gatedadapters.masking.live import LiveWeight, Pattern
from gatedadapters.masking.mask import FILES as MASK_FILES
from gatedadapters.masking.mask import RECORD, Mask, check_backbone
from gatedadapters.masking.tuned import TunedElements
from gatedadapters.runtime.sharding import (
    EndOfBackward,
    anywhere,
    average,
    check_alike,
    check_layout_of_weights,
    digest,
    groups_of,
    home_of,
    in_a_group,
    is_shard,
    is_sharded,
    local,
    on_first,
    part_of,
    replicate,
    reshard,
    whole,
    without_mark,
)
from gatedadapters.runtime.steps import CLOCK, StepListener, Turn
from gatedadapters.safe_files import whole_folder
from gatedadapters.supernet.attach import find_heads
from gatedadapters.supernet.hooks import hook_embedding

NAME = DELTA
VALUES = "values.safetensors"
FILES = MASK_FILES | {VALUES}


class SparseDelta(nn.Module, StepListener):
    """The trainable values of selected elements. `apply_mask` registers it in the model as `sparse_delta`.

    Its parameters are the only trainable values of the backbone. After each step of a `torch.optim.Optimizer`, the
    delta writes them into the weights, so that forward passes are those of the plain model. Before each step, it checks
    that nothing else has changed the selected elements.

    Attributes:
        tuned: the selected elements by tensor. A key is the name of the parameter with `/` instead of `.`.
        identity: fingerprint of the backbone without the delta.
        roles: roles of the mask's parameters.
        origin: how the mask was selected, as plain data.
        head_names: the parameters of the task heads, which are trained in full and saved too.
        head_values: the trained values of the task heads at the last removal. Empty while the delta is in a model.
    """

    turn: ClassVar[Turn] = Turn.DELTA
    identity: Fingerprint
    roles: dict[str, str]
    origin: dict[str, Any]

    def __init__(
        self,
        tuned: Mapping[str, TunedElements],
        *,
        identity: Fingerprint,
        roles: Mapping[str, str],
        origin: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.tuned = nn.ModuleDict({name.replace(".", "/"): part for name, part in tuned.items()})
        self.identity, self.roles, self.origin = identity, dict(roles), dict(origin)
        self.head_names: tuple[str, ...] = ()
        self.head_values: dict[str, Tensor] = {}
        self._model: list[nn.Module] = []  # a list, so that the backbone is not registered as a child of its own child
        self._handles: list[Any] = []
        self._required_grad: frozenset[str] = frozenset()
        self._as_written: frozenset[str] = frozenset()  # tensors that loading a state dict has not changed
        self.averaging: EndOfBackward | None = None  # in a sharded model
        replicate(self)
        nn.Module.register_load_state_dict_pre_hook(self, _before_loading)
        nn.Module.register_load_state_dict_post_hook(self, _follow_loaded_values)

    def __getstate__(self) -> dict[str, Any]:
        return {**without_mark(self.__dict__), "averaging": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)
        replicate(self)
        if self.applied:
            CLOCK.add(self)

    # -- contents ------------------------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The model that the delta is in.

        Raises:
            AttachError: it is in no model.
        """
        if not self._model:
            raise AttachError("this delta is in no model", fix="delta.reapply(model)", where="SparseDelta")
        return self._model[0]

    @property
    def applied(self) -> bool:
        """Whether the delta is in a model."""
        return bool(self._model)

    def items(self) -> Iterator[tuple[str, TunedElements]]:
        """The name of each parameter with selected elements, and these elements."""
        for key, part in self.tuned.items():
            yield key.replace("/", "."), cast(TunedElements, part)

    def parts(self) -> Iterator[TunedElements]:
        """The selected elements of each tensor."""
        for part in self.tuned.values():
            yield cast(TunedElements, part)

    @property
    def params(self) -> int:
        """Number of selected elements."""
        return sum(len(part.pattern) for part in self.parts())

    @property
    def mask(self) -> Mask:
        """The mask of the selected elements."""
        return Mask.from_indices(
            {name: part.pattern.indices() for name, part in self.items()},
            {name: part.pattern.shape for name, part in self.items()},
            identity=self.identity,
            roles=self.roles,
            origin=self.origin,
        )

    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters of the model's task heads, which are trained in full and saved too."""
        return [self.model.get_parameter(name) for name in self.head_names]

    def checkpointing(self) -> bool:
        """Whether the model trains with activation checkpointing."""
        return self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())

    # -- into and out of a model ---------------------------------------------------------------------------------------

    def reapply(self, model: nn.Module, *, heads: Sequence[str] | None = None) -> SparseDelta:
        """Put this delta into a model again, with its values and the trained values of the task heads.

        The cost is proportional to the number of selected elements.

        Args:
            model: the model in which the values were trained, or an equal one; without a delta.
            heads: see `apply_mask`; default: the heads that the delta had.

        Raises:
            AttachError: this delta is in a model already, or `model` has a delta.
            MaskError: `model` has another backbone, or heads of other shapes.

        The model is not changed in any of these cases.
        """
        if self.applied:
            raise AttachError("this delta is in a model already", where="reapply", fix="delta.remove() first")
        head_names = find_heads(model, self.head_names if heads is None else heads)
        check_backbone(self.identity, fingerprint(model, skip=frozenset(head_names)), where="reapply")
        parameters = parameters_of(model, [name for name, _ in self.items()], where="reapply")
        for name, part in self.items():
            check_tensor(name, parameters[name], part.pattern.shape)
        check_head_shapes(self.head_values, parameters)
        self._install(model, head_names)
        return self

    def remove(self) -> nn.Module:
        """Take the delta out of its model, and restore every bit, attribute and `requires_grad` flag of the backbone.

        If the model has adapters, the backbone stays frozen. Task heads in the model keep their trained values. The
        delta keeps its values and a copy of those of the heads, for `reapply`.

        Returns:
            The model.

        Raises:
            AttachError: this delta is in no model.
            TrainingError: something else changed the selected elements. Nothing is done then.
        """
        self.check()
        self.head_values = {name: value.clone() for name, value in self._heads().items()}
        return self._uninstall(restore=True)

    def merge(self) -> nn.Module:
        """Leave the values in the weights for good, and take the delta out of its model.

        Returns:
            The model.

        Raises:
            AttachError: this delta is in no model.
            TrainingError: something else changed the selected elements. Nothing is done then.
        """
        self.check()
        self.head_values = {name: value.clone() for name, value in self._heads().items()}
        for part in self.parts():
            part.write()
        return self._uninstall(restore=False)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """A context in which the model is the backbone alone. Do not train in it.

        Raises:
            AttachError: this delta is in no model.
            TrainingError: something else changed the selected elements.
        """
        self.check()
        for part in self.parts():
            part._written = part.values._version  # so that forward passes do not write the values back
            part.write_originals()
        try:
            yield
        finally:
            self.write()

    def save(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        overwrite: bool = False,
        beside: bool = False,
        allow_nonfinite: bool = False,
    ) -> None:
        """Write the mask, the values and the trained task heads into `folder`, whole or not at all.

        An element takes about 5 bytes in float32. `load_delta` then reads the same bits. Of a sharded model, every
        process calls this; the first one writes, and all raise its error.

        Args:
            folder: a new or an empty folder.
            dtype: type of the stored values, float32 or bfloat16.
            overwrite: replace a delta that the folder holds, in one step.
            beside: other files that the folder holds stay; an earlier delta in it is replaced.
            allow_nonfinite: also write infinities and NaN.

        Raises:
            ArtifactError: the folder is not free, a value is not finite, or the dtype is neither of the two.
        """
        if dtype not in DTYPES.values():
            raise ArtifactError(
                expected="torch.float32 or torch.bfloat16",
                got=str(dtype),
                where="SparseDelta.save(dtype=)",
                fix="choose one of them",
            )
        model = self._model[0] if self.applied else None
        tensors = {f"values.{name}": whole(part.values).to(dtype) for name, part in self.items()}
        tensors |= {f"heads.{name}": value.to(dtype) for name, value in self._heads().items()}
        if not allow_nonfinite:
            fix = "train again with a lower rate, or write them as they are with allow_nonfinite=True"
            check_finite(tensors, where=folder, fix=fix)

        def write() -> None:
            with whole_folder(
                folder, files=FILES, overwrite=overwrite, beside=RECORD if beside else None, together=in_a_group()
            ) as new:
                written = write_tensors(new / VALUES, tensors, metadata={"format": "gatedadapters delta 1"})
                self.mask.write(new, {VALUES: written})

        on_first(model is not None and is_sharded(model), write)

    # -- while it is in a model ----------------------------------------------------------------------------------------

    def watched(self) -> Iterator[nn.Parameter]:
        """The values; see `StepListener`."""
        return self.parameters()

    def before_step(self, optimizer: Optimizer) -> None:
        """Check that nothing else has changed the selected elements."""
        self.check()

    def after_step(self, optimizer: Optimizer | None) -> None:
        """Write the values into the weights, always: fused optimisers change values without a new version number."""
        self.write()

    def write(self) -> None:
        """Write the values into the weights.

        Needed only after a change by hand, or with an optimiser that is no `torch.optim.Optimizer`.

        Raises:
            AttachError: this delta is in no model.
        """
        reshard(self.model)
        for part in self.parts():
            part.write()

    def check(self) -> None:
        """Check the weights in which elements are tuned.

        They must hold the values that were written last, their stand-ins must be in place, and they must not require
        gradients themselves.

        Raises:
            AttachError: this delta is in no model.
            TrainingError: something of this does not hold. The error names the tensors.
        """
        reshard(self.model)
        held = {id(module) for module in self.model.modules()}
        for name, part in self.items():
            for module, attribute in part.owners:
                if id(module) not in held:
                    raise _changed([name], "another module was put in its place")
                standing = self.averaging is not None or isinstance(module.__dict__.get(attribute), LiveWeight)
                if not standing or attribute not in module._parameters:
                    raise _changed([name], "another parameter was put in its place")
            if part.weight.requires_grad:
                raise TrainingError(
                    "a tuned parameter is trained in full beside its delta",
                    expected="requires_grad=False",
                    got="requires_grad=True: an optimiser may move elements that the mask keeps",
                    where=name,
                    fix="parameter.requires_grad_(False); to train all of it, remove the delta first",
                )
        changed = self._where(TunedElements.differs, [name for name, part in self.items() if not part.pending])
        if changed:
            raise _changed(changed, "other values in tuned elements")

    def _where(self, flag: Callable[[TunedElements], Tensor], names: Collection[str]) -> list[str]:
        """Which of the tensors have a flag, on any process: all of them raise, or none."""
        parts = [(name, part) for name, part in self.items() if name in names]
        flags = self._anywhere([flag(part) for _, part in parts])
        return [name for (name, _), found in zip(parts, flags, strict=True) if found]

    def stand_in(self) -> None:
        """Let the stand-ins shadow the tuned parameters; in a sharded model they do so from each forward pass until its
        backward pass has ended, because FSDP looks for the parameters in between.
        """
        for part in self.parts():
            for module, attribute in part.owners:
                module.__dict__[attribute] = LiveWeight.over(module, attribute, part)

    def stand_down(self) -> None:
        """Take the stand-ins away."""
        for part in self.parts():
            for module, attribute in part.owners:
                module.__dict__.pop(attribute, None)

    def _anywhere(self, flags: Sequence[Tensor]) -> list[bool]:
        """Which flags, scalar bool tensors, are set here or, in a sharded model, on any process."""
        home = next(self.parts()).pattern.columns.device
        return anywhere(flags, self.averaging.groups if self.averaging is not None else (), home)

    def begin_forward(self) -> None:
        """Called before each forward pass."""
        if self.averaging is not None:
            self.stand_in()

    def follow_sharding(self) -> dict[int, nn.Parameter]:
        """Keep this process's share of the values alone, if the model is sharded and this was not done yet.

        `apply_mask` does it in a sharded model, and the library's Trainers do when they have sharded theirs.

        Returns:
            The parameters that have taken the places of others, by the id of the other.

        Raises:
            TrainingError: the processes hold different masks or values.
        """
        model = self.model
        if self.averaging is not None or not (in_a_group() and is_sharded(model)):
            return {}
        alike = {"the mask": self.mask.digest, "the values of the delta": digest(dict(self.named_parameters()))}
        check_alike(alike, where="sparse delta of a sharded model")
        reshard(model)
        groups, home = groups_of(model), home_of(model)
        replaced = {}
        for part in self.parts():
            if is_shard(part.weight):
                old = id(part.values)
                replaced[old] = part.share_out()
            else:
                part.to(home)
        self.averaging = EndOfBackward(groups, lambda: self._exchange(groups))
        return replaced

    def _exchange(self, groups: Sequence[Any]) -> None:
        """Give the values the mean of all processes' gradients, at the end of a backward pass."""
        average([part.values for part in self.parts() if not part.spread], groups)
        spread = [part for part in self.parts() if part.spread]
        for part, found in zip(spread, self._anywhere([part.has_gradient() for part in spread]), strict=True):
            if found:
                part.exchange()
        self.stand_down()

    def _heads(self) -> dict[str, Tensor]:
        """The trained values of the task heads, from the model or, outside one, from the last removal."""
        if not self.applied:
            return self.head_values
        reshard(self.model)
        return {n: whole(p.detach()) for n, p in zip(self.head_names, self.head_parameters(), strict=True)}

    def _install(self, model: nn.Module, head_names: tuple[str, ...]) -> None:
        required = trained_originally(model)
        check_layout_of_weights(model)
        check_adapters(model, {name for name, _ in self.items()})
        owners = _owners(model)
        self.train(model.training)
        try:
            for name, part in self.items():
                part.owners = owners[name]
                if part.weight.device != part.values.device:
                    part.to(part.weight.device)
                part.originals = part.present().clone()  # of this model, in its type
            self._model.append(model)
            self.follow_sharding()
            if not is_sharded(model):
                self.stand_in()
            self.head_names, self._required_grad = head_names, required
            self._handles.append(model.register_forward_pre_hook(RefuseCompilation()))
            self._handles.append(model.register_forward_pre_hook(BeginForward(self)))
            self._handles.append(model.register_forward_hook(FollowBackward(self), always_call=True))
            self._handles += hook_embedding(self, model)
            model.add_module(NAME, self)
            apply_requires_grad(model, required)
            self.write()
            with torch.no_grad():
                for name in self.head_values.keys() & set(head_names):
                    head = model.get_parameter(name)
                    local(head).copy_(part_of(self.head_values[name], head))
            self.head_values = {}
            CLOCK.add(self)
        except BaseException:
            self._required_grad = required
            if not self._model:
                self._model.append(model)
            self._uninstall(restore=True)
            raise

    def _uninstall(self, *, restore: bool) -> nn.Module:
        model = self.model
        reshard(model)
        self.averaging = None
        self.stand_down()
        for part in self.parts():
            if part.owners and restore:
                part.write_originals()
            part.take_in()
            part.owners, part._written = [], None
        CLOCK.discard(self)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if getattr(model, NAME, None) is self:
            delattr(model, NAME)
        apply_requires_grad(model, self._required_grad)
        self._model.clear()
        return model


class BeginForward:
    """A forward pre-hook; see `SparseDelta.begin_forward`."""

    def __init__(self, delta: SparseDelta) -> None:
        self.delta = delta

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Begin."""
        self.delta.begin_forward()


class FollowBackward:
    """A forward hook, also called after an exception, that lets a delta in a sharded model wait for the backward pass;
    see `EndOfBackward`.
    """

    def __init__(self, delta: SparseDelta) -> None:
        self.delta = delta

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Wait for the backward pass through `output`, if there will be one."""
        averaging = self.delta.averaging
        if averaging is not None and not (torch.is_grad_enabled() and averaging.follow(output)):
            self.delta.stand_down()


class RefuseCompilation:
    """A forward pre-hook that refuses compilation: a compiled model would miss new values and their gradients."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Raise an error while the model is compiled."""
        if torch.compiler.is_compiling():
            raise TrainingError(
                "a model with a sparse delta is not compiled",
                expected="the model as it is",
                got="torch.compile",
                where=type(module).__name__,
                fix="delta.merge() or .remove() first",
            )


def apply_mask(model: nn.Module, mask: Mask, *, heads: Sequence[str] | None = None) -> SparseDelta:
    """Freeze `model`, and make the elements that `mask` selects trainable, in place.

    The model computes the same as before, at the same cost. `model.parameters()` now also yields the values of the
    selected elements, as one compact vector for each tensor. Only these values, and adapters if there are any, require
    gradients. Everything else is frozen to the bit with any optimiser, because the optimiser has no other values.

    Load, resize and tie weights before this call or after `remove`. In between, a stand-in replaces each tuned
    parameter, and transformers' methods fail on it.

    Args:
        model: any module whose selected tensors are floating-point parameters.
        mask: made for this model, by `select` or `Mask.build`.
        heads: parameters of the model (names or prefixes) to train in full and save too. By default, everything outside
            the backbone, unless the model has a language-model head.

    Raises:
        AttachError: the model has a delta already, or a head is unknown.
        MaskError: the mask selects nothing, belongs to another model, or selects integer or quantised weights.

    The model is not changed in any of these cases.
    """
    delta, head_names = _build(model, mask, heads, where="apply_mask")
    delta._install(model, head_names)
    return delta


def load_delta(
    model: nn.Module, folder: str | Path, *, verify: bool = True, allow_nonfinite: bool = False
) -> SparseDelta:
    """Put a saved delta into the backbone in which it was trained, with its task heads.

    Everything is checked before the model is changed. Nothing in the files is executed.

    Args:
        model: a model with the backbone of the delta.
        folder: written by `SparseDelta.save`.
        verify: check the digests of the files, which tell damage. Deltas of releases 0.1 and 0.2 have none; they load
            with a note in the log.
        allow_nonfinite: also load infinities and NaN.

    Raises:
        ArtifactError: the folder holds no delta, a file is truncated, foreign or damaged, or a value is not finite.
        AttachError, MaskError: as in `apply_mask`.

    The model is not changed in any of these cases.
    """
    path = Path(folder)
    mask, record = Mask.read(path, verify=verify)
    delta, head_names = _build(model, mask, mask.identity.heads, where=str(path))
    shapes: dict[str, tuple[int, ...]] = {f"values.{name}": (len(part.pattern),) for name, part in delta.items()}
    shapes |= {f"heads.{name}": tuple(model.get_parameter(name).shape) for name in head_names}
    digest = record.digest(VALUES)
    tensors = read_tensors(path / VALUES, shapes, digest=digest, allow_nonfinite=allow_nonfinite)
    with torch.no_grad():
        for name, part in delta.items():
            part.values.copy_(tensors[f"values.{name}"])
    delta.head_values = {name: tensors[f"heads.{name}"] for name in head_names}
    delta._install(model, head_names)
    return delta


def _build(
    model: nn.Module, mask: Mask, heads: Sequence[str] | None, *, where: str
) -> tuple[SparseDelta, tuple[str, ...]]:
    """A delta for `model` and the names of its heads. The model is not changed."""
    if find_delta(model) is not None:
        raise AttachError(
            "this model has a sparse delta already",
            expected="a model without one",
            got="model.sparse_delta",
            where=type(model).__name__,
            fix="model.sparse_delta.remove() or .merge() first",
        )
    reshard(model)
    selected = [name for name in mask.names if mask.count(name)]
    if not selected:
        raise MaskError(
            "the mask selects nothing",
            expected="at least one element",
            got="none",
            where=where,
            fix="lower protect=, or raise density=",
        )
    parameters = parameters_of(model, selected, where=where)
    for name in selected:
        check_tensor(name, parameters[name], mask.shape(name))
    head_names = find_heads(model, heads)
    identity = fingerprint(model, skip=frozenset(head_names))
    check_backbone(mask.identity, identity, where=where)
    overlap = [name for name in selected if name in head_names]
    if overlap:
        raise MaskError(
            "the mask selects elements of a head that is trained in full",
            expected="elements of the backbone",
            got=overlap[0],
            where=where,
            fix="exclude heads from the mask, or pass heads=()",
        )
    tuned = {}
    for name in selected:
        weight = parameters[name]
        pattern = Pattern.of(weight.shape, mask.indices(name).to(weight.device))
        tuned[name] = TunedElements(pattern, pattern.gather(whole(weight.detach())).clone())
    return SparseDelta(tuned, identity=identity, roles=mask.roles, origin=mask.origin), head_names


def find_delta(model: nn.Module) -> SparseDelta | None:
    """The delta in `model`, or in the model that DDP wraps; None without one."""
    found = (getattr(module, NAME, None) for module in model.modules())
    return next((delta for delta in found if isinstance(delta, SparseDelta)), None)


def get_delta(model: nn.Module) -> SparseDelta:
    """The delta in `model`, or in the model that DDP wraps.

    Raises:
        AttachError: the model has none.
    """
    found = find_delta(model)
    if found is not None:
        return found
    raise AttachError("this model has no sparse delta", where=type(model).__name__, fix="call gatedadapters.apply_mask")


def _owners(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """For each parameter, by its name in `named_parameters()`, every (module, attribute) that holds it.

    A tied parameter has several.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owners: dict[str, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(names[id(parameter)], []).append((module, attribute))
    return owners


def _changed(names: Sequence[str], how: str) -> TrainingError:
    return TrainingError(
        "a tuned parameter was changed from outside between steps",
        expected="the values that the last step wrote",
        got=how,
        where=", ".join([*names[:3], *(["..."] if len(names) > 3 else [])]),
        fix="remove the delta before loading, resizing or tying weights, or call delta.write() to overrule the change",
    )


def _before_loading(delta: SparseDelta, *args: Any) -> None:
    """Load-state-dict pre-hook: note the tensors that the state dict has not changed.

    It runs after the weights of the backbone are loaded, and before the values of the delta are.
    """
    names = {name for name, _ in delta.items()} if delta.applied else set()
    delta._as_written = frozenset(names.difference(delta._where(TunedElements.differs, names)))


def _follow_loaded_values(delta: SparseDelta, incompatible: Any) -> None:
    """Load-state-dict post-hook: accept weights that hold the trained values or the base's, and write the values.

    Raises:
        TrainingError: other weights were loaded.
    """
    if not delta.applied:
        return
    loaded = {name for name, _ in delta.items()} - delta._as_written
    foreign = delta._where(TunedElements.differs_from_originals, delta._where(TunedElements.differs, loaded))
    if foreign:
        raise _changed(foreign, "a state dict of another backbone was loaded")
    delta.write()
