"""Does tuning a selected core, task after task, forget less than tuning everything, and is it the selection?

Claims under test, on one stream of real tasks in several orders, every arm in the same runner for the same steps with
settings tuned on validation data: `l2_fisher` forgets less than sequential full fine-tuning and sequential LoRA, and
its score over all tasks (OP) is above both and above random tensors of exactly as many elements.
`l2_fisher` ranks whole tensors, as released; `l2_fisher-matrices` leaves vectors and embeddings out, and
`l2_fisher-elements` ranks single elements by the same quantity. Each has its random control of as many elements.

    python benchmarks/continual.py run [--study minilm-l3] [--arms l2_fisher ...] [--streams 0 1]
    python benchmarks/continual.py table [--study minilm-l3]
    python benchmarks/continual.py picture DIR [--study minilm-l3]
    python benchmarks/continual.py carry [--streams 0]   # 3-layer cores on the 6-layer encoder, beside its own
    python benchmarks/continual.py memory                # probe and selection beside full fine-tuning, SmolLM2-135M

Studies: `minilm-l3` and `minilm-l6` learn five text-classification tasks without any trained head: a text is of the
class whose name the encoder puts nearest (`label_matching`), so that what is learnt, and forgotten, is the backbone's;
general ability is read out by nearest class means on a sixth. `smollm2` learns three multiple-choice tasks. Each stream
has an order and a seed of its own. Every cell is stored as it finishes; a killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import computed, shown, store
from label_matching import label_matcher

import gatedadapters as ga
from gatedadapters.config import ProbeConfig, StreamTrainingConfig
from gatedadapters.continual import (
    Metrics,
    StreamResult,
    Task,
    TaskStream,
    choice_tasks,
    classification_tasks,
    probe,
    select_core,
    tensors_of,
)
from gatedadapters.continual.fitting import Recipe, fit
from gatedadapters.continual.measures import nearest_class
from gatedadapters.data import MixedTaskCollator, MixedTaskDataset
from gatedadapters.data.bundled import load_choices, load_encoder, load_smollm2, load_task
from gatedadapters.reporting.tables import format_table
from gatedadapters.reporting.versions import versions

STORE = Path(__file__).parent / "results" / "continual"
TEXTS, GENERAL = ("newsgroups", "r8", "tweets", "rotten_tomatoes", "subjectivity"), "medical_specialty"
CHOICES = ("openbookqa", "piqa", "medmcqa")
STUDIES = ("minilm-l3", "minilm-l6", "smollm2")
TRAIN, HELD_OUT, LENGTH = 800, 120, 20
QUESTIONS = {"validation": 30, "test": 60}  # of the decoder's tasks, where they have as many
BATCH, STEPS = 16, 50
STREAMS = (0, 1, 2, 3, 4)
TUNING_STREAM = 100
CORES: dict[str, dict[str, Any]] = {  # of selecting arms that do not take the default
    "matrices": {"exclude": ["bias", "norm", "embedding"], "share": 0.12},  # 2 of 18, 4 of 36
    "elements": {"granularity": "element", "share": 0.05},
}


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
    "carried": (),  # cores of the 3-layer encoder; in the study of the 6-layer one alone
}
DECODER_SETTINGS = {"l2_fisher": rates(3e-4, 1e-3), "random": rates(1e-3, 3e-3)}  # around what suits the encoder
TUNED_LIKE = {"joint": "sequential", "replay": "sequential", "carried": "l2_fisher-matrices"}  # not tuned again
ARMS = tuple(SETTINGS)
COUNTED_LIKE = {"random": "l2_fisher", "random-matrices": "l2_fisher-matrices", "random-cosine": "cosine"}
COMPARED = {  # selections: what they are to beat, their own control among them
    "l2_fisher": ("sequential", "lora", "random"),
    "l2_fisher-matrices": ("sequential", "lora", "random-matrices", "ewc", "o_lora"),
    "l2_fisher-elements": ("sequential", "lora", "random-elements"),
    "cosine": ("sequential", "lora", "random-cosine"),
    "lota": ("sequential", "lora", "l2_fisher-elements"),
    "carried": ("sequential", "lora", "random-matrices", "l2_fisher-matrices"),
}


@dataclass(frozen=True)
class Cell:
    """One stream: everything its result depends on. `stream` is the seed, of the order too; 0 keeps the order."""

    study: str
    arm: str
    setting: tuple[tuple[str, float], ...]
    stream: int
    steps: int = STEPS
    tasks: int = 5
    split: str = "test"

    @property
    def file(self) -> Path:
        """Where its result is stored."""
        setting = "-".join(f"{value:g}" for _, value in self.setting)
        return STORE / self.study / f"{self.arm}-{setting}-{self.stream}-{self.steps}-{self.tasks}-{self.split}.json"


def order_of(stream: int, count: int) -> list[int]:
    """The order of a stream's tasks."""
    return list(range(count)) if stream == 0 else np.random.default_rng(stream).permutation(count).tolist()


