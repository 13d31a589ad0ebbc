"""Imports point down, the package imports lightly, files stay readable."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gatedadapters"
LAYERS = (
    {"errors"},
    {"config", "devices", "html", "intervals", "plugins", "precision", "safe_files"},
    {"backbone", "gates", "paths"},
    {
        *("structure", "selection", "fingerprint", "routing", "hooks", "weight_hooks", "saving", "merging", "adapters"),
        *("attachment", "freezing"),
    },
    {"masking", "artifacts"},
    {"data", "training"},
    {"continual", "transfer", "robustness"},
    {"studies", "experiment", "inspection"},
    {"cli"},
)
RANK = {unit: rank for rank, layer in enumerate(LAYERS) for unit in layer}
ABOVE_ALL = {"__init__", "__main__"}  # the public names, and the command line
HEAVY = {"optuna", "tensorboard", "matplotlib", "peft"}
MAX_LINES = 500


def unit_of(module: str) -> str:
    """``gatedadapters.gates.bank`` is part of the unit ``gates``; the package itself is ``__init__``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def for_type_checking(node: ast.AST) -> bool:
    """Whether a node is ``if TYPE_CHECKING:``."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported_units(tree: ast.AST, module: str, *, typing: bool) -> set[str]:
    """Every unit that a module imports, also inside functions; with ``typing`` also for types only."""
    found: set[str] = set()
    pending = [tree]
    while pending:
        node = pending.pop()
        if typing or not for_type_checking(node):
            pending += ast.iter_child_nodes(node)
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: use absolute imports"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {unit_of(name) for name in names if name.split(".")[0] == "gatedadapters"}
    return found


def read_imports(*, typing: bool) -> dict[str, set[str]]:
    """The units that each module imports, beside its own."""
    result: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        result[module] = imported_units(tree, module, typing=typing) - {unit_of(module)}
    return result


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    return read_imports(typing=True)


def test_every_part_of_the_package_has_its_place_in_the_order(imports: dict[str, set[str]]) -> None:
    units = {unit_of(module) for module in imports} - ABOVE_ALL - {"testing"}
    assert units <= set(RANK), f"say in LAYERS where {units - set(RANK)} belongs"


def test_imports_point_down(imports: dict[str, set[str]]) -> None:
    upward = [
        f"{module} imports {imported}"
        for module, units in imports.items()
        if unit_of(module) in RANK
        for imported in units
        if RANK.get(imported, len(LAYERS)) > RANK[unit_of(module)]
    ]
    assert not upward


def test_parts_of_one_layer_do_not_import_each_other_in_circles() -> None:
    graph: dict[str, set[str]] = {}
    for module, units in read_imports(typing=False).items():
        if unit_of(module) in RANK:
            graph.setdefault(unit_of(module), set()).update(units & set(RANK))
    assert list(TopologicalSorter(graph).static_order())


def test_testing_imports_only_what_lies_below_training(imports: dict[str, set[str]]) -> None:
    used = {unit for module, units in imports.items() if unit_of(module) == "testing" for unit in units}
    used.discard("robustness")  # its contract is shipped too; of what lies below, it imports data alone
    assert imports["gatedadapters.robustness.apply"] <= {"data", "errors"}
    assert all(RANK.get(unit, len(LAYERS)) <= RANK["data"] for unit in used - {"training"}), used
    assert "training" not in used


def test_importing_the_package_leaves_heavy_packages_alone() -> None:
    script = f"import gatedadapters, sys; print(*sorted({HEAVY} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert loaded.split() == []


@pytest.mark.parametrize("folder", ["gatedadapters", "tests", "benchmarks"])
def test_files_stay_readable(folder: str) -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert not {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > MAX_LINES}
