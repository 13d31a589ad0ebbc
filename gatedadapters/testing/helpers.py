"""Functions on models that the contracts share with other tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from gatedadapters.masking.scores import Batch
from gatedadapters.supernet.adapters import Adapters


def awaken(module: nn.Module, *, seed: int = 0) -> None:
    """Give every parameter except gates a random value, so that paths contribute as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.endswith("log_alpha"):
                parameter.normal_(std=0.3, generator=generator)


def stir(adapters: Adapters, *, by: float, seed: int = 0) -> None:
    """Add noise of standard deviation `by` to the weights and heads of gated adapters, and draw random gates."""
    assert adapters.bank is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in [*adapters.weight_parameters(), *adapters.head_parameters()]:
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
        gates = adapters.bank.log_alpha
        gates.copy_(1 + 2 * torch.randn(gates.shape, generator=generator))


def checkpoint_activations(model: nn.Module, *, use_reentrant: bool) -> None:
    """Turn on gradient checkpointing of a transformers model; the name of the method differs by release."""
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def assert_equal(a: Tensor, b: Tensor) -> None:
    """Assert bitwise equality; the message holds the largest difference."""
    assert a.shape == b.shape, f"{tuple(a.shape)} != {tuple(b.shape)}"
    assert torch.equal(a, b), f"differ by up to {(a - b).abs().max():.3g}"


def run_model(model: nn.Module, batch: Batch, **more: Any) -> Tensor:
    """The first output of a model, with a fixed random state for dropout."""
    torch.manual_seed(0)
    return cast(Tensor, model(**batch, **more)[0])


def output_of(model: nn.Module, batch: Batch, **more: Any) -> Tensor:
    """The first output of a model, without gradients."""
    with torch.no_grad():
        return run_model(model, batch, **more)


def random_loss(model: nn.Module, batch: Batch) -> Tensor:
    """A scalar that depends on every output value."""
    values = run_model(model, batch).float()
    weight = torch.randn(values.shape, generator=torch.Generator().manual_seed(2))
    return (values * weight).sum()


def train_briefly(model: nn.Module, batch: Batch, *, steps: int = 2) -> None:
    """Take a few steps of SGD on all parameters that require gradients."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    for _ in range(steps):
        random_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_state(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Assert that two state dicts have the same keys and, bit for bit, the same values."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name
