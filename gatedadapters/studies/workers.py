"""Running the trials in a study's queue, in this process or in several."""

from __future__ import annotations

import _thread
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.trial import Trial, TrialState

from gatedadapters.config import StudyConfig
from gatedadapters.errors import GatedAdaptersError, StudyError
from gatedadapters.redaction import redacted
from gatedadapters.studies import queue

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
RunTrial = Callable[[optuna.Study, Trial], Sequence[float]]  # returns the values of the objectives
_POLL = 0.5  # seconds between looks at the queue
_SHUTDOWN = 5.0  # seconds that interrupted workers have to put their trials back


def work(study: optuna.Study, run: RunTrial, config: StudyConfig) -> None:
    """Run trials until none is waiting or running. Other processes' trials count, because they may come back.

    A trial that raises an error is kept with the error, and its job is queued again at most `config.retries` times.

    Raises:
        KeyboardInterrupt: the current job is queued again, and the interruption does not count as a failure.
    """
    watch = queue.Watch()
    while True:
        trial = queue.claim(study)
        if trial is not None:
            _run_one(study, trial, run, config)
        elif not queue.trials_of(study, TrialState.RUNNING):
            if not queue.trials_of(study, TrialState.WAITING):
                return
        elif not watch.collect(study, config.retries):
            time.sleep(_POLL)


def _run_one(study: optuna.Study, trial: Trial, run: RunTrial, config: StudyConfig) -> None:
    try:
        _run_claimed(study, trial, run, config)
    finally:
        queue.release(study, trial)


def _run_claimed(study: optuna.Study, trial: Trial, run: RunTrial, config: StudyConfig) -> None:
    frozen = study.get_trials(deepcopy=False)[trial.number]
    try:
        with queue.Heartbeat(study, trial):
            values = run(study, trial)
        study.tell(trial, list(values), skip_if_finished=True)
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
    except KeyboardInterrupt:
        if queue.fail(study, trial, "interrupted", uncounted=True):
            queue.retry(study, frozen, config.retries)
        raise
    except Exception:  # one trial that fails must not stop the others
        current = study.get_trials(deepcopy=False)[trial.number]
        if queue.fail(study, trial, redacted(traceback.format_exc(limit=-6))):
            queue.retry(study, current, config.retries)


def work_together(
    entry: Callable[..., None], arguments: tuple[Any, ...], study: optuna.Study, config: StudyConfig, workers: int
) -> None:
    """Run `entry(*arguments, index)` in several processes until the queue is empty.

    Each process gets its share of the cores and, if there are several GPUs, one of them. A process that dies is
    replaced.

    Raises:
        StudyError: processes die again and again without finishing a trial.
    """
    context = multiprocessing.get_context("spawn")  # threads and GPUs do not survive a fork
    watch = queue.Watch()
    processes: dict[int, Any] = {}
    deaths, done = 0, _finished(study)

    def start(index: int) -> None:
        with _environment(index, workers):
            processes[index] = context.Process(target=entry, args=(*arguments, index), daemon=False)
            processes[index].start()

    try:
        for index in range(workers):
            start(index)
        while processes:
            time.sleep(_POLL)
            for index, process in list(processes.items()):
                if process.is_alive():
                    continue
                process.join()
                del processes[index]
                watch.collect(study, config.retries)
                if process.exitcode == 0:
                    continue
                deaths = deaths + 1 if _finished(study) == done else 1
                done = _finished(study)
                if deaths > workers * (1 + config.retries):
                    raise StudyError(
                        "workers die before they finish a trial",
                        expected="processes that live",
                        got=f"{deaths} deaths in a row, the last with exit code {process.exitcode}",
                        where=f"study {config.name}",
                        fix="look for memory that runs out; take fewer workers",
                    )
                if queue.trials_of(study, TrialState.WAITING, TrialState.RUNNING):
                    start(index)
    finally:  # processes are left only after an interruption or an error
        until = time.monotonic() + _SHUTDOWN
        for process in processes.values():
            process.join(max(0.0, until - time.monotonic()))  # an interrupted worker puts its trial back itself
            process.terminate()
            process.join()
        if processes:
            queue.Watch().collect(study, config.retries, uncounted=True)


@contextmanager
def quiet_end() -> Iterator[None]:
    """A context for the work of a process: it ends with the process that started it, and prints no secret.

    If the parent is gone, the work is interrupted, which puts a running trial back into the queue. The process ends in
    any case a little later.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        return
    except GatedAdaptersError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except Exception:
        print(redacted(traceback.format_exc()), file=sys.stderr)
        raise SystemExit(1) from None


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    parent.join()
    _thread.interrupt_main()
    time.sleep(_SHUTDOWN)
    os._exit(1)


def _finished(study: optuna.Study) -> int:
    return len(queue.trials_of(study, TrialState.COMPLETE, TrialState.PRUNED))


@contextmanager
def _environment(index: int, workers: int) -> Iterator[None]:
    """The environment that process `index` inherits: threads for its share of the cores, and one GPU of several."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    changes = {name: str(min(threads, int(os.environ.get(name, threads)))) for name in THREADS}
    gpus = _gpus()
    if len(gpus) > 1:
        changes["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        [str(i) for i in range(torch.cuda.device_count())] if visible is None else [v for v in visible.split(",") if v]
    )
