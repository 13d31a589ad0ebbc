"""How much an update will damage adapters, predicted from unlabelled text before any test."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor, nn

from gatedadapters.backbone.layout import undisturbed
from gatedadapters.backbone.sample import device_of
from gatedadapters.errors import AttachError, DataError
from gatedadapters.masking.scores import Batch
from gatedadapters.masking.scores.losses import logits_of
from gatedadapters.paths import Path
from gatedadapters.paths.site import Point
from gatedadapters.reporting import html
from gatedadapters.reporting.tables import format_table
from gatedadapters.supernet.adapters import Adapters, get_adapters
from gatedadapters.supernet.hooks import hidden_argument
from gatedadapters.transfer.distance import distance, padding_mask
from gatedadapters.transfer.shift import vocabulary_size

TOKENS = 256  # of a batch, spread evenly: enough for a norm, and little memory


@dataclass(frozen=True, slots=True)
class SiteDamage:
    """What an update changes at one module that adapters write to.

    Attributes:
        module: qualified name of the module.
        share: size of the adapters' contribution over the size of what the backbone computes there, on the old base.
        moved: ||x' - x|| / ||x|| (Frobenius) of what the module reads.
        changed: ||c' - c|| / ||c|| of the adapters' contribution c.
    """

    module: str
    share: float
    moved: float
    changed: float


@dataclass(frozen=True, slots=True)
class Damage:
    """How much an update is expected to damage adapters; compare updates or adapters by it, it is no loss.

    Attributes:
        value: root mean square over the sites of `share * moved`, see `predict_damage`. Values of different models
            cannot be compared.
        outputs: how far the outputs moved: of classes and tokens the divergence KL(old || new) in nats, of other
            outputs the squared error over the mean square.
        sites: one entry for each module that adapters write to.
    """

    value: float
    outputs: float
    sites: tuple[SiteDamage, ...]

    def __str__(self) -> str:
        return f"predicted damage {self.value:.4f}; the outputs moved by {self.outputs:.3f}"

    def _rows(self) -> list[list[str]]:
        ordered = sorted(self.sites, key=lambda site: -site.share * site.moved)
        return [[s.module, f"{s.share:.1%}", f"{s.moved:.1%}", f"{s.changed:.1%}"] for s in ordered]

    def table(self) -> str:
        """The sites in per cent, the most damaged first."""
        return f"{self}\n\n{format_table(_HEADER, self._rows())}"

    def _repr_html_(self) -> str:
        return html.table(_HEADER, self._rows(), title=str(self))

    def to_data(self) -> dict[str, Any]:
        """The prediction as plain data."""
        return asdict(self)


_HEADER = ["module", "share of adapters", "input moved", "contribution changed"]


def predict_damage(old: nn.Module, new: nn.Module, batches: Iterable[Batch]) -> Damage:
    """Predict from unlabelled text how much an update damages carried adapters.

    For each module s that adapters write to, with x what it reads, y what the backbone computes there and c what the
    adapters add, all in the adapted model and over all tokens except padding (Frobenius norms; ' is the new base):

        value = root mean square over s of  (||c|| / ||y||) * (||x' - x|| / ||x||)

    A site counts by how much the adapters do there, and by how far what they read has moved. The sites say where the
    damage is, and `value` ranks the adapters and updates of one model. How far the outputs moved is returned as well:
    it ranked adapters and updates better by what they lost, and those of different models, too (`docs/results.md`).

    Args:
        old: the old base with the adapters attached, compact or with gates.
        new: its update with the same adapters: `load_adapters(new, folder, base="updated")`.
        batches: a few batches of the task; labels are not read.

    Raises:
        AttachError: one of the two has no adapters, or they are not the same ones.
        DataError: there is no batch, a token id lies outside the vocabulary, or the adapters change single weights
            alone, which no module computes with.

    Both models are left as they were.
    """
    pair = _attached(old, "old"), _attached(new, "new")
    if _sites(pair[0]) != _sites(pair[1]):
        raise AttachError(
            "the two models do not have the same adapters",
            expected="the adapters of the old base, carried to the new one",
            got=f"{len(pair[0].paths)} paths on the old base, {len(pair[1].paths)} on the new one",
            where="predict_damage(old, new)",
            fix='ga.load_adapters(new, folder, base="updated") with the folder that was loaded on the old base',
        )
    sums: dict[Point, dict[str, float]] = {}
    outputs: list[float] = []
    for batch in batches:
        _check_words(batch, old, new)
        (before, answer), (after, answer_new) = _recorded(pair[0], batch), _recorded(pair[1], batch)
        hidden = getattr(answer, "logits", None) is None
        moved = distance(logits_of(answer_new), logits_of(answer), padding_mask(batch), hidden=hidden)
        outputs.append(float(moved))
        for point, (read, computed, added) in before.items():
            read_new, _, added_new = after[point]
            own = sums.setdefault(point, defaultdict(float))
            named = {"x": read, "y": computed, "c": added, "dx": read_new - read, "dc": added_new - added}
            for name, value in named.items():
                own[name] += float(value.square().sum(dtype=torch.float64))
    if not sums:
        raise DataError(
            "there is nothing to predict a damage from",
            expected="at least one batch, and adapters that add to what modules compute",
            got="no batch" if _sites(pair[0]) else "adapters that change weights alone",
            where="predict_damage(batches=)",
            fix="give a few batches of token ids; measure with activation_shift what moves under adapters of weights",
        )
    sites = tuple(
        SiteDamage(point.module, _ratio(own["c"], own["y"]), _ratio(own["dx"], own["x"]), _ratio(own["dc"], own["c"]))
        for point, own in sums.items()
    )
    squares = fmean((site.share * site.moved) ** 2 for site in sites)
    return Damage(math.sqrt(squares), fmean(outputs), sites)


def _attached(model: nn.Module, name: str) -> Adapters:
    try:
        return get_adapters(model)
    except AttachError as error:
        raise AttachError(
            f"the {name} model has no adapters",
            expected="both bases with the same adapters",
            got=f"a {type(model).__name__} without adapters",
            where=f"predict_damage({name}=)",
            fix="ga.load_adapters(old, folder)" if name == "old" else 'ga.load_adapters(new, folder, base="updated")',
        ) from error


def _sites(adapters: Adapters) -> list[Point]:
    """The points that paths write to; those that change a weight are left out."""
    sites = (cast(Path, path).site for path in adapters.paths.values())
    return list(dict.fromkeys(site.write for site in sites if not site.at_weight))


def _recorded(adapters: Adapters, batch: Batch) -> tuple[dict[Point, tuple[Tensor, Tensor, Tensor]], Any]:
    """Run a batch, and return what is read, computed and added at each point, (tokens, width) in float32; and the
    model's output.
    """
    model, modules, found = adapters.model, dict(adapters.model.named_modules()), dict[Point, list[Tensor]]()
    handles = []
    for point in _sites(adapters):
        module, first, last = modules[point.module], _Before(point, batch, found), _After(point, batch, found)
        if point.side == "input":
            handles.append(module.register_forward_pre_hook(first, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_pre_hook(last, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(first, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(last, with_kwargs=True))
    given = {key: value for key, value in batch.items() if key != "labels"}
    try:
        with undisturbed(model):
            output = model(**{k: v.to(device_of(model)) if isinstance(v, Tensor) else v for k, v in given.items()})
    finally:
        for handle in handles:
            handle.remove()
    return {point: (read, computed, changed - computed) for point, (read, computed, changed) in found.items()}, output


class _Before:
    """Registered before the hooks of the adapters: keeps what the module reads and what the backbone computes."""

    def __init__(self, point: Point, batch: Batch, found: dict[Point, list[Tensor]]) -> None:
        self.point, self.mask, self.found = point, batch.get("attention_mask"), found

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
        """Forward hook or pre-hook, with kwargs."""
        read = self.rows(hidden_argument(args, kwargs))
        self.found[self.point] = [read, read if self.point.side == "input" else self.rows(output)]

    def rows(self, value: Any) -> Tensor:
        """Tokens without padding, spread evenly, (tokens, width)."""
        tensor = value if isinstance(value, Tensor) else hidden_argument(tuple(value), {})
        flat = tensor.detach().float()
        flat = flat.flatten(0, -2) if tensor.is_floating_point() else flat.reshape(-1, 1)  # token ids are one number
        if self.mask is not None and self.mask.numel() == len(flat):
            flat = flat[self.mask.flatten().bool().to(flat.device)]
        kept = torch.linspace(0, len(flat) - 1, min(TOKENS, len(flat)), device=flat.device).long()
        return flat[kept]


class _After(_Before):
    """Registered after the hooks of the adapters: keeps what they made of it."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
        """Forward hook or pre-hook, with kwargs."""
        own = self.found[self.point]
        own[2:] = [self.rows(hidden_argument(args, kwargs) if self.point.side == "input" else output)]


def _check_words(batch: Batch, *models: nn.Module) -> None:
    """Check that both models know every token of a batch.

    Raises:
        DataError: one does not.
    """
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or not ids.numel():
        return
    words = min(size for size in map(vocabulary_size, models))
    if words and (int(ids.max()) >= words or int(ids.min()) < 0):
        raise DataError(
            "a token id lies outside the vocabulary",
            expected=f"0..{words - 1}",
            got=str(int(ids.max()) if int(ids.max()) >= words else int(ids.min())),
            where="predict_damage(batches=)",
            fix="take the tokenizer of these bases",
        )


def _ratio(part: float, whole: float) -> float:
    """||part|| / ||whole|| from sums of squares; 0 where the part is 0."""
    return math.sqrt(part / whole) if part and whole else 0.0
