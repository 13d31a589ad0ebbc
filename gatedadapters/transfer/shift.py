"""How much an update of a base moved what it computes, point by point."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, groupby
from typing import Any

from torch import Tensor, nn

from gatedadapters.backbone import Layout, discover
from gatedadapters.backbone.layout import undisturbed
from gatedadapters.backbone.sample import device_of
from gatedadapters.errors import DataError, LayoutError
from gatedadapters.masking.scores import Batch
from gatedadapters.reporting import html
from gatedadapters.reporting.tables import format_table
from gatedadapters.structure import column
from gatedadapters.supernet.hooks import hidden_argument


@dataclass(frozen=True, slots=True)
class PointShift:
    """One module of the layout: `shift` = ||new - old|| / ||old||, Frobenius, over the tokens that are no padding."""

    module: str
    block: int
    sublayer: str
    role: str
    shift: float


@dataclass(frozen=True, slots=True)
class ActivationShift:
    """How far the outputs of every linear map, and of every mixture of experts, moved from one base to another."""

    points: tuple[PointShift, ...]

    def mean(self, sublayer: str) -> float:
        """Over the points of a kind of sub-layer, `attention` or `feed_forward`; nan where there is none."""
        own = [point.shift for point in self.points if point.sublayer == sublayer]
        return sum(own) / len(own) if own else float("nan")

    def grid(self) -> tuple[list[int], list[str], dict[tuple[int, str], float]]:
        """Blocks, columns (sub-layer, role), and the shift of each cell (the mean where several points share one)."""
        cells: dict[tuple[int, str], list[float]] = {}
        for point in self.points:
            cells.setdefault((point.block, column(point.sublayer, point.role, "").strip()), []).append(point.shift)
        columns = list(dict.fromkeys(name for _, name in cells))
        blocks = sorted({block for block, _ in cells})
        return blocks, columns, {place: sum(values) / len(values) for place, values in cells.items()}

    def table(self) -> str:
        """One row a block, one column a place, in per cent."""
        blocks, columns, cells = self.grid()
        rows = [
            [str(block), *(f"{cells[block, name]:.1%}" if (block, name) in cells else "" for name in columns)]
            for block in blocks
        ]
        return format_table(["block", *columns], rows)

    def _repr_html_(self) -> str:
        blocks, columns, cells = self.grid()
        peak = max(cells.values(), default=0.0) or 1.0
        texts = {place: f"{value:.1%}" for place, value in cells.items()}
        shares = {place: value / peak for place, value in cells.items()}
        return html.grid(blocks, columns, texts, shares, title="relative shift")

    def to_data(self) -> list[dict[str, Any]]:
        """Plain data."""
        return [asdict(point) for point in self.points]


def activation_shift(old: nn.Module, new: nn.Module, batches: Iterable[Batch]) -> ActivationShift:
    """Run two versions of a base on the same texts, each on its own hidden states, and compare every point.

    Args:
        old: the base before.
        new: the base after; the same layout, other values.
        batches: what both models run on; `attention_mask` (batch, length) says what is padding, and for the rows of a
            decoder that has an encoder, `decoder_attention_mask`. The layouts are discovered on the first.

    Raises:
        LayoutError: the two are not versions of one base; the first difference is named.
        DataError: there is no batch.
    """
    given = iter(batches)
    first = next(given, None)
    if first is None:
        raise DataError("a shift is measured on texts", expected="at least one batch", got="none", where="batches")
    layout = check_versions(old, new, first)
    places = list(_places(layout))
    names = [place[0] for place in places]
    moved, size = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for batch in chain([first], given):
        masks = padding(layout, batch)
        before, after = outputs(old, names, batch, masks), outputs(new, names, batch, masks)
        for name in names:
            for a, b in zip(before[name], after[name], strict=True):
                moved[name] += float((b.to(a) - a).square().sum())
                size[name] += float(a.square().sum())
    return ActivationShift(
        tuple(
            PointShift(name, block, sublayer, role, math.sqrt(moved[name] / max(size[name], 1e-30)))
            for name, block, sublayer, role in places
        )
    )


def check_versions(old: nn.Module, new: nn.Module, sample: Batch | None = None) -> Layout:
    """The layout that two versions of a base share.

    Compared are class, vocabulary, shapes of parameters, layout, and of the configurations what decides what layers
    compute: numbers of heads, non-linearities, residual connections and the like. How far positions reach (`rope_*`,
    windows, lengths) may differ: releases of one base differ there.

    Args:
        old: the base before.
        new: the base after.
        sample: a batch that runs through both; a default is made for token models.

    Raises:
        LayoutError: they are not versions of one base; the first difference is named.
    """

    def refuse(what: str, expected: object, got: object) -> LayoutError:
        return LayoutError(
            f"these are not two versions of one base: {what} differs",
            expected=f"{expected} (old)",
            got=f"{got} (new)",
            where=f"{type(old).__name__}, {type(new).__name__}",
            fix="give a base and its update",
        )

    if type(old) is not type(new):
        raise refuse("the class", type(old).__name__, type(new).__name__)
    words = [_vocabulary(model) for model in (old, new)]
    if words[0] != words[1]:
        raise refuse("the vocabulary", f"{words[0]:,} tokens", f"{words[1]:,} tokens")
    shapes = [{n: tuple(p.shape) for n, p in model.named_parameters()} for model in (old, new)]
    for name in dict.fromkeys((*shapes[0], *shapes[1])):
        a, b = (found.get(name, "absent") for found in shapes)
        if a != b:
            raise refuse(f"the shape of {name}", a, b)
    settings = [_settings(model) for model in (old, new)]
    for name, a in settings[0].items():
        b = settings[1].get(name, a)  # what one of them lacks, its layers do not read
        if a != b:
            raise refuse(f"{name} of the configuration", a, b)
    layouts = [discover(model, sample) for model in (old, new)]
    for a, b in zip(*map(_lines, layouts), strict=False):
        if a != b:
            raise refuse("the layout", a.strip(), b.strip())
    return layouts[0]


def padding(layout: Layout, batch: Batch) -> dict[str, Tensor]:
    """By module in the blocks, the mask (batch, length) of the rows it returns, where the batch has one.

    A decoder's rows are its own tokens, whose mask is not the encoder's; but keys and values of its cross-attention are
    computed from the encoder's.
    """
    found = {}
    for block in layout.blocks:
        for sublayer in block.sublayers:
            roles = {m.name: m.role for m in sublayer.maps}
            if sublayer.writer is not None:
                roles.setdefault(sublayer.writer, "")
            for name, role in roles.items():
                memory = sublayer.kind == "cross_attention" and role in ("k", "v", "kv")
                decodes = block.stack == "decoder" and not memory
                mask = batch.get("decoder_attention_mask" if decodes else "attention_mask")
                if mask is not None:
                    found[name] = mask
    return found


def outputs(
    model: nn.Module, names: Iterable[str], batch: Batch, masks: Mapping[str, Tensor]
) -> dict[str, list[Tensor]]:
    """What each named module returns for a batch in evaluation mode: for every call of it, rows (tokens, width)."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    modules = dict(model.named_modules())
    with recording({name: modules[name] for name in found}, found, masks), undisturbed(model):
        model(**{key: value.to(device_of(model)) for key, value in batch.items()})
    return found


