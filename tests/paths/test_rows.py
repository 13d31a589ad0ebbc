"""LoRA at token embeddings and output heads, and new rows for tokens, beyond the contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import gatedadapters as ga
from gatedadapters.backbone import discover
from gatedadapters.config.space import Where
from gatedadapters.errors import AttachError, ConfigError, PathError
from gatedadapters.paths import Site, SkippedSite, path_class
from gatedadapters.paths.bias import BiasOptions
from gatedadapters.paths.elements import ElementsOptions
from gatedadapters.paths.lora import LoRAOptions
from gatedadapters.paths.norm import NormOptions
from gatedadapters.paths.rows import RowsOptions
from gatedadapters.paths.scale import ScaleOptions
from gatedadapters.testing import tiny
from gatedadapters.testing.helpers import awaken, output_of, random_loss

TABLE, HEAD = Where(sublayers=("embedding",)), Where(sublayers=("outside",), roles=("head",))
BOTH = Where(sublayers=("embedding", "outside"), roles=("tokens", "head"))


def attached(model: nn.Module, batch: Any, *options: Any) -> Any:
    """Compact, awakened adapters of every site that the options select."""
    structure = ga.attach(model, ga.SearchSpace(paths=options), batch).discretize()
    ga.detach(model)
    adapters = ga.attach(model, structure)
    awaken(adapters)
    return adapters


def decoder(*, tied: bool) -> tuple[PreTrainedModel, Any]:
    model, batch = tiny("llama", head="lm")
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
        model.config.tie_word_embeddings = True
    return model, batch


def test_rows_learn_as_the_rows_of_the_weights_do_at_either_end() -> None:
    """Outside oracle: autograd of the untied weights."""
    model, batch = decoder(tied=False)
    tokens = [*sorted(set(batch["input_ids"].flatten().tolist()))[:5], 98]
    random_loss(model, batch).backward()
    own = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    adapters = attached(model, batch, RowsOptions(tokens=tokens, at=BOTH))
    with torch.no_grad():
        for path in adapters.paths.values():
            path.values.zero_()
    random_loss(model, batch).backward()
    assert len(adapters.paths) == 2
    for path in adapters.paths.values():
        expected = own[f"{path.site.write.module}.weight"][sorted(tokens)]
        assert expected.any()
        torch.testing.assert_close(path.values.grad, expected, rtol=1e-4, atol=1e-5)


def test_only_the_named_tokens_change() -> None:
    model, batch = decoder(tied=True)
    table, ids = model.model.embed_tokens, torch.arange(99)[None]
    before = table(ids)
    attached(model, batch, RowsOptions(tokens=[7, "30-32"]))
    changed = (table(ids) != before).any(-1).flatten().nonzero().flatten()
    assert changed.tolist() == [7, 30, 31, 32]


@pytest.mark.parametrize("options", [LoRAOptions(rank=2, at=TABLE), LoRAOptions(rank=2, at=HEAD)])
def test_with_tied_weights_one_end_is_adapted_without_the_other(options: LoRAOptions) -> None:
    model, batch = decoder(tied=True)
    hidden = torch.randn(1, 2, 32)
    table, head = model.model.embed_tokens(batch["input_ids"]), model.lm_head(hidden)
    attached(model, batch, options)
    assert torch.equal(model.model.embed_tokens(batch["input_ids"]), table) == (options.at == HEAD)
    assert torch.equal(model.lm_head(hidden), head) == (options.at == TABLE)


@pytest.mark.parametrize("options", [LoRAOptions(rank=2, at=TABLE), RowsOptions(tokens=(5, 6), at=HEAD)])
def test_a_merge_into_tied_weights_is_refused_with_the_way_out(options: Any) -> None:
    model, batch = decoder(tied=True)
    adapters = attached(model, batch, options)
    expected = output_of(model, batch)
    with pytest.raises(AttachError, match=r"(?s)shared.*untie"):
        adapters.merge()
    assert torch.equal(output_of(model, batch), expected)


@pytest.mark.parametrize(
    "options",
    [LoRAOptions(rank=2, at=BOTH), RowsOptions(tokens=range(3, 30), at=BOTH), ScaleOptions(at=TABLE)],
)
def test_untied_tables_and_heads_merge(options: Any) -> None:
    model, batch = decoder(tied=False)
    adapters = attached(model, batch, options)
    expected = output_of(model, batch)
    adapters.merge()
    torch.testing.assert_close(output_of(model, batch), expected, rtol=1e-4, atol=1e-5)


class Scaled(nn.Embedding):
    """A table that multiplies what it looks up, as those of BART and Gemma 3 may."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 5.5