# -- one cell ----------------------------------------------------------------------------------------------------------


def encoder_stream(cell: Cell) -> tuple[Any, TaskStream]:
    """A bundled encoder that matches texts with names of classes, and the tasks in the stream's order."""
    sizes = {"train": TRAIN, "validation": HELD_OUT, "test": HELD_OUT, "seed": cell.stream}
    texts = [load_task(name, **sizes) for name in TEXTS]
    backbone, tokenizer = load_encoder(cell.study)
    backbone.pooler = None  # no task reads it
    model = label_matcher(backbone, texts, tokenizer)
    labelled = classification_tasks(model, texts, tokenizer, max_length=LENGTH, split=cell.split)
    tasks = [replace(task, heads=()) for task in labelled]
    other = load_task(GENERAL, train=200, validation=HELD_OUT, test=HELD_OUT, seed=cell.stream)
    parts = [list(MixedTaskDataset([other], tokenizer, part, LENGTH)) for part in ("train", cell.split)]
    general = Task(GENERAL, *parts, MixedTaskCollator(tokenizer), nearest_class)
    keep_words(backbone, [item for task in (*tasks, general) for part in (task.train, task.held_out) for item in part])
    order = order_of(cell.stream, len(tasks))[: cell.tasks]
    return model, TaskStream([tasks[i] for i in order], general)


def keep_words(backbone: Any, items: Sequence[dict[str, Any]]) -> None:
    """Cut the word table down to the words of the stream, in place: no other row is ever read, nor moved by any arm,
    and most of the time of full fine-tuning would go into them.
    """
    words = sorted({0, *(word for item in items for word in item["input_ids"])})  # 0 pads
    place = {word: index for index, word in enumerate(words)}
    for item in items:
        item["input_ids"] = [place[word] for word in item["input_ids"]]
    table = torch.nn.Embedding(len(words), backbone.config.hidden_size, padding_idx=0)
    table.weight.data = backbone.get_input_embeddings().weight.data[words].clone()
    backbone.set_input_embeddings(table)


def decoder_stream(cell: Cell) -> tuple[Any, TaskStream]:
    """SmolLM2 and multiple-choice tasks; a further one measures general ability."""
    model, tokenizer = load_smollm2()
    names = [CHOICES[i] for i in order_of(cell.stream, len(CHOICES))][: cell.tasks]
    sizes = {"train": 400, **QUESTIONS, "seed": cell.stream}
    *tasks, general = choice_tasks(
        [load_choices(name, **sizes) for name in (*names, "commonsenseqa")], tokenizer, max_length=64, split=cell.split
    )
    return model, TaskStream(tasks, general if cell.split == "test" else None)  # most of the time goes into scores


