"""Orthogonal subspace fine-tuning: whole matrices are tuned, but only in their small singular directions.

This is a mask's dense counterpart. A mask protects single elements, to the bit. Here the directions with the largest
singular values are protected, in every matrix: what the matrix reads along them and writes along them stays.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from pydantic import NonNegativeInt
from torch import Tensor, nn
from torch.optim import Optimizer

from gatedadapters.artefact_files import check_finite, read_tensors, with_digests, write_tensors
from gatedadapters.backbone.fingerprint import Fingerprint, fingerprint, is_own
from gatedadapters.config.base import Config, read_record
from gatedadapters.errors import ArtifactError, AttachError, MaskError, TrainingError
from gatedadapters.masking.checks import check_head_shapes, check_tensor
from gatedadapters.masking.delta import find_delta
from gatedadapters.masking.mask import check_backbone
from gatedadapters.masking.roles import matching_parameters, parameter_roles
from gatedadapters.runtime.sharding import is_sharded
from gatedadapters.runtime.steps import CLOCK, StepListener, Turn
from gatedadapters.safe_files import whole_folder
from gatedadapters.supernet.attach import find_heads
from gatedadapters.supernet.supernet import NAME as ADAPTERS

RECORD, VALUES = "subspace.json", "subspace.safetensors"
FILES = frozenset({RECORD, VALUES})
_OTHER_ROLES = ("embedding", "norm", "bias", "head")


class SubspaceRecord(Config):
    """What was protected, as data. The tuned matrices lie in the file beside the record."""

    version: Literal[1] = 1
    fingerprint: Fingerprint
    protected: dict[str, NonNegativeInt]


@dataclass
class Side:
    """The free directions on one side of a matrix, given by an orthonormal basis.

    Attributes:
        basis: (..., size, directions) of the free directions or of the protected ones.
        is_free: whether it is that of the free directions. The free ones are fewer where most are protected; of the
            longer side of a matrix the decomposition has no basis of them.
    """

    basis: Tensor
    is_free: bool

    def project(self, values: Tensor) -> Tensor:
        """The part of the columns of `values`, (..., size, n), that lies in the free directions."""
        if self.basis.device != values.device:
            self.basis = self.basis.to(values.device)
        inside = self.basis @ (self.basis.mT @ values)
        return inside if self.is_free else values - inside


class FreeDirections:
    """The free directions of one matrix W = U diag(s) Vᵀ: those orthogonal to its first `protected` singular vectors.

    Attributes:
        protected: number of protected singular directions.
        start: the matrix before training.
        params: degrees of freedom of a change within the free directions.
    """

    def __init__(self, weight: Tensor, protected: int) -> None:
        self.protected, self.start = protected, weight.detach().clone()
        left, _, right = torch.linalg.svd(self.start.to(_precise(weight)), full_matrices=False)
        rows, columns = weight.shape[-2:]
        rank = min(rows, columns)
        self._left = _side(left, protected, complete=rows == rank)
        self._right = _side(right.mT, protected, complete=columns == rank)
        self.params = (rows - protected) * (columns - protected) * weight[..., 0, 0].numel()

    def project(self, change: Tensor) -> Tensor:
        """The part of a change of the matrix that lies in the free directions of both sides."""
        return self._right.project(self._left.project(change).mT).mT

    @torch.no_grad()
    def constrain(self, weight: Tensor) -> None:
        """Take what does not lie in the free directions out of the change of the matrix since the start."""
        if self.start.device != weight.device:
            self.start = self.start.to(weight.device)
        precise = _precise(weight)
        start = self.start.to(precise)
        weight.copy_(start + self.project(weight.to(precise) - start))


def _precise(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _side(basis: Tensor, protected: int, *, complete: bool) -> Side:
    """The free directions on one side, from singular vectors in the columns of `basis`."""
    rank = basis.shape[-1]
    if complete and protected > rank // 2:
        return Side(basis[..., protected:].clone(), True)
    return Side(basis[..., :protected].clone(), False)


class SubspaceDelta(StepListener):
    """Matrices of a model that are tuned in their small singular directions. `apply_subspace` makes it.

    `parameters()` are the model's own matrices and its task heads. Before each step of a `torch.optim.Optimizer`, the
    gradients are projected onto the free directions. After it, so is the change since the start: the steps of Adam, and
    weight decay, leave the directions of their gradients.

    Beside what full fine-tuning of the same matrices holds (gradients, optimiser states), memory holds a copy of the
    matrices at the start, and bases that take between nothing and twice as much as the matrices. Per step it costs
    matrix products of about 4 (protected directions) (size of the matrix) multiplications, whatever the batch is.

    Attributes:
        model: the model.
        identity: fingerprint of the backbone before training.
        head_names: the parameters of the task heads, which are trained in full and saved too.
        protected: number of protected singular directions of each matrix.

    References:
        Nayak et al. 2025, "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning", arXiv
        2504.07097. They train the factors of W along the free directions, with projected gradients. The matrices that
        can be reached are the same; here the matrix itself is trained, and projected after each step too.
    """

    turn: ClassVar[Turn] = Turn.DELTA

    def __init__(
        self,
        model: nn.Module,
        protected: Mapping[str, int],
        *,
        identity: Fingerprint,
        head_names: tuple[str, ...],
    ) -> None:
        self.model, self.identity, self.head_names = model, identity, head_names
        self.protected = dict(protected)
        self._free = {name: FreeDirections(model.get_parameter(name), count) for name, count in protected.items()}
        self._required_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self._free or name in head_names)
        _APPLIED[model] = self
        CLOCK.add(self)

    # -- contents ------------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tuned matrices."""
        return tuple(self._free)

    @property
    def params(self) -> int:
        """Degrees of freedom: the number of values that may move independently, heads not counted."""
        return sum(free.params for free in self._free.values())

    @property
    def digest(self) -> str:
        """A digest that is equal where as many directions of the same matrices are protected."""
        return hashlib.sha256(json.dumps(self.protected, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def applied(self) -> bool:
        """Whether the model is tuned in these directions; not after `remove` or `merge`."""
        return _APPLIED.get(self.model) is self

    def parameters(self) -> Iterator[nn.Parameter]:
        """What an optimiser has to be given: the matrices and the task heads."""
        for name in (*self._free, *self.head_names):
            yield self.model.get_parameter(name)

    # -- out of the model ----------------------------------------------------------------------------------------------

    def remove(self) -> nn.Module:
        """Restore every bit of the matrices and every `requires_grad` flag. Task heads keep their trained values.

        Returns:
            The model.

        Raises:
            AttachError: the model is not tuned in these directions any more.
        """
        self._check_applied("remove")
        self._restore()
        return self._end()

    def merge(self) -> nn.Module:
        """Leave the tuned matrices in the model for good, and restore the `requires_grad` flags.

        Returns:
            The model.

        Raises:
            AttachError: the model is not tuned in these directions any more.
        """
        self._check_applied("merge")
        return self._end()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """A context in which the model is the backbone before training. Do not train in it.

        Raises:
            AttachError: the model is not tuned in these directions any more.
        """
        self._check_applied("disabled")
        tuned = {name: self.model.get_parameter(name).detach().clone() for name in self._free}
        self._restore()
        try:
            yield
        finally:
            self._write(tuned)

    def save(self, folder: str | Path, *, overwrite: bool = False, beside: bool = False) -> None:
        """Write the tuned matrices and task heads, in float32, into `folder`, whole or not at all.

        Args:
            folder: a new or an empty folder.
            overwrite: replace what an earlier call wrote there.
            beside: other files that the folder holds stay.

        Raises:
            ArtifactError: the folder is not free, or a value is not finite.
        """
        names = (*self._free, *self.head_names)
        tensors = {name: self.model.get_parameter(name).detach().float() for name in names}
        check_finite(tensors, where=folder, fix="train again with a lower rate")
        record = SubspaceRecord(fingerprint=self.identity, protected=self.protected)
        with whole_folder(folder, files=FILES, overwrite=overwrite, beside=RECORD if beside else None) as new:
            digest = write_tensors(new / VALUES, tensors, metadata={"format": "gatedadapters subspace 1"})
            text = with_digests(json.dumps(record.model_dump(mode="json"), indent=1), {VALUES: digest})
            (new / RECORD).write_text(text, encoding="utf-8")

    # -- while it is in a model ----------------------------------------------------------------------------------------

    def watched(self) -> Iterator[nn.Parameter]:
        """The matrices; see `StepListener`."""
        return (self.model.get_parameter(name) for name in self._free)

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Project the gradients.

        Raises:
            TrainingError: another part of the library has frozen the matrices.
        """
        for name, free in self._free.items():
            parameter = self.model.get_parameter(name)
            if not parameter.requires_grad:
                raise TrainingError(
                    "a matrix that is tuned in its small singular directions was frozen",
                    expected="requires_grad=True",
                    got="requires_grad=False",
                    where=name,
                    fix="merge or remove the subspace before adapters or a mask are put into the model",
                )
            if parameter.grad is not None:
                parameter.grad.copy_(free.project(parameter.grad.to(_precise(parameter))))

    def after_step(self, optimizer: Optimizer | None) -> None:
        """Project the change since the start."""
        for name, free in self._free.items():
            free.constrain(self.model.get_parameter(name))

    # -- inside --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.model.get_parameter(name).copy_(value)

    def _restore(self) -> None:
        self._write({name: free.start for name, free in self._free.items()})

    def _check_applied(self, where: str) -> None:
        if not self.applied:
            raise AttachError(
                "this model is not tuned in its small singular directions any more",
                expected="a subspace that is applied",
                got="one that was removed or merged",
                where=where,
                fix="call apply_subspace, or load_subspace",
            )

    def _end(self) -> nn.Module:
        CLOCK.discard(self)
        del _APPLIED[self.model]
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required_grad.get(name, parameter.requires_grad))
        return self.model


_APPLIED: WeakKeyDictionary[nn.Module, SubspaceDelta] = WeakKeyDictionary()
"""The subspace of each model that is tuned in one."""


def find_subspace(model: nn.Module) -> SubspaceDelta | None:
    """The subspace that `model` is tuned in, if there is one."""
    return _APPLIED.get(model)


def apply_subspace(
    model: nn.Module,
    *,
    protect: float = 0.5,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    heads: Sequence[str] | None = None,
) -> SubspaceDelta:
    """Freeze `model`, and make its matrices trainable in their small singular directions (OSFT).

    In each matrix, the share `protect` of the singular directions, those with the largest singular values, is protected
    on both sides: the change that training makes is orthogonal to them. It is so up to rounding, so train float32
    weights (under bf16 autocast if that is faster). All other parameters are frozen.

    Args:
        model: any module with linear maps, neither sharded nor quantised; without adapters and deltas.
        protect: share of the singular directions of each matrix that is protected, at least 0 and below 1.
        include: roles or names (with * and ?) of the matrices to tune; default: all linear maps of the blocks.
        exclude: which of these to freeze as a whole.
        heads: parameters of the model (names or prefixes) to train in full; default: see `apply_mask`.

    Raises:
        MaskError: the share is out of range, a pattern matches nothing, or no matrix of floating-point numbers.
        AttachError: the model has adapters, a delta or a subspace already, or is sharded, or a head is unknown.

    The model is not changed in any of these cases.
    """
    if not 0.0 <= protect < 1.0:
        raise MaskError(
            expected="protect of at least 0 and below 1",
            got=protect,
            where="apply_subspace(protect=)",
            fix="give the share of singular directions to keep, such as 0.5",
        )
    head_names = _check_free(model, heads, where="apply_subspace")
    names = _matrices(model, head_names, include, exclude)
    shapes = {name: model.get_parameter(name).shape for name in names}
    protected = {name: round(protect * min(shape[-2:])) for name, shape in shapes.items()}
    identity = fingerprint(model, skip=frozenset(head_names))
    return SubspaceDelta(model, protected, identity=identity, head_names=head_names)


def load_subspace(model: nn.Module, folder: str | Path, *, verify: bool = True) -> SubspaceDelta:
    """Put what `SubspaceDelta.save` wrote into the backbone in which it was trained. Training can go on.

    Args:
        model: a model with the backbone of the subspace.
        folder: written by `SubspaceDelta.save`.
        verify: check the digests of the files, which tell damage.

    Raises:
        ArtifactError: a missing, truncated, foreign or damaged file, or another version.
        AttachError, MaskError: as in `apply_subspace`, or the model has another backbone.

    The model is not changed in any of these cases.
    """
    path = Path(folder)
    record, file = read_record(
        SubspaceRecord,
        path / RECORD,
        what="a saved subspace",
        expected=f"a folder with {RECORD} and {VALUES}",
        fix="give the folder that SubspaceDelta.save wrote",
        verify=verify,
    )
    head_names = _check_free(model, record.fingerprint.heads, where=str(path))
    identity = fingerprint(model, skip=frozenset(head_names))
    check_backbone(record.fingerprint, identity, where=str(path))
    parameters = dict(model.named_parameters())
    for name, count in record.protected.items():
        _check_protected(name, count, parameters.get(name), where=path / RECORD)
        check_tensor(name, parameters[name], tuple(parameters[name].shape))
    shapes = {name: tuple(parameters[name].shape) for name in (*record.protected, *head_names)}
    tensors = read_tensors(path / VALUES, shapes, digest=file.digest(VALUES))
    check_head_shapes({name: tensors[name] for name in head_names}, parameters)
    found = SubspaceDelta(model, record.protected, identity=identity, head_names=head_names)
    found._write(tensors)
    return found


def _check_free(model: nn.Module, heads: Sequence[str] | None, *, where: str) -> tuple[str, ...]:
    """The model's heads, after a check that nothing else is in the model."""
    taken = {
        "adapters": hasattr(model, ADAPTERS),
        "a sparse delta": find_delta(model) is not None,
        "a subspace": find_subspace(model) is not None,
        "shards of weights": is_sharded(model),
    }
    for what, there in taken.items():
        if there:
            raise AttachError(
                f"this model has {what} already" if what != "shards of weights" else "this model is sharded",
                expected="a plain model in one process",
                got=what,
                where=where,
                fix="detach, merge or remove it first" if what != "shards of weights" else "load it without sharding",
            )
    return find_heads(model, heads)


def _check_protected(name: str, count: int, parameter: Tensor | None, *, where: Path) -> None:
    """Check that what a record says of a matrix can be true of the model's.

    Raises:
        ArtifactError: the model has no such matrix, or it has fewer singular directions.
    """
    if parameter is None or parameter.dim() < 2:
        expected, got = "names of matrices of this model", repr(name)
    elif count > min(parameter.shape[-2:]):
        expected, got = f"at most {min(parameter.shape[-2:]):,} protected directions of {name}", f"{count:,}"
    else:
        return
    raise ArtifactError(
        "this subspace does not fit the model",
        expected=expected,
        got=got,
        where=where,
        fix="give the folder that SubspaceDelta.save wrote for this model",
    )


def _matrices(
    model: nn.Module, heads: Sequence[str], include: Sequence[str] | None, exclude: Sequence[str] | None
) -> list[str]:
    """Names of the matrices to tune."""
    roles = {n: r for n, r in parameter_roles(model).items() if n not in heads and not is_own(n)}
    parameters = dict(model.named_parameters())
    if include is None:
        roles = {n: r for n, r in roles.items() if r not in _OTHER_ROLES and parameters[n].dim() >= 2}
    names = matching_parameters(roles, include, exclude, where="apply_subspace")
    for name in names:
        if parameters[name].dim() < 2:
            raise MaskError(
                "a vector has no singular directions",
                expected="matrices",
                got=f"shape {tuple(parameters[name].shape)}",
                where=name,
                fix='leave vectors out, for example exclude=["norm", "bias"]',
            )
        check_tensor(name, parameters[name], tuple(parameters[name].shape))
    return names
