"""Every family of the zoo is laid out as written down by hand, and every matrix has its one place."""

import copy
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gatedadapters.backbone import Block, Layout, LinearMap, discover
from gatedadapters.testing.backbones import FAMILIES, heads, tiny

LAYOUTS = Path(__file__).with_name("layouts.txt").read_text()
EXPECTED = {
    family: section.partition("\n")[2]
    for section in re.split(r"^= ", LAYOUTS, flags=re.MULTILINE)[1:]
    for family in section.partition("\n")[0].split()
}

every_family = pytest.mark.parametrize("family", FAMILIES)
every_head = pytest.mark.parametrize(
    ("family", "head"), [(family, head) for family in FAMILIES for head in heads(family)]
)

# Blocks that normalise the sum, not the summands: they change a hidden state to which nothing is added.
POST_NORM = {
    *("bert", "roberta", "xlm-roberta", "electra", "mpnet", "distilbert", "deberta_v2", "albert", "bart"),
}


# Families that store expert matrices as (in, out).
TRANSPOSED = {"gpt_oss", "llama4", "recurrent_gemma"}


@cache
def laid_out(family: str, head: str = "base") -> tuple[PreTrainedModel, Layout]:
    """A model that no test changes, and its layout by its own batch."""
    model, batch = tiny(family, head=head)
    return model, discover(model, batch)


@cache
def laid_out_by_default(family: str, head: str = "base") -> Layout:
    """The layout by the batch that `discover` makes itself."""
    return discover(laid_out(family, head)[0])


def _relative(name: str | None, block: Block) -> str:
    return "-" if name is None else name.removeprefix(block.name).lstrip(".") or "."


def _describe(block: Block) -> Iterator[str]:
    for sub in block.sublayers:
        ends = (_relative(name, block) for name in (sub.name, sub.reader, sub.writer))
        yield " ".join((sub.kind, *ends))
        for m in sub.maps:
            name = _relative(m.name, block) + ("" if m.parameter == "weight" else f":{m.parameter}")
            line = f"{m.role} {name} {m.in_features} {m.out_features}"
            yield (line + (f" x{m.experts}" if m.experts else "") + (f" ~{m.traffic:g}" if m.traffic != 1 else ""))


@every_family
def test_layout_is_the_one_written_by_hand(family: str) -> None:
    _, layout = laid_out(family)
    head: dict[str, list[str]] = {}
    expected: dict[str, list[str]] = {}
    for line in filter(None, map(str.strip, EXPECTED[family].splitlines())):
        first, *rest = line.split()
        if first in ("blocks", "outside", "unknown"):
            head[first] = rest
        elif first == "block":
            lines = expected.setdefault(rest[0], [])
        else:
            lines.append(line)
    blocks = {block.name: block for block in layout.blocks}
    assert head["blocks"] == [b.name if b.calls == 1 else f"{b.name}*{b.calls}" for b in layout.blocks]
    assert head.get("outside", []) == [m.name for m in layout.outside]
    assert head.get("unknown", []) == [entry.name for entry in layout.unknown]
    assert expected == {name: list(_describe(blocks[name])) for name in expected}
    assert [block.index for block in layout.blocks] == list(range(len(blocks)))
    assert layout.hidden_size == 32


def test_stacks_are_named_by_what_they_read() -> None:
    for family, stacks in (("t5", "2 3"), ("bart", "2 3"), ("bert", ""), ("opt", "")):
        _, layout = laid_out(family)
        counted = Counter(block.stack for block in layout.blocks)
        if stacks:
            assert f"{counted['encoder']} {counted['decoder']}" == stacks
        else:
            assert set(counted) == {""}


@every_head
def test_every_matrix_has_exactly_one_place(family: str, head: str) -> None:
    model, layout = laid_out(family, head)
    places = Counter(f"{m.name}.{m.parameter}" for _, _, m in layout.maps())
    places.update(f"{m.name}.{m.parameter}" for m in layout.outside)
    places.update(entry.name for entry in layout.unknown)
    matrices = {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if not isinstance(module, nn.Embedding)
        for parameter, value in module.named_parameters(recurse=False)
        if value.dim() >= 2 and "bias" not in parameter
    }
    assert places == dict.fromkeys(matrices, 1)


@every_head
def test_every_norm_has_exactly_one_place(family: str, head: str) -> None:
    """Oracle: whatever holds a vector called weight, named for what it is in every family of the zoo."""
    model, layout = laid_out(family, head)
    vectors = {
        name
        for name, module in model.named_modules()
        if any(n == "weight" and p.dim() == 1 for n, p in module.named_parameters(recurse=False))
    }
    assert Counter(norm.name for _, _, norm in layout.norms()) == dict.fromkeys(vectors, 1)
    for _, _, norm in layout.norms():
        module = model.get_submodule(norm.name)
        assert norm.width == len(module.weight)
        assert norm.shifts == (getattr(module, "bias", None) is not None)


# By block: the norms of its sub-layers in order, as the models' sources say.
NORMS = {
    "bert": ["norm attention.output.LayerNorm", "norm output.LayerNorm"],  # after the residual addition
    "distilbert": ["norm sa_layer_norm", "norm output_layer_norm"],
    "llama": ["norm input_layernorm", "norm post_attention_layernorm"],  # before; despite its name the second, too
    "falcon": ["norm input_layernorm", ""],  # one for attention and feed-forward
    "gemma2": [
        "norm input_layernorm o_norm post_attention_layernorm",
        "norm pre_feedforward_layernorm down_norm post_feedforward_layernorm",
    ],
    "qwen3": [
        "norm input_layernorm q_norm self_attn.q_norm k_norm self_attn.k_norm",
        "norm post_attention_layernorm",
    ],
    "mamba2": ["norm norm in_norm mixer.norm"],
    "gpt2": ["norm ln_1", "norm ln_2"],
}


