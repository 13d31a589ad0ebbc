"""From a layout to the sites that a path's options select."""

from __future__ import annotations

from collections.abc import Iterator

from gatedadapters.backbone import Block, Layout, LinearMap, Sublayer
from gatedadapters.config import PathOptions
from gatedadapters.paths.site import Point, Side, Site, SkippedSite


def map_sites(
    options: PathOptions, layout: Layout, *, tap: Side, write: Side, kind: str, instead: str = "", ids: bool = False
) -> Iterator[Site | SkippedSite]:
    """Sites at every selected linear map.

    Args:
        options: which maps.
        layout: of the backbone.
        tap: the side of the map that the path reads.
        write: the side of the map that the path changes.
        kind: path kind, for skipped sites.
        instead: a path kind that can go to maps without a module of their own; such maps are skipped.
        ids: whether the path can read token ids; if not, their tables are skipped unless it reads their output.
    """
    for block, sublayer, linear in selected_maps(options, layout):
        if linear.kind == "embedding" and tap == "input" and not ids:
            yield SkippedSite(kind, linear.name, "it reads token ids, not vectors")
        elif linear.host:
            reason = f"{linear.host} multiplies with it and does more: no module has just its input and output"
            reason += f"; {instead} can go there" if instead else ""
            yield SkippedSite(kind, f"{linear.name}.{linear.parameter}", reason, instead)
        else:
            yield Site.at_map(block, sublayer, linear, tap=tap, write=write)


def selected_maps(options: PathOptions, layout: Layout) -> Iterator[tuple[Block, Sublayer, LinearMap]]:
    """The maps that `options.at` selects: those of the blocks, then, if it names them, those outside the blocks."""
    outside = [place for place in layout.maps_outside() if place[1].kind in (options.at.sublayers or ())]
    for block, sublayer, linear in (*layout.maps(), *outside):
        name = linear.name if linear.kind != "experts" else f"{linear.name}.{linear.parameter}"
        if selected(options, layout, block, sublayer, name, linear.role):
            yield block, sublayer, linear


def sublayer_sites(options: PathOptions, layout: Layout, *, tap: Side, kind: str) -> Iterator[Site | SkippedSite]:
    """Sites that write to the output of every selected sub-layer, before the residual addition.

    Args:
        options: which sub-layers; its roles are ignored, because a sub-layer has none.
        layout: of the backbone.
        tap: the side of the sub-layer that the path reads.
        kind: path kind, for skipped sites.
    """
    for block in layout.blocks:
        for sublayer in block.sublayers:
            if not selected(options, layout, block, sublayer, sublayer.name, None):
                continue
            reader = sublayer.reader if tap == "input" else sublayer.writer
            if reader is None or sublayer.writer is None:
                reason = "no module boundary carries the hidden state that this sub-layer reads or writes"
                yield SkippedSite(kind, sublayer.name, reason)
                continue
            traffic = max((m.traffic for m in sublayer.maps if m.name == sublayer.writer), default=float(block.calls))
            yield Site(
                Point(reader, tap),
                Point(sublayer.writer, "output"),
                sublayer.width,
                sublayer.width,
                block.name,
                block.index,
                sublayer.kind,
                "",
                traffic,
            )


def selected(
    options: PathOptions, layout: Layout, block: Block, sublayer: Sublayer, module: str, role: str | None
) -> bool:
    """Whether `options.at` selects this module; `role` is None for a whole sub-layer."""
    return options.at.accepts(
        module=module,
        block=block.index,
        n_blocks=len(layout.blocks),
        stack=block.stack,
        sublayer=sublayer.kind,
        role=role,
    )
