"""What there is to run: one cell for each stream, and the setting of each arm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.common.store import Result, Store

STUDIES = ("minilm-l3", "minilm-l6", "smollm2", "smollm2-texts")
HELD_OUT, STEPS = 120, 50
TEXTS_STEPS = 24  # of four blocks of 128 tokens, for each task of `smollm2-texts`
QUESTIONS = {"validation": 30, "test": 60}  # of the decoder's tasks, where they have as many
STREAMS = (0, 1, 2, 3, 4)
SEEDS = 3  # of each order of `smollm2-texts`, whose streams are three orders of as many seeds
TUNING_STREAM = 100
Setting = tuple[tuple[str, float], ...]  # names and values


def rates(*values: float, **others: float) -> tuple[dict[str, float], ...]:
    """Settings to tune over."""
    return tuple({"rate": value, **others} for value in values)


SETTINGS: dict[str, tuple[dict[str, float], ...]] = {  # so wide that none of the selections run so far is at the edge
    "sequential": rates(1e-5, 3e-5, 1e-4, 3e-4),
    "lora": rates(1e-4, 3e-4, 1e-3, 3e-3),
    "l2_fisher": rates(1e-4, 3e-4, 1e-3),
    "random": rates(3e-4, 1e-3, 3e-3),
    "l2_fisher-matrices": rates(3e-5, 1e-4, 3e-4, 1e-3),
    "random-matrices": rates(1e-4, 3e-4, 1e-3),
    "l2_fisher-elements": rates(3e-5, 1e-4, 3e-4, 1e-3),
    "random-elements": rates(3e-4, 1e-3, 3e-3),
    "cosine": rates(1e-4, 3e-4, 1e-3),
    "random-cosine": rates(1e-4, 3e-4, 1e-3),
    "lota": rates(3e-5, 1e-4, 3e-4),
    "ewc": (*rates(1e-4, weight=1e2), *rates(1e-4, weight=1e4), *rates(1e-4, weight=1e6)),
    "per_task": rates(3e-3),
    "joint": (),
    "replay": (),
    "o_lora": rates(3e-4, 1e-3, 3e-3, 1e-2),
    "osft": rates(3e-5, 1e-4, 3e-4),
    "carried": (),  # cores of the 3-layer encoder; in the study of the 6-layer one alone
    "l2_fisher-matrices-short": (),  # probes that cost less
    "l2_fisher-matrices-gradient": (),
}
FEWER_SETTINGS = {  # of the decoder, around what suits the encoder, or what suited the study of forgetting
    "smollm2": {"l2_fisher": rates(3e-4, 1e-3), "random": rates(1e-3, 3e-3)},
    "smollm2-texts": {
        **dict.fromkeys(("sequential", "osft", "l2_fisher-matrices", "random-matrices"), rates(1e-4, 3e-4)),
        "lora": rates(1e-3, 3e-3),
    },
}
TUNED_LIKE = {"joint": "sequential", "replay": "sequential"} | dict.fromkeys(  # not tuned again
    ("carried", "l2_fisher-matrices-short", "l2_fisher-matrices-gradient"), "l2_fisher-matrices"
)
ARMS = tuple(SETTINGS)
COUNTED_LIKE = {"random": "l2_fisher", "random-matrices": "l2_fisher-matrices", "random-cosine": "cosine"}
COMPARED = {  # selections: what they are to beat, their own control among them
    "l2_fisher": ("sequential", "lora", "random"),
    "l2_fisher-matrices": ("sequential", "lora", "random-matrices", "ewc", "o_lora", "osft"),
    "l2_fisher-elements": ("sequential", "lora", "random-elements"),
    "cosine": ("sequential", "lora", "random-cosine"),
    "lota": ("sequential", "lora", "l2_fisher-elements"),
    "carried": ("sequential", "lora", "random-matrices", "l2_fisher-matrices"),
    "l2_fisher-matrices-short": ("l2_fisher-matrices", "random-matrices"),
    "l2_fisher-matrices-gradient": ("l2_fisher-matrices", "random-matrices"),
}
OVERLAPPING = (  # arms whose cores are compared, on the 6-layer encoder: its own, and what is to be like them
    "l2_fisher-matrices",
    "l2_fisher-matrices-short",
    "l2_fisher-matrices-gradient",
    "carried",
    "random-matrices",
)


@dataclass(frozen=True)
class Cell:
    """One stream: everything its result depends on. `stream` is the seed, of the order too; 0 keeps the order. In
    `smollm2-texts`, `SEEDS` streams in a row have one order.
    """

    study: str
    arm: str
    setting: Setting
    stream: int
    steps: int = STEPS
    tasks: int = 5
    split: str = "test"

    @property
    def name(self) -> str:
        """Its name among the results."""
        setting = "-".join(f"{value:g}" for _, value in self.setting)
        fields = (self.study, self.arm, setting, self.stream, self.steps, self.tasks, self.split)
        return "-".join(map(str, fields))


def summary(result: Result) -> Result:
    """What tables, pictures and later cells need of a stream: no reports, and cores only where they are compared."""
    cell = result.get("cell")  # the measurement of memory has none
    compared = cell is not None and cell["study"] == "minilm-l6" and cell["arm"] in OVERLAPPING
    dropped = {"reports"} if compared else {"reports", "cores"}
    return {name: value for name, value in result.items() if name not in dropped}


STORE = Store("continual", summary=summary)


def read(cell: Cell) -> Result | None:
    """A stored result, if there is one."""
    return STORE.read(cell.name)


def settings_of(study: str, arm: str) -> tuple[dict[str, float], ...]:
    """What an arm is tuned over."""
    return FEWER_SETTINGS.get(study, {}).get(arm, SETTINGS[arm])


def variants(cell: Cell) -> list[Cell]:
    """The cell under each setting of its arm."""
    return [replace(cell, setting=tuple(setting.items())) for setting in settings_of(cell.study, cell.arm)]


def counted(cell: Cell) -> list[int]:
    """Elements per task that the arm selects on which this cell's random arm is modelled; the setting does not matter.

    Raises:
        RuntimeError: no such stream has been run.
    """
    like = replace(cell, arm=COUNTED_LIKE[cell.arm])
    result = next((found for found in map(read, variants(like)) if found is not None), None)
    if result is None:
        raise RuntimeError(f"{cell.name} takes its numbers of elements from {like.arm}: run that arm first")
    return [stage["elements"] for stage in result["stages"]]


def tuning_cells(study: str, arm: str) -> list[Cell]:
    """A stream of its own, scored on validation data, for every setting of an arm: as long as the streams compared, for
    a shorter one asks for too high a rate; of the decoder a shorter one nevertheless.
    """
    steps, tasks = {"smollm2": (10, 2), "smollm2-texts": (TEXTS_STEPS, 2)}.get(study, (STEPS, 5))
    return variants(Cell(study, arm, (), TUNING_STREAM, steps, tasks, "validation"))


def tuned(study: str, arm: str, result_of: Callable[[Cell], Result | None] = read) -> Setting | None:
    """Of the settings within a standard error of the best validation OP the one that forgets least; of losses, which
    have next to no error, the best. None where a cell that decides it is missing. The 6-layer encoder takes those of
    the 3-layer one.
    """
    study = "minilm-l3" if study == "minilm-l6" else study
    cells = tuning_cells(study, TUNED_LIKE.get(arm, arm))
    if len(cells) == 1:
        return cells[0].setting
    if arm in COUNTED_LIKE:  # its cells take their numbers of elements from those of the other arm
        tuned(study, COUNTED_LIKE[arm], result_of)
    results = [result_of(cell) for cell in cells]
    metrics = [result["metrics"] for result in results if result is not None]
    if len(metrics) < len(cells):
        return None
    best = max(found["op"] for found in metrics)
    asked = cells[0].tasks * (QUESTIONS["validation"] if study == "smollm2" else HELD_OUT)
    error = 0.0 if study == "smollm2-texts" else (best * (1 - best) / asked) ** 0.5
    near = [i for i, found in enumerate(metrics) if found["op"] >= best - error]
    return cells[min(near, key=lambda i: metrics[i]["forgetting"])].setting


def cells_of(study: str, arm: str, setting: Setting) -> list[Cell]:
    """The arm's streams."""
    if study == "smollm2":
        return [Cell(study, arm, setting, 0, steps=30, tasks=3)]
    if study == "smollm2-texts":
        return [Cell(study, arm, setting, stream, steps=TEXTS_STEPS) for stream in range(3 * SEEDS)]
    return [Cell(study, arm, setting, stream) for stream in STREAMS]


Found = dict[str, tuple[Setting, dict[int, Result]]]


def results_of(study: str) -> Found:
    """(setting, results by stream) of every arm that has any."""
    found: Found = {}
    for arm in ARMS:
        setting = tuned(study, arm)
        if setting is None:
            continue
        results = {cell.stream: read(cell) for cell in cells_of(study, arm, setting)}
        there = {stream: result for stream, result in results.items() if result is not None}
        if there:
            found[arm] = setting, there
    return found
