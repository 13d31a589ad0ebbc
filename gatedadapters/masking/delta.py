"""The trainable values of selected elements, living in the weights of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gatedadapters.backbone.attached import apply_requires_grad, trained_originally
from gatedadapters.backbone.fingerprint import DELTA, Fingerprint, fingerprint
from gatedadapters.errors import ArtifactError, AttachError, MaskError, TrainingError
from gatedadapters.masking.checks import check_adapters, check_heads, check_tensor, tunable
from gatedadapters.masking.live import LiveWeight, Pattern
from gatedadapters.masking.mask import FILES as MASK_FILES
from gatedadapters.masking.mask import Mask, check_backbone
from gatedadapters.masking.tuned import Tuned
from gatedadapters.runtime.steps import CLOCK, StepListener, Turn
from gatedadapters.safe_files import DTYPES, read_tensors, whole_folder, write_tensors
from gatedadapters.supernet.attach import find_heads
from gatedadapters.supernet.hooks import hook_embedding

NAME = DELTA
VALUES = "values.safetensors"
FILES = MASK_FILES | {VALUES}


class SparseDelta(nn.Module, StepListener):
    """What `apply_mask` puts into a model, registered there as `sparse_delta`: its parameters are the only trainable
    values of the backbone.

    After each step of a `torch.optim.Optimizer` the values are written into the weights, so the forward pass is that of
    the plain model. Before each step it is checked that nobody else wrote there.

    Attributes:
        tuned: the selected elements by tensor, `name.of.parameter` with `/` for `.`.
        identity: of the backbone without the delta.
        roles: of the mask.
        origin: of the mask.
        head_values: what task heads had learned when it last left a model; empty while it is in one.
    """

    turn: ClassVar[Turn] = Turn.DELTA
    identity: Fingerprint
    roles: dict[str, str]
    origin: dict[str, Any]

    def __init__(
        self, tuned: Mapping[str, Tuned], *, identity: Fingerprint, roles: Mapping[str, str], origin: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.tuned = nn.ModuleDict({name.replace(".", "/"): part for name, part in tuned.items()})
        self.identity, self.roles, self.origin = identity, dict(roles), dict(origin)
        self.head_names: tuple[str, ...] = ()
        self.head_values: dict[str, Tensor] = {}
        self._model: list[nn.Module] = []  # a list, so that the backbone is not registered as a child of its own child
        self._handles: list[Any] = []
        self._required_grad: frozenset[str] = frozenset()
        self._as_written: frozenset[str] = frozenset()  # while a state dict is loaded: weights that it did not hold
        nn.Module.register_load_state_dict_pre_hook(self, _before_loading)
        nn.Module.register_load_state_dict_post_hook(self, _follow_loaded_values)

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)
        if self.applied:
            CLOCK.add(self)

    # -- what it holds -------------------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The model this delta is in.

        Raises:
            AttachError: it is in none.
        """
        if not self._model:
            raise AttachError("this delta is in no model", fix="delta.reapply(model)")
        return self._model[0]

    @property
    def applied(self) -> bool:
        """Whether it is in a model."""
        return bool(self._model)

    def items(self) -> Iterator[tuple[str, Tuned]]:
        """Names of the parameters of the backbone, and their selected elements."""
        for key, part in self.tuned.items():
            yield key.replace("/", "."), cast(Tuned, part)

    def parts(self) -> Iterator[Tuned]:
        """The selected elements, tensor by tensor."""
        for part in self.tuned.values():
            yield cast(Tuned, part)

    @property
    def params(self) -> int:
        """How many elements are tuned."""
        return sum(len(part.pattern) for part in self.parts())

    @property
    def mask(self) -> Mask:
        """Which elements are tuned."""
        return Mask.from_indices(
            {name: part.pattern.indices() for name, part in self.items()},
            {name: part.pattern.shape for name, part in self.items()},
            identity=self.identity,
            roles=self.roles,
            origin=self.origin,
        )

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters of the model's own task heads, trained and saved along."""
        return [self.model.get_parameter(name) for name in self.head_names]

    def checkpointing(self) -> bool:
        """Whether the model checkpoints activations while training."""
        return self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())

    # -- in and out of a model -----------------------------------------------------------------------------------------

    def reapply(self, model: nn.Module, *, heads: Sequence[str] | None = None) -> SparseDelta:
        """Put the values into `model`, which is or equals the one they were trained in, and into its task heads what
        they had learned with them; costs O(selected).

        Args:
            model: without a delta.
            heads: see `apply_mask`; default: those it had.

        Raises:
            AttachError: this delta is in a model already, or `model` has one.
            MaskError: another backbone, or heads of other shapes.

        The model is left untouched by all of them.
        """
        if self.applied:
            raise AttachError("this delta is in a model already", where="reapply", fix="delta.remove() first")
        head_names = find_heads(model, self.head_names if heads is None else heads)
        check_backbone(self.identity, fingerprint(model, skip=frozenset(head_names)), where="reapply")
        parameters = tunable(model, [name for name, _ in self.items()], where="reapply")
        for name, part in self.items():
            check_tensor(name, parameters[name], part.pattern.shape)
        check_heads(self.head_values, parameters)
        self._install(model, head_names)
        return self

    def remove(self) -> nn.Module:
        """Take the delta out: every bit, attribute and `requires_grad` of the model is as before; where adapters stay
        in it, the backbone stays frozen. Task heads keep what they learned, this object its values and a copy of
        theirs.

        Raises:
            AttachError: this delta is in no model.
            TrainingError: somebody else changed the tuned weights; nothing is done.
        """
        self.check()
        self.head_values = {name: value.clone() for name, value in self._heads().items()}
        return self._uninstall(restore=True)

    def merge(self) -> nn.Module:
        """Leave the values in the weights for good, and this object without a model.

        Raises:
            AttachError: this delta is in no model.
            TrainingError: somebody else changed the tuned weights; nothing is done.
        """
        self.check()
        self.head_values = {name: value.clone() for name, value in self._heads().items()}
        for part in self.parts():
            part.write()
        return self._uninstall(restore=False)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context the model is the backbone alone; not to be trained meanwhile."""
        self.check()
        for part in self.parts():
            part._written = part.values._version  # so that no forward pass writes them back
            part.write(part.originals)
        try:
            yield
        finally:
            for part in self.parts():
                part.write()

    def save(self, folder: str | Path, *, dtype: torch.dtype = torch.float32, overwrite: bool = False) -> None:
        """Write the mask, the values and what task heads learned into `folder`, whole or not at all: about 5 bytes an
        element. `load_delta` reads them back, bit for bit in fp32.

        Args:
            folder: a new or an empty folder.
            dtype: of the values, float32 or bfloat16.
            overwrite: replace a delta that the folder holds, in one step.

        Raises:
            ArtifactError: the folder is not free, or an unknown dtype.
        """
        if dtype not in DTYPES.values():
            raise ArtifactError(
                expected="torch.float32 or torch.bfloat16",
                got=str(dtype),
                where="SparseDelta.save(dtype=)",
                fix="choose one of them",
            )
        tensors = {f"values.{name}": part.values.to(dtype) for name, part in self.items()}
        tensors |= {f"heads.{name}": value.to(dtype) for name, value in self._heads().items()}
        with whole_folder(folder, files=FILES, overwrite=overwrite) as new:
            self.mask.write(new)
            write_tensors(new / VALUES, tensors, metadata={"format": "gatedadapters delta 1"})

    # -- while it is in a model ----------------------------------------------------------------------------------------

    def watched(self) -> Iterator[nn.Parameter]:
        """The values; see `StepListener`."""
        return self.parameters()

    def before_step(self, optimizer: Optimizer) -> None:
        """See that nobody else wrote into the weights."""
        self.check()

    def after_step(self, optimizer: Optimizer | None) -> None:
        """Write the values into the weights. Version counters cannot tell whether they moved: fused optimisers do not
        advance them.
        """
        self.write()

    def write(self) -> None:
        """Put the values into the weights. Needed only after changing them by hand, or with an optimiser that is no
        `torch.optim.Optimizer`.

        Raises:
            AttachError: this delta is in no model.
        """
        _ = self.model
        for part in self.parts():
            part.write()

    def check(self) -> None:
        """See that the weights hold what was written last, that every use of them is still seen, and that they learn
        through the values alone.

        Raises:
            AttachError: this delta is in no model.
            TrainingError: naming the tensors of which this is not so.
        """
        held = {id(module) for module in self.model.modules()}
        for name, part in self.items():
            for module, attribute in part.places:
                if id(module) not in held:
                    raise _changed([name], "another module was put in its place")
                if not isinstance(module.__dict__.get(attribute), LiveWeight) or attribute not in module._parameters:
                    raise _changed([name], "another parameter was put in its place")
            if part.weight.requires_grad:
                raise TrainingError(
                    "a tuned parameter is trained in full beside its delta",
                    expected="requires_grad=False",
                    got="requires_grad=True: an optimiser may move elements that the mask keeps",
                    where=name,
                    fix="parameter.requires_grad_(False); to train all of it, remove the delta first",
                )
        parts = [(name, part) for name, part in self.items() if not part.pending]
        if parts:
            home = parts[0][1].values.device
            flags = torch.stack([part.differs().to(home) for _, part in parts]).tolist()  # the one host read
            changed = [name for (name, _), flag in zip(parts, flags, strict=True) if flag]
            if changed:
                raise _changed(changed, "other values in tuned elements")

    def _heads(self) -> dict[str, Tensor]:
        """What task heads learned: in the model, or when this delta left one."""
        if not self.applied:
            return self.head_values
        return {n: p.detach() for n, p in zip(self.head_names, self.head_parameters(), strict=True)}

    def _install(self, model: nn.Module, head_names: tuple[str, ...]) -> None:
        required = trained_originally(model)
        check_adapters(model, {name for name, _ in self.items()})
        places = _places(model)
        self.train(model.training)
        try:
            for name, part in self.items():
                part.places = places[name]
                if part.weight.device != part.values.device:
                    part.to(part.weight.device)
                part.originals = part.pattern.gather(part.weight.detach()).clone()  # of this model, in its type
                for module, attribute in part.places:
                    module.__dict__[attribute] = LiveWeight.over(module, attribute, part)
            self._model.append(model)
            self.head_names, self._required_grad = head_names, required
            self._handles.append(model.register_forward_pre_hook(RefuseCompilation()))
            self._handles += hook_embedding(self, model)
            model.add_module(NAME, self)
            apply_requires_grad(model, required)
            self.write()
            with torch.no_grad():
                for name in self.head_values.keys() & set(head_names):
                    model.get_parameter(name).copy_(self.head_values[name])
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
        for part in self.parts():
            if part.places and restore:
                part.write(part.originals)
            for module, attribute in part.places:
                module.__dict__.pop(attribute, None)
            part.places, part._written = [], None
        CLOCK.discard(self)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if getattr(model, NAME, None) is self:
            delattr(model, NAME)
        apply_requires_grad(model, self._required_grad)
        self._model.clear()
        return model


class RefuseCompilation:
    """Before the model runs: a compiled one would see neither new values nor their gradients."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the model."""
        if torch.compiler.is_compiling():
            raise TrainingError(
                "a model with a sparse delta is not compiled",
                expected="the model as it is",
                got="torch.compile",
                where=type(module).__name__,
                fix="delta.merge() or .remove() first",
            )


