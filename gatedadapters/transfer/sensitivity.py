"""How strongly paths depend on feed-forward knowledge, and a search that prefers paths which depend on it less."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import cast

import torch

from gatedadapters.backbone import discover
from gatedadapters.backbone.layout import undisturbed
from gatedadapters.backbone.sample import device_of
from gatedadapters.errors import AttachError, DataError
from gatedadapters.gates import GateBank
from gatedadapters.masking.scores import Batch
from gatedadapters.paths import Path
from gatedadapters.supernet.adapters import Adapters
from gatedadapters.transfer.shift import expert_maps, module_outputs, padding_masks, record_outputs, relative_shift
from gatedadapters.transfer.weakening import weaken_knowledge

MIN_WEIGHT = 0.25
"""Smallest weight of a path, relative to the mean. At 0 the path would have no cost, and would win any small budget."""


def knowledge_sensitivity(
    adapters: Adapters, batches: Iterable[Batch], *, mask: float = 0.2, seed: int = 0
) -> dict[str, float]:
    """By how much masking feed-forward knowledge changes the backbone's activations where each path writes.

    The sensitivity is ||masked - plain|| / ||plain|| (Frobenius) of the output of the module that the path writes to,
    over all tokens except padding. For a path at one expert's map it is that of the whole mixture. Only the masks are
    random. The model is left as it was.

    Args:
        adapters: attached to the model; they are switched off while measuring.
        batches: a few batches of the task.
        mask: share of each inner activation that is masked, p_i in `weaken_knowledge`.
        seed: of the masks.

    Returns:
        The sensitivity of each path, by the path's key.

    Raises:
        LayoutError: the model has no feed-forward sub-layer, or one that cannot be masked.
        DataError: there is no batch.
    """
    model = adapters.model
    modules = dict(model.named_modules())
    given = iter(batches)
    first = next(given, None)
    if first is None:
        raise DataError(
            "a sensitivity is measured on batches of text",
            expected="at least one batch",
            got="none",
            where="batches",
            fix="give at least one batch of token ids",
        )
    with adapters.disabled():
        layout = discover(model, first)
    mixtures = expert_maps(layout)
    written = {key: cast(Path, path).site.write.module for key, path in adapters.paths.items()}
    written = {key: mixtures.get(module, module) for key, module in written.items()}
    names = list(dict.fromkeys(written.values()))
    shifts: dict[str, list[float]] = {name: [] for name in names}
    watched = {name: modules[name] for name in names}
    with adapters.disabled(), weaken_knowledge(model, first, mask=mask, drop=0.0) as weakening:
        for number, batch in enumerate(chain([first], given)):
            masks = padding_masks(layout, batch)
            plain = module_outputs(model, names, batch, masks)
            masked: dict[str, list[torch.Tensor]] = {name: [] for name in names}
            with record_outputs(watched, masked, masks), undisturbed(model):
                torch.manual_seed(seed + number)
                for feed_forward in weakening.places:  # only modules in training mode are masked; all others evaluate
                    for name in (*feed_forward.inner, *feed_forward.activations):
                        modules[name].training = True
                model(**{key: value.to(device_of(model)) for key, value in batch.items()})
            for name in names:
                shifts[name].append(relative_shift(plain[name], masked[name]))
    return {key: sum(shifts[name]) / len(shifts[name]) for key, name in written.items()}


def prefer_transferable(
    adapters: Adapters, batches: Iterable[Batch], *, mask: float = 0.2, strength: float = 1.0, seed: int = 0
) -> dict[str, float]:
    """Weigh the cost of each path in the gate penalty by max(its sensitivity / the mean sensitivity, ¼) ** strength.

    Of two paths that serve the task equally well, the search then keeps the one that depends less on feed-forward
    knowledge, which an update of the base may change. Reported costs and budgets stay as they are. Paths before the
    first feed-forward sub-layer have sensitivity 0 and get weight ¼: with less, the search would keep them whatever
    they do for the task. Checkpoints do not hold the weights: call this again before resuming.

    Args:
        adapters: with gates, before training.
        batches: see `knowledge_sensitivity`.
        mask: see `knowledge_sensitivity`.
        strength: exponent of the weights; 0 is the plain search.
        seed: of the masks.

    Returns:
        The sensitivity of each path, by the path's key.

    Raises:
        AttachError: the adapters are compact, so that there are no gates.
        LayoutError, DataError: see `knowledge_sensitivity`.
    """
    _bank(adapters)
    found = knowledge_sensitivity(adapters, batches, mask=mask, seed=seed)
    weigh_by(adapters, found, strength=strength)
    return found


def weigh_by(adapters: Adapters, found: Mapping[str, float], *, strength: float = 1.0) -> None:
    """Weigh paths as `prefer_transferable` does, by sensitivities that were measured earlier.

    Args:
        adapters: with gates, before training.
        found: what `knowledge_sensitivity` returned. Measure it before `weaken_knowledge` is applied to the model.
        strength: exponent of the weights; 0 is the plain search.

    Raises:
        AttachError: the adapters are compact, so that there are no gates.
    """
    bank = _bank(adapters)
    values = torch.tensor([found[group.key] for group in bank.groups], dtype=torch.float64)
    weights = (values / values.mean().clamp(min=1e-12)).clamp(min=MIN_WEIGHT) ** strength
    bank.weigh(weights[bank.owner.cpu()])


def _bank(adapters: Adapters) -> GateBank:
    if adapters.bank is None:
        raise AttachError(
            "these adapters are compact: no gate is left to weigh", fix="attach a search space", where="adapters"
        )
    return adapters.bank
