"""From a layout to the sites that a path's options select."""

from __future__ import annotations

from collections.abc import Iterator

from gatedadapters.backbone import Block, Layout, LinearMap, Sublayer
from gatedadapters.config import PathOptions
from gatedadapters.paths.site import Point, Side, Site, SkippedSite


def map_sites(
    options: PathOptions, layout: Layout, *, tap: Side, write: Side, kind: str, instead: str = ""
) -> Iterator[Site | SkippedSite]:
    """Sites around every selected linear map; those inside a module that does more are reported, with the kind that
    takes such places `instead`.
    """
    for block, sublayer, linear in selected_maps(options, layout):
        if linear.host:
            reason = f"{linear.host} multiplies with it and does more: no module takes its input and returns its output"
            reason += f"; {instead} can go there" if instead else ""
            yield SkippedSite(kind, f"{linear.name}.{linear.parameter}", reason, instead)
        else:
            yield Site.at_map(block, sublayer, linear, tap=tap, write=write)


def selected_maps(options: PathOptions, layout: Layout) -> Iterator[tuple[Block, Sublayer, LinearMap]]:
    """Every map of the blocks that `options.at` selects, then those outside them where it names `outside`."""
    outside = layout.maps_outside() if "outside" in (options.at.sublayers or ()) else ()
    for block, sublayer, linear in (*layout.maps(), *outside):
        name = linear.name if linear.kind != "experts" else f"{linear.name}.{linear.parameter}"
        if selected(options, layout, block, sublayer, name, linear.role):
            yield block, sublayer, linear


def sublayer_sites(options: PathOptions, layout: Layout, *, tap: Side, kind: str) -> Iterator[Site | SkippedSite]:
    """Sites that write where a selected sub-layer returns, before the residual addition; roles do not apply."""
    for block in layout.blocks:
        for sublayer in block.sublayers:
            if not selected(options, layout, block, sublayer, sublayer.name, None):
                continue
            reader = sublayer.reader if tap == "input" else sublayer.writer
            if reader is None or sublayer.writer is None:
                yield SkippedSite(
                    kind, sublayer.name, "where this sub-layer reads or writes the hidden state is unknown"
                )
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
    """Whether `options.at` selects this module."""
    return options.at.accepts(
        module=module,
        block=block.index,
        n_blocks=len(layout.blocks),
        stack=block.stack,
        sublayer=sublayer.kind,
        role=role,
    )
