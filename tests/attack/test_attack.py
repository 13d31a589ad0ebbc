"""Whatever a file holds is answered: with a result, or with an error that says where and what to do."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import runner

from gatedadapters.errors import ConfigError

CASES = int(os.environ.get("ATTACK_CASES", "1000"))  # of each format


@pytest.mark.slow
@pytest.mark.parametrize("name", runner.formats())
def test_every_answer_is_as_promised(name: str) -> None:
    answers = runner.run(name, range(CASES))
    assert not answers.faults, str(answers)
    assert answers.refused > CASES / 2, str(answers)


@pytest.mark.filterwarnings("ignore:TaskConfig. file:FutureWarning")
def test_whole_configurations_get_as_far_as_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mutate_yaml

    mutate_yaml.prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, run in mutate_yaml.COMMANDS.items():
        if name == "space":
            assert run("space.yaml") == 0
            continue
        with pytest.raises(runner.RefusedError, match=r"the model cannot be read|there is no such storage"):
            run(f"{name}.yaml")


def test_what_is_not_as_promised_is_a_fault() -> None:
    def refuse(**parts: str) -> None:
        raise ConfigError("wrong", **parts)

    told = {"where": "here", "fix": "mend it"}
    assert runner.judge(runner.Attack("", lambda: refuse(**told)))[0] == "refused"
    assert runner.judge(runner.Attack("", lambda: refuse(where="here"))) == (
        "fault",
        "no remedy: wrong\n  where:    here",
    )
    assert "ZeroDivisionError" in runner.judge(runner.Attack("", lambda: 1 / 0))[1]
    assert runner.judge(runner.Attack("", lambda: 1, lambda found: found == 1))[0] == "accepted"
    assert "another result" in runner.judge(runner.Attack("", lambda: 2, lambda found: found == 1))[1]


def test_a_process_that_hangs_or_dies_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mutate_bad.py").write_text(
        "import os, time\n"
        "from runner import Attack\n"
        "def prepare(folder): pass\n"
        "def attack(random, valid, folder):\n"
        "    ways = [lambda: os._exit(3), lambda: time.sleep(60), lambda: [0] * 4 * 10**7]\n"
        "    return Attack('', random.choice(ways))\n"
    )
    monkeypatch.setattr(runner, "SILENCE", 4.0)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    start = time.monotonic()
    answers = runner.run("bad", range(6))
    assert time.monotonic() - start < 60
    problems = "\n".join(fault.problem for fault in answers.faults)
    assert len(answers.faults) == 6
    for says in ("exit code 3", "no answer within 4 s", "MB beyond the start"):
        assert says in problems
