"""By how much an update of a base changed the activations at each of its points."""

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
    """The shift at one module of the layout.

    Attributes:
        module: qualified name of the module.
        block: index of the block.
        sublayer: kind of the sub-layer, such as `attention`.
        role: role of the linear map; empty for the output of a whole sub-layer.
        shift: ||new - old|| / ||old|| (Frobenius) of the module's output, over all tokens except padding.
    """

    module: str
    block: int
    sublayer: str
    role: str
    shift: float


@dataclass(frozen=True, slots=True)
class ActivationShift:
    """The shift of the output of every linear map and every mixture of experts, from one base to its update.

    Attributes:
        points: one entry for each module, in the order of the layout.
    """

    points: tuple[PointShift, ...]

    def mean(self, sublayer: str) -> float:
        """Mean shift over the points of one kind of sub-layer, such as `attention`; nan where there is none."""
        own = [point.shift for point in self.points if point.sublayer == sublayer]
        return sum(own) / len(own) if own else float("nan")

    def grid(self) -> tuple[list[int], list[str], dict[tuple[int, str], float]]:
        """The shifts as a grid: indices of blocks, names of columns (sub-layer and role), and the shift of each cell.

        A cell that several points share holds their mean.
        """
        cells: dict[tuple[int, str], list[float]] = {}
        for point in self.points:
            cells.setdefault((point.block, column(point.sublayer, point.role, "").strip()), []).append(point.shift)
        columns = list(dict.fromkeys(name for _, name in cells))
        blocks = sorted({block for block, _ in cells})
        return blocks, columns, {cell: sum(values) / len(values) for cell, values in cells.items()}

    def table(self) -> str:
        """The grid as text, in per cent: one row for each block, one column for each sub-layer and role."""
        blocks, columns, cells = self.grid()
        rows = [
            [str(block), *(f"{cells[block, name]:.1%}" if (block, name) in cells else "" for name in columns)]
            for block in blocks
        ]
        return format_table(["block", *columns], rows)

    def _repr_html_(self) -> str:
        blocks, columns, cells = self.grid()
        peak = max(cells.values(), default=0.0) or 1.0
        texts = {cell: f"{value:.1%}" for cell, value in cells.items()}
        shares = {cell: value / peak for cell, value in cells.items()}
        return html.grid(blocks, columns, texts, shares, title="relative shift")

    def to_data(self) -> list[dict[str, Any]]:
        """The points as plain data."""
        return [asdict(point) for point in self.points]


def activation_shift(old: nn.Module, new: nn.Module, batches: Iterable[Batch]) -> ActivationShift:
    """Run two versions of a base on the same batches, each on its own hidden states, and compare their activations.

    Args:
        old: the base before its update.
        new: the base after its update: the same layout, other values.
        batches: batches that both models run on. `attention_mask` (batch, length) marks padding; in the decoder of an
            encoder-decoder model, `decoder_attention_mask` does. The layouts are discovered on the first batch.

    Raises:
        LayoutError: the two are not versions of one base; the first difference is named.
        DataError: there is no batch.
    """
    given = iter(batches)
    first = next(given, None)
    if first is None:
        raise DataError(
            "a shift is measured on batches of text",
            expected="at least one batch",
            got="none",
            where="batches",
            fix="give at least one batch of token ids",
        )
    layout = check_versions(old, new, first)
    points = list(_points(layout))
    names = [point[0] for point in points]
    moved, size = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for batch in chain([first], given):
        masks = padding_masks(layout, batch)
        before, after = module_outputs(old, names, batch, masks), module_outputs(new, names, batch, masks)
        for name in names:
            for a, b in zip(before[name], after[name], strict=True):
                moved[name] += float((b.to(a) - a).square().sum())
                size[name] += float(a.square().sum())
    return ActivationShift(
        tuple(
            PointShift(name, block, sublayer, role, math.sqrt(moved[name] / max(size[name], 1e-30)))
            for name, block, sublayer, role in points
        )
    )


