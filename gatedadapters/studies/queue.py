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

KEY, OWNER, HEARTBEAT, ERROR, UNCOUNTED = "key", "owner", "heartbeat", "error", "not counted as a failure"
LIVE = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
BEAT = 15.0  # seconds between heartbeats
_running_here: Counter[tuple[str, int]] = Counter()  # (study, trial): threads of this process that claim or work on it
_counting = threading.Lock()
_SILENCE = 6  # missing heartbeats after which a process counts as gone


@dataclass(frozen=True)
class Job:
    """Work for one trial.

    Attributes:
        key: names the work. Among all trials with the same key, one needs to complete.
        params: values that are fixed beforehand. The sampler chooses the others.
    """

    key: str
    params: Mapping[str, Any]


def trials_of(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    """Trials in these states (default: all), in the order of their numbers."""
    return study.get_trials(deepcopy=False, states=states or None)


def missing(study: optuna.Study, jobs: Iterable[Job], retries: int) -> list[Job]:
    """Jobs that still need a trial: none is waiting, running or done, and at most `retries` have failed."""
    failures: Counter[str] = Counter()
    live = set()
    for trial in trials_of(study):
        key = trial.user_attrs.get(KEY)
        if key is None:
            continue
        if trial.state in LIVE:
            live.add(key)
        elif UNCOUNTED not in trial.user_attrs:
            failures[key] += 1
    return [job for job in jobs if job.key not in live and failures[job.key] <= retries]


def enqueue(study: optuna.Study, job: Job) -> None:
    """Put a job into the queue."""
    study.enqueue_trial(dict(job.params), user_attrs={KEY: job.key})


def claim(study: optuna.Study) -> Trial | None:
    """Claim a waiting trial for this process; None if no trial is waiting."""
    storage = _storage(study)
    for waiting in trials_of(study, TrialState.WAITING):
        with _counting:  # before the claim, so that no thread sees it claimed by nobody
            _running_here[_name(study, waiting)] += 1
        try:
            if not storage.set_trial_state_values(waiting._trial_id, state=TrialState.RUNNING):
                release(study, waiting)
                continue
        except UpdateFinishedTrialError:
            release(study, waiting)
            continue
        trial = Trial(study, waiting._trial_id)
        owner = {"host": socket.gethostname(), "pid": os.getpid()}
        storage.set_trial_user_attr(waiting._trial_id, OWNER, owner)
        first = _first_of_its_key(study, waiting)
        if first == waiting.number:
            return trial
        # Two machines that started the study at the same moment have both filled the queue.
        fail(study, waiting, f"the same as trial {first}", uncounted=True)
        release(study, waiting)
    return None


def release(study: optuna.Study, trial: Trial | FrozenTrial) -> None:
    """Say that this process works on a claimed trial no longer, whatever has become of it."""
    with _counting:
        name = _name(study, trial)
        _running_here[name] -= 1  # another thread may have won the claim that this one lost
        if _running_here[name] <= 0:
            del _running_here[name]


def _name(study: optuna.Study, trial: Trial | FrozenTrial) -> tuple[str, int]:
    return study.study_name, trial.number


def _first_of_its_key(study: optuna.Study, trial: FrozenTrial) -> int:
    key = trial.user_attrs.get(KEY)
    return min((t.number for t in trials_of(study, *LIVE) if t.user_attrs.get(KEY) == key), default=trial.number)


def fail(study: optuna.Study, trial: Trial | FrozenTrial, error: str, *, uncounted: bool = False) -> bool:
    """Mark a trial as failed and store the reason; False if the trial was finished already.

    Args:
        study: the study of the trial.
        trial: the trial to mark.
        error: the reason.
        uncounted: whether this failure does not count towards the retries.
    """
    storage, number = _storage(study), trial._trial_id
    try:
        storage.set_trial_user_attr(number, ERROR, error)
        if uncounted:
            storage.set_trial_user_attr(number, UNCOUNTED, True)
        storage.set_trial_state_values(number, state=TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False
    return True


def retry(study: optuna.Study, trial: FrozenTrial, retries: int) -> bool:
    """Queue the job of a failed trial again, with the same values; False if it has failed more than `retries` times."""
    key = trial.user_attrs[KEY]
    failures = [t for t in trials_of(study, TrialState.FAIL) if t.user_attrs.get(KEY) == key]
    if sum(UNCOUNTED not in t.user_attrs for t in failures) > retries:
        return False
    params = trial.params or trial.system_attrs.get("fixed_params", {})
    enqueue(study, Job(key, params))
    return True


class Watch:
    """Finds running trials whose process is gone.

    A process on this machine is looked up by its id. A process on another machine is gone if its heartbeat has not
    changed for `silence` seconds, measured by the clock of this process: the clocks of machines need not agree.
    """

    def __init__(self, silence: float = _SILENCE * BEAT) -> None:
        self.silence = silence
        self._seen: dict[int, tuple[Any, float]] = {}

    def lost(self, study: optuna.Study) -> list[FrozenTrial]:
        """Running trials whose process is gone."""
        now, found = time.monotonic(), []
        for trial in trials_of(study, TrialState.RUNNING):
            beat = trial.user_attrs.get(HEARTBEAT)
            before, since = self._seen.get(trial.number, (None, now))
            if trial.number not in self._seen or beat != before:
                self._seen[trial.number] = beat, now
                since = now
            owner = trial.user_attrs.get(OWNER, {})
            here = owner.get("host") == socket.gethostname()
            gone = here and not (_alive(owner["pid"]) if owner["pid"] != os.getpid() else _is_mine(study, trial))
            if gone or now - since > self.silence:
                found.append(trial)
        return found

    def collect(self, study: optuna.Study, retries: int, *, uncounted: bool = False) -> int:
        """Mark lost trials as failed, queue their jobs again, and return how many there were; see `fail`.

        A trial without an owner was claimed by a process that was killed before it began: that is no failure of it.
        """
        count = 0
        for trial in self.lost(study):
            begun = OWNER in trial.user_attrs
            if fail(study, trial, "the process that worked on it is gone", uncounted=uncounted or not begun):
                retry(study, trial, retries)
                count += 1
        return count


class Heartbeat:
    """A context that increases a trial's heartbeat every few seconds."""

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
                return  # another process marked the trial as failed; `work` finds out at the end of the trial
            except Exception:  # a network that fails for a while costs one heartbeat
                continue


def _is_mine(study: optuna.Study, trial: FrozenTrial) -> bool:
    """Whether this process is at work on a trial that it owns; not if an error of the storage has ended that work."""
    return _name(study, trial) in _running_here


def _alive(pid: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _storage(study: optuna.Study) -> optuna.storages.BaseStorage:
    return study._storage