def strategy_of(cell: Cell) -> dict[str, Any]:
    """The arm as a strategy and its options."""
    warm = {
        "steps": max(1, cell.steps // 3),
        "batch_size": BATCH,
        "fisher_batches": 20,
    }  # a third of tuning, as released
    if cell.study == "smollm2":
        warm |= {"batch_size": 4, "fisher_batches": 10}
    kind, _, part = cell.arm.partition("-")
    core = {"core": CORES[part]} if part in CORES else {}
    if kind in ("l2_fisher", "cosine", "lota"):
        return {"kind": kind, "probe": warm, **core}
    if cell.arm in COUNTED_LIKE:
        like = Cell(**{**vars(cell), "arm": COUNTED_LIKE[cell.arm], "setting": ()})
        counts = next((counts for counts in map(counted, variants(like)) if counts), None)
        assert counts, f"run {COUNTED_LIKE[cell.arm]} before {cell.arm}"
        return {"kind": "random", "elements": counts, **core}
    if kind == "random":
        return {"kind": kind, **core}
    if cell.arm == "carried":
        return {"kind": "carried", "source": str(small_stream(cell))}
    options = {name: value for name, value in cell.setting if name != "rate"}
    return {"kind": cell.arm, **options}


def small_stream(cell: Cell) -> Path:
    """Folder of the same stream on the 3-layer encoder under the arm whose cores are carried, run now if nobody has."""
    folder = STORE.parent / "tmp" / f"continual-l3-{cell.stream}-{cell.steps}-{cell.tasks}-{cell.split}"
    small = Cell(**{**vars(cell), "study": "minilm-l3", "arm": TUNED_LIKE["carried"]})
    model, stream = encoder_stream(small)
    ga.run_stream(model, stream, strategy_of(small), training=training_of(small), folder=folder)
    return folder


def training_of(cell: Cell) -> StreamTrainingConfig:
    """How each task is tuned."""
    return StreamTrainingConfig(
        steps=cell.steps,
        batch_size=4 if cell.study == "smollm2" else BATCH,
        learning_rate=dict(cell.setting)["rate"],
        seed=cell.stream,
        device="cpu",
        checkpoint_steps=None,
    )


def variants(cell: Cell) -> list[Cell]:
    """The cell under each setting of its arm; what is selected does not depend on it."""
    return [Cell(**{**vars(cell), "setting": tuple(setting.items())}) for setting in settings_of(cell.study, cell.arm)]


def settings_of(study: str, arm: str) -> tuple[dict[str, float], ...]:
    """What an arm is tuned over."""
    return DECODER_SETTINGS.get(arm, SETTINGS[arm]) if study == "smollm2" else SETTINGS[arm]


def counted(cell: Cell) -> list[int] | None:
    """Elements trained per task in a stored cell."""
    return [stage["elements"] for stage in stored(cell)["stages"]] if cell.file.exists() else None


def compute(cell: Cell) -> dict[str, Any]:
    """One cell, from the pretrained model to its matrix."""
    model, stream = decoder_stream(cell) if cell.study == "smollm2" else encoder_stream(cell)
    strategy = strategy_of(cell)
    began, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="gatedadapters-") as folder:
        result = ga.run_stream(model, stream, strategy, training=training_of(cell), folder=Path(folder) / "stream")
        cores = [{name: len(found) for name, found in core.indices.items()} for _, core in result.cores()]
    if "source" in result.record.strategy:  # of a smaller model's stream: its name, not where this machine has it
        result.record.strategy["source"] = Path(result.record.strategy["source"]).name
    return {
        "cell": asdict(cell),
        **result.to_data(),
        "reports": [stage.report for stage in result.stages],
        "cores": cores if cell.arm != "lota" else [],
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "versions": versions(),
    }


def run(cell: Cell) -> dict[str, Any]:
    """The stored result of a cell, computed now if nobody has; written whole or not at all."""
    return computed(cell.file, lambda: compute(cell))


def stored(cell: Cell) -> dict[str, Any]:
    """A result that is there."""
    return dict(json.loads(cell.file.read_text()))


# -- the study ---------------------------------------------------------------------------------------------------------


def tuning_cells(study: str, arm: str) -> list[Cell]:
    """A stream of its own, scored on validation data, for every setting of an arm: as long as the streams compared, for
    a shorter one asks for too high a rate; of the decoder a shorter one nevertheless.
    """
    steps, tasks = (10, 2) if study == "smollm2" else (STEPS, 5)
    return [
        Cell(study, arm, tuple(setting.items()), TUNING_STREAM, steps, tasks, "validation")
        for setting in settings_of(study, arm)
    ]