def apply_mask(model: nn.Module, mask: Mask, *, heads: Sequence[str] | None = None) -> SparseDelta:
    """Freeze `model` and make the elements that `mask` selects trainable, in place.

    The model computes what it did, at the cost it had; `model.parameters()` now also yields the values, one compact
    vector per tensor, and they alone (and adapters, if attached) require gradients. Everything else is bit-frozen,
    whatever the optimiser: no other value exists for it to move.

    Load, resize and tie weights before, or after `remove`: transformers' own methods do not expect what stands in for
    a tuned parameter, and fail on it.

    Args:
        model: any module whose selected tensors are floating-point parameters.
        mask: made for this model, by `select` or `Mask.build`.
        heads: parameters of the model (names or prefixes) to train in full and save along; by default everything
            outside the backbone of a model without a language-model head, such as a classifier.

    Raises:
        AttachError: the model has a delta already; unknown heads.
        MaskError: the mask selects nothing, is of another model, or selects integer or quantised weights.

    The model is left untouched by all of them.
    """
    delta, head_names = _built(model, mask, heads, where="apply_mask")
    delta._install(model, head_names)
    return delta


def load_delta(model: nn.Module, folder: str | Path) -> SparseDelta:
    """Put a saved delta into the backbone it was trained in, task heads included. Everything is checked before the
    model is touched, and nothing in the files is executed.

    Raises:
        ArtifactError: the folder holds no delta, or a file is truncated or foreign.
        AttachError, MaskError: as in `apply_mask`. The model is left untouched by all of them.
    """
    path = Path(folder)
    mask = Mask.load(path)
    delta, head_names = _built(model, mask, mask.identity.heads, where=str(path))
    shapes: dict[str, tuple[int, ...]] = {f"values.{name}": (len(part.pattern),) for name, part in delta.items()}
    shapes |= {f"heads.{name}": tuple(model.get_parameter(name).shape) for name in head_names}
    tensors = read_tensors(path / VALUES, shapes)
    with torch.no_grad():
        for name, part in delta.items():
            part.values.copy_(tensors[f"values.{name}"])
    delta.head_values = {name: tensors[f"heads.{name}"] for name in head_names}
    delta._install(model, head_names)
    return delta


