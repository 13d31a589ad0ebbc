"""Imports point down, no files import each other in a circle, the package imports lightly, the tree is the map's."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gatedadapters"
FLOORS = (
    {"artefact_files", "errors", "patterns", "redaction", "safe_files", "untrusted"},
    {"reporting", "config"},
    {"runtime"},
    {"backbone"},
    {"gates", "paths"},
    {"structure"},
    {"supernet"},
    {"masking"},
    {"allocation"},
    {"artifacts"},
    {"data"},
    {"training"},
    {"continual", "transfer", "robustness", "inspection"},
    {"experiments"},
    {"studies"},
    {"cli"},
)
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
ABOVE_ALL = {"__init__", "__main__"}  # the public names, and the command line
BESIDE = {"testing"}  # contracts and tiny backbones, which nothing in the package imports
LOOSE = {"__init__", "__main__", *FLOORS[0]}  # files that stand in no room
HEAVY = {"optuna", "tensorboard", "matplotlib", "peft"}

Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """Every file of the package by its dotted name; a room's ``__init__`` has the name of the room."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def room(module: str) -> str:
    """``gatedadapters.gates.bank`` stands in the room ``gates``; the package itself is ``__init__``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def read_imports(known: dict[str, Path]) -> Graph:
    """The files that each file names in its imports: inside functions and for types only, too."""
    graph: Graph = {}
    for module, path in known.items():
        names: list[tuple[str, str]] = []
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names += [(alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}, line {node.lineno}: use absolute imports"
                names += [(node.module or "", alias.name) for alias in node.names]
        targets = {f"{base}.{name}" if f"{base}.{name}" in known else base for base, name in names}
        graph[module] = {target for target in targets if target in known} - {module}
    return graph


@pytest.fixture(scope="module")
def imports() -> Graph:
    return read_imports(modules())


def circles(graph: Graph) -> list[str] | None:
    """The files of one circle of imports, or None."""
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return None


def test_every_room_has_its_floor(imports: Graph) -> None:
    rooms = {room(module) for module in imports} - ABOVE_ALL - BESIDE
    assert rooms == set(FLOOR), "say in FLOORS where a new room belongs"


def test_only_errors_and_files_stand_loose() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == LOOSE


def test_imports_point_down_types_included(imports: Graph) -> None:
    upward = [
        f"{module} imports {target}"
        for module, targets in imports.items()
        if room(module) in FLOOR
        for target in targets
        if room(target) != room(module) and FLOOR.get(room(target), len(FLOORS)) > FLOOR[room(module)]
    ]
    assert not upward


def test_no_files_import_each_other_in_a_circle(imports: Graph) -> None:
    assert circles(imports) is None


def test_a_circle_would_be_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None


def test_rooms_of_one_floor_do_not_import_each_other_in_circles(imports: Graph) -> None:
    between: Graph = {}
    for module, targets in imports.items():
        between.setdefault(room(module), set()).update(room(target) for target in targets)
    assert circles({name: targets - {name} for name, targets in between.items()}) is None


def test_testing_imports_only_what_an_outsider_may_extend(imports: Graph) -> None:
    used = {room(target) for module, targets in imports.items() if room(module) == "testing" for target in targets}
    assert not used & {"experiments", "studies", "cli", "inspection"}
    assert not [
        module for module, targets in imports.items() if room(module) != "testing" and "testing" in map(room, targets)
    ]


def test_importing_the_package_leaves_heavy_packages_alone_and_registers_no_hooks(tmp_path: Path) -> None:
    script = (
        "import gatedadapters, sys\n"
        "from torch.optim import optimizer\n"
        f"print(*sorted({HEAVY} & set(sys.modules)))\n"
        "print(len(optimizer._global_optimizer_pre_hooks) + len(optimizer._global_optimizer_post_hooks))"
    )
    assert processes.run(processes.code, script, log=tmp_path / "log").split() == ["0"]
