"""No output of a study that fails, in whatever way, shows the password of its storage."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_up
import pytest
import yaml
from sqlalchemy.exc import OperationalError

from gatedadapters import redaction
from gatedadapters.cli import main
from gatedadapters.errors import GatedAdaptersError, StudyError
from gatedadapters.studies import Study, storage, study, workers

MARK = "S3cretMARK"
URLS = [
    f"postgresql://user:{MARK}@localhost:1/x",
    f"postgresql://user@localhost:1/x?password={MARK}",
    f"postgresql://user@localhost:1/x?pw={MARK}",
    f"postgresql://user:{MARK}@localhost:noport/x",
    f"postgresql://user:{MARK}",
    f"postgresql://user:a/{MARK} b@c:{MARK}@localhost:1/x",
    f"postgresql+nodriver://user:{MARK}@localhost/x",
    f"mysql://user:{MARK}@localhost:1/x",
    f"nonsense://user:{MARK}@x",
    f"grpc://user:{MARK}@localhost:1",
    f"grpc://user:{MARK}@localhost",
    f"grpc://localhost:1?password={MARK}",
]


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_known", set())
    monkeypatch.setattr(storage, "_WAIT", 1)


@pytest.fixture
def no_mark(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., None]:
    def check(*errors: BaseException) -> None:
        printed = capfd.readouterr()
        for error in errors:
            forms = (str(error), repr(error), str(error.args), str(vars(error)), *traceback.format_exception(error))
            assert MARK not in "".join(forms)
        assert MARK not in printed.out + printed.err
        for path in tmp_path.rglob("*"):
            assert path.is_dir() or MARK.encode() not in path.read_bytes(), path

    return check


@pytest.mark.parametrize("url", URLS)
@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")
def test_a_storage_that_cannot_be_opened(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_mark: Callable[..., None]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(made_up.config().model_dump(mode="json")))
    with pytest.raises(GatedAdaptersError) as caught:
        Study(made_up.config(), storage=url)
    no_mark(caught.value)
    for name in ("study", "report"):
        assert main([name, "study.yaml", "--storage", url]) == 2
        no_mark()


def test_a_storage_that_fails_while_trials_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_mark: Callable[..., None]
) -> None:
    found = Study(made_up.config(), storage=tmp_path / "study.journal", measure=made_up.measure)
    found.storage = URLS[0]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OperationalError(f"connecting to {URLS[0]}", {"password": MARK}, Exception(f"password={MARK}"))

    monkeypatch.setattr(study, "work", fail)
    with pytest.raises(StudyError, match=r"(?s)the storage of the study fails.*fix:") as caught:
        found.run()
    monkeypatch.setattr(study.queue, "trials_of", fail)
    with pytest.raises(StudyError) as listing:
        _ = found.trials
    no_mark(caught.value, listing.value)


def test_trials_that_fail_with_it_in_their_error(tmp_path: Path, no_mark: Callable[..., None]) -> None:
    def failing(search: Any, *args: Any, **kwargs: Any) -> Any:
        if search.training.seed == 1:
            raise OperationalError(f"connecting to {URLS[0]}", {}, Exception(f"hf_{MARK}1234567 password={MARK}"))
        return made_up.measure(search, *args, **kwargs)

    found = Study(made_up.config(retries=0), storage=tmp_path / "study.journal", measure=failing).run()
    found.report(tmp_path / "report")
    found.tensorboard(tmp_path / "runs")
    assert any("OperationalError" in trial.user_attrs.get("error", "") for trial in found.trials)
    for form in (str(found), found._repr_html_()):
        assert MARK not in form
    no_mark()


def test_a_worker_that_dies_of_it(no_mark: Callable[..., None]) -> None:
    for error in (ValueError(URLS[0]), StudyError(URLS[1], got=URLS[2])):
        with pytest.raises(SystemExit) as caught, workers.quiet_end():
            raise error
        no_mark(caught.value)
