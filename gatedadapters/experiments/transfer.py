"""Running a transfer configuration from start to finish, and what it leaves in the output folder."""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback

from gatedadapters.artifacts import load_adapters
from gatedadapters.config import SearchConfig, TransferConfig
from gatedadapters.data import MixedTaskCollator, MixedTaskDataset, TextTask
from gatedadapters.errors import LayoutError
from gatedadapters.experiments.arms import Experiment, evaluate
from gatedadapters.experiments.search import check_free
from gatedadapters.experiments.setup import load_tasks, use_bf16
from gatedadapters.inspection import save_shift_png
from gatedadapters.reporting.versions import versions
from gatedadapters.structure import Structure
from gatedadapters.supernet.adapters import Adapters, get_adapters
from gatedadapters.supernet.attach import attach, detach
from gatedadapters.transfer import (
    ActivationShift,
    TransferReport,
    TransferScores,
    activation_shift,
    knowledge_sensitivity,
    transfer_scores,
)
from gatedadapters.transfer.evaluate import Train, as_before
from gatedadapters.transfer.sensitivity import weigh_by

SURVIVOR, PLAIN = "transfer-trained", "adapter"
METRICS, PICTURE, CONFIG, TABLE = "metrics.json", "shift.png", "transfer.yaml", "table.txt"
OUTPUTS = frozenset({SURVIVOR, PLAIN, METRICS, PICTURE, CONFIG, TABLE})


@dataclass(frozen=True)
class Transferred:
    """What a run came to.

    Attributes:
        report: scores by seed (mean accuracy over tasks) and the recovery.
        shift: of activations between the bases.
        saved: (old base, new base) scores of the adapter that was given, as it was saved.
        seconds: everything.
    """

    report: TransferReport
    shift: ActivationShift
    saved: tuple[float, float] | None
    seconds: float

    def table(self) -> str:
        """Scores, recovery, and the mean shift of attention and feed-forward points."""
        lines = [self.report.table()]
        if self.saved is not None:
            lines.append(
                f"the given adapter as saved: {self.saved[0]:.3f} on the old base, {self.saved[1]:.3f} on the new"
            )
        attention, feed_forward = self.shift.mean("attention"), self.shift.mean("feed_forward")
        lines.append(f"activations moved: attention {attention:.1%}, feed-forward {feed_forward:.1%}\n")
        lines.append(self.shift.table())
        return "\n".join(lines)

    def to_json(self, config: TransferConfig) -> str:
        """Every number, with what is needed to get it again."""
        data: dict[str, Any] = {
            "versions": versions(),
            "config": config.as_written(),
            **self.report.to_data(),
            "given_adapter": self.saved,
            "shift": self.shift.to_data(),
            "seconds": self.seconds,
        }
        return json.dumps(data, indent=1) + "\n"


class Bases:
    """Both versions of a base under equal heads, for one seed."""

    def __init__(self, config: TransferConfig, tasks: list[TextTask], seed: int, logs: Path) -> None:
        self.config, self.tasks = config, tasks
        self.experiments = []
        for model in (config.model, config.update):
            training = config.training.model_copy(update={"seed": seed})
            names = set(SearchConfig.model_fields) - {"model", "training"}
            own = SearchConfig(model=model, training=training, **{name: getattr(config, name) for name in names})
            self.experiments.append(Experiment(own, tasks, logs))
        self.old, self.new = (experiment.model for experiment in self.experiments)
        words = [experiment.tokenizer.get_vocab() for experiment in self.experiments]
        differ = sorted(words[0].items() ^ words[1].items(), key=lambda item: item[1])
        if differ:
            raise LayoutError(
                "these are not two versions of one base: the vocabulary differs",
                expected=f"the {len(words[0]):,} tokens of {config.model}",
                got=f"{len(words[1]):,} tokens, {differ[0][0]!r} is not the same",
                where=f"update: {config.update}",
                fix="give a base and its update",
            )

    def train(self, model: nn.Module, progress: tqdm[Any]) -> Adapters:
        """Adapters of the configured structure or search, compact."""
        experiment = self.experiments[0] if model is self.old else self.experiments[1]
        if self.config.search:
            return experiment.adapted(self.config.resolved_space(), progress, searching=True)
        if self.config.adapter is not None:
            return experiment.adapted(Structure.load(self.config.adapter), progress, searching=False)
        return experiment.adapted(experiment.everything(), progress, searching=False)

    def sensitivity(self) -> dict[str, float]:
        """By candidate of the search, on training texts of the old base."""
        experiment, texts = self.experiments[0], 64
        data = MixedTaskDataset(self.tasks, experiment.tokenizer, "train", self.config.training.max_length)
        batches = self._batches(data, texts)
        if "task_ids" not in inspect.signature(self.old.forward).parameters:
            batches = [{key: value for key, value in batch.items() if key != "task_ids"} for batch in batches]
        adapters = attach(self.old, self.config.resolved_space(), tasks=experiment.names)
        try:
            return knowledge_sensitivity(adapters, batches)
        finally:
            detach(self.old)

    def train_transferable(self, sensitivity: dict[str, float], progress: tqdm[Any]) -> Adapters:
        """`train` on the old base, its search preferring what transfers."""
        experiment = self.experiments[0]
        experiment.callbacks = [Weigh(sensitivity)]
        try:
            return self.train(self.old, progress)
        finally:
            experiment.callbacks = []

    def score(self, model: nn.Module) -> float:
        """Mean test accuracy over tasks."""
        first = self.experiments[0]
        scores = evaluate(model, self.tasks, first.tokenizer, self.config.training.max_length, bf16=first.bf16)
        return sum(scores.values()) / len(scores)

    def shift(self) -> ActivationShift:
        """Between the bases, on test texts."""
        tokenizer = self.experiments[0].tokenizer
        data = MixedTaskDataset(self.tasks, tokenizer, "test", self.config.training.max_length)
        batches = [
            {key: value for key, value in batch.items() if key != "task_ids"}
            for batch in self._batches(data, self.config.shift_texts)
        ]
        old, new = (
            getattr(model, str(getattr(model, "base_model_prefix", "")), model) for model in (self.old, self.new)
        )
        return activation_shift(old, new, batches)

    def _batches(self, data: MixedTaskDataset, texts: int) -> list[dict[str, Any]]:
        """At most so many texts, spread evenly over the data, without labels."""
        chosen = torch.linspace(0, len(data) - 1, min(texts, len(data))).long().tolist()
        collate = MixedTaskCollator(self.experiments[0].tokenizer)
        batches = [collate([data[i] for i in chosen[start : start + 16]]) for start in range(0, len(chosen), 16)]
        return [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]


