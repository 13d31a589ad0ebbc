"""The documentation builds without a warning, needs no network, and names everything that is public."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import gatedadapters
from gatedadapters.allocation import score_kinds as placement_kinds
from gatedadapters.cli.main import COMMANDS, parser
from gatedadapters.continual import strategy_kinds
from gatedadapters.masking.scores import score_kinds
from gatedadapters.paths import path_kinds
from gatedadapters.robustness import corruption_kinds

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
PACKAGES = (
    *(
        "allocation",
        "continual",
        "data",
        "errors",
        "experiments",
        "inspection",
        "masking",
        "masking.scores",
        "paths",
        "robustness",
        "studies",
    ),
    *("testing", "training", "transfer"),
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    silent = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=silent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_builds_without_a_warning_and_loads_nothing_from_a_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    loaded = re.compile(r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(?:https?:)?//|<link[^>]*\shref=\"?(?:https?:)?//")
    assert {page.name: found for page in pages if (found := loaded.findall(page.read_text(encoding="utf-8")))} == {}
    styles = [style.read_text(encoding="utf-8") for style in site.rglob("*.css")]
    assert [style for style in styles if re.search(r"url\([\"']?https?:|@import", style)] == []


def test_no_page_shows_markup_that_was_not_rendered(site: Path) -> None:
    for page in site.rglob("*.html"):
        prose = re.sub(r"<(code|pre).*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert "```" not in prose, page.name
        assert "::: " not in prose, page.name


def documented() -> dict[str, Any]:
    """What the reference pages show, by the name they give."""
    names = re.findall(r"^::: (\S+)$", "\n".join(page.read_text() for page in REFERENCE.glob("*.md")), re.MULTILINE)
    assert len(names) == len(set(names))
    return {name: resolved(name) for name in names}


def resolved(name: str) -> Any:
    """What a dotted name stands for: a module as far as there is one, then attributes."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found = import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


def public() -> Iterator[tuple[str, Any]]:
    for package in ("gatedadapters", *(f"gatedadapters.{name}" for name in PACKAGES)):
        module = import_module(package)
        for name in module.__all__:
            if not isinstance(found := getattr(module, name), ModuleType):
                yield f"{package}.{name}", found


def test_every_public_name_is_on_a_reference_page() -> None:
    shown = documented()
    objects = {id(value) for value in shown.values()}
    assert [name for name, value in public() if name not in shown and id(value) not in objects] == []
    assert {name for name in gatedadapters.__all__ if not hasattr(gatedadapters, name)} == set()


def test_every_command_and_option_is_on_its_page() -> None:
    page = (REFERENCE / "command-line.md").read_text(encoding="utf-8")
    (commands,) = (action.choices for action in parser()._actions if action.choices)
    assert len(commands) == len(COMMANDS)
    for name, command in commands.items():
        assert f"`{name}`" in page
        options = set(re.findall(r"--[a-z-]+", command.format_help())) - {"--help"}
        assert [option for option in sorted(options) if f"`{option}`" not in page] == [], name


@pytest.mark.parametrize(
    ("page", "kinds"),
    [
        ("paths.md", path_kinds),
        ("scores.md", score_kinds),
        ("allocation.md", placement_kinds),
        ("continual.md", strategy_kinds),
        ("robustness.md", corruption_kinds),
    ],
)
def test_every_kind_of_the_library_is_on_its_page(page: str, kinds: Callable[[], dict[str, type]]) -> None:
    text = (REFERENCE / page).read_text(encoding="utf-8")
    own = [kind for kind, found in kinds().items() if found.__module__.startswith("gatedadapters.")]
    assert len(own) > 4
    assert [kind for kind in own if f"`{kind}`" not in text] == []


def test_the_map_shows_every_room_of_the_package() -> None:
    page = (ROOT / "docs" / "map.md").read_text(encoding="utf-8")
    rooms = [place for place in (ROOT / "gatedadapters").iterdir() if (place / "__init__.py").is_file()]
    assert len(rooms) > 15
    assert [room.name for room in rooms if f"\n  {room.name}/ " not in page] == []


def test_every_link_of_the_readme_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160
