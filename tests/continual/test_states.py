"""States as bits: what changed leads both ways, exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from streams import moved, state
from torch import nn

from gatedadapters.continual.states import Change, Snapshot, digest
from gatedadapters.errors import ArtifactError


class Mixed(nn.Module):
    """Parameters of several types, a tied one, one that is not contiguous, a scalar, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.randn(40, 30))
        self.tied = self.wide
        self.narrow = nn.Parameter(torch.randn(17).to(torch.bfloat16))
        self.exact = nn.Parameter(torch.randn(5, dtype=torch.float64))
        self.turned = nn.Parameter(torch.randn(6, 4).T)  # its bits are changed in a copy, as those of other devices are
        self.scalar = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("steps", torch.tensor([3]))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("derived", torch.zeros(2), persistent=False)


def changed(model: Mixed) -> None:
    with torch.no_grad():
        model.wide[3, 4:9] = torch.tensor([float("nan"), -0.0, 0.0, 1e-45, float("inf")])
        model.narrow[::2] *= -1
        model.exact.add_(1)
        model.turned[1, 2:5] += 1
        model.scalar.zero_()
        model.steps.add_(1)
        model.flags.logical_not_()


def test_a_change_leads_forward_and_back_to_the_same_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mixed()
    first, before = Snapshot(tmp_path / "first.safetensors", model), digest(model)
    changed(model)
    after = digest(model)
    Change.between(first, before, model).write(tmp_path / "change")
    change = Change.load(tmp_path / "change")
    assert change.count == 5 + 9 + 5 + 3 + 1 + 1 + 2
    with pytest.raises(ArtifactError, match="another state"):
        change.apply(model)  # it is after the change already
    change.apply(model, back=True)
    assert digest(model) == before
    change.apply(model)
    assert digest(model) == after
    first.restore(model)
    assert digest(model) == before


def test_a_sparse_change_takes_about_five_bytes_an_element(tmp_path: Path) -> None:
    model = nn.Linear(300, 300)
    first, before = Snapshot(tmp_path / "first.safetensors", model), digest(model)
    with torch.no_grad():
        model.weight.view(-1)[::50] += 1
    change = Change.between(first, before, model)
    assert change.count == 1800
    assert change.nbytes < 5.2 * change.count


def test_a_model_in_another_state_is_refused_and_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mixed()
    change = Change.between(Snapshot(tmp_path / "first.safetensors", model), "0" * 32, model)
    with torch.no_grad():
        model.scalar.add_(1)
    was = state(model)
    with pytest.raises(ArtifactError, match="another state"):
        change.apply(model)
    assert not moved(was, state(model))


def test_a_change_whose_bits_lead_elsewhere_is_refused_and_the_model_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mixed()
    first, before = Snapshot(tmp_path / "first.safetensors", model), digest(model)
    changed(model)
    change = Change.between(first, before, model)
    was = state(model)
    change._values["bits.wide"] ^= 1
    with pytest.raises(ArtifactError, match="do not give the state"):
        change.apply(model, back=True)
    assert digest(model) == change.record.after
    assert state(model).keys() == was.keys()


def test_a_damaged_change_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    first = Snapshot(tmp_path / "first.safetensors", model)
    before = digest(model)
    with torch.no_grad():
        model.weight.add_(1)
    Change.between(first, before, model).write(tmp_path / "change")
    file = tmp_path / "change" / "change.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ArtifactError):
        Change.load(tmp_path / "change")
    with pytest.raises(ArtifactError, match="not a stored change"):
        Change.load(tmp_path / "nothing")