def tuned(study: str, arm: str, *, compute_missing: bool) -> tuple[tuple[str, float], ...] | None:
    """Of the settings within a standard error of the best validation OP the one that forgets least; None where a cell
    that decides it is missing. The 6-layer encoder takes those of the 3-layer one.
    """
    study = "minilm-l3" if study == "minilm-l6" else study
    cells = tuning_cells(study, TUNED_LIKE.get(arm, arm))
    if len(cells) == 1:
        return cells[0].setting
    if compute_missing and arm in COUNTED_LIKE:
        tuned(study, COUNTED_LIKE[arm], compute_missing=True)
    if not compute_missing and not all(cell.file.exists() for cell in cells):
        return None
    found = [run(cell) for cell in cells]
    scores, best = [r["metrics"]["op"] for r in found], max(r["metrics"]["op"] for r in found)
    asked = cells[0].tasks * (QUESTIONS["validation"] if study == "smollm2" else HELD_OUT)
    near = [i for i, score in enumerate(scores) if score >= best - (best * (1 - best) / asked) ** 0.5]
    return cells[min(near, key=lambda i: found[i]["metrics"]["forgetting"])].setting


def cells_of(study: str, arm: str, setting: tuple[tuple[str, float], ...]) -> list[Cell]:
    """The arm's streams."""
    if study == "smollm2":
        return [Cell(study, arm, setting, 0, steps=30, tasks=3)]
    return [Cell(study, arm, setting, stream) for stream in STREAMS]


def run_all(study: str, arms: Sequence[str], streams: Sequence[int]) -> None:
    """Compute what is missing."""
    for arm in arms:
        if arm == "carried" and study != "minilm-l6":
            continue
        setting = tuned(study, arm, compute_missing=True)
        assert setting is not None
        for cell in cells_of(study, arm, setting):
            if cell.stream in streams:
                found = run(cell)
                m = found["metrics"]
                print(
                    f"{study} {arm} {dict(setting)} stream {cell.stream}: OP {m['op']:.3f}, "
                    f"forgetting {m['forgetting']}, {found['cpu_seconds']} CPU s",
                    file=sys.stderr,
                )


def results_of(study: str) -> dict[str, tuple[dict[str, float], dict[int, dict[str, Any]]]]:
    """(setting, results by stream) of every arm that has any."""
    found = {}
    for arm in ARMS:
        setting = tuned(study, arm, compute_missing=False)
        cells = cells_of(study, arm, setting) if setting is not None else []
        results = {cell.stream: stored(cell) for cell in cells if cell.file.exists()}
        if results:
            found[arm] = dict(setting or ()), results
    return found


def table(study: str) -> str:
    """Every arm from the stored cells, and selections minus what they are to beat, paired by stream; in per cent. CPU
    seconds are of a whole stream with its scores; what a probe takes is given as a share of the tuning it serves.
    """
    found, rows = results_of(study), []
    for arm, (setting, results) in found.items():
        metrics = {n: [r["metrics"][n] for r in results.values()] for n in Metrics.__dataclass_fields__}
        means = [shown(v for v in metrics[n] if v is not None) for n in metrics]
        stages = [stage for r in results.values() for stage in r["stages"]]
        rows.append(
            [
                arm,
                " ".join(f"{v:g}" for v in setting.values()),
                str(len(results)),
                *means,
                f"{np.mean([s['elements'] for s in stages]):,.0f}",
                f"{np.mean([s['bytes'] for s in stages]):,.0f}",
                f"{np.mean([r['cpu_seconds'] for r in results.values()]):.0f}",
                f"{sum(s['probe_seconds'] for s in stages) / sum(s['seconds'] for s in stages):.0%}",
            ]
        )
    header = [
        "arm",
        "setting",
        "streams",
        "OP",
        "BWT",
        "FWT",
        "forgetting",
        "general delta",
        "elements / task",
        "bytes / task",
        "CPU s",
        "probe / tuning",
    ]
    return "\n\n".join([format_table(header, rows), *differences(found)])


def differences(found: dict[str, tuple[dict[str, float], dict[int, dict[str, Any]]]]) -> list[str]:
    """Each selection minus what it is to beat; no table where there is nothing to compare."""
    rows = []
    for ours, others in COMPARED.items():
        for theirs in others:
            if ours in found and theirs in found:
                mine, own = found[ours][1], found[theirs][1]
                both = sorted(mine.keys() & own.keys())
                pairs = [
                    shown((mine[s]["metrics"][n] - own[s]["metrics"][n] for s in both), signed=True)
                    for n in ("op", "forgetting")
                ]
                rows.append([ours, theirs, str(len(both)), *pairs])
    return [format_table(["arm", "minus", "streams", "OP", "forgetting"], rows)] if rows else []


