"""What every run shares: the words it is called with, the check of its folder, and a light import."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest

from gatedadapters import experiments
from gatedadapters.config import CompressConfig, SearchConfig, TransferConfig
from gatedadapters.errors import ArtifactError, ConfigError
from gatedadapters.experiments import outputs

RUNS = ("search", "compress", "select", "continual", "transfer")


@pytest.mark.parametrize("name", experiments.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert getattr(experiments, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'serch'"):
        experiments.serch  # noqa: B018


@pytest.mark.parametrize("name", RUNS)
def test_every_run_takes_a_file_that_it_names_when_it_is_wrong(name: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("nonsense: 1")
    with pytest.raises(ConfigError, match=r"(?s)nonsense.*wrong\.yaml"):
        getattr(experiments, name)(tmp_path / "wrong.yaml", out=tmp_path / "out", overwrite=False)
    assert not (tmp_path / "out").exists()


def test_results_go_to_the_name_of_the_file_unless_a_folder_is_given(configured: Callable[..., Path]) -> None:
    file = configured()
    config, folder = outputs.config_and_folder(SearchConfig, str(file), None)
    assert (config, folder) == (SearchConfig.load(file), Path("search"))
    assert outputs.config_and_folder(SearchConfig, config, "runs/x") == (config, Path("runs/x"))


def test_a_configuration_without_a_file_needs_a_folder(configured: Callable[..., Path]) -> None:
    config = SearchConfig.load(configured())
    with pytest.raises(ConfigError, match=r"(?s)where the results go.*out=.*fix:.*out="):
        experiments.search(config)


def test_the_configuration_of_another_run_is_refused() -> None:
    config = TransferConfig.parse({"model": "a", "update": "b", "tasks": [{"train": "a.csv"}]}, where="test")
    given: Any = config
    with pytest.raises(ConfigError, match=r"(?s)a SearchConfig.*TransferConfig"):
        experiments.search(given, out="out")


@pytest.mark.parametrize(
    ("held", "overwrite", "named"),
    [
        ([], False, None),
        ([outputs.LOGS], False, None),
        ([outputs.METRICS, outputs.LOGS], True, None),
        ([outputs.METRICS], False, "or --overwrite"),
        ([outputs.METRICS, "notes.txt"], True, "notes.txt"),
    ],
)
def test_a_folder_is_free_unless_it_holds_results_or_files_of_others(
    held: list[str], overwrite: bool, named: str | None, tmp_path: Path
) -> None:
    for name in held:
        (tmp_path / name).touch()
    if named is None:
        outputs.check_output_folder(tmp_path, outputs.OF_SEARCH, overwrite=overwrite)
    else:
        with pytest.raises(ArtifactError, match=named):
            outputs.check_output_folder(tmp_path, outputs.OF_SEARCH, overwrite=overwrite)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(ArtifactError, match="a file"):
        outputs.check_output_folder(tmp_path / "out", outputs.OF_SEARCH, overwrite=True)


def test_the_package_has_its_runs_and_imports_each_when_it_is_used(tmp_path: Path) -> None:
    """Neither `import gatedadapters` nor showing nor planning pays for what training needs."""
    script = (
        "import sys; import gatedadapters as ga\n"
        "print('gatedadapters.experiments' in sys.modules)\n"
        "ga.experiments.show; ga.experiments.plan\n"
        "print(sorted({'matplotlib', 'optuna', 'peft', 'tensorboard', 'transformers.trainer'} & set(sys.modules)))\n"
        "ga.experiments.search\n"
        "print('transformers.trainer' in sys.modules)\n"
    )
    said = processes.run(processes.code, script, log=tmp_path / "log").splitlines()
    # bitsandbytes, which transformers.trainer imports where it is installed, says something, too.
    assert [line for line in said if line in ("False", "True") or line.startswith("[")] == ["False", "[]", "True"]


def test_a_compression_is_shorter_and_gentler_than_a_search_however_much_of_its_training_is_given() -> None:
    data = {"lora": "a", "budget": {"fraction": 0.5}, "task": {"train": "a.csv"}, "training": {"seed": 3}}
    training = CompressConfig.parse(data, where="test").as_search("model").training
    assert (training.steps, training.learning_rate, training.seed) == (200, 1e-3, 3)
