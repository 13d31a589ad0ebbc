"""What the repository promises beside its code: versions, presets, the wheel, the commands of the README."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import processes
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gatedadapters
from gatedadapters.config.study import study_presets
from gatedadapters.data.bundled import PACKAGES

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SCRIPTS = [ROOT / ".ci" / "run", *sorted(p for p in (ROOT / "scripts").glob("*.sh") if p.name != "setup.sh")]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(p for p in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if p.name != "config.yml")
PRESETS = sorted(path.stem for path in (ROOT / "search_spaces").glob("*.yaml"))


def pins(name: str) -> dict[str, str]:
    """The exact versions in a requirements file; anything but ``name==version`` fails."""
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    split = [line.split("==") for line in lines if line]
    return {canonicalize_name(package): version for package, version in split}


def declared() -> list[Requirement]:
    """Everything that pyproject.toml asks for, extras included."""
    texts = [
        *PROJECT["dependencies"],
        *(text for extra in PROJECT["optional-dependencies"].values() for text in extra),
    ]
    return [requirement for text in texts if (requirement := Requirement(text)).name != "gatedadapters"]


@pytest.mark.parametrize("requirement", declared(), ids=str)
def test_the_tested_version_lies_within_the_bounds(requirement: Requirement) -> None:
    tested = pins("constraints.txt")
    assert canonicalize_name(requirement.name) in tested
    assert requirement.specifier.contains(tested[canonicalize_name(requirement.name)])


def test_torch_is_pinned_without_a_build() -> None:
    assert re.fullmatch(r"[\d.]+", pins("constraints.txt")["torch"])


def test_data_packages_are_those_the_readers_were_checked_against() -> None:
    assert pins("benchmarks/requirements.txt") == {package.name: package.version for package in PACKAGES.values()}


def test_one_version_everywhere() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d[^\]]*)\]", changelog, flags=re.MULTILINE)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert released[0] == PROJECT["version"] == gatedadapters.__version__ == cited["version"]
    assert cited["license"] == PROJECT["license"]
    assert cited["repository-code"] == PROJECT["urls"]["Home"]


def test_the_command_line_is_installed_where_the_package_is() -> None:
    try:
        scripts = metadata.distribution("gatedadapters").entry_points
    except metadata.PackageNotFoundError:
        pytest.skip("the package is on the path, not installed")
    assert [(script.name, script.value) for script in scripts] == list(PROJECT["scripts"].items())


def test_public_names_exist() -> None:
    assert sorted(set(gatedadapters.__all__)) == sorted(gatedadapters.__all__)
    assert all(hasattr(gatedadapters, name) for name in gatedadapters.__all__)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_loads(preset: str) -> None:
    space = gatedadapters.SearchSpace.load(preset)
    assert space.name == preset
    assert space.description


def test_the_wheel_carries_presets_and_types_and_works_on_its_own(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"gatedadapters/search_spaces/{preset}.yaml" for preset in PRESETS} <= names
    assert {f"gatedadapters/search_spaces/studies/{name}.yaml" for name in study_presets()} <= names
    assert "gatedadapters/py.typed" in names
    assert {name.split("/")[0] for name in names} == {
        "gatedadapters",
        f"gatedadapters-{PROJECT['version']}.dist-info",
    }
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)  # of a wheel without scripts, all that installing does
    script = site / "check.py"
    script.write_text(f"""
import gatedadapters
assert gatedadapters.__file__.startswith({str(site)!r}), gatedadapters.__file__
print([gatedadapters.SearchSpace.load(name).name for name in {PRESETS}])
""")
    assert processes.run(processes.script, script, log=tmp_path / "log").strip() == str(PRESETS)


def test_the_source_distribution_leaves_results_out() -> None:
    sdist = pytest.importorskip("hatchling.builders.sdist")
    names = {file.distribution_path for file in sdist.SdistBuilder(str(ROOT)).recurse_included_files()}
    assert {"tests/test_repository.py", "benchmarks/__main__.py", "docs/results.md"} <= names
    assert not [name for name in names if name.startswith(("benchmarks/results", "benchmarks/scratch"))]


def test_continuous_integration_runs_the_commands_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "bash scripts/test.sh" in readme
    assert "bash scripts/quickstart.sh" in readme
    assert "bash scripts/test.sh" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_executable_and_can_be_parsed(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.stem)
def test_a_workflow_calls_what_exists(workflow: Path) -> None:
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert all(("run" in step) != ("uses" in step) for step in steps)
    commands = [re.sub(r"\$\{\{.*?\}\}", "X", step["run"]) for step in steps if "run" in step]
    assert commands
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)
        files = [word for word in command.split() if "/" in word or word.endswith(".txt")]
        assert all((ROOT / file).is_file() for file in files), files
        extras = re.findall(r"scripts/setup\.sh (\S+)", command)
        assert {extra for found in extras for extra in found.split(",")} <= PROJECT["optional-dependencies"].keys()


def test_workflows_run_every_python_that_is_promised_and_the_lowest_versions() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))["jobs"]
    promised = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert jobs["pinned"]["strategy"]["matrix"]["python"] == promised
    assert PROJECT["requires-python"] == f">={promised[0]}"
    assert {"run": "bash .ci/run"} in jobs["pinned"]["steps"]
    assert {"run": "bash scripts/test-lowest.sh"} in jobs["lowest"]["steps"]


def test_hooks_before_a_commit_run_tools_of_the_environment() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    checked = set((ROOT / "scripts" / "test.sh").read_text(encoding="utf-8").splitlines())
    assert {"ruff check .", "ruff format --check .", "mypy"} <= checked
    assert [hook["entry"] for hook in hooks] == ["ruff check --fix", "ruff format", "mypy"]
    tools = {Requirement(text).name for text in PROJECT["optional-dependencies"]["dev"]}
    assert {hook["entry"].split()[0] for hook in hooks} <= tools


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_a_form_for_issues_names_itself_and_what_it_asks(form: Path) -> None:
    data = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert data["name"]
    assert data["description"]
    assert all(field["attributes"]["label"] for field in data["body"])
