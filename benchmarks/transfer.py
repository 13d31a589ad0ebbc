"""Do adapters survive an update of their base, and does weakening feed-forward knowledge help them?

Claims under test, on all-MiniLM-L6-v2 and a later fine-tune of it by other people (a real update), and on SmolLM2-135M
and its own continued pretraining: knowledge dropping while an adapter trains (Trans-PEFT, arXiv 2506.06844) reduces
what the adapter loses on the new base, by more than the interval, at a cost of at most a point on the old base;
ordinary dropout of the same rate does not; and the update moved feed-forward activations more than attention's.

    python benchmarks/transfer.py run       # computes the cells that are missing, one JSON file each
    python benchmarks/transfer.py table     # prints the tables from the stored cells

Every arm stores the same number of adapter parameters. A cell trains on one base: on the old one it is tested on both
(the second is direct transfer), on the new one it is re-tuned. The order of the cells is that of what decides; a killed
run goes on where it stopped; several processes may run side by side. Everything computes in fp32, so that machines
without fast bf16 agree.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from cells import read, shown, store
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainingArguments,
    set_seed,
)

import gatedadapters as ga
from gatedadapters.data import MixedTaskCollator, MixedTaskDataset
from gatedadapters.data.bundled import load_corpus, load_task, model_folder
from gatedadapters.data.bundled.models import cache_folder
from gatedadapters.reporting.tables import format_table
from gatedadapters.reporting.versions import versions
from gatedadapters.transfer import activation_shift, prefer_transferable, recovery, simulate_update

STORE = Path(__file__).parent / "results" / "transfer"
UPDATE = "smollm2-update.json"  # how large the update is that `folder_of` makes
CANDIDATE_RANK, SHARE = 16, 0.25  # every arm: the parameters of LoRA rank 4 at every linear map
DROP = 0.1


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
    def file(self) -> Path:
        """Where its result is stored."""
        fields = (self.setting, self.task, self.arm, f"{self.mask:g}", f"{self.drop:g}", self.base, self.seed)
        return STORE / ("_".join(map(str, fields)) + ".json")


# -- arms --------------------------------------------------------------------------------------------------------------


def uniform(model: nn.Module, cell: Cell, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """LoRA of one rank at every linear map."""
    return fixed(model, cell, _candidates())


def attention_only(model: nn.Module, cell: Cell, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """LoRA at the attention maps only, of the same size in all."""
    return fixed(model, cell, _candidates(sublayers=["attention"], rank=3 * CANDIDATE_RANK))


def dropout(model: nn.Module, cell: Cell, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Control: uniform LoRA, and ordinary dropout of the same rate on what attention returns."""
    modules = dict(model.named_modules())
    for block in ga.discover(model).blocks:
        for sublayer in block.sublayers:
            if sublayer.kind == "attention" and sublayer.writer is not None:
                modules[sublayer.writer].register_forward_hook(Dropout(DROP))
    return uniform(model, cell, batches)


