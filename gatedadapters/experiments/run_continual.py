"""The run `continual`: tune a model on task after task, with one or several strategies. A stopped run can go on."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gatedadapters.config import ContinualConfig
from gatedadapters.config.base import read_yaml
from gatedadapters.continual import StreamResult, check_stream, metrics_table, run_stream
from gatedadapters.continual.digests import difference
from gatedadapters.continual.result import STREAM
from gatedadapters.continual.strategies import Strategy, resolve
from gatedadapters.continual.strategies.random import RandomCores
from gatedadapters.errors import ArtifactError, ConfigError
from gatedadapters.experiments import outputs
from gatedadapters.experiments.progress import say, silence_transformers
from gatedadapters.experiments.streams import build_stream, stream_orders
from gatedadapters.inspection import TensorBoardWriter, save_core_png, save_stream_png
from gatedadapters.safe_files import file_errors, write_text


@dataclass(frozen=True)
class ContinualResult:
    """The results of all streams of all strategies. Its text is what `gatedadapters continual` prints.

    Attributes:
        config: the configuration of the run.
        folder: the output folder.
        streams: results by strategy, in the order of `stream_orders`. The first strategy is the configured one; the
            others are compared with it.
    """

    config: ContinualConfig
    folder: Path
    streams: dict[str, list[StreamResult]]

    def table(self) -> str:
        """The first stream of each strategy, then means over all streams, then the cores of the first task."""
        parts = [str(results[0]) for results in self.streams.values()]
        count = len(next(iter(self.streams.values())))
        parts.append(f"mean and 95 % interval over {count} streams (orders and seeds):" if count > 1 else "all:")
        parts.append(metrics_table({name: [r.metrics for r in results] for name, results in self.streams.items()}))
        reports = [results[0].stages[0].report for results in self.streams.values()]
        first = next(iter(self.streams.values()))[0].stages[0].task
        parts += [f"core of {first}: {report}" for report in reports if report]
        return "\n\n".join(parts)

    def __str__(self) -> str:
        contents = {
            f"{outputs.PICTURES}/": "scores after every task, and where the cores lie",
            f"{outputs.LOGS}/": "the same while it runs: tensorboard --logdir",
            f"{outputs.STREAMS}/": "what every task changed; gatedadapters.StreamResult.load(...).restore(model, to=k)",
            outputs.METRICS: "every number",
            outputs.CONTINUAL_CONFIG: "the configuration",
        }
        return f"{self.table()}\n\nIn {self.folder}:\n{outputs.list_outputs(contents)}"


@file_errors("read or write a file of the run", "continual")
def continual(
    config: ContinualConfig | str | Path, out: str | Path | None = None, *, overwrite: bool = False
) -> ContinualResult:
    """Run every strategy on every stream, as `gatedadapters continual` does.

    A run that was stopped goes on when it is called again with the same arguments, and ends with the same bits.

    Args:
        config: the configuration, or the path of its YAML file.
        out: folder of the results. Default: the name of the YAML file, in the current folder.
        overwrite: whether to start anew if that folder holds an earlier run.

    Raises:
        GatedAdaptersError: the configuration, the model, the data or the folder cannot be used, before anything is
            trained; or training failed.
    """
    config, folder = outputs.config_and_folder(ContinualConfig, config, out)
    silence_transformers()
    strategies = _by_name([resolve(strategy) for strategy in (config.strategy, *config.compare)])
    text = config.to_yaml(folder.absolute())
    unfinished = {path.name for path in folder.glob(f".{outputs.CONTINUAL_CONFIG}.*")}  # left by a killed process
    results = outputs.OF_CONTINUAL | unfinished
    outputs.check_output_folder(folder, results, overwrite=overwrite or _can_go_on(folder, text))
    model, stream = build_stream(config, config.seeds[0])
    for strategy in strategies.values():  # all of them before the first is trained
        check_stream(model, stream, strategy, training=config.training)
    if overwrite:
        for name in (outputs.STREAMS, outputs.PICTURES, outputs.LOGS):
            shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / outputs.CONTINUAL_CONFIG, text)  # before any result: a run goes on only beside its own
    for name in unfinished:
        (folder / name).unlink(missing_ok=True)
    (folder / outputs.PICTURES).mkdir(exist_ok=True)
    streams: dict[str, list[StreamResult]] = {name: [] for name in strategies}
    main = next(iter(strategies))
    for place, seed, order in stream_orders(config):
        for name, strategy in strategies.items():
            say(f"{name}, stream {place}: {', '.join(config.tasks[i].title for i in order)}")
            earlier = None if name == main else streams[main][-1]
            streams[name].append(_run_one(config, folder, name, strategy, place, seed, order, earlier))
    result = ContinualResult(config, folder, streams)
    _write(result)
    return result


def _run_one(
    config: ContinualConfig,
    folder: Path,
    name: str,
    strategy: Strategy,
    place: str,
    seed: int,
    order: list[int],
    main: StreamResult | None,
) -> StreamResult:
    """Run one strategy on one stream.

    Args:
        config: the configuration of the run.
        folder: the output folder.
        name: name of the strategy.
        strategy: the strategy.
        place: name of the stream.
        seed: seed of the stream.
        order: order of the tasks.
        main: the result of the first strategy on this stream, from which a random core takes its size; None if this is
            the first strategy.
    """
    model, stream = build_stream(config, seed)
    if main is not None and isinstance(strategy, RandomCores):
        sized = _of_equal_size(strategy, main)
        try:
            check_stream(model, stream.ordered(order), sized, training=config.training)
            strategy = sized
        except ConfigError as error:  # it is configured to choose from fewer elements than the first strategy trained
            say(f"  {name} keeps its share, for {error}")
    logs = folder / outputs.LOGS / name / place
    shutil.rmtree(logs, ignore_errors=True)  # a stream that goes on logs the stages it finished earlier once more
    with TensorBoardWriter(logs) as writer:
        return run_stream(
            model,
            stream.ordered(order),
            strategy,
            training=config.training.model_copy(update={"seed": seed}),
            folder=folder / outputs.STREAMS / name / place,
            keep=config.keep,
            watch=lambda line: say(f"  {line}"),
            on_stage=writer.stream,
        )


def _by_name(strategies: list[Strategy]) -> dict[str, Strategy]:
    """Each strategy under its kind, with a number where a kind is used more than once."""
    found: dict[str, Strategy] = {}
    for strategy in strategies:
        number = sum(name.rpartition("-")[0] == strategy.kind or name == strategy.kind for name in found)
        found[f"{strategy.kind}-{number + 1}" if number else strategy.kind] = strategy
    return found


def _of_equal_size(strategy: RandomCores, main: StreamResult) -> RandomCores:
    """A random core as large as what `main` trained on each task, unless it is configured with a size of its own."""
    fields: dict[str, Any] = strategy.model_dump(exclude_unset=True)
    if "elements" in fields or "share" in fields.get("core", {}) or len(main.stages) != len(main.tasks):
        return strategy
    return strategy.model_copy(update={"elements": tuple(stage.elements for stage in main.stages)})


def _can_go_on(folder: Path, text: str) -> bool:
    """Whether `folder` holds this run, or no result yet.

    Args:
        folder: the output folder.
        text: the configuration of this run, as it is written there.

    Raises:
        ArtifactError: the folder holds results of another configuration; the error names what differs.
    """
    if not ((folder / outputs.METRICS).exists() or any(folder.glob(f"{outputs.STREAMS}/*/*/{STREAM}"))):
        return True
    file = folder / outputs.CONTINUAL_CONFIG
    earlier = file.read_text(encoding="utf-8") if file.is_file() else None
    if earlier in (text, None):
        return earlier is not None
    place, expected, got = difference(read_yaml(file), yaml.safe_load(text))
    raise ArtifactError(
        "the folder holds a run of another configuration",
        expected=expected,
        got=got,
        where=f"{file}: {place.removeprefix('.')}",
        fix="give the same one, another --out, or --overwrite",
    )


def _write(result: ContinualResult) -> None:
    folder = result.folder
    for name, streams in result.streams.items():
        save_stream_png(streams[0], folder / outputs.PICTURES / f"{name}.png", title=name)
        if cores := streams[0].cores():
            save_core_png(cores, folder / outputs.PICTURES / f"{name}-cores.png")
    data = {
        "config": result.config.as_written(),
        "streams": {name: [stream.to_data() for stream in streams] for name, streams in result.streams.items()},
    }
    outputs.write_metrics(folder, data)
    outputs.write_table(folder, result.table())