def _built(
    model: nn.Module, mask: Mask, heads: Sequence[str] | None, *, where: str
) -> tuple[SparseDelta, tuple[str, ...]]:
    """A delta for `model`, which is not touched, and the names of its heads."""
    if find_delta(model) is not None:
        raise AttachError(
            "this model has a sparse delta already",
            expected="a model without one",
            got="model.sparse_delta",
            where=type(model).__name__,
            fix="model.sparse_delta.remove() or .merge() first",
        )
    selected = [name for name in mask.names if mask.count(name)]
    if not selected:
        raise MaskError("the mask selects nothing", expected="at least one element", got="none", where=where)
    parameters = tunable(model, selected, where=where)
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
        tuned[name] = Tuned(pattern, pattern.gather(weight.detach()).clone())
    return SparseDelta(tuned, identity=identity, roles=mask.roles, origin=mask.origin), head_names


def find_delta(model: nn.Module) -> SparseDelta | None:
    """The delta in `model` (or in what DDP wrapped), if any."""
    found = (getattr(module, NAME, None) for module in model.modules())
    return next((delta for delta in found if isinstance(delta, SparseDelta)), None)


def get_delta(model: nn.Module) -> SparseDelta:
    """The delta in `model` (or in what DDP wrapped).

    Raises:
        AttachError: it has none.
    """
    found = find_delta(model)
    if found is not None:
        return found
    raise AttachError("this model has no sparse delta", where=type(model).__name__, fix="call gatedadapters.apply_mask")


