"""The structures of a regime: of one size, in strata, the same whenever they are made.

| name | what is kept |
|---|---|
| `even:all` | everything: each kind gets the same share, in it each role, and in that blocks are spread evenly |
| `kind:norm` | one kind, spread evenly |
| `role:attn.q:lora` | one kind at one role, spread evenly |
| `role:ffn.gate+up:lora` | one kind at two roles |
| `part:ffn:lora` | one kind in one sort of sub-layer, spread evenly |
| `depth:first:all`, `depth:last:lora` | a third of the blocks, all kinds or one |
| `pair:lora+norm` | two kinds, half each |
| `mix:lora:3` | one kind, by chance |
| `random:17` | anything, by chance, also how much goes to each kind |
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

import gatedadapters as ga
from benchmarks.common.store import SCRATCH, locked, write_whole
from benchmarks.studies.placement.precision import autocast
from benchmarks.studies.placement.regimes import Regime
from gatedadapters.structure import Structure
from gatedadapters.structure.structure import column

COUNT = 64  # structures of a regime
LEAST = 0.9  # of the size that a structure must have
ELEMENT_BATCHES = 8  # from which the single weights are chosen
OUTSIDE = ("outside", "embedding")  # sub-layers that belong to no block
THIRDS = ("first", "middle", "last")
GOLDEN = (5**0.5 - 1) / 2  # multiples of it, without their whole part, spread evenly however many there are


ItemT = TypeVar("ItemT")
KeyT = TypeVar("KeyT", bound=Hashable)
Stratum = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Unit:
    """The smallest thing that is kept or not.

    Attributes:
        index: in the gate bank.
        kind: of its path.
        role: such as `attn.q` or `ffn.down`.
        part: the sort of its sub-layer, such as `attn`.
        third: of the blocks, `first`, `middle` or `last`; "" outside the blocks.
        block: index of its block.
        rank: its number within its path.
        params: its parameters.
    """

    index: int
    kind: str
    role: str
    part: str
    third: str
    block: int
    rank: int
    params: int


def made(regime: Regime, *, count: int = COUNT) -> dict[str, Structure]:
    """The structures of a regime by name, in the order in which they are worth training.

    They are made once and kept in a file that all processes read: which single weights are the most useful may depend
    on how a machine rounds.

    Args:
        regime: says which model, which candidates and which size.
        count: of structures.
    """
    recipe = f"{regime.search_space.model_dump_json()} {regime.size} {regime.group} {count} {LEAST}"
    file = SCRATCH / "placement" / f"{regime.name}-{zlib.crc32(recipe.encode()):08x}.json"
    with locked(file.with_suffix(".lock")):
        if not file.exists():
            fresh = {name: structure.to_json() for name, structure in _made(regime, count).items()}
            write_whole(file, json.dumps(fresh))
        return {name: Structure.from_json(text) for name, text in json.loads(file.read_text(encoding="utf-8")).items()}


def _made(regime: Regime, count: int) -> dict[str, Structure]:
    problem = regime.problem
    problem.reset(0)
    batches = itertools.islice(problem.batches(0, regime.batch), ELEMENT_BATCHES)
    with autocast():
        importance = ga.score(problem.model, batches, kind="taylor", loss=problem.score_loss)
    adapters = ga.attach(problem.model, regime.search_space)
    try:
        bank = adapters.bank
        assert bank is not None
        adapters.choose_elements(importance)
        found = {}
        for name, kept in chosen(units_of(adapters), regime.size, regime.group, count).items():
            scores = torch.zeros_like(bank.kept)
            scores[:, list(kept)] = 1.0
            found[name] = adapters.discretize(scores=scores)
        return found
    finally:
        ga.detach(problem.model)


def units_of(adapters: ga.Adapters) -> list[Unit]:
    """The units of gated candidates, in the order of the gate bank."""
    bank = adapters.bank
    assert bank is not None
    depth = 1 + max(p.site.block_index for _, p in adapters.typed_paths() if p.site.sublayer not in OUTSIDE)
    found = []
    for key, path in adapters.typed_paths():
        where, site = bank.slices[key], path.site
        role = column(site.sublayer, site.role, path.kind).rpartition(" ")[0]
        third = "" if site.sublayer in OUTSIDE else THIRDS[3 * site.block_index // depth]
        same = (path.kind, role, role.partition(".")[0], third, site.block_index)
        found += [Unit(i, *same, i - where.start, int(bank.params[i])) for i in range(where.start, where.stop)]
    return found


def chosen(units: Sequence[Unit], size: int, seed: str, count: int = COUNT) -> dict[str, tuple[int, ...]]:
    """The units that each structure keeps.

    The order takes one structure of each stratum in turn, so that those first trained already show what there is.
    Structures that cannot reach the size, or that repeat an earlier one, are left out.

    Args:
        units: the candidates.
        size: in parameters, which no structure exceeds.
        seed: of all that is drawn by chance.
        count: of structures.
    """
    taken: set[tuple[int, ...]] = set()

    def usable(stratum: Stratum) -> Stratum:
        for name, kept in stratum:
            if kept not in taken and sum(units[index].params for index in kept) >= LEAST * size:
                taken.add(kept)
                yield name, kept

    finite = [list(usable(of(units, size, seed))) for of in (_kinds, _depths, _roles, _parts, _pairs, _mixes)]
    rows = itertools.zip_longest(*finite, usable(_random(units, size, seed)))
    return dict(itertools.islice(filter(None, itertools.chain.from_iterable(rows)), count))


# -- strata ------------------------------------------------------------------------------------------------------------


def _kinds(units: Sequence[Unit], size: int, seed: str) -> Stratum:
    yield _even("even:all", units, size, seed)
    for kind, own in _by(units, lambda unit: unit.kind).items():
        yield _even(f"kind:{kind}", own, size, seed)


def _roles(units: Sequence[Unit], size: int, seed: str) -> Stratum:
    groups = _by(units, lambda unit: f"{unit.role}:{unit.kind}")
    for name in _shuffled(list(groups), f"{seed}/roles"):
        yield _even(f"role:{name}", groups[name], size, seed)
    for (part, kind), own in _by(units, lambda unit: (unit.part, unit.kind)).items():
        for roles in itertools.combinations(dict.fromkeys(unit.role for unit in own), 2):
            joined = "+".join(role.removeprefix(f"{part}.") for role in roles)
            yield _even(f"role:{part}.{joined}:{kind}", [unit for unit in own if unit.role in roles], size, seed)


def _parts(units: Sequence[Unit], size: int, seed: str) -> Stratum:
    for name, own in _by(units, lambda unit: f"{unit.part}:{unit.kind}").items():
        if len({unit.role for unit in own}) > 2:  # else it is named by its roles
            yield _even(f"part:{name}", own, size, seed)


def _depths(units: Sequence[Unit], size: int, seed: str) -> Stratum:
    kinds = ("all", *_by(units, lambda unit: unit.kind))
    for kind, third in itertools.product(kinds, THIRDS):
        own = [unit for unit in units if unit.third == third and kind in ("all", unit.kind)]
        yield _even(f"depth:{third}:{kind}", own, size, seed)


def _pairs(units: Sequence[Unit], size: int, seed: str) -> Stratum:
    for a, b in itertools.combinations(sorted({unit.kind for unit in units}), 2):
        yield _even(f"pair:{a}+{b}", [unit for unit in units if unit.kind in (a, b)], size, seed)


def _mixes(units: Sequence[Unit], size: int, seed: str) -> Stratum:
    for number, (kind, own) in itertools.product(range(3), _by(units, lambda unit: unit.kind).items()):
        yield _by_chance(f"mix:{kind}:{number}", own, size, seed)


def _random(units: Sequence[Unit], size: int, seed: str) -> Stratum:
    for number in range(4 * COUNT):
        yield _by_chance(f"random:{number}", units, size, seed)


# -- filling a size ----------------------------------------------------------------------------------------------------


def _by_chance(name: str, units: Sequence[Unit], size: int, seed: str) -> tuple[str, tuple[int, ...]]:
    """Shares of the kinds by chance, and within each kind units by chance; a kind with many small units would else be
    most of every structure.
    """
    draw = _generator(f"{seed}/{name}/shares")
    waiting = _by(_shuffled(units, f"{seed}/{name}"), lambda unit: unit.kind)
    share = {kind: draw.exponential() for kind in sorted(waiting)}
    spent = dict.fromkeys(waiting, 0)
    kept: list[int] = []
    while True:
        fits = {kind: next((unit for unit in own if unit.params <= size), None) for kind, own in waiting.items()}
        able = [kind for kind, unit in fits.items() if unit is not None]
        if not able:
            return name, tuple(sorted(kept))
        kind = min(able, key=lambda kind: spent[kind] / share[kind])
        unit = fits[kind]
        assert unit is not None
        waiting[kind].remove(unit)
        kept.append(unit.index)
        size -= unit.params
        spent[kind] += unit.params


def _even(name: str, units: Sequence[Unit], size: int, seed: str) -> tuple[str, tuple[int, ...]]:
    """The next unit always goes to the kind that has spent least, and there to the role that has spent least.

    Within a role, first ranks come before second ones, and blocks are taken in an order of which every part is spread
    evenly. Chance decides among equals, and where the blocks begin.
    """
    draw = _generator(f"{seed}/{name}")
    waiting: dict[str, dict[str, list[Unit]]] = {}
    for kind, own in _by(_shuffled(units, f"{seed}/{name}"), lambda unit: unit.kind).items():
        waiting[kind] = {}
        for role, members in _by(own, lambda unit: unit.role).items():
            begin = draw.random()
            members.sort(key=lambda unit, begin=begin: (unit.rank, (unit.block * GOLDEN + begin) % 1))
            waiting[kind][role] = members
    spent_by_kind = dict.fromkeys(waiting, 0)
    spent_by_role = {(kind, role): 0 for kind, roles in waiting.items() for role in roles}
    kept: list[int] = []
    while True:
        fits = {
            kind: {role: next((u for u in members if u.params <= size), None) for role, members in roles.items()}
            for kind, roles in waiting.items()
        }
        able = {kind: [role for role, unit in roles.items() if unit] for kind, roles in fits.items()}
        kinds = [kind for kind, roles in able.items() if roles]
        if not kinds:
            return name, tuple(sorted(kept))
        kind = min(kinds, key=spent_by_kind.__getitem__)
        role = min(able[kind], key=lambda role: spent_by_role[kind, role])
        unit = fits[kind][role]
        assert unit is not None
        waiting[kind][role].remove(unit)
        kept.append(unit.index)
        size -= unit.params
        spent_by_kind[kind] += unit.params
        spent_by_role[kind, role] += unit.params


def _by(units: Sequence[Unit], key: Callable[[Unit], KeyT]) -> dict[KeyT, list[Unit]]:
    groups: dict[KeyT, list[Unit]] = {}
    for unit in units:
        groups.setdefault(key(unit), []).append(unit)
    return groups


def _shuffled(items: Sequence[ItemT], seed: str) -> list[ItemT]:
    return [items[i] for i in _generator(seed).permutation(len(items))]


def _generator(seed: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(seed.encode()))
