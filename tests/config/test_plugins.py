"""What another installed package registers is known to the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from gatedadapters.cli.main import main
from gatedadapters.config.plugins import load_plugins
from gatedadapters.errors import ConfigError
from gatedadapters.robustness import corruption_kinds

MODULE = """
from gatedadapters.robustness import Typos, register

@register
class Shouted(Typos):
    \"\"\"Words in capitals.\"\"\"

    kind = "shouted-{name}"
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that names a module of its own."""
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[gatedadapters]\nmine = {tmp_path.name}_words\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / f"{tmp_path.name}_words.py"


def test_what_a_package_registers_is_known(package: Path) -> None:
    package.write_text(MODULE.format(name=package.stem))
    load_plugins()
    assert f"shouted-{package.stem}" in corruption_kinds()


def test_a_plugin_that_fails_is_named(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package.write_text("import no_such_module_of_mine")
    with pytest.raises(ConfigError, match=r"(?s)no_such_module_of_mine.*entry point mine"):
        load_plugins()
    assert main(["show", "nowhere"]) == 2
    assert "entry point mine" in capsys.readouterr().err
