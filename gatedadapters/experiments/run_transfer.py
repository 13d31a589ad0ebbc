"""The run `transfer`: how much an adapter loses when its base is updated, and how much training can prevent of it."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn
from tqdm.auto import tqdm

from gatedadapters.artifacts import load_adapters
from gatedadapters.config import TransferConfig
from gatedadapters.data import predicts_tokens
from gatedadapters.experiments import outputs
from gatedadapters.experiments.base_pair import BasePair, Measured
from gatedadapters.experiments.progress import progress_bar, silence_transformers
from gatedadapters.experiments.repairs import ANEW, DIRECT, RepairReport, lengths, repair_arms
from gatedadapters.experiments.task_models import load_tasks
from gatedadapters.experiments.training import use_bf16
from gatedadapters.inspection import save_shift_png
from gatedadapters.reporting.intervals import Interval
from gatedadapters.safe_files import file_errors
from gatedadapters.structure.folder import ADAPTER
from gatedadapters.supernet.adapters import Adapters
from gatedadapters.transfer import (
    ActivationShift,
    Damage,
    TransferReport,
    TransferScores,
    transfer_scores,
)
from gatedadapters.transfer.evaluate import Train, as_before


@dataclass(frozen=True)
class TransferResult:
    """The result of a transfer. Its text is what `gatedadapters transfer` prints.

    Attributes:
        config: the configuration of the run.
        folder: the output folder.
        report: scores by seed and the recovery. A score is the mean accuracy over tasks, or the mean loss where a
            language model answers in tokens.
        losses: the same of the mean loss over tasks; the very report where that is in losses.
        repairs: what repairs and trainings on the new base reach.
        damage: by seed, how much the update is expected to damage the adapter, measured on unlabelled test texts.
        shift: how far activations moved between the bases.
        given: scores (old base, new base) of the configured adapter as it was saved; None if none is configured.
        seconds: duration of the whole run.
    """

    config: TransferConfig
    folder: Path
    report: TransferReport
    losses: TransferReport
    repairs: RepairReport
    damage: tuple[Damage, ...]
    shift: ActivationShift
    given: tuple[float, float] | None
    seconds: float

    def table(self) -> str:
        """Scores, recovery, repairs, the predicted damage, and how far the activations moved."""
        lines = [self.report.table(), ""]
        if not self.report.lower_is_better:
            lines += ["the same in loss:\n", self.losses.table(), ""]
        lines += [self.repairs.table(), ""]
        costs = [scores.direct - scores.old for scores in self.losses.scores]
        expected = Interval.of([found.value for found in self.damage])
        answers = Interval.of([found.outputs for found in self.damage])
        lines.append(f"predicted damage {expected}, outputs moved by {answers}; measured, in loss: {_signed(costs)}")
        if self.given is not None:
            lines.append(
                f"the given adapter as saved: {self.given[0]:.3f} on the old base, {self.given[1]:.3f} on the new"
            )
        attention, feed_forward = self.shift.mean("attention"), self.shift.mean("feed_forward")
        lines.append(f"activations moved: attention {attention:.1%}, feed-forward {feed_forward:.1%}\n")
        lines.append(self.shift.table())
        return "\n".join(lines)

    def __str__(self) -> str:
        contents = {
            f"{outputs.TRANSFER_TRAINED}/": 'of the first seed; load_adapters(new_model, "...", base="updated")',
            f"{outputs.ADAPTER}/": "the same without weakening",
            outputs.SHIFT_PICTURE: "how far each point's activations moved",
            outputs.METRICS: "every number",
            outputs.TRANSFER_CONFIG: "the configuration; run it again with gatedadapters transfer",
        }
        what = "Loss per token" if self.report.lower_is_better else "Accuracy"
        return "\n".join(
            [
                f"\n{what} on test data, {len(self.report.scores)} seed(s):\n",
                self.table(),
                f"\n{self.seconds:.0f} s in all. In {self.folder}:",
                outputs.list_outputs(contents, width=18),
            ]
        )


@file_errors("read or write a file of the run", "transfer")
def transfer(
    config: TransferConfig | str | Path, out: str | Path | None = None, *, overwrite: bool = False
) -> TransferResult:
    """Train and test every arm for every seed on both versions of a base, as `gatedadapters transfer` does.

    Args:
        config: the configuration, or the path of its YAML file.
        out: folder of the results. Default: the name of the YAML file, in the current folder.
        overwrite: whether to replace the results of an earlier run in that folder.

    Raises:
        GatedAdaptersError: the configuration, the bases, the data or the folder cannot be used; or training failed.
    """
    config, folder = outputs.config_and_folder(TransferConfig, config, out)
    outputs.check_output_folder(folder, outputs.OF_TRANSFER, overwrite=overwrite)
    silence_transformers()
    start = time.perf_counter()
    tasks = load_tasks(config)
    config = _with_precision(config)
    scores, losses = list[TransferScores](), list[TransferScores]()
    arms, damage = dict[str, list[Measured]](), list[Damage]()
    shift, given = None, None
    steps = 3 * (config.training.steps + sum(lengths(config.repair, config.training.steps)))
    with (
        tempfile.TemporaryDirectory(prefix="gatedadapters-") as logs,
        progress_bar(steps * len(config.seeds)) as progress,
    ):
        for seed in config.seeds:
            bases = BasePair(config, tasks, seed, Path(logs) / str(seed))
            if shift is None:
                shift = bases.shift()
                if config.adapter is not None:
                    given = _scores_as_saved(bases, config.adapter)
            home = Path(logs) / f"adapters-{seed}" if scores else folder
            measured = list[Measured]()
            scores.append(_run_seed(bases, seed, home, progress, measured))
            losses.append(TransferScores(seed, *(found.loss for found in measured)))
            damage.append(bases.damage(home / ADAPTER))
            found = {DIRECT: measured[1], **repair_arms(bases, home / ADAPTER, seed, progress), ANEW: measured[-1]}
            for arm, own in found.items():
                arms.setdefault(arm, []).append(own)
    assert shift is not None
    report = TransferReport(tuple(scores), lower_is_better=predicts_tokens(tasks))
    result = TransferResult(
        config,
        folder,
        report,
        TransferReport(tuple(losses), lower_is_better=True),
        RepairReport({arm: tuple(own) for arm, own in arms.items()}),
        tuple(damage),
        shift,
        given,
        time.perf_counter() - start,
    )
    _write(result)
    return result


def _run_seed(
    bases: BasePair, seed: int, folder: Path, progress: tqdm[Any], measured: list[Measured]
) -> TransferScores:
    """Train and test the arms of one seed that `transfer_scores` has.

    Args:
        bases: both versions of the base.
        seed: of the training.
        folder: where the adapters are kept.
        progress: a bar.
        measured: gets all scores, in the order of the fields of `TransferScores`.
    """

    def score(model: nn.Module) -> float:
        measured.append(bases.measure(model))
        return measured[-1].main

    config = bases.config
    transferable: Train | None = None
    if config.prefer_transferable:
        sensitivity = bases.sensitivity()  # measured now, because knowledge is weakened while the arm trains

        def transferable(model: nn.Module, seed: int) -> Adapters:
            return bases.train_transferable(sensitivity, progress)

    return transfer_scores(
        bases.old,
        bases.new,
        lambda model, _: bases.train(model, progress),
        score,
        seed=seed,
        weakening=config.weakening,
        total_steps=config.training.steps,
        folder=folder,
        train_transferable=transferable,
    )


def _signed(values: list[float]) -> str:
    return Interval.of(values).text(signed=True)


def _scores_as_saved(bases: BasePair, adapter: str) -> tuple[float, float]:
    """Scores (old base, new base) of a saved adapter, without further training."""
    scores = []
    cases: list[tuple[nn.Module, Literal["same", "updated"]]] = [(bases.old, "same"), (bases.new, "updated")]
    for model, base in cases:
        with as_before(model):
            load_adapters(model, adapter, base=base)
            scores.append(bases.measure(model).main)
    return scores[0], scores[1]


def _with_precision(config: TransferConfig) -> TransferConfig:
    """The configuration with `precision: auto` decided, once for all arms, bases and seeds."""
    training = config.training.model_copy(update={"precision": "bf16" if use_bf16(config) else "fp32"})
    return config.model_copy(update={"training": training})


def _write(result: TransferResult) -> None:
    config, folder = result.config, result.folder
    save_shift_png(
        result.shift,
        folder / outputs.SHIFT_PICTURE,
        title=f"what the update moved: {config.model} to {config.update}",
    )
    (folder / outputs.TRANSFER_CONFIG).write_text(config.to_yaml(folder.absolute()), encoding="utf-8")
    data = {
        "config": config.as_written(),
        **result.report.to_data(),
        "losses": result.losses.to_data(),
        "repairs": result.repairs.to_data(),
        "predicted_damage": [found.to_data() for found in result.damage],
        "given_adapter": result.given,
        "shift": result.shift.to_data(),
        "seconds": result.seconds,
    }
    outputs.write_metrics(folder, data)
    outputs.write_table(folder, result.table())
