"""Public names of the last release still work, with a warning that names the new one."""

from __future__ import annotations

from importlib import import_module

import pytest

import gatedadapters as ga
from gatedadapters.testing.backbones import tiny

RENAMED = (
    ("gatedadapters.paths", "Misfit", "SkippedSite"),
    ("gatedadapters.gates", "Group", "GateGroup"),
    ("gatedadapters.masking.scores", "Run", "ScoringRun"),
    ("gatedadapters.studies", "Point", "CurvePoint"),
    ("gatedadapters.continual.strategies", "Tuned", "TunedStage"),
)


@pytest.mark.parametrize(("module", "old", "new"), RENAMED)
def test_an_old_name_is_the_new_thing_and_says_so(module: str, old: str, new: str) -> None:
    found = import_module(module)
    with pytest.warns(DeprecationWarning, match=f"{old} is now called {new}"):
        assert getattr(found, old) is getattr(found, new)
    with pytest.raises(AttributeError, match="nonesuch"):
        _ = found.nonesuch


def test_misfits_are_skipped_sites() -> None:
    model, batch = tiny("mixtral")
    adapters = ga.attach(model, ga.SearchSpace.parse({"paths": [{"kind": "lora"}]}, where="test"), batch)
    with pytest.warns(DeprecationWarning, match="skipped_sites"):
        assert adapters.misfits == adapters.skipped_sites != ()