def gated(model: nn.Module, cell: Cell, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """A searched structure."""
    size = _size(model)
    ga.attach(model, _candidates(), seed=cell.seed)
    return {"budget": ga.Budget(params=size)}


def gated_preferring(model: nn.Module, cell: Cell, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """A searched structure, the penalty weighed by how far masking knowledge moves a place."""
    options = gated(model, cell, batches)
    prefer_transferable(ga.get_adapters(model), batches)
    return options


class Dropout:
    """Ordinary dropout on a module's output."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook."""
        first = output if isinstance(output, Tensor) else output[0]
        dropped = F.dropout(first, self.share, module.training)
        return dropped if isinstance(output, Tensor) else (dropped, *output[1:])


ARMS: dict[str, Callable[..., dict[str, Any]]] = {
    "uniform": uniform,
    "dropout": dropout,
    "attention": attention_only,
    "gated": gated,
    "gated-preferring": gated_preferring,
}


def fixed(model: nn.Module, cell: Cell, space: ga.SearchSpace) -> dict[str, Any]:
    """Attach the structure of the common size whose ranks are as even as it allows."""
    budget = ga.Budget(params=_size(model))
    candidates = ga.attach(model, space, seed=cell.seed)
    structure = candidates.discretize(budget, scores=_evenly(candidates.bank))
    ga.detach(model)
    ga.attach(model, structure, seed=cell.seed)
    return {}


def _candidates(*, sublayers: list[str] | None = None, rank: int = CANDIDATE_RANK) -> ga.SearchSpace:
    where = {"sublayers": sublayers} if sublayers else {}
    return ga.SearchSpace.parse({"paths": [{"kind": "lora", "rank": rank, "at": where}]}, where="benchmark")


def _size(model: nn.Module) -> int:
    dense = ga.attach(model, _candidates()).bank.dense_cost()
    ga.detach(model)
    return int(SHARE * dense)


def _evenly(bank: Any) -> Tensor:
    """Scores that fill rank by rank."""
    scores = torch.zeros_like(bank.kept)
    for where in bank.slices.values():
        scores[:, where] = 1000.0 - torch.arange(where.stop - where.start)
    return scores


# -- bases -------------------------------------------------------------------------------------------------------------


def folder_of(name: str) -> Path:
    """A base as `from_pretrained` reads it; the update of SmolLM2 is made once, its report beside it."""
    if name != "smollm2-friends":
        return model_folder(name)
    target = cache_folder() / "smollm2-friends-80"
    if not target.is_dir():
        source = model_folder("smollm2")
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source)
        report = simulate_update(
            model,
            tokenizer,
            load_corpus("friends"),
            steps=80,
            learning_rate=5e-4,
            batch_size=4,
            length=128,
            other_texts=load_corpus("xsum")[:40],
        )
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            built = Path(scratch) / "model"
            model.save_pretrained(built)
            tokenizer.save_pretrained(built)
            built.rename(target)
        store(STORE / UPDATE, report.to_data())
    return target


def build(cell: Cell, base: str, n_classes: int) -> tuple[nn.Module, Any]:
    """A base under a classification head that depends on the seed alone."""
    folder = folder_of(base)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    set_seed(cell.seed)
    if cell.setting == "smollm2":
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=n_classes, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
        )
        return model, tokenizer
    return ga.MultiTaskClassifier(
        AutoModel.from_pretrained(folder, dtype=torch.float32), {cell.task: n_classes}
    ), tokenizer


# -- one cell ----------------------------------------------------------------------------------------------------------


