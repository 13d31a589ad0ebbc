"""What users of adapters rely on elsewhere, held here too: types, memory, and switching that costs nothing.

The rest of that list is tested where it belongs: merging in test_merging.py, disabling and mixtures in test_shelf.py,
strict keys in test_save_and_load.py, activation checkpointing and deep copies in the contract of a path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertModel

import gatedadapters as ga
from gatedadapters.testing.backbones import tiny


class Allocations(TorchDispatchMode):
    """Adds up the bytes of every tensor made within the context."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        new = {t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)}
        self.bytes += sum(storage.nbytes() for storage in new if storage.data_ptr() not in known)
        return out


def size(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def larger() -> nn.Module:
    torch.manual_seed(0)
    return BertModel(
        BertConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, vocab_size=2000)
    ).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    result = {}
    for seed, name in enumerate(("one", "two")):
        adapters = ga.attach(larger(), "attention-only", seed=seed)
        assert adapters.bank is not None
        adapters.compact(adapters.discretize(ga.Budget(fraction=0.1)))
        with torch.no_grad():
            for parameter in adapters.weight_parameters():
                parameter.normal_(0, 0.1)
        result[name] = tmp_path_factory.mktemp("adapters") / name
        adapters.save(result[name])
    return result


def test_loading_makes_no_copy_of_the_backbone(folders: dict[str, Path]) -> None:
    model = larger()
    backbone = size(model)
    where = {name: p.data_ptr() for name, p in model.named_parameters()}
    with Allocations() as made:
        adapters = ga.load_adapters(model, folders["one"])
    assert 0 < made.bytes < 0.1 * backbone
    assert size(adapters) < 0.02 * backbone
    assert {name: p.data_ptr() for name, p in model.named_parameters() if name in where} == where


def test_switching_and_disabling_make_no_tensor_at_all(folders: dict[str, Path]) -> None:
    model = larger()
    shelf = ga.Shelf.load(model, folders)
    with Allocations() as made:
        shelf.activate("two")
        with shelf.using("one"), shelf.disabled():
            shelf.activate(None)
    assert made.bytes == 0


def test_a_merge_keeps_no_more_than_the_originals_and_the_way_back_makes_nothing(folders: dict[str, Path]) -> None:
    model = larger()
    adapters = ga.load_adapters(model, folders["one"])
    report = adapters.merge()
    touched = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if n in report.drift)
    assert report.bytes == touched == sum(t.numel() * t.element_size() for t in adapters.merged.originals.values())
    with Allocations() as made:
        with adapters.disabled():
            pass
        adapters.unmerge()
    assert made.bytes == 0
    assert adapters.merged is None
    assert adapters.merge_and_detach().bytes == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_on_a_half_precision_backbone_stay_float32_and_it_stays_half(
    dtype: torch.dtype, folders: dict[str, Path]
) -> None:
    exact, model = larger(), larger().to(dtype)
    batch = tiny("bert")[1]
    ga.load_adapters(exact, folders["one"])
    # float16 has rounded the backbone's values once more than the fingerprint would have
    adapters = ga.load_adapters(model, folders["one"], base="updated" if dtype == torch.float16 else "same")
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    output = model(**batch).last_hidden_state
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), exact(**batch).last_hidden_state, rtol=0.05, atol=0.05)
    output.float().pow(2).mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapters.weight_parameters())
    unmerged = output.detach()
    adapters.merge()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).last_hidden_state, unmerged, rtol=0.05, atol=0.05)
    assert {p.dtype for n, p in model.named_parameters() if not n.startswith("gated_adapters.")} == {dtype}
    model.to(torch.float32)  # the whole model, adapters included, takes another type as any module does
    adapters.unmerge()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_merged_backbone_is_another_backbone_to_saved_adapters(folders: dict[str, Path]) -> None:
    model = larger()
    ga.load_adapters(model, folders["one"]).merge_and_detach()
    with pytest.raises(ga.errors.ArtifactError, match=r"another backbone \(values"):
        ga.load_adapters(model, folders["two"])
