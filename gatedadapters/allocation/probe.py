"""What placement scores look at: a model with its candidates attached, some batches, and a short training of both."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gatedadapters.backbone.fingerprint import is_own
from gatedadapters.backbone.quantized import is_quantized
from gatedadapters.errors import AllocationError
from gatedadapters.gates import GateBank
from gatedadapters.masking.scores.base import Batch, Loss
from gatedadapters.paths import Path
from gatedadapters.supernet.adapters import Adapters

HELD_OUT_SHARE = 0.25


class Probe:
    """One look at a model for one task. Everything it changes is the candidates and heads, which the caller restores.

    Attributes:
        model: with `adapters` attached.
        adapters: the candidates; the gates of the units that are judged are held at 1, those of others at 0 (`opened`).
        learn: batches to learn from.
        held_out: batches to judge by: the last quarter of what was given, none if nothing is to be judged by them.
        loss: see `masking.scores.Loss`.
        learning_rate: the common rate of all kinds of path, for a structure of the size that will be kept.
        kept_share: parameters that will be kept over those that are open.
        seed: seed of scores that draw random numbers.
        judged: by key, which of the path's units are open, (units,) of bool.
        ranks: by key, how many units of the whole candidate each open unit stands for.
        params: by key, parameters of the open units.
        unit_params: by key, parameters of one unit.
        gains: by key, what each step of the warm start took off the loss of the next step's batch, to first order.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Adapters,
        batches: Sequence[Batch],
        *,
        loss: Loss,
        learning_rate: float,
        seed: int,
        kept: float | None = None,
        hold_out: bool = True,
        first_units: bool = False,
        whole: Adapters | None = None,
        progress: bool = True,
    ) -> None:
        count = max(1, round(HELD_OUT_SHARE * len(batches))) if hold_out and len(batches) > 1 else 0
        self.learn, self.held_out = list(batches[: len(batches) - count]), list(batches[len(batches) - count :])
        self.model, self.adapters, self.loss = model, adapters, loss
        self.seed, self.progress = seed, progress
        self.bank = cast(GateBank, adapters.bank)
        self.judged = {key: self._judged(key, path, first_units) for key, path in self.paths.items()}
        counts = {key: int(judged.sum()) for key, judged in self.judged.items()}
        self.ranks = {key: path.units // counts[key] for key, path in (whole or adapters).typed_paths()}
        self.unit_params = {group.key: group.params for group in self.bank.groups}
        self.params = {key: self.unit_params[key] * count for key, count in counts.items()}
        self.learning_rate = learning_rate
        self.kept_share = 1.0 if kept is None else min(1.0, kept / sum(self.params.values()))
        self.gains: dict[str, list[float]] = {key: [] for key in counts}
        self._is_warm = False

    def _judged(self, key: str, path: Path, first_units: bool) -> Tensor:
        """All units of a path, or the first of each expert if units have gates of their own."""
        where = self.bank.slices[key]
        split = where.stop - where.start == path.units
        judged = torch.zeros(path.units, dtype=torch.bool)
        judged[:: path.options.size if first_units and split else 1] = True
        return judged

    @property
    def paths(self) -> dict[str, Path]:
        """The candidates by key."""
        return dict(self.adapters.typed_paths())

    @contextmanager
    def opened(self) -> Iterator[None]:
        """A context in which the units that are judged are open, others closed, and gates do not learn."""
        with ExitStack() as stack:
            for key, path in self.paths.items():
                stack.enter_context(path.narrowed(int(self.judged[key].nonzero().max()) + 1))
            stack.enter_context(self.bank.held(self._open()))
            yield

    def _open(self) -> Tensor:
        """Gates, (tasks, units of the bank), that are 1 where units are judged."""
        kept = torch.zeros_like(self.bank.kept)
        for key, where in self.bank.slices.items():
            kept[:, where] = self.judged[key][: where.stop - where.start].to(kept)
        return kept

    # -- a short training ----------------------------------------------------------------------------------------------

    def warm_start(self) -> None:
        """Train all candidates and heads together, one step for each batch of `learn`; a second call does nothing.

        The rate falls linearly from a tenth of the way on, as in a run of that length: what counts is where
        candidates would end. The contributions of all open candidates add up, so their rate is the learning rate times
        `kept_share`, as in a search; heads learn at the learning rate.

        Raises:
            AllocationError: the loss is not finite, or reaches no candidate.
        """
        if self._is_warm:
            return
        self._is_warm = True
        steps = len(self.learn)
        paths = {parameter for path in self.paths.values() for parameter in path.parameters()}
        groups = self.adapters.parameter_groups(self.learning_rate)
        for group in groups:
            if paths.issuperset(group["params"]):
                group["lr"] *= self.kept_share
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        warmup = max(1, round(0.1 * steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        )
        learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        before: dict[nn.Parameter, Tensor] = {}
        self.model.train()
        for batch in self._shown(self.learn, "warm start"):
            loss = self._losses(batch).mean()
            _check_loss(loss)
            loss.backward()
            if before:
                self._credit(before)
            before = {p: p.detach().clone() for p in paths if p.requires_grad}
            nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            torch.clear_autocast_cache()  # under a caller's autocast, heads would compute with what they were before
            schedule.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def _credit(self, before: Mapping[nn.Parameter, Tensor]) -> None:
        """Add what the last step took off the loss of this batch, to first order: minus gradient times movement."""
        for key, path in self.paths.items():
            gains = [(p.grad * (before[p] - p)).sum() for p in path.parameters() if p in before and p.grad is not None]
            self.gains[key].append(float(sum(gains)))

    # -- closing -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def held_out_losses(self, closed: Collection[str] = ()) -> Tensor:
        """The loss of each held-out example, (examples,), with the paths `closed` switched off."""
        self.model.eval()
        kept = self._open()
        for key in closed:
            kept[:, self.bank.slices[key]] = 0.0
        with self.bank.held(kept):
            return self.losses()

    @torch.no_grad()
    def losses(self) -> Tensor:
        """The loss of each held-out example, (examples,), with the gates as they are now."""
        self.model.eval()
        return torch.cat([self._losses(batch).detach().float() for batch in self.held_out or self.learn])

    # -- gradients at the start ----------------------------------------------------------------------------------------

    def gradients(
        self, parameters: Mapping[str, nn.Parameter], use: Callable[[str, Tensor], object], *, most: int | None = None
    ) -> int:
        """Pass the gradient of every parameter in every batch to `use`, and free it.

        The model runs in evaluation mode, and the candidates stay as they are. `most` batches are read; default: all.

        Returns:
            The number of batches.

        Raises:
            AllocationError: the loss is not finite, or reaches none of the parameters.
        """
        batches = [*self.learn, *self.held_out][:most]
        reached = False

        def hook(name: str) -> Callable[[Tensor], None]:
            def pass_on(parameter: Tensor) -> None:
                nonlocal reached
                grad, parameter.grad = parameter.grad, None
                assert grad is not None
                reached = True
                use(name, grad)

            return pass_on

        frozen = {name: p for name, p in parameters.items() if not p.requires_grad}
        self.model.eval()
        handles = []
        try:
            for name, parameter in parameters.items():
                parameter.requires_grad_(True)
                handles.append(parameter.register_post_accumulate_grad_hook(hook(name)))
            for batch in self._shown(batches, "gradients"):
                loss = self._losses(batch).mean()
                _check_loss(loss)
                loss.backward()
        finally:
            for handle in handles:
                handle.remove()
            for parameter in frozen.values():
                parameter.requires_grad_(False)
            self.model.zero_grad()
        if not reached:
            raise _no_gradient("no gradient at any candidate")
        return len(batches)

    # -- inputs --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def inputs(self, use: Callable[[str, Tensor], None]) -> None:
        """Pass the inputs of every module that a path adds to, (tokens, width), to `use`, under the module's name."""
        names = {path.site.write.module for path in self.paths.values()}
        modules = dict(self.model.named_modules())

        def hook(name: str) -> Callable[..., None]:
            def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hidden = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
                if hidden is not None and hidden.is_floating_point():
                    use(name, hidden.detach().reshape(-1, hidden.shape[-1]).float())

            return read

        handles = [modules[name].register_forward_pre_hook(hook(name), with_kwargs=True) for name in sorted(names)]
        self.model.eval()
        try:
            with self.adapters.disabled():
                for batch in self._shown([*self.learn, *self.held_out], "inputs"):
                    self._losses(batch)
        finally:
            for handle in handles:
                handle.remove()

    # -- helpers -------------------------------------------------------------------------------------------------------

    def weight_of(self, path: Path) -> nn.Parameter | None:
        """The weight of the module that a path adds to; None if it is quantised or there is none."""
        site = path.site
        module = self.model.get_submodule(site.write.module)
        weight = module._parameters.get(site.write.parameter or "weight")
        return None if weight is None or is_quantized(weight) or weight.element_size() < 2 else weight

    def _losses(self, batch: Batch) -> Tensor:
        home = next(p for n, p in self.model.named_parameters() if not is_own(n)).device
        moved = {k: v.to(home) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return self.loss(self.model, moved)

    def _shown(self, batches: Sequence[Batch], title: str) -> Iterator[Batch]:
        return iter(tqdm(batches, title, leave=False, disable=None if self.progress else True))


def taken(batches: Any, count: int) -> list[Batch]:
    """The first `count` batches of an iterable.

    Raises:
        AllocationError: there is none.
    """
    found = list(itertools.islice(iter(batches), count))
    if not found:
        raise AllocationError(
            "there is nothing to probe with",
            expected="at least one batch",
            got="none",
            where="allocate(batches=)",
            fix="pass a DataLoader or a list of batches; a generator is used up after one pass",
        )
    return found


@contextmanager
def restored(model: nn.Module, names: Collection[str], seed: int) -> Iterator[None]:
    """A context that restores these parameters' values, the mode of every module, and the random state.

    What is drawn inside, such as dropout, follows from the seed.
    """
    values = {name: model.get_parameter(name).detach().clone() for name in names}
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in values.items():
                    model.get_parameter(name).copy_(value)
            for module, mode in modes:
                module.training = mode


def _check_loss(loss: Tensor) -> None:
    if not loss.requires_grad:
        raise _no_gradient("a loss without a gradient")
    if not bool(torch.isfinite(loss)):
        raise AllocationError(
            "the loss is not finite",
            expected="a finite loss",
            got=float(loss.detach()),
            where="allocate",
            fix="look for broken examples; use fp32 or bf16, or a lower learning_rate",
        )


def _no_gradient(got: str) -> AllocationError:
    return AllocationError(
        "the probe learns nothing",
        expected="a loss that depends on the candidates",
        got=got,
        where="allocate",
        fix="check the labels (are all of them ignored, -100?) and that the model runs with gradients",
    )