@contextmanager
def recording(
    modules: Mapping[str, nn.Module], into: dict[str, list[Tensor]], masks: Mapping[str, Tensor]
) -> Iterator[None]:
    """Within this context the modules' outputs are kept, in fp32, without the rows of padding (see `padding`)."""

    def keep(name: str) -> Any:
        mask = masks.get(name)

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            value = output if isinstance(output, Tensor) else hidden_argument(tuple(output), {})
            rows = value.detach().float().flatten(0, -2)
            if mask is not None and mask.numel() == len(rows):
                rows = rows[mask.flatten().bool().to(rows.device)]
            into[name].append(rows)

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def relative(before: list[Tensor], after: list[Tensor]) -> float:
    """||after - before|| / ||before|| over all calls."""
    moved = sum(float((b - a).square().sum()) for a, b in zip(before, after, strict=True))
    size = sum(float(a.square().sum()) for a in before)
    return math.sqrt(moved / max(size, 1e-30))


def _lines(layout: Layout) -> list[str]:
    """A layout as text, but for which experts the sample was routed to, and in which order."""
    lines = re.sub("  traffic .*", "", layout.table()).splitlines()
    runs = groupby(lines, key=lambda line: line.startswith("    "))  # the maps of a sub-layer
    return [line for are_maps, run in runs for line in (sorted(run) if are_maps else run)]


def routed(layout: Layout) -> dict[str, str]:
    """By map of an expert that is a module of its own, what its sub-layer writes at: which tokens, and how many, an
    expert sees differs from base to base.
    """
    found: dict[str, str] = {}
    for block in layout.blocks:
        for sublayer in block.sublayers:
            alike: dict[str, list[str]] = {}
            for m in sublayer.maps:
                alike.setdefault(re.sub(r"\d+", "#", m.name.removeprefix(sublayer.name)), []).append(m.name)
            if sublayer.writer and any(m.role == "router" for m in sublayer.maps):
                found |= {name: sublayer.writer for names in alike.values() if len(names) > 1 for name in names}
    return found


def _places(layout: Layout) -> Iterator[tuple[str, int, str, str]]:
    apart = routed(layout)
    for block in layout.blocks:
        for sublayer in block.sublayers:
            held = [m for m in sublayer.maps if m.kind != "experts" and m.traffic > 0 and m.name not in apart]
            maps = {m.name: m.role for m in held}
            if sublayer.writer and sublayer.writer not in maps:
                maps[sublayer.writer] = ""
            for name, role in maps.items():
                yield name, block.index, sublayer.kind, role


_NOT_OF_LAYERS = re.compile(
    r"^_|dropout|drop_path|layerdrop|token_id|token_index|initializer|^init_"  # training and special tokens
    r"|^(transformers_version|architectures|auto_map|dtype|torch_dtype|quantization_config|gradient_checkpointing)$"
    r"|^(id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params|classifier_\w+)$"
    r"|^(output_\w+|return_dict\w*|use_cache|chunk_size_feed_forward|tie_word_embeddings|vocab_size)$"
    r"|^rope_|max_\w*position|sliding_window|max_window_layers"  # how far positions reach
)
"""Names in a configuration that leave open or unchanged what the layers of a trained model compute."""


def _settings(model: nn.Module) -> dict[str, Any]:
    """What the model's configuration says of its layers; those of its parts by dotted names."""
    configs = (getattr(module, "config", None) for module in model.modules())
    config: Any = next((found for found in configs if hasattr(found, "to_dict")), None)

    def flat(data: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in data.items():
            if not _NOT_OF_LAYERS.search(str(name)):
                if isinstance(value, Mapping):
                    yield from flat(value, f"{prefix}{name}.")
                else:
                    yield f"{prefix}{name}", value

    return {} if config is None else dict(flat(config.to_dict(), ""))


def _vocabulary(model: nn.Module) -> int:
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    return 0 if embedding is None else embedding.num_embeddings


__all__ = ["ActivationShift", "PointShift", "activation_shift", "check_versions", "outputs", "relative"]
