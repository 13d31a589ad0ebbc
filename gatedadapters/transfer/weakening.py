"""Knowledge masking and knowledge dropping, as hooks.

Adapters trained while the feed-forward sub-layers are weakened lean less on what is stored there, and keep working when
an update of the base model changes it.

What is skipped when a block is hit, so that h_out = h_after_attention:

========================= ==========================================================================================
pre-norm, parallel        the contribution is 0: h + FFN(norm(h)) becomes h (Llama, GPT-2, T5); x + attn(n(x)) +
                          FFN(n(x)) becomes x + attn(n(x)) (GPT-J, NeoX, Phi, Falcon)
sandwich norms            the same; the norm on the contribution is passed over too (Gemma 2)
post-norm                 norm(h + FFN(h)) becomes h: contribution and the norm after the addition (BERT, RoBERTa, BART)
encoder-decoder           each block of both stacks; a decoder block keeps its cross-attention
mixture of experts        the contribution of routed and shared experts together; the router still runs, so that a
                          balancing loss sees every block
========================= ==========================================================================================

LoRA and scales at the sub-layer's maps are masked and dropped with it. A serial or parallel bottleneck acts on the
sub-layer as a whole: it still runs, on a contribution of 0.

A plain feed-forward sub-layer that is hit costs nothing: its maps are given no tokens, and what they return is padded
back with zeros. All its parameters still take part in the step, with gradients of exactly 0, which is what
DistributedDataParallel needs. A mixture of experts is computed and thrown away.

References:
    Trans-PEFT (arXiv 2506.06844, ACL 2025): intra-layer knowledge masking and cross-layer knowledge dropping. What
    dropping means outside pre-norm blocks is our instantiation.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, ClassVar, Self, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from gatedadapters.config import Ramp, WeakeningConfig
from gatedadapters.errors import AttachError, ConfigError, LayoutError, TrainingError
from gatedadapters.runtime.steps import CLOCK, StepListener, Turn, unwrapped
from gatedadapters.supernet.hooks import InputHook, OutputHook, hidden_argument, replace_hidden
from gatedadapters.transfer.feed_forward import FeedForward, feed_forwards
from gatedadapters.transfer.random_mask import masked

logger = logging.getLogger(__name__)


def weaken_knowledge(
    model: nn.Module,
    sample: Mapping[str, Tensor] | None = None,
    *,
    mask: float | Ramp = 0.0,
    drop: float | Ramp = 0.1,
    rescale: bool = False,
    total_steps: int | None = None,
) -> Weakening:
    """Weaken the feed-forward sub-layers of `model` while it trains; nothing happens in evaluation mode.

    Masking sets each neuron of the inner activation to 0 with probability `mask`, independently per example, token and
    neuron, in every forward. Dropping makes a block skip its feed-forward sub-layer with probability `drop`, one draw
    per block and forward for the whole batch. Neither rescales. Both draw from torch's default generators (dropping on
    the CPU, masking on the device), which activation checkpointing replays. A probability of 0 draws nothing.

    Works on a bare model, one with peft adapters, and one with gated adapters, attached before or after:

        with ga.weaken_knowledge(model, drop=0.1):
            trainer.train()

    Args:
        model: any model whose layout can be discovered.
        sample: a batch that runs through it; a default is made for token models.
        mask: p_i, a number in [0, 1) or a `Ramp`.
        drop: p_c, a number in [0, 1) or a `Ramp`.
        rescale: ablation: divide what stays by 1 - p.
        total_steps: optimiser steps of the training, needed for a `Ramp`. The optimiser's state holds the steps done,
            so that a resumed training can go on with the ramp where it stopped. The Trainers of this package do so;
            give any other transformers Trainer the callback `ga.FollowOptimizer()`; in a loop of your own call
            `follow(optimizer)` on the handle once the optimiser's state is loaded.

    Returns:
        A handle and context manager; `remove()` or the end of the context takes every hook out.

    Raises:
        ConfigError: a probability outside [0, 1), or a ramp over an unknown number of steps.
        LayoutError: no feed-forward sub-layer, or one that hooks cannot mask or drop; it is named.
        AttachError: the model is already weakened.

    The model is left untouched by all of them.
    """
    config = WeakeningConfig.parse({"mask": mask, "drop": drop, "rescale": rescale}, where="weaken_knowledge")
    if config.scheduled and not total_steps:
        raise ConfigError(
            "a ramp runs over training, so its length must be known",
            expected="total_steps > 0",
            got=repr(total_steps),
            where="weaken_knowledge",
            fix="pass total_steps=, the number of optimiser steps",
        )
    if any(isinstance(hook, _Hook) for hook in _hooks_of(model)):
        raise AttachError(
            "this model is already weakened",
            expected="one weakening at a time",
            got="hooks of an earlier one",
            where=type(model).__name__,
            fix="leave the context, or call remove() on the handle (restore_knowledge(model) without one)",
        )
    places = feed_forwards(model, sample)
    for name, wanted, field in (("mask", mask, "no_mask"), ("drop", drop, "no_drop")):
        refused = [place for place in places if getattr(place, field)]
        if wanted != 0 and refused:
            raise LayoutError(
                f"not every feed-forward sub-layer of this model can be weakened with {name}=",
                expected="sub-layers whose modules can be hooked",
                got=getattr(refused[0], field) + (f" ({len(refused)} sub-layers)" if len(refused) > 1 else ""),
                where=f"{refused[0].name or refused[0].block} of {type(model).__name__}",
                fix=f"{name}=0, and {'drop' if name == 'mask' else 'mask'}= alone",
            )
    return Weakening(model, places, config, total_steps=total_steps)


def restore_knowledge(model: nn.Module) -> None:
    """Take the hooks of `weaken_knowledge` out of a model whose handle is out of reach, such as a deep copy."""
    for weakening in {hook.weakening for hook in _hooks_of(model) if isinstance(hook, _Hook)}:
        weakening.remove()


class Weakening(StepListener):
    """The hooks of `weaken_knowledge`: their draws, and taking them out.

    Attributes:
        config: the probabilities.
        places: what is weakened.
        step: optimiser steps so far, counted where a probability is a ramp. A resumed training finds them in the state
            of its optimiser (`follow`); set it where that state is not loaded.
        dropped: by block, whether its last forward in training mode skipped the feed-forward sub-layer.
    """

    turn: ClassVar[Turn] = Turn.RAMP
    config: WeakeningConfig
    places: tuple[FeedForward, ...]

    def __init__(
        self,
        model: nn.Module,
        places: Iterable[FeedForward],
        config: WeakeningConfig,
        *,
        total_steps: int | None = None,
    ) -> None:
        self.config, self.places, self.total_steps = config, tuple(places), total_steps
        self.step = 0
        self.dropped: dict[str, bool] = {}
        self.lengths: dict[str, int] = {}  # tokens that a writer has to be padded to, by its name
        self._model = [model]
        self._handles: list[Any] = []
        self._forget_optimizers()
        modules = dict(model.named_modules())
        self._blocks = {place.block: modules[place.block] for place in self.places}
        if config.mask != 0:
            for place in self.places:
                for name in place.inner:
                    hook = MaskInput(self)
                    self._handles.append(modules[name].register_forward_pre_hook(hook, with_kwargs=True))
                for name in place.activations:
                    self._handles.append(modules[name].register_forward_hook(MaskOutput(self)))
        if config.drop != 0:
            self._hook_drops(modules)
        if config.scheduled:
            CLOCK.add(self)

    def _hook_drops(self, modules: Mapping[str, nn.Module]) -> None:
        ordered: dict[str, list[tuple[nn.Module, int]]] = {}
        for place in self.places:
            own = ordered.setdefault(place.block, [])
            for name in place.readers:
                before = NoTokens(self, place.block, place.writer)
                self._handles.append(modules[name].register_forward_pre_hook(before, with_kwargs=True))
                own.append((modules[name], self._handles[-1].id))
            contribution = Contribution(
                self, place.block, place.writer, skipped=bool(place.readers), divides=not place.normed
            )
            self._handles.append(modules[place.writer].register_forward_hook(contribution))
            own.append((modules[place.writer], self._handles[-1].id))
            for name in place.norms:
                hook = PassOver(self, place.block, divides=place.normed and name == place.norms[-1])
                self._handles.append(modules[name].register_forward_hook(hook, with_kwargs=True))
        for block, hooks in ordered.items():  # one draw a block, however many such sub-layers it has
            self._handles.append(modules[block].register_forward_pre_hook(Draw(self, block, hooks)))

    @property
    def probabilities(self) -> tuple[float, float]:
        """(p_i, p_c) now."""
        return self.config.at(min(1.0, self.step / self.total_steps) if self.total_steps else 1.0)

    @property
    def removed(self) -> bool:
        """Whether the hooks are out."""
        return not self._handles

    def skips(self, block: str) -> bool:
        """Whether this block skips its feed-forward sub-layer now. In evaluation none does, whatever was drawn last: a
        sub-layer may be called by itself, without the block that draws.
        """
        return self._blocks[block].training and self.dropped.get(block, False)

    def remove(self) -> None:
        """Take every hook out; the model is as before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        CLOCK.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_stepped", "_taken_up")}  # a copy has its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_optimizers()
        if self.config.scheduled and self._handles:
            CLOCK.add(self)

    # -- ramps: optimiser steps ----------------------------------------------------------------------------------------

    def _forget_optimizers(self) -> None:
        self._stepped: WeakSet[Optimizer] = WeakSet()  # since `step` was last counted, and with it
        self._taken_up: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()  # loaded steps, until the next one

    def follow(self, optimizer: Optimizer) -> None:
        """Resume a ramp: take the number of steps that are done from `optimizer`, whose state was loaded.

        For loops of your own. Call it before the first forward pass, for each optimiser of the model. It changes
        nothing where no state was loaded.

        Raises:
            TrainingError: the optimiser holds no parameter of this model.
        """
        if not self.config.scheduled:
            return
        inner = unwrapped(optimizer)
        if next(CLOCK.shared(self, inner), None) is None:
            raise TrainingError(
                "this optimiser does not train the weakened model",
                expected="an optimiser that holds parameters of the model",
                got=f"{type(inner).__name__} with none of them",
                where="Weakening.follow",
                fix="pass the optimiser of this training, once it holds its parameters",
            )
        self.training_begins(inner)

    def watched(self) -> Iterator[nn.Parameter]:
        """The parameters of the model; see `StepListener`."""
        return self._model[0].parameters()

    def training_begins(self, optimizer: Optimizer) -> None:
        """Take the number of steps that are done from the optimiser's state, if one was loaded."""
        done = self._loaded_steps(optimizer)
        if done is not None:
            self.step = self._taken_up[optimizer] = done

    def after_step(self, optimizer: Optimizer | None) -> None:
        """Count the step: ramps follow the optimiser, not forward passes, so that evaluation and gradient accumulation
        do not count. Several optimisers on one model make one step together.
        """
        if optimizer is None or not any(p.requires_grad for p in CLOCK.shared(self, optimizer)):
            return
        done = self._loaded_steps(optimizer)
        if done is not None:
            if done != self.step:
                logger.warning(_NOT_HANDED_IN, done, self.step)
            self.step = done + 1
        elif not self._stepped or optimizer in self._stepped:
            self.step += 1
            self._stepped.clear()
        self._stepped.add(optimizer)
        self._taken_up.pop(optimizer, None)
        _WRITTEN[optimizer] = self.step
        for group in optimizer.param_groups:
            group[_STEPS] = self.step

    def _loaded_steps(self, optimizer: Optimizer) -> int | None:
        """The steps that a loaded state holds and nobody has read yet; None if there is no such state."""
        held: int | None = optimizer.param_groups[0].get(_STEPS) if optimizer.param_groups else None
        return None if held in (_WRITTEN.get(optimizer), self._taken_up.get(optimizer)) else held


