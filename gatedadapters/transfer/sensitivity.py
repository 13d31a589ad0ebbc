"""Which places of an adapter hang on feed-forward knowledge, and a search that prefers the others."""

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
from gatedadapters.transfer.shift import outputs, padding, recording, relative, routed
from gatedadapters.transfer.weakening import weaken_knowledge

LEAST = 0.25
"""Of the mean pressure: what is never pressed would win every place of a small budget."""


def knowledge_sensitivity(
    adapters: Adapters, batches: Iterable[Batch], *, mask: float = 0.2, seed: int = 0
) -> dict[str, float]:
    """By path, how far masking feed-forward knowledge moves the backbone's activations where the path writes.

    ||masked - plain|| / ||plain|| of the output of the module written to (of an expert's map: of the whole mixture),
    over the tokens that are no padding. Only the masking is random; the model is left as it was.

    Args:
        adapters: attached to the model; they are switched off while measuring.
        batches: a few batches of the task.
        mask: p_i.
        seed: of the masks.

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
            "a sensitivity is measured on texts", expected="at least one batch", got="none", where="batches"
        )
    with adapters.disabled():
        layout = discover(model, first)
    apart = routed(layout)
    written = {key: cast(Path, path).site.write.module for key, path in adapters.paths.items()}
    written = {key: apart.get(module, module) for key, module in written.items()}
    names = list(dict.fromkeys(written.values()))
    shifts: dict[str, list[float]] = {name: [] for name in names}
    watched = {name: modules[name] for name in names}
    with adapters.disabled(), weaken_knowledge(model, first, mask=mask, drop=0.0) as weakening:
        for number, batch in enumerate(chain([first], given)):
            masks = padding(layout, batch)
            plain = outputs(model, names, batch, masks)
            masked: dict[str, list[torch.Tensor]] = {name: [] for name in names}
            with recording(watched, masked, masks), undisturbed(model):
                torch.manual_seed(seed + number)
                for place in weakening.places:  # masking acts where a module trains; nothing else in the model does
                    for name in (*place.inner, *place.activations):
                        modules[name].training = True
                model(**{key: value.to(device_of(model)) for key, value in batch.items()})
            for name in names:
                shifts[name].append(relative(plain[name], masked[name]))
    return {key: sum(shifts[name]) / len(shifts[name]) for key, name in written.items()}


def prefer_transferable(
    adapters: Adapters, batches: Iterable[Batch], *, mask: float = 0.2, strength: float = 1.0, seed: int = 0
) -> dict[str, float]:
    """Let the gate penalty weigh each path by max(its sensitivity / the mean sensitivity, 1/4) ** strength.

    Of two places that serve the task alike, the search then keeps the one that hangs less on what an update of the base
    changes. Costs and budgets are what they were: only where the pressure acts differs. What stands before the first
    feed-forward sub-layer hangs on none, and is pressed a quarter as much as the mean: with less it would be kept
    whatever it does for the task. After a resume, call it again.

    Args:
        adapters: with gates, before training.
        batches: see `knowledge_sensitivity`.
        mask: p_i.
        strength: 0 is the plain search.
        seed: of the masks.

    Returns:
        The sensitivity of each path.

    Raises:
        AttachError: the adapters are compact.
        LayoutError, DataError: see `knowledge_sensitivity`.
    """
    _bank(adapters)
    found = knowledge_sensitivity(adapters, batches, mask=mask, seed=seed)
    weigh_by(adapters, found, strength=strength)
    return found


def weigh_by(adapters: Adapters, found: Mapping[str, float], *, strength: float = 1.0) -> None:
    """`prefer_transferable` with sensitivities that were measured before, on a model that was not weakened then.

    Raises:
        AttachError: the adapters are compact.
    """
    bank = _bank(adapters)
    values = torch.tensor([found[group.key] for group in bank.groups], dtype=torch.float64)
    weights = (values / values.mean().clamp(min=1e-12)).clamp(min=LEAST) ** strength
    bank.weigh(weights[bank.owner.cpu()])


def _bank(adapters: Adapters) -> GateBank:
    if adapters.bank is None:
        raise AttachError("these adapters are compact: no gate is left to weigh", fix="attach a search space")
    return adapters.bank