def picture(study: str, folder: Path) -> None:
    """R of every arm's first stream as a heat map."""
    from gatedadapters.inspection import save_stream_png

    folder.mkdir(parents=True, exist_ok=True)
    for arm in ARMS:
        setting = tuned(study, arm, compute_missing=False)
        cell = next((c for c in cells_of(study, arm, setting) if c.file.exists()), None) if setting else None
        if cell is not None:
            save_stream_png(StreamResult.of(stored(cell)), folder / f"{study}-{arm}.png", title=arm)


# -- small to large ----------------------------------------------------------------------------------------------------


def carry(streams: Sequence[int]) -> str:
    """The 6-layer encoder with its own cores, with those of the 3-layer one, and with random ones."""
    run_all("minilm-l6", ("l2_fisher-matrices", "carried", "random-matrices"), streams)
    return f"{overlaps()}\n\n{table('minilm-l6')}"


def overlaps() -> str:
    """How much of its own selection the 6-layer encoder is carried, and what chance gives: shares of elements, in
    per cent; a stream's value is the mean over its tasks.
    """
    found, rows = results_of("minilm-l6"), []
    own = found[TUNED_LIKE["carried"]][1]
    for arm in ("carried", "random-matrices"):
        other = found[arm][1]
        both = sorted(own.keys() & other.keys())
        shares = [
            np.mean([jaccard(*cores) for cores in zip(own[s]["cores"], other[s]["cores"], strict=True)]) for s in both
        ]
        rows.append([arm, str(len(both)), shown(float(share) for share in shares)])
    return format_table(["6-layer encoder", "streams", "Jaccard with its own selection"], rows)


def jaccard(mine: dict[str, int], theirs: dict[str, int]) -> float:
    """Of elements selected by tensor, one of the two holding whole tensors."""
    both = sum(min(count, theirs.get(name, 0)) for name, count in mine.items())
    return both / (sum(mine.values()) + sum(theirs.values()) - both)


# -- memory ------------------------------------------------------------------------------------------------------------


def memory() -> str:
    """Peak resident memory of full fine-tuning and of probe and selection, each in a process of its own; measured anew
    and stored.
    """
    peaks = {}
    for what in ("load", "full", "probe"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, "memory-of", what], capture_output=True, text=True, check=True
        )
        peaks[what] = round(float(done.stdout.split()[-1]))
    store(STORE / "memory.json", {"peak_mb": peaks, "versions": versions()})
    return format_table(["SmolLM2-135M", "peak resident MB"], [[what, f"{peak:,}"] for what, peak in peaks.items()])


def memory_of(what: str) -> None:
    """A few steps of one of them; prints the peak."""
    model, stream = decoder_stream(Cell("smollm2", "sequential", (), 0))
    with tempfile.TemporaryDirectory() as folder:
        if what == "full":
            recipe = Recipe(steps=3, batch_size=4, learning_rate=1e-5, use_cpu=True)
            fit(model, stream[0].train, stream[0].collate, recipe, folder=Path(folder), seed=0)
        elif what == "probe":
            config = ProbeConfig(steps=3, batch_size=4, fisher_batches=3)
            found = probe(model, stream[0], Path(folder) / "probe", config, elements=True)
            for granularity in ("tensor", "element"):
                select_core(tensors_of(model), [found], 0, granularity=granularity)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "table", "picture", "carry", "memory", "memory-of"))
    parser.add_argument("target", nargs="?", help="folder of pictures")
    parser.add_argument("--study", choices=STUDIES, default="minilm-l3")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=ARMS)
    parser.add_argument("--streams", nargs="*", type=int, default=STREAMS)
    options = parser.parse_args()
    if options.command == "run":
        run_all(options.study, options.arms, options.streams)
    if options.command in ("run", "table"):
        print(table(options.study))
    elif options.command == "picture":
        picture(options.study, Path(options.target or "."))
    elif options.command == "carry":
        print(carry(options.streams))
    elif options.command == "memory":
        print(memory())
    elif options.command == "memory-of":
        memory_of(options.target)


if __name__ == "__main__":
    main()