class Weigh(TrainerCallback):
    """Tells a search, before its first step, which places hang on feed-forward knowledge."""

    def __init__(self, sensitivity: dict[str, float]) -> None:
        self.sensitivity = sensitivity

    def on_train_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        """The penalty is set by then."""
        weigh_by(get_adapters(model), self.sensitivity)


def run(config: TransferConfig, folder: Path, *, overwrite: bool = False) -> Transferred:
    """Train every arm for every seed, and write everything into `folder`.

    Raises:
        GatedAdaptersError: whatever is wrong with the configuration, the data, the bases or the folder.
    """
    check_free(folder, OUTPUTS, overwrite=overwrite)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    start = time.perf_counter()
    tasks = load_tasks(config)
    config = _with_precision(config)
    scores: list[TransferScores] = []
    shift, saved = None, None
    total = 3 * config.training.steps * len(config.seeds)
    with (
        tempfile.TemporaryDirectory(prefix="gatedadapters-") as logs,
        tqdm(total=total, unit="step", dynamic_ncols=True, file=sys.stderr) as progress,
    ):
        for seed in config.seeds:
            bases = Bases(config, tasks, seed, Path(logs) / str(seed))
            if shift is None:
                shift = bases.shift()
                if config.adapter is not None:
                    saved = _as_saved(bases, config.adapter)
            scores.append(
                transfer_scores(
                    bases.old,
                    bases.new,
                    lambda model, _, bases=bases: bases.train(model, progress),  # type: ignore[misc]
                    bases.score,
                    seed=seed,
                    weakening=config.weakening,
                    total_steps=config.training.steps,
                    folder=folder if not scores else None,
                    train_transferable=_transferable(bases, progress),
                )
            )
    assert shift is not None
    result = Transferred(TransferReport(tuple(scores)), shift, saved, time.perf_counter() - start)
    save_shift_png(shift, folder / PICTURE, title=f"what the update moved: {config.model} to {config.update}")
    (folder / CONFIG).write_text(config.to_yaml(folder.absolute()), encoding="utf-8")
    (folder / METRICS).write_text(result.to_json(config), encoding="utf-8")
    (folder / TABLE).write_text(result.table() + "\n", encoding="utf-8")
    return result


def report(folder: Path, result: Transferred) -> None:
    """Print what a run came to and where it lies."""
    print(f"\nAccuracy on test data, {len(result.report.scores)} seed(s):\n")
    print(result.table())
    print(f"\n{result.seconds:.0f} s in all. In {folder}:")
    for name, what in {
        f"{SURVIVOR}/": 'of the first seed; load_adapters(new_model, "...", base="updated")',
        f"{PLAIN}/": "the same without weakening",
        PICTURE: "how far each point's activations moved",
        METRICS: "every number",
        CONFIG: "the configuration; run it again with gatedadapters transfer",
    }.items():
        print(f"  {name:<18} {what}")


def _transferable(bases: Bases, progress: tqdm[Any]) -> Train | None:
    """What trains the transfer-trained arm, where that is not what trains the others."""
    if not bases.config.prefer_transferable:
        return None
    sensitivity = bases.sensitivity()  # now: knowledge is weakened while the arm trains
    return lambda _, __: bases.train_transferable(sensitivity, progress)


def _with_precision(config: TransferConfig) -> TransferConfig:
    """With one precision for every arm, base and seed, where it is to be found out which is faster."""
    training = config.training.model_copy(update={"precision": "bf16" if use_bf16(config) else "fp32"})
    return config.model_copy(update={"training": training})


def _as_saved(bases: Bases, adapter: str) -> tuple[float, float]:
    found = []
    for model, base in ((bases.old, "same"), (bases.new, "updated")):
        with as_before(model):
            load_adapters(model, adapter, base=base)  # type: ignore[arg-type]
            found.append(bases.score(model))
    return found[0], found[1]