class _Hook:
    """Hooks are objects that share their `Weakening`, so that a copy of the model has a weakening of its own."""

    def __init__(self, weakening: Weakening) -> None:
        self.weakening = weakening


class MaskInput(_Hook):
    """Before the map that reads the inner activation a: a * 1[U > p_i]."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook with kwargs."""
        share = self.weakening.probabilities[0]
        if not module.training or share == 0:
            return None
        inner = hidden_argument(args, kwargs)
        return replace_hidden(args, kwargs, masked(inner, share, rescale=self.weakening.config.rescale))


class MaskOutput(_Hook):
    """After the non-linearity inside fused experts."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Forward hook."""
        share = self.weakening.probabilities[0]
        if not module.training or share == 0:
            return None
        return masked(output, share, rescale=self.weakening.config.rescale)


class Draw(_Hook):
    """Before a block: decide whether it skips its feed-forward sub-layer."""

    def __init__(self, weakening: Weakening, block: str, ordered: list[tuple[nn.Module, int]]) -> None:
        super().__init__(weakening)
        self.block, self.ordered = block, ordered

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the block."""
        share = self.weakening.probabilities[1]
        hit = module.training and share > 0 and bool(torch.rand((), dtype=torch.float32, device="cpu") < share)
        self.weakening.dropped[self.block] = hit
        if hit or (module.training and self.weakening.config.rescale):
            for place, hook in self.ordered:
                _put_in_order(place, hook)


class NoTokens(_Hook):
    """Before a map that reads the hidden state of a skipped sub-layer: give it no tokens."""

    def __init__(self, weakening: Weakening, block: str, writer: str) -> None:
        super().__init__(weakening)
        self.block, self.writer = block, writer

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook with kwargs."""
        if not self.weakening.skips(self.block):
            return None
        hidden = hidden_argument(args, kwargs)
        if hidden.shape[-2]:  # a map inside the sub-layer gets none already
            self.weakening.lengths[self.writer] = hidden.shape[-2]
        return replace_hidden(args, kwargs, hidden[..., :0, :])