def test_a_table_that_scales_what_it_looks_up_merges_too() -> None:
    model, batch = tiny("bert")
    table = Scaled(99, 32, padding_idx=0)
    model.embeddings.word_embeddings = table
    adapters = attached(model, batch, LoRAOptions(rank=2, at=TABLE), RowsOptions(tokens=range(9, 50)))
    expected = output_of(model, batch)
    adapters.merge()
    torch.testing.assert_close(output_of(model, batch), expected, rtol=1e-4, atol=1e-4)


def test_heads_and_tables_are_selected_only_if_they_are_named() -> None:
    model, batch = decoder(tied=False)
    layout = discover(model, batch)
    for options, modules in (
        (LoRAOptions(), set()),
        (LoRAOptions(at=TABLE), {"model.embed_tokens"}),
        (LoRAOptions(at=HEAD), {"lm_head"}),
        (RowsOptions(tokens=(4,)), {"model.embed_tokens"}),
        (RowsOptions(tokens=(4,), at=BOTH), {"model.embed_tokens", "lm_head"}),
    ):
        sites = [site for site in path_class(options).sites(options, layout) if isinstance(site, Site)]
        assert {site.write.module for site in sites if not site.block} == modules


@pytest.mark.parametrize(
    "options", [ElementsOptions(at=TABLE), BiasOptions(side="input", at=TABLE), ScaleOptions(side="input", at=TABLE)]
)
def test_kinds_that_need_vectors_skip_the_table_by_name(options: Any) -> None:
    (site,) = path_class(options).sites(options, discover(*tiny("bert")))
    assert isinstance(site, SkippedSite)
    assert "token ids" in site.reason


@pytest.mark.parametrize("at", [TABLE, HEAD])
def test_a_token_outside_the_vocabulary_is_one_error_and_nothing_is_attached(at: Where) -> None:
    model, batch = decoder(tied=True)
    with pytest.raises(PathError, match=r"(?s)below 99.*got: +99.*resize_token_embeddings"):
        ga.attach(model, ga.SearchSpace(paths=(NormOptions(), RowsOptions(tokens=(4, 99), at=at))), batch)
    assert not hasattr(model, "gated_adapters")
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("tokens", [(), (3, 3), ("a",), (-1,), ("5-3",)])
def test_tokens_that_cannot_be_meant_are_refused(tokens: Any) -> None:
    with pytest.raises(ConfigError, match="tokens"):
        RowsOptions(tokens=tokens)


def test_new_tokens_from_an_id_on() -> None:
    model, batch = decoder(tied=True)
    model.resize_token_embeddings(104)
    adapters = ga.attach(model, ga.SearchSpace(paths=(RowsOptions(tokens=range(99, 104)),)), batch)
    (path,) = adapters.paths.values()
    assert path.values.shape == (5, 32)
    assert adapters.discretize().params == 5 * 32


def test_what_a_token_has_learnt_is_the_size_of_what_is_added_to_it() -> None:
    """So that a table of any vocabulary compares with maps."""
    model, batch = decoder(tied=False)
    adapters = attached(model, batch, RowsOptions(tokens=(4, 9)), LoRAOptions(rank=1, at=TABLE))
    rows, lora = sorted(adapters.paths.values(), key=lambda path: path.kind, reverse=True)
    torch.testing.assert_close(rows.learned(), rows.values.detach().norm(dim=1))
    ids, nothing = torch.arange(99), torch.zeros(99, 32)
    added = lora(ids, nothing, None).square().sum(1).mean().sqrt()
    torch.testing.assert_close(lora.learned(), added.detach()[None])