@pytest.mark.parametrize("family", NORMS)
def test_norms_belong_to_the_sublayer_that_they_normalise_for(family: str) -> None:
    _, layout = laid_out(family)
    for block in layout.blocks:
        found = [" ".join(f"{n.role} {_relative(n.name, block)}" for n in sub.norms) for sub in block.sublayers]
        assert found == NORMS[family]


@every_head
def test_widths_and_storage_match_the_weights(family: str, head: str) -> None:
    model, layout = laid_out(family, head)
    for m in (*(m for _, _, m in layout.maps()), *layout.outside):
        shape = model.get_parameter(f"{m.name}.{m.parameter}").shape
        stored = (m.in_features, m.out_features) if m.transposed else (m.out_features, m.in_features)
        assert tuple(shape) == ((m.experts, *stored) if m.kind == "experts" else stored)
        assert (m.kind == "conv1d") == (m.transposed and not m.experts)
        assert m.kind != "experts" or m.transposed == (family in TRANSPOSED)
    assert any(m.kind == "conv1d" for _, _, m in layout.maps()) == (family == "gpt2")


@every_head
def test_heads_and_batches_do_not_change_the_backbone(family: str, head: str) -> None:
    def structure(layout: Layout, prefix: str = "") -> list[tuple[str, ...]]:
        return [
            (
                b.name.removeprefix(prefix),
                s.kind,
                s.name.removeprefix(prefix),
                m.name.removeprefix(prefix),
                m.role,
            )
            for b, s, m in layout.maps()
        ]

    headed, layout = laid_out(family, head)
    prefix = "" if head == "base" else f"{headed.base_model_prefix}."
    assert structure(layout, prefix) == structure(laid_out_by_default(family))


@every_head
def test_meta_device_gives_the_same_layout(family: str, head: str) -> None:
    if family == "jetmoe":
        pytest.skip("it counts the tokens of each expert in Python, which needs values")
    model, _ = laid_out(family, head)
    assert discover(copy.deepcopy(model).to("meta")) == laid_out_by_default(family, head)


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "gpt2", "falcon", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_implementation_and_precision_do_not_matter(family: str, dtype: torch.dtype) -> None:
    model, batch = tiny(family)
    expected = discover(model, batch)
    model.to(dtype)
    for experts in ("eager", "batched_mm", "grouped_mm"):
        model.config._attn_implementation = "eager"
        model.config._experts_implementation = experts
        assert discover(model, batch) == expected


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in POST_NORM])
def test_writers_return_all_that_a_block_adds(family: str) -> None:
    model, batch = tiny(family)
    layout = discover(model, batch)
    states: dict[str, list[Tensor]] = {}
    for block in layout.blocks:
        model.get_submodule(block.name).register_forward_hook(
            lambda _, args, kwargs, out, name=block.name: states.update(
                {name: [_first((args, kwargs.get("hidden_states"))), _first(out)]}
            ),
            with_kwargs=True,
        )
        for sub in block.sublayers:
            assert sub.writer is not None
            model.get_submodule(sub.writer).register_forward_hook(lambda _, args, out: _silence(out))
    _run(model, batch)
    for before, after in states.values():
        assert torch.equal(before, after)


@every_family
def test_readers_feed_their_writers(family: str) -> None:
    model, batch = tiny(family)
    sub = discover(model, batch).blocks[-1].sublayers[-1]
    assert sub.reader is not None
    assert sub.writer is not None
    seen: list[Tensor] = []
    reader, writer = model.get_submodule(sub.reader), model.get_submodule(sub.writer)
    writer.register_forward_hook(lambda _, args, out: seen.append(_first(out).clone()))
    _run(model, batch)
    reader.register_forward_pre_hook(lambda _, args: (args[0] + 1.0, *args[1:]))
    _run(model, batch)
    assert seen[0].shape[-1] == sub.width == 32
    assert not torch.allclose(seen[0], seen[-1])


def test_table_prints_every_entry() -> None:
    layout = discover(*tiny("jamba", head="lm"))
    table = layout.table()
    for _, sub, m in layout.maps():
        assert sub.name in table
        assert m.name.removeprefix(f"{sub.name}.") in table
    assert all(m.name in table for m in layout.outside)
    assert all(norm.name.removeprefix(f"{sub.name}.") in table for _, sub, norm in layout.norms())
    assert all(entry.name in table and entry.reason in table for entry in layout.unknown)


def test_layout_is_plain_data() -> None:
    layout = discover(*tiny("bert"))
    assert layout == copy.deepcopy(layout)
    assert hash(layout) == hash(copy.deepcopy(layout))
    assert isinstance(layout.blocks[0].sublayers[0].maps[0], LinearMap)


def _first(value: object) -> Tensor:
    while not isinstance(value, Tensor):
        assert isinstance(value, (tuple, list))
        value = next(item for item in value if isinstance(item, (Tensor, tuple)) and item != ())
    return value


def _silence(out: object) -> object:
    if isinstance(out, Tensor):
        return torch.zeros_like(out)
    assert isinstance(out, tuple)
    return (torch.zeros_like(out[0]), *out[1:])


def _run(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    with torch.no_grad():
        model(**batch)