class Contribution(_Hook):
    """After the writer: the contribution of a skipped sub-layer is 0, with its shape, dtype and place in the graph."""

    def __init__(self, weakening: Weakening, block: str, writer: str, *, skipped: bool, divides: bool) -> None:
        super().__init__(weakening)
        self.block, self.writer, self.skipped, self.divides = block, writer, skipped, divides

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook."""
        hit, config = self.weakening.skips(self.block), self.weakening.config
        if not hit and not (self.divides and config.rescale and module.training):
            return None
        value = output if isinstance(output, Tensor) else output[0]
        if hit:
            length = self.weakening.lengths[self.writer] if self.skipped else value.shape[-2]
            value = F.pad(value[..., :0, :], (0, 0, 0, length))
        else:
            value = value / (1 - self.weakening.probabilities[1])
        return value if isinstance(output, Tensor) else (value, *output[1:])


class PassOver(_Hook):
    """After a norm of a skipped sub-layer: hand on what it was given; its parameters get gradients of 0.

    A norm does not care how large its input is, so a contribution that is normed is rescaled after that.
    """

    def __init__(self, weakening: Weakening, block: str, *, divides: bool) -> None:
        super().__init__(weakening)
        self.block, self.divides = block, divides

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Forward hook with kwargs."""
        if not self.weakening.skips(self.block):
            rescaled = self.divides and self.weakening.config.rescale and module.training
            return output / (1 - self.weakening.probabilities[1]) if rescaled else None
        given = hidden_argument(args, kwargs).to(output.dtype)
        learns = any(parameter.requires_grad for parameter in module.parameters())
        return given + output[..., :0, :].sum() if learns else given


