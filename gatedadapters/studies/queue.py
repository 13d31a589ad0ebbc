"""Trials as a queue that any number of processes on any number of machines work off.

Everything that is to run is put into the storage beforehand as waiting trials, each with the `key` of what it is. A
process claims one by changing its state, which every storage grants to one process only: nothing is lost, nothing runs
twice. Who works on a trial lets its `heartbeat` count; who sees one stand still, or knows that its process is gone,
marks the trial as failed, and thereby has the right and the duty to put it into the queue again.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

KEY, OWNER, HEARTBEAT, ERROR, SPARED = "key", "owner", "heartbeat", "error", "not counted as a failure"
LIVE = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
BEAT = 15.0  # seconds between heartbeats
_SILENCE = 6  # heartbeats that may fail to come


@dataclass(frozen=True)
class Job:
    """What waits to be run.

    Attributes:
        key: what it is; of all trials of one key one is enough.
        params: what is fixed beforehand; the sampler chooses the rest.
    """

    key: str
    params: Mapping[str, Any]


def trials_of(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    """Trials in the order of their numbers."""
    return study.get_trials(deepcopy=False, states=states or None)


def missing(study: optuna.Study, jobs: Iterable[Job], retries: int) -> list[Job]:
    """Jobs that no trial waits for, runs or has done, and that have not failed too often."""
    failures: Counter[str] = Counter()
    live = set()
    for trial in trials_of(study):
        key = trial.user_attrs.get(KEY)
        if key is None:
            continue
        if trial.state in LIVE:
            live.add(key)
        elif SPARED not in trial.user_attrs:
            failures[key] += 1
    return [job for job in jobs if job.key not in live and failures[job.key] <= retries]


def enqueue(study: optuna.Study, job: Job) -> None:
    """Put a job into the queue."""
    study.enqueue_trial(dict(job.params), user_attrs={KEY: job.key})


def claim(study: optuna.Study) -> Trial | None:
    """A waiting trial that is ours from now on; None where none waits."""
    storage = _storage(study)
    for waiting in trials_of(study, TrialState.WAITING):
        try:
            if not storage.set_trial_state_values(waiting._trial_id, state=TrialState.RUNNING):
                continue
        except UpdateFinishedTrialError:
            continue
        trial = Trial(study, waiting._trial_id)
        owner = {"host": socket.gethostname(), "pid": os.getpid()}
        storage.set_trial_user_attr(waiting._trial_id, OWNER, owner)
        first = _first_of_its_key(study, waiting)
        if first == waiting.number:
            return trial
        # two machines that began the study in the same moment have both filled the queue
        fail(study, waiting, f"the same as trial {first}", spared=True)
    return None


def _first_of_its_key(study: optuna.Study, trial: FrozenTrial) -> int:
    key = trial.user_attrs.get(KEY)
    return min((t.number for t in trials_of(study, *LIVE) if t.user_attrs.get(KEY) == key), default=trial.number)


def fail(study: optuna.Study, trial: Trial | FrozenTrial, error: str, *, spared: bool = False) -> bool:
    """Mark a trial as failed, with the reason; False where it was finished already."""
    storage, number = _storage(study), trial._trial_id
    try:
        storage.set_trial_user_attr(number, ERROR, error)
        if spared:
            storage.set_trial_user_attr(number, SPARED, True)
        storage.set_trial_state_values(number, state=TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False
    return True


def retry(study: optuna.Study, trial: FrozenTrial, retries: int) -> bool:
    """Put what a failed trial was to do into the queue again, with the same values; False where it failed too often."""
    key = trial.user_attrs[KEY]
    failures = [t for t in trials_of(study, TrialState.FAIL) if t.user_attrs.get(KEY) == key]
    if sum(SPARED not in t.user_attrs for t in failures) > retries:
        return False
    params = trial.params or trial.system_attrs.get("fixed_params", {})
    enqueue(study, Job(key, params))
    return True


class Watch:
    """Finds running trials whose process is gone.

    On this machine a process is looked up; of others the heartbeat must go on, by the watch of who looks: the clocks of
    machines need not agree.
    """

    def __init__(self, silence: float = _SILENCE * BEAT) -> None:
        self.silence = silence
        self._seen: dict[int, tuple[Any, float]] = {}

    def lost(self, study: optuna.Study) -> list[FrozenTrial]:
        """Trials that nobody works on any more."""
        now, found = time.monotonic(), []
        for trial in trials_of(study, TrialState.RUNNING):
            beat = trial.user_attrs.get(HEARTBEAT)
            before, since = self._seen.get(trial.number, (None, now))
            if trial.number not in self._seen or beat != before:
                self._seen[trial.number] = beat, now
                since = now
            owner = trial.user_attrs.get(OWNER, {})
            here = owner.get("host") == socket.gethostname()
            if (here and not _alive(owner["pid"])) or now - since > self.silence:
                found.append(trial)
        return found

    def collect(self, study: optuna.Study, retries: int, *, spared: bool = False) -> int:
        """Mark what is lost as failed and queue it again; how many there were. Spared failures do not count."""
        count = 0
        for trial in self.lost(study):
            if fail(study, trial, "the process that worked on it is gone", spared=spared):
                retry(study, trial, retries)
                count += 1
        return count


class Heartbeat:
    """Lets a trial's heartbeat count while the block runs."""

    def __init__(self, study: optuna.Study, trial: Trial, every: float = BEAT) -> None:
        self.storage, self.number, self.every = _storage(study), trial._trial_id, every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        count = 0
        while not self._stop.wait(self.every):
            count += 1
            try:
                self.storage.set_trial_user_attr(self.number, HEARTBEAT, count)
            except UpdateFinishedTrialError:
                return  # somebody took us for dead; `work` finds out when it is done
            except Exception:  # a network that fails for a while costs a beat
                continue


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _storage(study: optuna.Study) -> optuna.storages.BaseStorage:
    return study._storage
