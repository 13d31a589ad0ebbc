"""Adapters folded into the backbone's weights and out of them again."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatedadapters as ga
from gatedadapters.errors import ArtifactError, AttachError, PathError, TaskError, TrainingError
from gatedadapters.supernet import hooks
from gatedadapters.testing.backbones import FAMILIES, tiny
from gatedadapters.testing.helpers import assert_same_state, awaken, output_of, stir

LINEAR = ga.SearchSpace.parse(
    {"paths": [{"kind": "lora", "rank": 3}, {"kind": "scale", "side": "input"}, {"kind": "scale", "side": "output"}]},
    where="test",
)


def compacted(
    family: str, space: ga.SearchSpace | str = LINEAR, *, tasks: tuple[str, ...] = ("default",), head: str = "base"
) -> tuple[nn.Module, dict[str, Tensor], ga.Adapters]:
    """A tiny model with compact adapters that do something."""
    model, batch = tiny(family, head=head)
    with torch.no_grad():  # biases start as zeros, and no factor would change them
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0, 0.05)
    if space is LINEAR:
        # A router does more than a linear map. Mamba reads the weight of its dt map without calling the module, so
        # paths there never run, nor ever learn anything that a merge would bring in.
        roles = sorted({linear.role for _, _, linear in ga.discover(model, batch).maps()} - {"router", "dt"})
        space = ga.SearchSpace.parse(
            {"paths": [{**path.model_dump(exclude={"at"}), "at": {"roles": roles}} for path in LINEAR.paths]},
            where="test",
        )
    adapters = ga.attach(model, space, batch, tasks=tasks)
    stir(adapters, by=0.05)
    adapters.compact()
    return model, batch, adapters


def backbone_state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("gated_adapters.")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_computes_the_same_without_paths_and_comes_back_bit_for_bit(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch, adapters = compacted(family)
    before, expected = backbone_state(model), output_of(model, batch)
    report = adapters.merge()
    with monkeypatch.context() as patch:
        patch.setattr(hooks, "run_paths", None)
        torch.testing.assert_close(output_of(model, batch), expected, rtol=1e-4, atol=1e-5)
    changed = {name for name, value in backbone_state(model).items() if not torch.equal(value, before[name])}
    assert changed == set(report.drift) != set()
    assert 0 < report.worst < 1e-4
    assert report.bytes == sum(before[name].numel() * 4 for name in changed)
    adapters.unmerge()
    assert_same_state(backbone_state(model), before)
    assert torch.equal(output_of(model, batch), expected)


def test_merging_and_unmerging_twice_are_merging_and_unmerging_once() -> None:
    model, _, adapters = compacted("gpt2")
    before = backbone_state(model)
    adapters.unmerge()
    report = adapters.merge()
    merged = backbone_state(model)
    assert adapters.merge() is report is adapters.merged
    assert_same_state(backbone_state(model), merged)
    for _ in range(2):
        adapters.unmerge()
        assert adapters.merged is None
        assert_same_state(backbone_state(model), before)
    adapters.merge()
    assert_same_state(backbone_state(model), merged)


def test_disabled_gives_the_backbone_while_merged_and_detaching_restores_every_bit() -> None:
    model, batch, adapters = compacted("bert")
    backbone, _ = tiny("bert")
    backbone.load_state_dict(backbone_state(model))
    expected = output_of(backbone, batch)
    adapters.merge()
    merged = output_of(model, batch)
    with adapters.disabled(), adapters.disabled():
        assert torch.equal(output_of(model, batch), expected)
        for call in (adapters.merge, adapters.unmerge):
            with pytest.raises(AttachError, match="disabled"):
                call()
    assert torch.equal(output_of(model, batch), merged)
    ga.detach(model)
    assert torch.equal(output_of(model, batch), expected)
    assert_same_state(dict(model.state_dict()), dict(backbone.state_dict()))


@pytest.mark.parametrize("way", ["deepcopy", "torch.save"])
def test_a_merged_model_is_copied_and_saved_with_the_way_back(way: str) -> None:
    model, batch, adapters = compacted("llama")
    before, expected = backbone_state(model), output_of(model, batch)
    adapters.merge()
    merged = output_of(model, batch)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    adapters.unmerge()
    assert torch.equal(output_of(twin, batch), merged)
    ga.get_adapters(twin).unmerge()
    assert_same_state(backbone_state(twin), before)
    assert torch.equal(output_of(twin, batch), expected)
    assert torch.equal(output_of(model, batch), expected)


def test_one_task_of_several_is_merged_by_name_and_the_others_are_refused() -> None:
    model, batch, adapters = compacted("bert", tasks=("one", "two"))
    with pytest.raises(TaskError, match=r"one, two(.|\n)*fix:"):
        adapters.merge()
    mixed = output_of(model, batch, task_ids=torch.tensor([1, 0]))
    adapters.merge("two")
    ids = torch.tensor([1, 1])
    torch.testing.assert_close(output_of(model, batch, task_ids=ids)[:1], mixed[:1], rtol=1e-4, atol=1e-5)
    assert torch.equal(output_of(model, batch), output_of(model, batch, task_ids=ids))
    for other in (torch.tensor([1, 0]), torch.tensor([0, 0])):
        with pytest.raises(TaskError, match="batch holds another's"):
            output_of(model, batch, task_ids=other)
    with pytest.raises(AttachError, match="unmerge"):
        adapters.merge("one")


def test_merged_adapters_refuse_to_be_trained() -> None:
    model, batch, adapters = compacted("bert")
    adapters.merge()
    with pytest.raises(TrainingError, match="do not learn"):
        model.train()(**batch)
    adapters.unmerge()
    model(**batch)[0].norm().backward()
    assert all(p.grad is not None for p in adapters.weight_parameters())


def test_merge_and_detach_leaves_a_plain_model_that_is_saved_and_loaded_as_one(tmp_path: Any) -> None:
    model, batch, adapters = compacted("gpt2", head="lm")
    original, _ = tiny("gpt2", head="lm")
    expected = output_of(model, batch)
    adapters.merge_and_detach()
    assert model.state_dict().keys() == original.state_dict().keys()
    assert [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks] == []
    grads = {name: p.requires_grad for name, p in original.named_parameters()}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    torch.testing.assert_close(output_of(model, batch), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = type(original).from_pretrained(tmp_path).eval()
    assert torch.equal(output_of(again, batch), output_of(model, batch))
    with pytest.raises(AttachError, match="detached"):
        adapters.unmerge() if adapters.merged else adapters.model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_drift_in_half_precision_is_the_share_of_the_change_that_rounding_lost(dtype: torch.dtype) -> None:
    model, _, adapters = compacted("llama", "lora-all-linear")
    exact = {name: p.detach().double() for name, p in model.named_parameters()}
    before = {name: value.to(dtype) for name, value in exact.items()}
    model.to(dtype)
    report = adapters.merge()
    assert 1e-4 < report.worst < 0.1
    assert str(report).splitlines()[2].split()[-1] == f"{report.worst:.2%}"
    for key, path in adapters.paths.items():
        name = f"{key.split(':')[0].replace('/', '.')}.weight"
        change: Tensor = (path.up.double() @ path.down.double()).detach()
        stored = model.get_parameter(name).detach()
        assert stored.dtype == dtype
        lost = (stored.double() - before[name].double() - change).norm() / change.norm()
        assert report.drift[name] == pytest.approx(float(lost), rel=1e-3)
    adapters.unmerge()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items() if "gated" not in name)


def tied(model: nn.Module, adapters: ga.Adapters) -> None:
    modules = dict(model.named_modules())
    modules["encoder.layer.1.attention.self.query"].weight = modules["encoder.layer.0.attention.self.query"].weight


def viewed(model: nn.Module, adapters: ga.Adapters) -> None:
    """As flattened parameters of a sharded model are."""
    first, second = (model.get_parameter(f"encoder.layer.{i}.attention.self.query.weight") for i in (0, 1))
    flat = torch.cat([first.data, second.data])
    first.data, second.data = flat[: len(first)], flat[len(first) :]


def not_a_number(model: nn.Module, adapters: ga.Adapters) -> None:
    adapters.paths["encoder/layer/1/output/dense:lora"].up.data[0, 0] = float("nan")


def overflowing(model: nn.Module, adapters: ga.Adapters) -> None:
    model.half()
    path = adapters.paths["encoder/layer/1/output/dense:lora"]
    path.up.data.fill_(6e4)
    path.down.data.fill_(6e4)


def on_meta(model: nn.Module, adapters: ga.Adapters) -> None:
    model.encoder.layer[1].output.dense.to("meta")


def quantised(model: nn.Module, adapters: ga.Adapters) -> None:
    dense = model.encoder.layer[1].output.dense
    weight = (dense.weight * 100).to(torch.int8)
    del dense.weight
    dense.weight = nn.Parameter(weight, requires_grad=False)


def parametrised(model: nn.Module, adapters: ga.Adapters) -> None:
    nn.utils.parametrizations.weight_norm(model.encoder.layer[1].output.dense)


def more_than_a_map(model: nn.Module, adapters: ga.Adapters) -> None:
    dense = model.encoder.layer[1].output.dense
    dense.forward = lambda x: nn.functional.linear(x, dense.weight, dense.bias).relu()


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (tied, AttachError, r"layer\.0\.attention\.self\.query\.weight and encoder\.layer\.1\.attention\.self\.query"),
        (viewed, AttachError, "is shared"),
        (not_a_number, ArtifactError, "not finite"),
        (overflowing, ArtifactError, "float16"),
        (on_meta, AttachError, "meta device"),
        (quantised, AttachError, "torch.int8"),
        (parametrised, AttachError, "parametrised"),
        (more_than_a_map, AttachError, "more than a linear map"),
    ],
)
def test_what_cannot_be_merged_is_named_and_nothing_is_changed(spoil: Any, error: type[Exception], words: str) -> None:
    model, _, adapters = compacted("bert", "lora-all-linear")
    spoil(model, adapters)
    before = backbone_state(model)
    for call in (adapters.merge, adapters.merge_and_detach):
        with pytest.raises(error, match=words) as caught:
            call()
        assert "fix:" in str(caught.value)
        assert "encoder.layer.1" in str(caught.value)
    after = backbone_state(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].device == value.device
        assert value.is_meta or torch.equal(after[name], value), name
    assert adapters.merged is None
    assert len(model.encoder.layer[0].output.dense._forward_hooks) == 1


@pytest.mark.parametrize(("family", "space", "kind"), [("bert", "encoder-mixed", "serial|parallel")])
def test_bottlenecks_are_refused_by_name_with_the_way_out(family: str, space: str, kind: str) -> None:
    model, _, adapters = compacted(family, space)
    before = backbone_state(model)
    with pytest.raises(PathError, match=rf"({kind}) at(.|\n)*fix: .*without this kind"):
        adapters.merge()
    assert_same_state(backbone_state(model), before)


def test_adapters_with_gates_are_refused() -> None:
    model, batch = tiny("bert")
    adapters = ga.attach(model, "lora-all-linear", batch)
    with pytest.raises(AttachError, match="compact"):
        adapters.merge()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "jamba"])
def test_paths_at_the_weights_of_experts_and_routers_merge_and_come_back(family: str) -> None:
    model, batch = tiny(family)
    adapters = ga.attach(model, "lora-all-linear", batch)
    awaken(adapters)
    adapters.compact()
    before, computed = backbone_state(model), output_of(model, batch)
    report = adapters.merge()
    at_weights = {str(path.site.write) for _, path in adapters.typed_paths() if path.site.at_weight}
    assert at_weights
    assert at_weights <= report.drift.keys()
    assert not torch.equal(backbone_state(model)[min(at_weights)], before[min(at_weights)])
    torch.testing.assert_close(output_of(model, batch), computed, rtol=1e-3, atol=1e-4)
    adapters.unmerge()
    assert_same_state(backbone_state(model), before)
    assert torch.equal(output_of(model, batch), computed)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler does that itself
def test_a_compiled_model_follows_merging_and_disabling() -> None:
    model, batch = tiny("bert")
    model.encoder.layer = model.encoder.layer[:1]
    output_map = {"kind": "lora", "at": {"roles": ["o"]}}
    adapters = ga.attach(model, ga.SearchSpace.parse({"paths": [output_map]}, where="test"), batch)
    adapters.compact()
    with torch.no_grad():
        for parameter in adapters.weight_parameters():
            parameter.normal_(0, 0.1)
    compiled = torch.compile(model, backend="eager")
    expected = output_of(model, batch)
    with adapters.disabled():
        plain = output_of(model, batch)
        torch.testing.assert_close(output_of(compiled, batch), plain)
    torch.testing.assert_close(output_of(compiled, batch), expected)
    adapters.merge()
    torch.testing.assert_close(output_of(compiled, batch), expected, rtol=1e-4, atol=1e-5)
    adapters.unmerge()
    torch.testing.assert_close(output_of(compiled, batch), expected)
    torch._dynamo.reset()
    assert not torch.allclose(plain, expected, atol=1e-3)