def _put_in_order(module: nn.Module, own: int) -> None:
    """Our hook after those that act inside the sub-layer, before those that act on it as a whole.

    Adapters that were attached, pruned to their compact form or reloaded since have put their hooks behind ours.
    """
    held = module._forward_pre_hooks if own in module._forward_pre_hooks else module._forward_hooks
    hooks = cast(OrderedDict[int, Any], held)
    order = list(hooks)
    place = order.index(own)
    if any(isinstance(hooks[n], InputHook) or _is_inside(hooks[n]) for n in order[place:]):
        hooks.move_to_end(own)  # paths that tap the hidden state read it whole
        place = len(order)
    for number in [n for n in order[:place] if isinstance(hooks[n], OutputHook) and not _is_inside(hooks[n])]:
        hooks.move_to_end(number)


def _is_inside(hook: Any) -> bool:
    return isinstance(hook, OutputHook) and not hook.whole


def _hooks_of(model: nn.Module) -> Iterable[Any]:
    for module in model.modules():
        yield from module._forward_pre_hooks.values()
        yield from module._forward_hooks.values()


_STEPS = "weakened_steps"  # what an optimiser's groups, and so its state, call the steps of a ramp
_WRITTEN: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
"""The number of steps that was written into an optimiser last; another number there was loaded."""
_NOT_HANDED_IN = (
    "the loaded state of the optimiser says that %d steps of this ramp are done, but the first step of the resumed "
    "training was weakened as after step %d, because nobody had handed the optimiser in. From the next step on the "
    "ramp goes on. To resume it from the first step on, give the Trainer callbacks=[ga.FollowOptimizer()]; in a loop "
    "of your own, call follow(optimizer) on what ga.weaken_knowledge returned, once the optimiser's state is loaded"
)
