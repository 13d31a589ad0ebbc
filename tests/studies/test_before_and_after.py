"""A study refuses before it computes, survives kills and half a line, and ends with its parent."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import made_up
import optuna
import processes
import pytest
import yaml
from optuna.trial import TrialState

from gatedadapters.cli import main
from gatedadapters.errors import ArtifactError, FileAccessError
from gatedadapters.studies import Study, open_storage, queue, report, study

KILLS = int(os.environ.get("STUDY_KILLS", "4"))
OPTIMISE: dict[str, Any] = {
    "mode": "optimise",
    "sides": {"gated": {}},
    "seeds": [0],
    "factors": {"training.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
}


def forbidden(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a trial was run")


def made(tmp_path: Path, **changes: Any) -> Study:
    return Study(made_up.config(**changes), storage=tmp_path / "study.journal", measure=made_up.measure)


# -- before ------------------------------------------------------------------------------------------------------------


def test_a_report_folder_that_cannot_be_used_is_refused_before_a_trial_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "work", forbidden)
    Path("study.yaml").write_text(yaml.safe_dump(made_up.config().model_dump(mode="json")))
    Path("mine").mkdir()
    Path("mine", "thesis.txt").write_text("mine")
    for folder, says in (("mine", "thesis.txt"), ("mine/thesis.txt/report", "cannot write")):
        assert main(["study", "study.yaml", "--out", folder]) == 2
        assert says in capsys.readouterr().err


def test_a_storage_that_cannot_be_written_is_refused_before_a_trial_runs(tmp_path: Path, full_disk: Any) -> None:
    made(tmp_path)
    found = Study(made_up.config(), storage=tmp_path / "study.journal", measure=forbidden)
    size = (tmp_path / "study.journal").stat().st_size
    with full_disk(size + 20), pytest.raises(FileAccessError, match=r"(?s)study\.journal.*fix:"):
        found.run()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"trials": 3}, "the first 3 trials are what others are compared with"),
        ({"search": {**made_up.SEARCH, "training": {"steps": 1}}}, "runs of 1 steps with the prune at 0.1 have no"),
        ({"search": {**made_up.SEARCH, "schedule": {"prune": 0.9}}}, "the prune at 0.9 have no step"),
        ({"search": {**made_up.SEARCH, "schedule": {"prune": None}}}, "the schedule has no prune"),
        ({"objectives": ["score", "params"]}, "studies of one objective only"),
        ({"objectives": ["params"]}, "only the score is reported"),
    ],
)
def test_a_study_that_cannot_prune_says_so(
    changes: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = made(tmp_path, **{**OPTIMISE, "trials": 8, **changes})
    assert found.unpruned is not None
    assert says in found.unpruned
    found.run(2)
    assert says in capsys.readouterr().err
    assert says in str(found)
    assert says in found.report(tmp_path / "report").read_text()


@pytest.mark.parametrize("changes", [{}, {"prune": False, "trials": 3}])
def test_a_study_that_prunes_or_need_not_says_nothing(changes: dict[str, Any], tmp_path: Path) -> None:
    found = made(tmp_path, **{**OPTIMISE, "trials": 8, **changes})
    assert found.unpruned is None
    assert "stopped early" not in str(found)


def test_a_name_that_is_a_path_is_refused() -> None:
    for name in ("../evil", "a/b", ".hidden", "a\\b"):
        with pytest.raises(ValueError, match="its name is no path"):
            made_up.config(name=name)


# -- kills and full disks ----------------------------------------------------------------------------------------------


def results(found: Study) -> dict[str, float]:
    done = [trial for trial in found.trials if trial.state == TrialState.COMPLETE]
    assert len({trial.user_attrs["key"] for trial in done}) == len(done)
    return {trial.user_attrs["key"]: trial.values[0] for trial in done}


@pytest.mark.slow
def test_kills_while_trials_run_lose_double_and_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = tmp_path / "study.journal"
    for kill in range(KILLS):
        process = processes.start(made_up.run, journal, 1)
        until = time.monotonic() + 60
        while not journal.exists() or not claimed(journal, kill):
            assert time.monotonic() < until
            assert process.is_alive()
            time.sleep(0.02)
        time.sleep(random.SystemRandom().random())
        process.kill()
        process.join()
    monkeypatch.setattr(queue.Watch.__init__, "__defaults__", (1.0,))  # a kill may come before the owner is stored
    killed = Study(made_up.config(retries=0), storage=journal, measure=made_up.measure).run()
    assert not queue.trials_of(killed.optuna, TrialState.RUNNING, TrialState.WAITING)
    whole = Study(made_up.config(), storage=tmp_path / "whole.journal", measure=made_up.measure).run()
    assert results(killed) == results(whole)


def claimed(journal: Path, kills: int) -> bool:
    """Whether this process has claimed a trial, after so many kills."""
    return journal.read_bytes().count(b'"owner"') > kills


@pytest.mark.slow
def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    process = processes.start(made_up.run, journal, 2)
    owners: set[int] = set()
    until = time.monotonic() + 120
    while len(owners) < 2:
        assert time.monotonic() < until
        assert process.is_alive()
        time.sleep(0.1)
        lines = journal.read_text().splitlines() if journal.exists() else []
        owners = {json.loads(line)["user_attr"]["owner"]["pid"] for line in lines if '"owner"' in line}
    process.kill()
    process.join()
    until = time.monotonic() + 20
    while any(queue._alive(pid) for pid in owners):
        assert time.monotonic() < until, "workers live on"
        time.sleep(0.1)
    found = Study(made_up.config(retries=0), storage=journal, measure=made_up.measure).run()
    assert len(results(found)) == 14


def test_half_a_line_in_the_journal_is_passed_over(tmp_path: Path) -> None:
    made(tmp_path).run(3)
    journal = tmp_path / "study.journal"
    with journal.open("ab") as file:
        file.write(b'{"op_code":5,"worker_id":"')
    found = made(tmp_path).run()
    assert len(results(found)) == 14
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_a_disk_that_is_full_while_a_trial_runs_leaves_a_study_that_goes_on(tmp_path: Path, full_disk: Any) -> None:
    found = made(tmp_path)
    size = (tmp_path / "study.journal").stat().st_size
    with full_disk(size + 6000), pytest.raises(FileAccessError, match=r"(?s)study\.journal.*fix:"):
        found.run()
    again = made(tmp_path).run()
    assert len(results(again)) == 14


def test_a_study_whose_maker_was_killed_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study.time, "sleep", lambda seconds: None)
    optuna.create_study(
        storage=open_storage(tmp_path / "study.journal"), study_name=made_up.config().name, direction="maximize"
    )
    assert len(results(made(tmp_path).run())) == 14


def test_of_two_who_write_one_report_one_wins_and_the_other_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = made(tmp_path, seeds=[0]).run()
    found.report(tmp_path / "report")
    page = report.html_page

    def meanwhile(*args: Any) -> str:
        monkeypatch.setattr(report, "html_page", page)
        found.report(tmp_path / "report")
        return page(*args)

    monkeypatch.setattr(report, "html_page", meanwhile)
    with pytest.raises(ArtifactError, match="another process has written this folder meanwhile"):
        found.report(tmp_path / "report")
    assert (tmp_path / "report" / "report.html").is_file()
