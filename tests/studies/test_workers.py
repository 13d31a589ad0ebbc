"""Several processes on one study: nothing lost, nothing twice, also where one is killed."""

from __future__ import annotations

import os
import socket
import threading
import time
from functools import partial
from pathlib import Path

import made_up
import optuna
import processes
import pytest
from optuna.trial import TrialState

from benchmarks.common.postgresql import free_port
from gatedadapters.errors import StudyError
from gatedadapters.studies import Study, queue, workers


def check_complete(found: Study) -> None:
    done = [trial.user_attrs["key"] for trial in found.trials if trial.state == TrialState.COMPLETE]
    assert sorted(done) == sorted(job.key for job in found._jobs())
    assert not queue.trials_of(found.optuna, TrialState.RUNNING, TrialState.WAITING)


def check_killed(found: Study, marker: Path) -> None:
    check_complete(found)
    (killed,) = (trial for trial in found.trials if trial.state == TrialState.FAIL)
    assert killed.user_attrs["owner"]["pid"] == int(marker.read_text())
    assert "is gone" in killed.user_attrs["error"]
    again = [t for t in found.trials if t.user_attrs["key"] == killed.user_attrs["key"] and t.number > killed.number]
    assert [trial.state for trial in again] == [TrialState.COMPLETE]
    assert again[0].params["penalty.weight"] == killed.system_attrs["fixed_params"]["penalty.weight"]


def killed_on(storage: Path | str, marker: Path) -> Study:
    found = Study(made_up.config(), storage=storage, measure=partial(made_up.deadly, marker)).run(workers=2)
    check_killed(found, marker)
    return found


def test_workers_on_a_journal_lose_nothing_where_one_is_killed(tmp_path: Path) -> None:
    found = killed_on(tmp_path / "study.journal", tmp_path / "marker")
    assert len({trial.user_attrs["owner"]["pid"] for trial in found.trials}) > 1


def test_workers_on_postgresql_lose_nothing_where_one_is_killed(
    postgresql: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda method: processes.CONTEXT)  # starts quicker
    found = killed_on(postgresql, tmp_path / "marker")
    again = Study(made_up.config(seeds=[0, 1, 2]), storage=postgresql, measure=made_up.measure).run()
    assert len(again.trials) == len(found.trials) == 15 + 7
    check_complete(again)
    with pytest.raises(StudyError, match="another space"):
        Study(made_up.config(factors={"noise.ratio": {"values": [0.0]}}), storage=postgresql)


def test_a_proxy_serves_a_storage_to_other_machines(tmp_path: Path) -> None:
    port = free_port()
    journal = optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.journal"))
    server = optuna.storages._grpc.server.make_server(optuna.storages.JournalStorage(journal), "localhost", port)
    server.start()
    try:
        found = Study(made_up.config(), storage=f"grpc://localhost:{port}", measure=made_up.measure).run()
        check_complete(found)
    finally:
        server.stop(None).wait()


def test_many_threads_claim_every_trial_once(tmp_path: Path) -> None:
    config = made_up.config(seeds=list(range(10)))
    first = Study(config, storage=tmp_path / "study.journal", measure=made_up.measure)
    for job in first._jobs():
        queue.enqueue(first.optuna, job)

    def work() -> None:
        Study(config, storage=tmp_path / "study.journal", measure=made_up.measure).run()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_complete(first)
    assert len(first.trials) == 70


def test_a_claim_that_another_thread_lost_does_not_look_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study()
    queue.enqueue(study, queue.Job("k", {"x": 1}))
    stale = queue.trials_of(study, TrialState.WAITING)
    assert queue.claim(study) is not None
    with monkeypatch.context() as patched:  # the other thread listed the waiting trials before
        patched.setattr(queue, "trials_of", lambda study, *states: stale)
        assert queue.claim(study) is None
    assert queue.Watch().lost(study) == []


def test_a_trial_that_a_storage_error_ended_in_this_process_is_given_up() -> None:
    study = running(socket.gethostname(), os.getpid())
    assert not queue.Watch().lost(study)
    queue.release(study, study.trials[0])
    assert queue.Watch().lost(study)


def test_a_claim_that_was_killed_before_it_began_is_no_failure() -> None:
    study = optuna.create_study()
    queue.enqueue(study, queue.Job("k", {"x": 1}))
    study._storage.set_trial_state_values(study.trials[0]._trial_id, state=TrialState.RUNNING)
    watch = queue.Watch(silence=0.1)
    assert not watch.lost(study)
    time.sleep(0.2)
    assert watch.collect(study, retries=0) == 1
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.WAITING]


def running(host: str, pid: int) -> optuna.Study:
    study = optuna.create_study()
    queue.enqueue(study, queue.Job("k", {"x": 1}))
    trial = queue.claim(study)
    assert trial is not None
    trial.set_user_attr(queue.OWNER, {"host": host, "pid": pid})
    return study


def test_a_trial_of_another_machine_is_given_up_when_its_heartbeat_stops() -> None:
    study = running("elsewhere", 1)
    watch = queue.Watch(silence=0.3)
    for beat in range(4):
        optuna.trial.Trial(study, study.trials[0]._trial_id).set_user_attr(queue.HEARTBEAT, beat)
        assert not watch.lost(study)
        time.sleep(0.15)
    time.sleep(0.3)
    assert watch.collect(study, retries=1) == 1
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.WAITING]
    assert watch.collect(study, retries=1) == 0


def test_a_trial_of_this_machine_is_given_up_when_its_process_is_gone() -> None:
    assert not queue.Watch().lost(running(socket.gethostname(), os.getpid()))
    assert queue.Watch().lost(running(socket.gethostname(), 2**22 + 1))


def test_who_was_given_up_cannot_finish_any_more() -> None:
    study = running("elsewhere", 1)
    trial = study.trials[0]
    assert queue.fail(study, trial, "silent")
    assert not queue.fail(study, trial, "silent")
    study.tell(trial.number, 1.0, skip_if_finished=True)
    assert study.trials[0].state == TrialState.FAIL


def test_a_heartbeat_counts_while_a_trial_runs() -> None:
    study = running(socket.gethostname(), os.getpid())
    trial = optuna.trial.Trial(study, study.trials[0]._trial_id)
    with queue.Heartbeat(study, trial, every=0.02):
        time.sleep(0.2)
    beats = study.trials[0].user_attrs[queue.HEARTBEAT]
    assert beats > 1
    time.sleep(0.1)
    assert study.trials[0].user_attrs[queue.HEARTBEAT] == beats


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for name in workers.THREADS:
        monkeypatch.delenv(name, raising=False)
    with workers._environment(0, 3):
        assert {os.environ[name] for name in workers.THREADS} == {"2"}
    with workers._environment(0, 20):
        assert {os.environ[name] for name in workers.THREADS} == {"1"}
    assert not any(name in os.environ for name in workers.THREADS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    with workers._environment(3, 4):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,6"
