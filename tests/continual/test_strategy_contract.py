"""Every registered strategy meets the contract that outsiders' strategies are tested by; a careless one does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from pydantic import PrivateAttr
from streams import KINDS, strategy
from torch import Tensor

from gatedadapters.continual import Stage, Strategy, TunedStage
from gatedadapters.testing import StrategyContract

EVERYTHING = {"sequential", "ewc", "osft", "replay", "joint"}
EARLIER_HEADS = {"replay", "joint"}


class TestEveryStrategy(StrategyContract):
    @pytest.fixture(autouse=True, params=KINDS)
    def _kind(self, request: pytest.FixtureRequest) -> None:
        self.kind: str = request.param

    def strategy(self) -> Strategy:
        return strategy(self.kind)

    def may_move(self, stage: int, name: str) -> bool:
        return self.kind in EVERYTHING if name.startswith("backbone.") else self.kind in EARLIER_HEADS


class Careless(Strategy):
    """Moves all biases but says nothing of it, counts tasks in itself, keeps weights, pickles, and serves no model as
    it was.
    """

    kind = "careless"
    _tuned: int = PrivateAttr(default=0)
    _kept: list[Tensor] = PrivateAttr(default_factory=list)

    def tune(self, stage: Stage) -> TunedStage:
        elements = stage.train_only(name for name in stage.tensors if name.endswith("bias"))
        self._tuned += 1
        seconds = stage.fit(steps=2 + self._tuned)
        self._kept += [p.detach().clone() for p in stage.model.parameters()]
        torch.save(self._tuned, stage.memory / "tuned.pt")
        return TunedStage(elements, seconds)

    @contextmanager
    def serving(self, stage: Stage) -> Iterator[None]:
        yield
        if (stage.memory / "tuned.pt").exists():
            with torch.no_grad():
                stage.model.get_parameter("heads.a.bias").add_(1)


class OfTheCareless(StrategyContract):
    def strategy(self) -> Strategy:
        return Careless()


@pytest.mark.parametrize(
    ("test", "says"),
    [
        ("test_only_the_core_and_the_active_head_move", "stage 0 .a. moved"),
        ("test_a_stopped_stream_ends_with_the_bits_of_one_that_was_not", "differs"),
        ("test_the_strategy_holds_no_state_of_a_stream", "a stream changed the strategy"),
        ("test_what_is_stored_is_named_and_safe_to_read", "store JSON or safetensors"),
        ("test_the_memory_of_a_stage_is_released", "bytes of tensors outside the model"),
        ("test_serving_leaves_the_model_as_it_was", "serving changed the model"),
    ],
)
def test_the_contract_finds_what_is_wrong_with_a_strategy(test: str, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        getattr(OfTheCareless(), test)()
