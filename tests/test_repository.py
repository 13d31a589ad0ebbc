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
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gatedadapters
from gatedadapters.config.study import study_presets
from gatedadapters.data.bundled import PACKAGES

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
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
    assert released[0] == PROJECT["version"] == gatedadapters.__version__


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
    run = ROOT / ".ci" / "run"
    assert "bash scripts/test.sh" in run.read_text(encoding="utf-8")
    for script in (run, ROOT / "scripts" / "test.sh", ROOT / "scripts" / "quickstart.sh"):
        assert os.access(script, os.X_OK)
        subprocess.run(["bash", "-n", str(script)], check=True)