def check_versions(old: nn.Module, new: nn.Module, sample: Batch | None = None) -> Layout:
    """Check that two models are versions of one base, and return the layout that they share.

    The check compares class, vocabulary, shapes of parameters, layout, and those settings of the configurations that
    decide what layers compute: numbers of heads, non-linearities, residual connections and the like. Settings of
    positions (`rope_*`, windows, lengths) may differ, because releases of one base differ there.

    Args:
        old: the base before its update.
        new: the base after its update.
        sample: a batch that runs through both; default: one is made for token models.

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
    words = [vocabulary_size(model) for model in (old, new)]
    if words[0] != words[1]:
        raise refuse("the vocabulary", f"{words[0]:,} tokens", f"{words[1]:,} tokens")
    shapes = [{n: tuple(p.shape) for n, p in model.named_parameters()} for model in (old, new)]
    for name in dict.fromkeys((*shapes[0], *shapes[1])):
        a, b = (found.get(name, "absent") for found in shapes)
        if a != b:
            raise refuse(f"the shape of {name}", a, b)
    settings = [_settings(model) for model in (old, new)]
    for name, a in settings[0].items():
        b = settings[1].get(name, a)  # a setting that one configuration lacks is not read by its layers
        if a != b:
            raise refuse(f"{name} of the configuration", a, b)
    layouts = [discover(model, sample) for model in (old, new)]
    for a, b in zip(*map(_lines, layouts), strict=False):
        if a != b:
            raise refuse("the layout", a.strip(), b.strip())
    return layouts[0]


def padding_masks(layout: Layout, batch: Batch) -> dict[str, Tensor]:
    """For each module in the blocks, the mask (batch, length) of the tokens in its output; none where there is no mask.

    The tokens of a decoder have a mask of their own. But keys and values of its cross-attention are computed from the
    tokens of the encoder.
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


def module_outputs(
    model: nn.Module, names: Iterable[str], batch: Batch, masks: Mapping[str, Tensor]
) -> dict[str, list[Tensor]]:
    """Run a batch in evaluation mode and return what the named modules return.

    Args:
        model: the model.
        names: qualified names of modules.
        batch: the batch.
        masks: see `padding_masks`.

    Returns:
        For each module, one tensor (tokens, width) for every call, float32, without padding.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    modules = dict(model.named_modules())
    with record_outputs({name: modules[name] for name in found}, found, masks), undisturbed(model):
        model(**{key: value.to(device_of(model)) for key, value in batch.items()})
    return found


@contextmanager
def record_outputs(
    modules: Mapping[str, nn.Module], into: dict[str, list[Tensor]], masks: Mapping[str, Tensor]
) -> Iterator[None]:
    """Within this context, append every output of the modules to the lists in `into`.

    Args:
        modules: by name.
        into: by name, lists that are filled with tensors (tokens, width), float32, without padding.
        masks: see `padding_masks`.
    """

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


def relative_shift(before: list[Tensor], after: list[Tensor]) -> float:
    """||after - before|| / ||before|| (Frobenius) over all calls."""
    moved = sum(float((b - a).square().sum()) for a, b in zip(before, after, strict=True))
    size = sum(float(a.square().sum()) for a in before)
    return math.sqrt(moved / max(size, 1e-30))


def _lines(layout: Layout) -> list[str]:
    """A layout as lines of text, without what depends on the sample: which experts it was routed to, in which order."""
    lines = re.sub("  traffic .*", "", layout.table()).splitlines()
    runs = groupby(lines, key=lambda line: line.startswith("    "))  # the maps of a sub-layer
    return [line for are_maps, run in runs for line in (sorted(run) if are_maps else run)]


def expert_maps(layout: Layout) -> dict[str, str]:
    """For each linear map of an expert that is a module of its own, the module that returns the whole mixture's output.

    Two bases route different tokens to an expert. So the outputs of its maps cannot be compared; those of the mixture
    can.
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


def _points(layout: Layout) -> Iterator[tuple[str, int, str, str]]:
    """Module, block, kind of sub-layer and role of every point that is compared."""
    mixtures = expert_maps(layout)
    for block in layout.blocks:
        for sublayer in block.sublayers:
            held = [m for m in sublayer.maps if m.kind != "experts" and m.traffic > 0 and m.name not in mixtures]
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
"""Settings of a configuration that do not change what the layers of a trained model compute, or may differ."""


def _settings(model: nn.Module) -> dict[str, Any]:
    """The settings of a model's configuration that decide what its layers compute, nested ones by dotted names."""
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


def vocabulary_size(model: nn.Module) -> int:
    """Number of token embeddings; 0 where there are none."""
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    return 0 if embedding is None else embedding.num_embeddings


__all__ = ["ActivationShift", "PointShift", "activation_shift", "check_versions", "module_outputs", "relative_shift"]
