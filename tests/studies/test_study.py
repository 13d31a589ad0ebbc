"""Studies in one process: what is run, kept, retried, refused, computed and reported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from made_up import FACTORS, SEARCH, config, measure, score
from optuna.trial import TrialState
from scipy import stats

import gatedadapters as ga
from gatedadapters.config import SearchConfig, StudyConfig
from gatedadapters.errors import ArtifactError, ConfigError, StudyError
from gatedadapters.studies import Measured, Study, open_storage, storage
from gatedadapters.studies.results import Curve, search_of

OPTIMISE: dict[str, Any] = {
    "mode": "optimise",
    "sides": {"gated": {}},
    "seeds": [0],
    "factors": {
        "training.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
        "budget.fraction": {"low": 0.05, "high": 0.5},
    },
    "search": {**SEARCH, "perturbation": {"kind": "typos", "ratio": 0.2}},
}


def study(tmp_path: Path, scored_by: Any = measure, **changes: Any) -> Study:
    return Study(config(**changes), storage=tmp_path / "study.journal", measure=scored_by)


def curve(found: Study, factor: str, side: str, task: str = "mean") -> Curve:
    (only,) = [c for c in found.curves() if (c.factor, c.side, c.task) == (factor, side, task)]
    return only


def test_curves_are_means_over_seeds_with_t_intervals(tmp_path: Path) -> None:
    found = study(tmp_path, seeds=[0, 1, 2]).run()
    search = SearchConfig.parse(SEARCH, where="test")
    noisy = curve(found, "noise.ratio", "uniform", "b")
    assert [point.value for point in noisy.points] == [0.0, 0.2]
    for point in noisy.points:
        scores = []
        for seed in (0, 1, 2):
            training = search.training.model_copy(update={"seed": seed})
            noise = search.noise.model_copy(update={"ratio": point.value}) if search.noise else None
            scores.append(score(search.model_copy(update={"training": training, "noise": noise}), "uniform", 1, 0.0))
        interval = stats.ttest_1samp(scores, 0.0).confidence_interval(0.95)
        assert (point.score - point.half, point.score + point.half) == pytest.approx(
            (interval.low, interval.high), abs=1e-4
        )
        assert point.seeds == 3
    perturbed = curve(found, "perturbation.ratio", "gated")
    assert [p.score - perturbed.points[0].score for p in perturbed.points] == pytest.approx([0.0, -0.02, -0.06])
    weighted = curve(found, "penalty.weight", "gated")
    assert [point.params for point in weighted.points] == [round(1000 / (1 + w)) for w in (0.1, 1.0, 10.0)]
    assert weighted.drop == pytest.approx(0.099)
    assert not [c for c in found.curves() if c.factor == "penalty.weight" and c.side == "uniform"]


def test_a_grid_averages_over_the_other_factors(tmp_path: Path) -> None:
    factors = {k: FACTORS[k] for k in ("noise.ratio", "perturbation.ratio")}
    found = study(tmp_path, design="grid", factors=factors).run()
    assert len(found.trials) == 8
    noisy = curve(found, "noise.ratio", "gated")
    assert noisy.points[0].score - noisy.points[1].score == pytest.approx(0.06)
    perturbed = curve(found, "perturbation.ratio", "uniform")
    assert perturbed.points[0].score - perturbed.points[2].score == pytest.approx(0.06)


def test_running_again_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    first = study(tmp_path).run(3)
    assert len(first.trials) == 3
    again = study(tmp_path).run()
    keys = [trial.user_attrs["key"] for trial in again.trials]
    assert len(keys) == len(set(keys)) == 14
    assert all(trial.state == TrialState.COMPLETE for trial in again.trials)
    assert len(study(tmp_path).run().trials) == 14
    assert len(study(tmp_path, seeds=[0, 1, 2]).run().trials) == 21  # more seeds are the same study


def test_a_trial_that_fails_is_kept_with_its_error_and_retried(tmp_path: Path) -> None:
    calls: list[int] = []

    def broken(search: SearchConfig, side: Any, *args: Any, **kwargs: Any) -> Measured:
        if search.penalty is not None and search.training.seed == 1:
            calls.append(1)
            if search.penalty.weight == 1.0 or len(calls) == 1:
                raise ZeroDivisionError("made up")
        return measure(search, side, *args, **kwargs)

    found = study(tmp_path, broken, retries=2).run()
    failed = [trial for trial in found.trials if trial.state == TrialState.FAIL]
    assert len(failed) == 1 + 3
    assert all("ZeroDivisionError: made up" in trial.user_attrs["error"] for trial in failed)
    assert sum(trial.state == TrialState.COMPLETE for trial in found.trials) == 13
    report = found.report(tmp_path / "report").read_text()
    assert "ZeroDivisionError: made up" in report
    count = len(found.trials)
    assert len(study(tmp_path, broken, retries=2).run().trials) == count  # not for ever
    assert len(study(tmp_path, retries=3).run().trials) == count + 1


def test_an_interrupted_trial_is_taken_up_again(tmp_path: Path) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Measured:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(tmp_path, interrupted, retries=0).run()
    found = study(tmp_path, retries=0).run()
    assert sum(trial.state == TrialState.COMPLETE for trial in found.trials) == 14


def test_two_machines_that_fill_the_queue_at_once_run_nothing_twice(tmp_path: Path) -> None:
    from gatedadapters.studies import queue

    one, other = study(tmp_path), study(tmp_path)
    for job in (*one._jobs(), *one._jobs()[:5]):
        queue.enqueue(one.optuna, job)
    other.run()
    done = [trial.user_attrs["key"] for trial in other.trials if trial.state == TrialState.COMPLETE]
    assert len(done) == len(set(done)) == 14
    assert "5 failed" not in repr(other)


def test_a_study_of_the_same_name_over_another_space_is_refused(tmp_path: Path) -> None:
    before = study(tmp_path).run(2)
    with pytest.raises(StudyError, match=r"(?s)another space.*factors.*another name"):
        study(tmp_path, factors={"noise.ratio": {"values": [0.0, 0.1]}})
    optuna.create_study(storage=open_storage(tmp_path / "study.journal"), study_name="foreign").ask()
    with pytest.raises(StudyError, match="not one of ours"):
        study(tmp_path, name="foreign")
    assert len(before.trials) == 2


def test_a_study_goes_on_where_its_folder_was_moved_to(tmp_path: Path) -> None:
    for folder in ("alice", "bob"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "study.yaml").write_text(yaml.safe_dump(config().model_dump(mode="json")))
    loaded = [StudyConfig.load(tmp_path / folder / "study.yaml") for folder in ("alice", "bob")]
    assert loaded[0].search.tasks != loaded[1].search.tasks
    first, second = (Study(each, storage=tmp_path / "study.journal", measure=measure) for each in loaded)
    first.run()
    assert len(second.run().trials) == len(first.trials)
    assert second.best()[0].tasks == loaded[1].search.tasks
    assert first.best()[0].tasks == loaded[0].search.tasks


def test_a_study_that_is_only_looked_at_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no such storage"):
        Study(config(), storage=tmp_path / "new.journal", create=False)
    assert not (tmp_path / "new.journal").exists()
    study(tmp_path).run(1)
    with pytest.raises(StudyError, match="no such study"):
        Study(config(name="mistyped"), storage=tmp_path / "study.journal", create=False)
    assert optuna.get_all_study_names(open_storage(tmp_path / "study.journal")) == [config().name]
    before = (tmp_path / "study.journal").read_bytes()
    seen = Study(config(), storage=tmp_path / "study.journal", create=False)
    assert len(seen.trials) == 1
    seen.report(tmp_path / "report")
    assert (tmp_path / "study.journal").read_bytes() == before


def test_storages_that_cannot_be_used_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_WAIT", 1)
    with pytest.raises(StudyError, match=r"SQLite.*(?s:.*)journal"):
        Study(config(), storage=f"sqlite:///{tmp_path}/x.db").run(workers=2)
    with pytest.raises(StudyError, match="no such folder"):
        open_storage(tmp_path / "nowhere" / "x.journal")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(StudyError, match="no journal"):
        open_storage(tmp_path / "text")
    with pytest.raises(StudyError, match="cannot be reached"):
        open_storage("nonsense://x")
    with pytest.raises(StudyError, match="a host and its port"):
        open_storage("grpc://x")
    with pytest.raises(StudyError, match="cannot be reached"):
        open_storage("grpc://localhost:1")
    with pytest.raises(StudyError, match="open"):
        Study(config(), storage=optuna.storages.InMemoryStorage()).run(workers=2)


def test_an_unreachable_database_is_named_without_its_password() -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(StudyError, match="cannot be reached") as raised:
        open_storage("postgresql://user:secret@localhost:1/x")
    assert "secret" not in str(raised.value)
    assert "user:***@localhost:1" in str(raised.value)


def test_unknown_noise_is_refused_before_anything_is_stored(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such noise"):
        study(tmp_path, search={**SEARCH, "noise": {"kind": "nonsense", "ratio": 0}})
    with pytest.raises(ConfigError, match="training only"):
        study(tmp_path, search={**SEARCH, "perturbation": {"kind": "label", "ratio": 0}})
    with pytest.raises(ConfigError, match="no such noise"):
        study(tmp_path, factors={"noise.kind": {"values": ["label", "nonsense"]}})
    assert not list(tmp_path.iterdir())


def test_nothing_to_report_says_why(tmp_path: Path) -> None:
    found = study(tmp_path, lambda *args, **kwargs: 1 / 0, retries=0)
    with pytest.raises(StudyError, match="run the study first"):
        found.report(tmp_path / "report")
    found.run(1)
    with pytest.raises(StudyError, match=r"(?s)1 failed.*ZeroDivisionError"):
        found.report(tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_the_report_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    tasks = [{"train": str(tmp_path / name)} for name in ("a.csv", "b.csv")]
    found = study(tmp_path, search={**SEARCH, "tasks": tasks}).run()
    page = found.report(tmp_path / "report").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == 2
    markdown = (tmp_path / "report" / "report.md").read_text()
    pictures = re.findall(r"\]\((.*?)\)", markdown)
    assert {"sensitivity.png", "parallel.png"} == set(pictures)
    assert all((tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    for text in ("noise.ratio", "gated: mean", "optuna", "seeds", "14 complete"):
        assert text in markdown
        assert text in page
    best = [SearchConfig.load(file) for file in sorted((tmp_path / "report").glob("best-*.yaml"))]
    assert best == found.best()
    assert len(best) == 2
    assert best[0].penalty is None
    found.report(tmp_path / "report")  # its own is replaced, another study's is not
    other = study(tmp_path, name="other", search={**SEARCH, "tasks": tasks}).run()
    with pytest.raises(ArtifactError, match="already"):
        other.report(tmp_path / "report")
    assert found.report(tmp_path / "report").read_text() == page
    other.report(tmp_path / "report", overwrite=True)
    assert "14 complete" in repr(found)
    assert "noise.ratio" in str(found)
    assert "data:image/png" in found._repr_html_()


def test_optimising_prefers_what_scores_best_and_prunes_the_hopeless(tmp_path: Path) -> None:
    found = study(tmp_path, **OPTIMISE, trials=30).run()
    assert len(found.trials) == 30
    states = [trial.state for trial in found.trials]
    assert states.count(TrialState.PRUNED) > 0
    assert states.count(TrialState.COMPLETE) > 10
    (best,) = found.best()
    assert best.training.learning_rate == pytest.approx(0.002, abs=0.0015)
    shares = found.importances()
    assert shares["score"]["training.learning_rate"] > shares["score"]["budget.fraction"]
    assert shares["params"]["budget.fraction"] > shares["params"]["training.learning_rate"]
    page = found.report(tmp_path / "report").read_text()
    assert "PED-ANOVA" in page


def test_optimising_several_objectives_finds_the_feasible_front(tmp_path: Path) -> None:
    limits = {"params": 3000, "gap": 0.1}
    found = study(tmp_path, **OPTIMISE, trials=24, objectives=["score", "params", "gap"], constraints=limits).run()
    assert all(trial.state == TrialState.COMPLETE for trial in found.trials)
    front = found.front()
    assert {trial.number for trial in front} == {trial.number for trial in found.optuna.best_trials}
    assert all(trial.user_attrs["params"] <= 3000 for trial in front)
    assert any(trial.user_attrs["params"] > 3000 for trial in found.trials)
    for trial in found.trials:
        assert trial.values[2] == pytest.approx(0.2 * 0.2)
        assert search_of(trial).budget.fraction == trial.params["budget.fraction"]
    page = found.report(tmp_path / "report").read_text()
    assert "Pareto front" in page
    assert (tmp_path / "report" / "pareto.png").exists()


def losses(*args: Any, report: Any = None, **options: Any) -> Measured:
    """The closed form as a loss: what raises the score lowers it."""

    def turned(scores: Mapping[str, float]) -> dict[str, float]:
        return {task: 2 - value for task, value in scores.items()}

    told = None if report is None else lambda step, value: report(step, 2 - value)
    found = measure(*args, report=told, **options)
    return replace(found, scores=turned(found.scores), perturbed=tuple(map(turned, found.perturbed)))


TEXTS = {"tasks": [{"train": "a.txt"}, {"train": "b.jsonl", "kind": "chat"}]}


def test_a_study_of_texts_minimises_the_loss(tmp_path: Path) -> None:
    search = OPTIMISE["search"] | TEXTS
    found = study(tmp_path, losses, **OPTIMISE | {"search": search}, trials=30).run()
    assert [trial.state for trial in found.trials].count(TrialState.PRUNED) > 0
    (best,) = found.best()
    assert best.training.learning_rate == pytest.approx(0.002, abs=0.0015)
    assert found.importances()["score"]["training.learning_rate"] > 0.5

    limits = {"score": 1.13, "gap": 0.1}
    several = {**OPTIMISE, "search": search, "objectives": ["score", "gap"], "constraints": limits}
    front = study(tmp_path, losses, **several, name="several", trials=24).run()
    assert all(trial.values[1] == pytest.approx(0.04) for trial in front.trials)  # the loss is higher under typos
    assert all(trial.values[0] <= 1.13 for trial in front.front())
    assert any(trial.values[0] > 1.13 for trial in front.trials)


def test_the_report_of_a_study_of_texts_speaks_of_losses(tmp_path: Path) -> None:
    found = study(tmp_path, losses, search=SEARCH | TEXTS).run()
    assert found.best()[0].noise is None  # without noise the loss is lowest
    page = found.report(tmp_path / "report").read_text()
    for text in ("Loss per token, mean and 95 % t interval", "Loss by factor", "loss per token, "):
        assert text in page
    assert "ccuracy" not in page.partition("<h2>Environment")[0]
    (clean, *_) = curve(found, "noise.ratio", "gated").points
    assert f"{clean.score:.4f} ±" in str(found)


def test_the_public_name_is_the_class() -> None:
    assert ga.Study is Study


def test_every_complete_trial_is_a_tensorboard_run_that_names_every_value(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    found = study(tmp_path, seeds=[0]).run()
    for _ in range(2):  # the second time there is nothing to write
        found.tensorboard(tmp_path / "runs")
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) == len([trial for trial in found.trials if trial.state == TrialState.COMPLETE])
    columns = set()
    for run in runs:
        (file,) = run.iterdir()
        events = EventAccumulator(str(run)).Reload()
        trial = found.trials[int(run.name.removeprefix("trial-"))]
        (score,) = events.Scalars("score")
        assert score.value == pytest.approx(trial.values[0])
        start = HParamsPluginData.FromString(
            events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        ).session_start_info
        columns.add(tuple(sorted(start.hparams)))
        assert {"side", "noise.ratio", "training.seed", "training.learning_rate"} <= set(start.hparams), file
    assert len(columns) == 1
