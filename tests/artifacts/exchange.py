"""What the tests of exchange with peft share: adapters that do something, and peft as the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gatedadapters as ga

peft = pytest.importorskip("peft")

ALL_LINEAR = {"paths": [{"kind": "lora", "rank": 6}]}


def space(*paths: dict[str, object]) -> ga.SearchSpace:
    return ga.SearchSpace.parse({"paths": list(paths or ALL_LINEAR["paths"])}, where="test")


def compacted(
    model: nn.Module,
    batch: dict[str, Tensor],
    *paths: dict[str, object],
    share: float = 0.4,
    tasks: tuple[str, ...] = ("default",),
    seed: int = 0,
) -> ga.Adapters:
    """Adapters with random weights and gates, cut by chance to `share` of the candidates, compact."""
    adapters = ga.attach(model, space(*paths), batch, tasks=tasks)
    bank = adapters.bank
    assert bank is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in [*adapters.weight_parameters(), *adapters.head_parameters()]:
            parameter.normal_(0, 0.1, generator=generator)
        bank.log_alpha.normal_(1.0, 1.0, generator=generator)
    scores = torch.rand(bank.kept.shape, generator=generator)
    adapters.compact(adapters.discretize(ga.Budget(fraction=share), scores=scores))
    return adapters


@torch.no_grad()
def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits, or the last hidden state."""
    found = model(**batch)
    value: Tensor = found.logits if "logits" in found else found[0]
    return value


def loaded_by_peft(model: nn.Module, folder: Path) -> nn.Module:
    """What peft makes of a folder; a missing key would be a warning, hence an error, and none may be left over."""
    wrapped: nn.Module = peft.PeftModel.from_pretrained(model, str(folder))
    again = peft.load_peft_weights(str(folder))
    result = peft.set_peft_model_state_dict(wrapped, again)
    assert result.unexpected_keys == []
    assert [key for key in result.missing_keys if "lora_" in key or "ia3_" in key or "modules_to_save" in key] == []
    return wrapped.eval()
