"""A writer of TensorBoard runs, for everything that this library shows there."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.image import imsave
from numpy.typing import ArrayLike, NDArray
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard import summary as protos

from gatedadapters.config.base import Config
from gatedadapters.continual import StreamResult
from gatedadapters.gates import GateBank
from gatedadapters.inspection.continual import core_picture, stream_picture
from gatedadapters.inspection.frontier import frontier_picture
from gatedadapters.inspection.gates import GateView
from gatedadapters.inspection.heat_map import HeatMap
from gatedadapters.inspection.matrix import matrix_picture
from gatedadapters.masking import Mask
from gatedadapters.reporting.html import NOTHING
from gatedadapters.structure import Structure
from gatedadapters.structure.frontier import Frontier
from gatedadapters.structure.picture import pixels
from gatedadapters.supernet.adapters import Adapters

_CHANGE = LinearSegmentedColormap.from_list("change", ["#b2182b", NOTHING, "#1f5fa6"])
_OPEN = "share of the units open"
_LINES = 100  # lines of a text, at most


class TensorBoardWriter:
    """Writes one TensorBoard run.

    Each method writes one kind of result, with the step it belongs to, and can be left out. With a Trainer,
    `TensorBoardInspector` calls them. Everything goes into one run, because few runs with many tags are easier to read
    than many runs.

    Args:
        run: a folder, or an open writer, which stays open.
        max_tags: largest number of places of gates with a tag of their own. If there are more, gates are averaged by
            block and by column instead.
    """

    def __init__(self, run: str | Path | SummaryWriter, *, max_tags: int = 600) -> None:
        self._owned = not isinstance(run, SummaryWriter)
        self.run = run if isinstance(run, SummaryWriter) else SummaryWriter(str(run))
        self.max_tags = max_tags
        self._view: GateView | None = None
        self._maps: dict[str, HeatMap] = {}

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers by tag."""
        found = [value for tag, number in values.items() for value in protos.scalar(tag, number).value]
        self._write(Summary(value=found), step)  # one event: a hundred tags cost little more than one

    def gates(self, adapters: Adapters, step: int, *, maps: bool = True) -> None:
        """Write the state of the gates. Compact adapters have none, and nothing is written.

        Scalars:

        - `open block 3/attn.q lora`: the probability that at least one task has a unit open, as the mean over units;
          each block has a group of charts.
        - `open task/<name>`: the expected share of the candidates' cost that the task uses.
        - `path mix/<kind>`: the share of the expected cost that paths of this kind take.
        - `gates/...`: expected cost, cost of the units open without noise, target of the budget, closed paths.
        - `penalty/...`: terms and multipliers of the penalty.

        With `maps`: images of `open/<task>` (blocks by columns) and `path mix/by block`, and histograms of
        `log alpha/<task> <level>`.
        """
        bank = adapters.bank
        if bank is None:
            return
        view = self._view_of(adapters, bank)
        values = view.averages()
        values |= {f"open task/{task}": share for task, share in view.task_shares().items()}
        if len(view.kinds) > 1:
            values |= {f"path mix/{kind}": share for kind, share in view.kind_shares().items()}
        values |= {f"gates/{name}": cost for name, cost in view.costs().items()}
        values["gates/closed_paths"] = view.closed_paths()
        values |= {f"penalty/{name}": term for name, term in view.penalties().items()}
        self.scalars(values, step)
        if maps:
            self._gate_maps(view, step)

    def structure(self, structure: Structure, step: int, *, before: Structure | None = None) -> None:
        """Write a structure: an image of the share of the offered units that is kept, sizes, and the table as a text.

        The image of the stored units is `structure/kept`. With several tasks, `structure/kept by <task>` shows the
        units that a task uses. With an earlier structure `before`, the changes are `structure/changed` and
        `structure/diff`.
        """
        blocks, columns, cells = structure.grid()
        tasks = structure.tasks if len(structure.tasks) > 1 else ()
        self.scalars({"structure/params": structure.params, "structure/paths": len(structure.paths)}, step)
        self._text("structure/table", structure.table().splitlines(), step)
        if blocks:
            frame = self._frame("open", blocks, columns, _OPEN)
            for tag, found in (("", cells), *((f" by {task}", structure.grid(task)[2]) for task in tasks)):
                share = {place: kept / max(1, of) for place, (kept, of) in found.items()}
                self._image(f"structure/kept{tag}", frame.paint(share), step)
        if before is None:
            return
        lines = before.diff(structure)
        self._text("structure/diff", lines or ["nothing changed"], step)
        old = before.grid()[2]
        change = {place: (kept - old.get(place, (0, 0))[0]) / max(1, of) for place, (kept, of) in cells.items()}
        if lines and blocks:
            label = "change in the share kept (red: less)"
            frame = self._frame("change", blocks, columns, label, colours=_CHANGE, limits=(-1.0, 1.0))
            self._image("structure/changed", frame.paint(change), step)

    def frontier(
        self, frontier: Frontier, step: int = 0, *, within: float | None = None, tag: str = "frontier"
    ) -> None:
        """Write a frontier: its picture (see `frontier_picture`), its table as a text, and scalars of its points.

        The scalars `<tag>/loss` and `<tag>/params` have one value for each point, whose step is its number, the
        smallest first.
        """
        self._image(f"{tag}/picture", pixels(frontier_picture(frontier, within=within)), step)
        self._text(f"{tag}/table", frontier.table().splitlines(), step)
        for number, point in enumerate(frontier.points):
            self.scalars({f"{tag}/loss": point.loss, f"{tag}/params": point.params}, number)

    def mask(self, mask: Mask, step: int = 0, *, tag: str = "mask") -> None:
        """Write a mask: its density by role as scalars, by block and role as an image, and its table as a text."""
        blocks, columns, cells = mask.grid()
        share = {place: selected / max(1, of) for place, (selected, of) in cells.items()}
        totals: dict[str, list[int]] = {role: [0, 0] for role in columns}
        for (_, role), counts in cells.items():
            totals[role] = [total + count for total, count in zip(totals[role], counts, strict=True)]
        self.scalars({f"{tag}/{role}": free / max(1, of) for role, (free, of) in totals.items()}, step)
        if share:
            limits = (0.0, max(share.values()) or 1.0)
            frame = HeatMap(blocks, columns, "share of the elements that is free", limits=limits)
            self._image(f"{tag}/free", frame.paint(share), step)
        self._text(f"{tag}/table", mask.table().splitlines(), step)

    def matrix(self, names: Sequence[str], values: ArrayLike, step: int = 0, *, tag: str = "R") -> None:
        """Write scores, task by task, as an image, such as the matrix R of a continual run; see `matrix_picture`.

        Raises:
            DataError: `values` does not have one row and one column for each name.
        """
        self._image(tag, pixels(matrix_picture(names, values, title=tag)), step)

    def stream(self, result: StreamResult) -> None:
        """Write the state of a stream of tasks after a stage. `run_stream(on_stage=writer.stream)` does so for each.

        The step is the number of finished stages; step 0 is the untrained model. Scalars: `score/<task>`,
        `score/general`, `trained/elements`, `trained/bytes` and, after the last stage, `metrics/...` (OP, BWT, FWT,
        forgetting, general delta). Images: `R`, and `cores` if the tasks have cores.
        """
        step, last = len(result.stages), result.stages[-1]
        for at, record in ([(0, result.baseline)] if step == 1 else []) + [(step, last)]:
            scores = {f"score/{name}": score for name, score in zip(result.tasks, record.scores, strict=True)}
            self.scalars(scores | ({} if record.general is None else {"score/general": record.general}), at)
        self.scalars({"trained/elements": last.elements, "trained/bytes": last.bytes}, step)
        self._image("R", pixels(stream_picture(result)), step)
        if cores := result.cores():
            self._image("cores", pixels(core_picture(cores)), step)
        if step == result.record.stages:
            found = asdict(result.metrics)
            self.scalars({f"metrics/{name}": value for name, value in found.items() if value is not None}, step)
        self.flush()

    def hparams(
        self, config: Config | Mapping[str, Any], metrics: Mapping[str, float | None] | None = None, *, step: int = 0
    ) -> None:
        """Write the hyper-parameters and the results of this run, for the page that compares runs.

        TensorBoard takes its columns from the first run it finds. So every run should have every name, also for values
        that do not apply to it. Nested values get names with dots, None is written as `none`, and a list as JSON.

        Args:
            config: a configuration, or plain values by name.
            metrics: results by tag, written as scalars. None stands for a scalar that is written elsewhere.
            step: step of the results.
        """
        metrics = dict(metrics or {})
        for proto in protos.hparams(flat(config), metrics):
            self._write(proto, step)
        self.scalars({tag: value for tag, value in metrics.items() if value is not None}, step)

    def flush(self) -> None:
        """Make everything written so far visible to readers."""
        self.run.flush()

    def close(self) -> None:
        """Flush, and close the run if this writer opened it."""
        self.flush()
        if self._owned:
            self.run.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _view_of(self, adapters: Adapters, bank: GateBank) -> GateView:
        if self._view is None or self._view.bank is not bank or self._view.adapters.pressure is not adapters.pressure:
            self._view = GateView(adapters, bank, max_tags=self.max_tags)
            self._charts(self._view)
        else:
            self._view.read()
        return self._view

    def _charts(self, view: GateView) -> None:
        """Lay out the custom charts: the places of a block in one chart, costs and target in another."""
        charts: dict[str, list[Any]] = {}
        for tag in (tag for group in view.sets for tag in group.names):
            charts.setdefault(tag.partition("/")[0], ["Multiline", []])[1].append(re.escape(tag))
        gates = {
            "cost": ["Multiline", [f"gates/{name}" for name in view.costs()]],
            "closed paths": ["Multiline", ["gates/closed_paths"]],
        }
        if len(view.kinds) > 1:
            gates["path mix"] = ["Multiline", [re.escape(f"path mix/{kind}") for kind in view.kinds]]
        self.run.add_custom_scalars({"gates": gates, "open probability": charts})

    def _gate_maps(self, view: GateView, step: int) -> None:
        frame = self._frame("open", view.blocks, view.columns, _OPEN)
        for number, task in enumerate(view.adapters.tasks):
            self._image(f"open/{task}", frame.paint(view.open(number)), step)
        if len(view.kinds) > 1:
            frame = self._frame("mix", view.blocks, view.kinds, "share of the block's expected cost")
            self._image("path mix/by block", frame.paint(view.mix()), step)
        bins = np.linspace(*view.bank.config.bounds, 41)
        for name, values in view.log_alphas().items():
            self.run.add_histogram(f"log alpha/{name}", np.clip(values, bins[0], bins[-1]), step, bins=bins)

    def _frame(self, name: str, blocks: Sequence[int], columns: Sequence[str], label: str, **options: Any) -> HeatMap:
        key = f"{name} {blocks} {columns}"
        if key not in self._maps:
            self._maps[key] = HeatMap(blocks, columns, label, **options)
        return self._maps[key]

    def _image(self, tag: str, image: NDArray[np.uint8], step: int) -> None:
        file = io.BytesIO()
        imsave(file, image, format="png", pil_kwargs={"compress_level": 1})  # a tenth larger, five times as fast
        height, width, _ = image.shape
        encoded = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=file.getvalue())
        self._write(Summary(value=[Summary.Value(tag=tag, image=encoded)]), step)

    def _text(self, tag: str, lines: Sequence[str], step: int) -> None:
        more = [f"... and {len(lines) - _LINES:,} more"] if len(lines) > _LINES else []
        self.run.add_text(tag, "\n".join(f"    {line}" for line in [*lines[:_LINES], *more]), step)  # as it is

    def _write(self, proto: Any, step: int) -> None:
        self.run._get_file_writer().add_summary(proto, step)


def flat(config: Config | Mapping[str, Any], prefix: str = "") -> dict[str, int | float | str]:
    """A configuration as numbers and texts; nested fields have names with dots."""
    values = config.model_dump(mode="json") if isinstance(config, Config) else config
    found: dict[str, int | float | str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Config | Mapping):
            found |= flat(value, f"{name}.")
        elif isinstance(value, (int, float, str)) and not isinstance(value, bool):
            found[name] = value
        elif value is None or isinstance(value, bool):
            found[name] = str(value).lower()
        else:
            found[name] = json.dumps(value, default=str)
    return found
