"""The trials of the study: in a journal while they run, packed like the cells of other studies in the repository."""

from __future__ import annotations

import json
from pathlib import Path

from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from benchmarks.common.store import SCRATCH, Result, Store, locked
from gatedadapters.studies import Study
from gatedadapters.studies.queue import HEARTBEAT, KEY, OWNER

STORE = Store("robustness")
CONFIG = Path(__file__).with_name("robustness.yaml")
FOLDER = SCRATCH / "robustness"  # of the journal and of the report
VERSIONS = "versions"  # a trial that was packed before knows the versions that it ran on


def study(folder: Path = FOLDER) -> Study:
    """The study with every stored trial: those of the journal in `folder`, and packed ones that the journal lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock"):
        found = Study.load(CONFIG, storage=folder / "study.journal")
        known = {trial.user_attrs[KEY] for trial in found.trials}
        for key, result in sorted(STORE.results().items(), key=lambda item: int(item[1]["number"])):
            if key not in known:
                found.optuna.add_trial(_trial(key, result))
    return found


def pack(folder: Path = FOLDER) -> str:
    """Move every complete trial of the journal into the packed file."""
    packed, found = STORE.results(), study(folder)
    versions = found.optuna.user_attrs["gatedadapters"]["versions"]  # noted when the journal was made
    for trial in found.trials:
        if trial.state == TrialState.COMPLETE and trial.user_attrs[KEY] not in packed:
            own = trial.user_attrs.get(VERSIONS, versions)
            STORE.write(trial.user_attrs[KEY], {**_result(trial), VERSIONS: own})
    return STORE.pack()


def _result(trial: FrozenTrial) -> Result:
    """A trial as a result, without the machine and the process that ran it."""
    return {
        "number": trial.number,
        "score": trial.value,
        "factors": trial.params,
        "distributions": {name: json.loads(distribution_to_json(d)) for name, d in trial.distributions.items()},
        "attributes": {n: value for n, value in trial.user_attrs.items() if n not in (KEY, OWNER, HEARTBEAT, VERSIONS)},
    }


def _trial(key: str, result: Result) -> FrozenTrial:
    """Inverse of `_result`."""
    return create_trial(
        state=TrialState.COMPLETE,
        value=result["score"],
        params=result["factors"],
        distributions={name: json_to_distribution(json.dumps(d)) for name, d in result["distributions"].items()},
        user_attrs={KEY: key, VERSIONS: result[VERSIONS], **result["attributes"]},
    )
