"""Tiny masked models that the tests of this folder share, also across processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import gatedadapters as ga
from gatedadapters.testing import tiny


def random_mask(model: nn.Module, density: float = 0.03, *, seed: int = 0, names: Any = None) -> ga.Mask:
    """Each element of the backbone free with this probability."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {
        name: torch.rand(p.shape, generator=generator) < density
        for name, p in model.named_parameters()
        if names is None or name in names
    }
    return ga.Mask.build(model, chosen)


def counted_mask(model: nn.Module, count: int = 3, *, seed: int = 0) -> ga.Mask:
    """As many elements free in every tensor."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {name: torch.randperm(p.numel(), generator=generator)[:count] for name, p in model.named_parameters()}
    return ga.Mask.build(model, chosen)


def masked(
    family: str = "bert",
    density: float = 0.03,
    *,
    head: str = "base",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, dict[str, Tensor], ga.SparseDelta]:
    """A tiny model with a random delta in it, and a batch."""
    model, batch = tiny(family, head=head)
    model.to(dtype)
    return model, batch, ga.apply_mask(model, random_mask(model, density, seed=seed), heads=())


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Something that depends on every output."""
    output = model(**batch)[0]
    output = output if output.dtype == torch.float64 else output.float()
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
    return (output * weight).sum() / output.numel() ** 0.5


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the backbone's parameters and buffers."""
    return {k: v.detach().clone() for k, v in model.state_dict().items() if "sparse_delta" not in k}


def assert_same_bits(model: nn.Module, wanted: dict[str, Tensor]) -> None:
    found = snapshot(model)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def train(model: nn.Module, delta: Any, batch: dict[str, Tensor], optimizer: Any = None, steps: int = 3) -> Any:
    optimizer = optimizer or torch.optim.AdamW(delta.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return optimizer
