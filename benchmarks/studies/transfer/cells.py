"""What there is to run: one cell for each training run, in the order of what decides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.common.store import Result, Store

STORE = Store("transfer")
UPDATE = "smollm2-update"  # the result that says how large our own update of SmolLM2 is
DROP = 0.1
TASKS = ("newsgroups", "rotten_tomatoes", "tweets")
SWEEP_TASK, DECODER_TASK = "newsgroups", "rotten_tomatoes"
SEEDS = (0, 1, 2, 3, 4)
SWEEP_SEEDS, DECODER_SEEDS, RETUNED_SEEDS = (0,), SEEDS, (0, 1)  # vanilla and gated are re-tuned for every seed
MASKS, DROPS = (0.0, 0.1, 0.2, 0.3), (0.0, 0.05, 0.1, 0.15)
# name in the tables: (arm, drop, what it is compared with)
VARIANTS = {
    "vanilla": ("uniform", 0.0, ""),
    "transfer": ("uniform", DROP, "vanilla"),
    "dropout control": ("dropout", 0.0, "vanilla"),
    "attention only": ("attention", 0.0, "vanilla"),
    "gated": ("gated", 0.0, "vanilla"),
    "gated + transfer": ("gated", DROP, "gated"),
    "gated, preferring": ("gated-preferring", 0.0, "gated"),
}


@dataclass(frozen=True)
class Setting:
    """A pair of bases and how adapters are trained on them."""

    name: str
    old: str
    new: str
    steps: int
    batch: int
    length: int
    train: int
    test: int
    rate: float


ENCODER = Setting("minilm", "minilm-l6", "minilm-l6-update", 120, 16, 32, 1000, 600, 5e-3)
DECODER = Setting("smollm2", "smollm2", "smollm2-friends", 60, 8, 32, 400, 200, 1e-3)
SETTINGS = {setting.name: setting for setting in (ENCODER, DECODER)}


@dataclass(frozen=True)
class Cell:
    """One training run: everything its result depends on."""

    setting: str
    task: str
    arm: str
    seed: int
    base: str = "old"
    mask: float = 0.0
    drop: float = 0.0

    @property
    def name(self) -> str:
        """Its name among the results."""
        fields = (self.setting, self.task, self.arm, f"{self.mask:g}", f"{self.drop:g}", self.base, self.seed)
        return "_".join(map(str, fields))


def read(cell: Cell) -> Result | None:
    """A stored result, if there is one."""
    return STORE.read(cell.name)


def shift_of(setting: Setting) -> str:
    """The name of the result that says how far an update moved the outputs of its base."""
    return f"shift_{setting.name}"


def cell_of(setting: Setting, task: str, variant: str, seed: int, base: str = "old") -> Cell:
    """The cell of a variant."""
    arm, drop, _ = VARIANTS[variant]
    return Cell(setting.name, task, arm, seed, base, 0.0, drop)


def cells() -> Iterator[Cell]:
    """Every cell, in the order of what decides."""
    for seed in SEEDS:
        for task in TASKS:
            yield cell_of(ENCODER, task, "vanilla", seed)
            yield cell_of(ENCODER, task, "transfer", seed)
            yield cell_of(ENCODER, task, "vanilla", seed, "new")
    for seed in DECODER_SEEDS:
        yield cell_of(DECODER, DECODER_TASK, "vanilla", seed)
        yield cell_of(DECODER, DECODER_TASK, "transfer", seed)
        yield cell_of(DECODER, DECODER_TASK, "vanilla", seed, "new")
    for seed in SEEDS:
        for task in TASKS:
            for variant in VARIANTS:
                yield cell_of(ENCODER, task, variant, seed)
    for seed in SEEDS:
        for task in TASKS:
            yield cell_of(ENCODER, task, "gated", seed, "new")
    for seed in SWEEP_SEEDS:
        for mask in MASKS:
            for drop in DROPS:
                yield Cell(ENCODER.name, SWEEP_TASK, "uniform", seed, "old", mask, drop)
    for seed in RETUNED_SEEDS:
        for task in TASKS:
            for variant in VARIANTS:
                yield cell_of(ENCODER, task, variant, seed, "new")