def _places(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Every module and attribute that holds each parameter, tied ones included, under the name `parameters()` gives."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(names[id(parameter)], []).append((module, attribute))
    return places


def _changed(names: Sequence[str], how: str) -> TrainingError:
    return TrainingError(
        "a tuned parameter was changed from outside between steps",
        expected="the values that the last step wrote",
        got=how,
        where=", ".join([*names[:3], *(["..."] if len(names) > 3 else [])]),
        fix="remove the delta before loading, resizing or tying weights, or call delta.write() to overrule the change",
    )


def _before_loading(delta: SparseDelta, *args: Any) -> None:
    """Before the values of a state dict are loaded, after the backbone's: which weights the delta wrote last."""
    parts = delta.items() if delta.applied else ()
    delta._as_written = frozenset(name for name, part in parts if not bool(part.differs()))


def _follow_loaded_values(delta: SparseDelta, incompatible: Any) -> None:
    """After a state dict was loaded: weights that it held are those that were trained, or the base's; anything else is
    refused.
    """
    if not delta.applied:
        return
    loaded = [(name, part) for name, part in delta.items() if name not in delta._as_written]
    foreign = [n for n, part in loaded if bool(part.differs()) and bool(part.differs(part.originals))]
    if foreign:
        raise _changed(foreign, "a state dict of another backbone was loaded")
    delta.write()