def compute(cell: Cell) -> dict[str, Any]:
    """Train and score one cell."""
    setting = SETTINGS[cell.setting]
    task = load_task(cell.task, train=setting.train, validation=100, test=setting.test, seed=cell.seed)
    model, tokenizer = build(cell, getattr(setting, cell.base), task.n_classes)
    collate, data = MixedTaskCollator(tokenizer), MixedTaskDataset([task], tokenizer, "train", setting.length)
    batches = [collate([_inputs(data[i + j]) for j in range(16)]) for i in range(0, 64, 16)]
    set_seed(cell.seed)
    options = ARMS[cell.arm](model, cell, batches)
    args = TrainingArguments(
        output_dir=str(STORE / ".scratch" / str(os.getpid())),
        max_steps=setting.steps,
        learning_rate=setting.rate,
        per_device_train_batch_size=setting.batch,
        warmup_steps=round(0.06 * setting.steps),
        weight_decay=0.0,
        seed=cell.seed,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        logging_steps=setting.steps,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = ga.GatedTrainer(model, args, train_dataset=data, data_collator=Plain(collate), **options)
    began = time.perf_counter()
    with ga.weaken_knowledge(model, mask=cell.mask, drop=cell.drop):  # exactly nothing where both are 0
        trainer.train()
    seconds = time.perf_counter() - began
    adapters = ga.get_adapters(model)
    structure = adapters.structure if adapters.bank is None else adapters.compact()
    test = MixedTaskDataset([task], tokenizer, "test", setting.length)
    result: dict[str, Any] = {cell.base: score(model, test, collate)}
    if cell.base == "old":
        with tempfile.TemporaryDirectory() as scratch:
            adapters.save(Path(scratch) / "adapter")
            new, _ = build(cell, setting.new, task.n_classes)
            ga.load_adapters(new, Path(scratch) / "adapter", base="updated")
        result["direct"] = score(new, test, collate)
    kinds = dict.fromkeys(path.site.sublayer for path in structure.paths)
    shares = {kind: sum(p.params for p in structure.paths if p.site.sublayer == kind) for kind in kinds}
    blocks = {p.site.block_index: 0 for p in structure.paths}
    for p in structure.paths:
        blocks[p.site.block_index] += p.params
    return {
        "cell": asdict(cell),
        **result,
        "params": structure.params,
        "params_by_sublayer": shares,
        "params_by_block": blocks,
        "seconds": round(seconds, 1),
        "total_seconds": round(time.perf_counter() - began, 1),
        "versions": versions(),
    }


class Plain:
    """Batches as a model with one task takes them."""

    def __init__(self, collate: MixedTaskCollator) -> None:
        self.collate = collate

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Without task ids."""
        return self.collate([{k: v for k, v in f.items() if k not in ("task_ids", "token_type_ids")} for f in features])


def _inputs(feature: dict[str, Any]) -> dict[str, Any]:
    return {name: feature[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def score(model: nn.Module, data: Any, collate: MixedTaskCollator, batch: int = 64) -> dict[str, float]:
    """Accuracy and mean cross-entropy; examples sorted by length, so that little is padding."""
    model.eval()
    order = sorted(range(len(data)), key=lambda i: len(data[i]["input_ids"]))
    right, loss, collate_plain, device = 0, 0.0, Plain(collate), next(model.parameters()).device
    for start in range(0, len(order), batch):
        inputs = {k: v.to(device) for k, v in collate_plain([data[i] for i in order[start : start + batch]]).items()}
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        right += int((logits.argmax(-1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    return {"accuracy": right / len(order), "loss": loss / len(order)}


def premise(setting: Setting, task_name: str) -> dict[str, Any]:
    """How far the update moved the outputs of attention and of feed-forward maps."""
    task = load_task(task_name, train=10, validation=10, test=128, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder_of(setting.old))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data, collate = MixedTaskDataset([task], tokenizer, "test", setting.length), MixedTaskCollator(tokenizer)
    batches = [collate([_inputs(data[i + j]) for j in range(16)]) for i in range(0, 128, 16)]
    bases = [AutoModel.from_pretrained(folder_of(name), dtype=torch.float32) for name in (setting.old, setting.new)]
    shift = activation_shift(*bases, batches)
    means = {kind: shift.mean(kind) for kind in ("attention", "feed_forward")}
    return {**means, "points": shift.to_data()}


# -- the study ---------------------------------------------------------------------------------------------------------

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


def run_all(only: list[str], limit: int | None) -> None:
    """Compute what is missing."""
    for cell in cells():
        if cell.file.exists() or (only and not {cell.setting, cell.task, cell.arm} & set(only)):
            continue
        if limit is not None and limit <= 0:
            return
        limit = None if limit is None else limit - 1
        shift = STORE / f"shift_{cell.setting}.json"
        if not shift.exists():
            store(shift, premise(SETTINGS[cell.setting], cell.task))
        result = compute(cell)
        store(cell.file, result)
        scores = {name: round(result[name]["accuracy"], 3) for name in ("old", "direct", "new") if name in result}
        print(f"{cell.file.stem}: {scores}, {result['total_seconds']} s", flush=True)


# -- tables ------------------------------------------------------------------------------------------------------------


def arms_table(setting: Setting, tasks: tuple[str, ...], seeds: tuple[int, ...]) -> str:
    """By task and variant: accuracy on both bases, differences to another variant paired by seed, and the share of what
    re-tuning that one would win. Over all tasks, a seed's value is the mean over its tasks, so that the interval counts
    seeds; of fewer re-tuned ones their number is given.
    """
    header = ["task", "arm", "seeds", "old", "direct", "re-tuned", "beside", "direct - its", "old - its", "recovery"]
    rows = []
    for names in (*((task,) for task in tasks), *([tasks] if len(tasks) > 1 else [])):
        for variant in VARIANTS:

            def scores(name: str, base: str, where: str) -> dict[int, float]:
                """By seed, where every task has been run."""
                cells = {s: [read(cell_of(setting, t, name, s, base).file) for t in names] for s in seeds}  # noqa: B023
                return {s: mean(c[where]["accuracy"] for c in found) for s, found in cells.items() if all(found)}

            old, direct = scores(variant, "old", "old"), scores(variant, "old", "direct")
            if not old:
                continue
            retuned = {s: v for s, v in scores(variant, "new", "new").items() if s in old}
            number = f" ({len(retuned)})" if 0 < len(retuned) < len(old) else ""
            other = VARIANTS[variant][2]
            compared = [other, "", "", ""]
            if other and (theirs_old := scores(other, "old", "old")):
                theirs, theirs_retuned = scores(other, "old", "direct"), scores(other, "new", "new")
                closed = sorted(direct.keys() & theirs.keys() & theirs_retuned.keys())
                won, gap = [direct[s] - theirs[s] for s in closed], [theirs_retuned[s] - theirs[s] for s in closed]
                found = recovery(won, gap)
                compared[1:] = [
                    *(
                        shown([a[s] - b[s] for s in sorted(a.keys() & b)], signed=True)
                        for a, b in ((direct, theirs), (old, theirs_old))
                    ),
                    "undefined"
                    if found.value is None or found.interval is None
                    else f"{found.value:.0%} ({found.interval[0]:.0%} to {found.interval[1]:.0%})",
                ]
            sizes = [c["params"] for t in names for s in old if (c := read(cell_of(setting, t, variant, s).file))]
            rows.append(
                [
                    names[0] if len(names) == 1 else "all",
                    variant,
                    str(len(old)),
                    shown(old.values()),
                    shown(direct.values()),
                    shown(retuned.values()) + number,
                    *compared,
                    f"{max(sizes):,}",
                ]
            )
    return format_table([*header, "params"], rows)


def sweep_table() -> str:
    """(old, direct) accuracy by p_i and p_c, mean over seeds."""
    rows = []
    for mask in MASKS:
        row = [f"p_i {mask:g}"]
        for drop in DROPS:
            made = [Cell(ENCODER.name, SWEEP_TASK, "uniform", seed, "old", mask, drop) for seed in SWEEP_SEEDS]
            found = [result for result in (read(cell.file) for cell in made) if result]
            values = [mean(r[name]["accuracy"] for r in found) for name in ("old", "direct")] if found else []
            row.append(" / ".join(f"{100 * value:.1f}" for value in values))
        rows.append(row)
    return format_table(["", *(f"p_c {drop:g}" for drop in DROPS)], rows)


def table() -> str:
    """Everything there is to say so far."""
    parts = []
    for setting in SETTINGS.values():
        file = STORE / f"shift_{setting.name}.json"
        if file.exists():
            moved = json.loads(file.read_text())
            more = "more" if moved["feed_forward"] > moved["attention"] else "no more"
            parts.append(
                f"{setting.name}: the update moved feed-forward outputs by {moved['feed_forward']:.1%}, attention's by "
                f"{moved['attention']:.1%}: {more}, as the method presumes they are"
            )
    if (STORE / UPDATE).exists():
        made = json.loads((STORE / UPDATE).read_text())
        losses = " and ".join(
            f"the loss on {text} from {made[key][0]:.2f} to {made[key][1]:.2f}"
            for text, key in (("held-out dialogue", "loss"), ("news", "other_loss"))
        )
        parts.append(
            f"smollm2's update: {made['steps']} steps, {made['tokens']:,} tokens of dialogue; weights moved by "
            f"{made['weight_shift']:.1%}, {losses}"
        )
    parts.append(arms_table(ENCODER, TASKS, SEEDS))
    if any(made.file.exists() for made in cells() if made.mask):
        parts.append(f"{SWEEP_TASK}, accuracy on the old / the new base:\n{sweep_table()}")
    if any(made.file.exists() for made in cells() if made.setting == DECODER.name):
        parts.append(arms_table(DECODER, (DECODER_TASK,), DECODER_SEEDS))
    return "\n\n".join(parts)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--only", nargs="*", default=[], help="settings, tasks or arms, e.g. minilm newsgroups gated")
    parser.add_argument("--limit", type=int, help="at most so many cells")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.command == "run":
        run_all(options.only, options.limit)
    print(table())


if __name__ == "__main__":
    sys.exit(main())
