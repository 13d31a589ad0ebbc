"""A module that runs with other tensors for one call, and is itself never written to."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

from gatedadapters.errors import AttachError
from gatedadapters.runtime.forward import OwnForward, parameter_of, with_tensors


class Doubled(OwnForward):
    """Runs the module with twice its weight."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run({"weight": 2 * parameter_of(self.module, "weight")}, args, kwargs)


@pytest.fixture
def case() -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A map without bias, an input, what the map gives, and what twice its weight gives."""
    module, x = nn.Linear(3, 2, bias=False), torch.randn(4, 3)
    plain = module(x).detach()
    return module, x, plain, 2 * plain


def test_a_copy_shares_all_but_the_tensors_that_replace_parameters() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    weight = torch.randn(3, 3, requires_grad=True)
    other = with_tensors(module, {"0.weight": weight})
    assert other[0].weight is weight
    assert other[0].bias is module[0].bias
    assert other[1] is module[1]
    x = torch.randn(5, 3)
    expected = torch.func.functional_call(copy.deepcopy(module), {"0.weight": weight}, (x,))
    torch.testing.assert_close(other(x), expected)
    assert module[0].weight is not weight
    assert "0.weight" in module.state_dict()


def test_it_runs_between_the_modules_hooks_and_leaves_the_class_alone(
    case: tuple[nn.Linear, Tensor, Tensor, Tensor],
) -> None:
    module, x, plain, doubled = case
    seen = []
    module.register_forward_hook(lambda *_: seen.append("after"))
    own = Doubled(module)
    own.install()
    assert torch.equal(module(x), doubled)
    assert seen == ["after"]
    assert type(module) is nn.Linear
    assert list(module.state_dict()) == ["weight"]
    own.remove()
    assert torch.equal(module(x), plain)
    assert "forward" not in vars(module)


def test_copies_and_pickles_have_a_forward_of_their_own(case: tuple[nn.Linear, Tensor, Tensor, Tensor]) -> None:
    module, x, _, doubled = case
    Doubled(module).install()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with torch.no_grad():
            twin.weight.zero_()
        assert not twin(x).any()
    assert torch.equal(module(x), doubled)


class Counting(ModelHook):
    """An accelerate hook that counts forwards, as those that move weights do their work around them."""

    def __init__(self) -> None:
        self.forwards = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.forwards += 1
        return args, kwargs


@pytest.mark.parametrize("first", ["accelerate", "ours"])
def test_it_runs_under_accelerates_hooks_whichever_came_first(
    first: str, case: tuple[nn.Linear, Tensor, Tensor, Tensor]
) -> None:
    module, x, plain, doubled = case
    hook, own = Counting(), Doubled(module)
    if first == "accelerate":
        add_hook_to_module(module, hook)
        own.install()
    else:
        own.install()
        add_hook_to_module(module, hook)
    assert torch.equal(module(x), doubled)
    assert hook.forwards == 1
    own.remove()
    assert torch.equal(module(x), plain)
    assert hook.forwards == 2
    remove_hook_from_module(module)
    assert torch.equal(module(x), plain)
    assert hook.forwards == 2


def test_a_forward_that_somebody_replaced_is_refused(case: tuple[nn.Linear, Tensor, Tensor, Tensor]) -> None:
    module, x, _, _ = case
    module.forward = lambda given: given  # type: ignore[method-assign]
    with pytest.raises(AttachError, match=r"forward was replaced(.|\n)*fix:"):
        Doubled(module).install()
    assert module(x) is x
