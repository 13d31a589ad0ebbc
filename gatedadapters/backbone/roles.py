"""Finds the sub-layers of a block in a trace, and the roles of their maps. Data flow decides; names break ties."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from gatedadapters.backbone.trace import Attention, Input, Map, MapUse, Stream, Trace, maps_of

Kind = Literal["attention", "cross_attention", "feed_forward", "mixer", "outside", "embedding"]


@dataclass(frozen=True, slots=True)
class MapGroup:
    """Maps of one block that feed each other. They become one sub-layer if one of them writes the hidden state."""

    uses: dict[Map, MapUse]  # the first use of each map, in call order
    feeds: dict[Map, frozenset[Map]]  # for each map, the others whose outputs it reads
    writers: frozenset[Map]  # the maps whose outputs reach the block's output


def map_groups(uses: Sequence[MapUse], links: Iterable[frozenset[Map]], written: frozenset[Map]) -> list[MapGroup]:
    """Split the ``uses`` of one block into groups of connected maps, in call order.

    Args:
        uses: the multiplications of the block.
        links: sets of maps that share a sub-layer.
        written: maps whose outputs reach the block's output.
    """
    parent = {use.map: use.map for use in uses}

    def root(key: Map) -> Map:
        while parent[key] != key:
            key = parent[key]
        return key

    for link in links:
        here = [key for key in link if key in parent]
        for key in here[1:]:
            parent[root(key)] = root(here[0])
    members: dict[Map, dict[Map, MapUse]] = {}
    feeds: dict[Map, frozenset[Map]] = {}
    for use in uses:
        members.setdefault(root(use.map), {}).setdefault(use.map, use)
        feeds[use.map] = feeds.get(use.map, frozenset()) | maps_of(use.reads)
    return [
        MapGroup(group, {key: feeds[key] & group.keys() for key in group}, written & group.keys())
        for group in members.values()
    ]


def attention_of(group: MapGroup, trace: Trace, block: str) -> Attention | None:
    """The first attention that the group computes; DeBERTa's later ones are corrections by relative position."""
    return next((a for a in trace.attention if a.block == block and a.value & group.uses.keys()), None)


def kind_of(group: MapGroup, attention: Attention | None, trace: Trace, stack: str, name: str) -> Kind:
    """The kind of the sub-layer: attention, cross-attention, another mixing of tokens, or a feed-forward."""
    if attention is None and group.uses.keys() & trace.mixed:
        return "mixer"
    if attention is None and not _says_attention(name, group):
        return "feed_forward"
    for use in group.uses.values():
        foreign = [label for label in use.reads if isinstance(label, (Stream, Input))] or maps_of(use.reads)
        if foreign and Stream(stack) not in use.reads and not group.uses.keys() & maps_of(use.reads):
            return "cross_attention"
    return "attention"


def roles_of(group: MapGroup, kind: Kind, attention: Attention | None, width: int, trace: Trace) -> dict[Map, str]:
    """The role of every map of the group; ``width`` is that of the hidden state."""
    routers = [
        key
        for key, use in group.uses.items()
        if (kind == "feed_forward" and key in trace.routed) or (key in group.writers and use.out_features != width)
    ]
    writers = group.writers.difference(routers)
    if kind == "feed_forward":
        roles = _feed_forward_roles(group, writers, trace)
    elif kind == "mixer":
        stems = {key: _stem(key) for key in group.uses}
        roles = stems | {key: "in" for key in group.uses if not group.feeds[key]} | dict.fromkeys(writers, "out")
    else:
        roles = _attention_roles(group, attention) | dict.fromkeys(writers, "o")
    return roles | dict.fromkeys(routers, "router")


def _attention_roles(group: MapGroup, attention: Attention | None) -> dict[Map, str]:
    parts = ((attention.query, "q"), (attention.key, "k"), (attention.value, "v")) if attention else ()
    letters = {key: "".join(letter for maps, letter in parts if key in maps) for key in group.uses}
    if attention is None or "qv" in letters.values():  # not seen, or over landmarks instead of tokens (Nystromformer)
        return {key: _attention_role_by_name(key) for key in group.uses}
    # A map that feeds a projection, as the first half of latent attention does, is not a projection itself.
    fed = (group.uses[key].reads for key in letters if letters[key])
    inner = frozenset[Map]().union(*map(maps_of, fed))
    return {key: "other" if key in inner else letters[key] or "other" for key in group.uses}


def _feed_forward_roles(group: MapGroup, writers: frozenset[Map], trace: Trace) -> dict[Map, str]:
    roles = dict.fromkeys(group.uses, "other")
    for down in writers:
        feeders = [key for key in group.uses if key in group.feeds[down] and key not in trace.routed]
        if feeders:
            roles[down] = "down"
        if len(feeders) == 1:
            fused = group.uses[feeders[0]].out_features == 2 * group.uses[down].in_features
            roles[feeders[0]] = "gate_up" if fused else "up"
        elif len(feeders) == 2:
            active = [key for key in feeders if key in trace.activated]
            if len(active) != 1:
                active = [key for key in feeders if "gate" in key.name] or feeders
            roles |= {key: "gate" if key == active[0] else "up" for key in feeders}
    return roles


def _says_attention(name: str, group: MapGroup) -> bool:
    """Whether names tell of attention: needed if a kernel hides its operations from the trace."""
    letters = {_attention_role_by_name(key) for key in group.uses}
    projections = "qkv" in letters or letters >= {"q", "k", "v"}
    return projections and re.search("att", name, re.IGNORECASE) is not None


def _attention_role_by_name(key: Map) -> str:
    stem = _stem(key)
    if re.search(r"qkv|query_key_value|c_attn", stem, re.IGNORECASE):
        return "qkv"
    found = re.match(r"(q|k|v)(uery|ey|alue)?(?![a-z])", stem, re.IGNORECASE)
    return found[1].lower() if found else "other"


def _stem(key: Map) -> str:
    """``"layers.0.mixer.in_proj"`` -> ``"in"``."""
    last = key.name.rsplit(".", 1)[-1] if key.parameter == "weight" else key.parameter
    return re.sub(r"_?(proj|projection|linear|weight)$", "", last) or last
