"""Gates in TensorBoard: one run, many tags."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from gatedadapters.adapters import Adapters, get_adapters
from gatedadapters.config import Budget
from gatedadapters.inspection.picture import picture, pixels
from gatedadapters.paths import Path as GatedPath
from gatedadapters.structure import Structure, column


class GateWriter:
    """Writes what gates do, for loops of any kind; `TensorBoardInspector` uses it for a Trainer.

    Tags: `open block 3/attn.q lora` (probability that any task has it open, mean over units; one group of
    charts per block), `open task/<name>` (expected share of the candidates' cost that a task uses), `gates/...`
    (expected cost, the target it is held to, penalty, multiplier, share of paths open), `structure/...`.
    Where there are more places than `max_tags`, kinds of places and blocks are averaged instead.

    Args:
        adapters: with gates.
        writer: where to.
        max_tags: most places that get a tag of their own.
    """

    def __init__(self, adapters: Adapters, writer: SummaryWriter, *, max_tags: int = 600) -> None:
        self.adapters, self.writer = adapters, writer
        bank = adapters.bank
        if bank is None:
            self.sets: list[tuple[list[str], np.ndarray[Any, Any]]] = []
            return
        paths = [cast(GatedPath, adapters.paths[group.key]) for group in bank.groups]
        places = [column(path.site.sublayer, path.site.role, path.kind) for path in paths]
        digits = len(str(max(path.site.block_index for path in paths)))
        blocks = [f"{path.site.block_index:0{digits}d}" for path in paths]
        tags = [f"open block {block}/{place}" for block, place in zip(blocks, places, strict=True)]
        unit_owner = bank.owner.cpu().numpy()
        if len(set(tags)) <= max_tags:
            self.sets = [_numbered(tags, unit_owner)]
        else:
            self.sets = [
                _numbered([f"open place/{place}" for place in places], unit_owner),
                _numbered([f"open block/{block}" for block in blocks], unit_owner),
            ]

    def layout(self) -> None:
        """Lay out custom charts: a block's places in one chart, cost and target in another."""
        charts: dict[str, list[Any]] = {}
        for tag in (tag for tags, _ in self.sets for tag in tags):
            charts.setdefault(tag.partition("/")[0], ["Multiline", []])[1].append(re.escape(tag))
        cost = ["Multiline", [r"gates/expected_cost", r"gates/target"]]
        self.writer.add_custom_scalars({"gates": {"cost and target": cost}, "open probability": charts})

    @torch.no_grad()
    def scalars(self, step: int) -> None:
        """Everything of one step; reads the gates' state from the device once or twice, whatever their number."""
        bank, pressure = self.adapters.bank, self.adapters.pressure
        if bank is None:
            return
        probability = (bank.kept > 0).float() if bank.frozen else bank.open_probability()
        any_task = (1 - (1 - probability).prod(0)).cpu().numpy()
        for tags, index in self.sets:
            count = np.bincount(index, minlength=len(tags))
            means = np.bincount(index, weights=any_task, minlength=len(tags)) / count
            for tag, value in zip(tags, means, strict=True):
                self.writer.add_scalar(tag, value, step)
        penalty = pressure.penalty if pressure is not None else None
        unit = penalty.unit if penalty is not None else "params"
        if len(self.adapters.tasks) > 1:
            shares = (bank.expected_task_cost(unit) / bank.dense_cost(unit)).tolist()
            for task, share in zip(self.adapters.tasks, shares, strict=True):
                self.writer.add_scalar(f"open task/{task}", share, step)
        bank.refresh()
        self.writer.add_scalar("gates/expected_cost", float(bank.expected_cost(unit)), step)
        self.writer.add_scalar("gates/open_paths", sum(bank.open_paths.values()) / len(bank.open_paths), step)
        if pressure is not None:
            self.writer.add_scalar("gates/penalty", float(pressure.term(bank)), step)
            if isinstance(penalty, Budget):
                self.writer.add_scalar("gates/target", pressure.target(bank), step)
                self.writer.add_scalar("gates/multiplier", float(pressure.multipliers[0]), step)

    def picture(self, structure: Structure, step: int, tag: str = "structure/kept") -> None:
        """The structure as an image."""
        self.writer.add_image(tag, pixels(picture(structure)), step, dataformats="HWC")


class TensorBoardInspector(TensorBoardCallback):
    """transformers' TensorBoard callback that also writes gates, into the same run.

    Give it in place of the built-in one: `TrainingArguments(report_to="none")` and
    `GatedTrainer(callbacks=[TensorBoardInspector("runs/search")])`. It writes scalars whenever the Trainer logs,
    but at most `writes` times a run, and the structure as an image when it is pruned and at the end.

    Args:
        log_dir: folder of the run; transformers' default where None.
        max_tags: see `GateWriter`.
        writes: most times that gates are written in one run.
    """

    def __init__(self, log_dir: str | Path | None = None, *, max_tags: int = 600, writes: int = 200) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if log_dir is not None:
            self.logging_dir = str(log_dir)
        self.max_tags, self.writes = max_tags, writes
        self.gates: GateWriter | None = None
        self._next, self._every, self._was_fixed = 0, 1, False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the run."""
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        if not state.is_world_process_zero or self.tb_writer is None:
            return
        self.gates = GateWriter(get_adapters(kwargs["model"]), self.tb_writer, max_tags=self.max_tags)
        self.gates.layout()
        self._next, self._every = 0, max(1, state.max_steps // self.writes)
        self._was_fixed = self._is_fixed()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Notice the prune."""
        if self.gates is not None and not self._was_fixed and self._is_fixed():
            self._was_fixed = True
            self._picture(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """The Trainer's own values, and the gates'."""
        logs = {key: value for key, value in (logs or {}).items() if not key.startswith("gates/")}
        super().on_log(args, state, control, logs=logs, **kwargs)  # type: ignore[no-untyped-call]
        if self.gates is not None and state.global_step >= self._next:
            self.gates.scalars(state.global_step)
            self._next = state.global_step + self._every

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The structure as it is in the end; closes the run."""
        if self.gates is not None:
            self.gates.scalars(state.global_step)
            self._picture(state.global_step)
            self.gates = None
        super().on_train_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]

    def _is_fixed(self) -> bool:
        bank = self.gates.adapters.bank if self.gates is not None else None
        return bank is None or bank.frozen

    def _picture(self, step: int) -> None:
        assert self.gates is not None
        adapters = self.gates.adapters
        structure = adapters.structure
        if structure is None:
            penalty = adapters.pressure.penalty if adapters.pressure is not None else None
            structure = adapters.discretize(penalty if isinstance(penalty, Budget) else None)
        self.gates.picture(structure, step)


def _numbered(tags: list[str], unit_owner: np.ndarray[Any, Any]) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Distinct tags of groups, and the position of each unit's tag among them."""
    position = {tag: number for number, tag in enumerate(dict.fromkeys(tags))}
    return list(position), np.asarray([position[tag] for tag in tags])[unit_owner]
