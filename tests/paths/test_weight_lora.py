"""LoRA at weights, beyond the contract: against peft, against autograd, and what it must not cost."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import gatedadapters as ga
from gatedadapters.backbone import discover
from gatedadapters.config import GateConfig, SearchSpace
from gatedadapters.config.space import Where
from gatedadapters.errors import ArtifactError, PathError, TaskError
from gatedadapters.paths.low_rank_sum import LowRankSum
from gatedadapters.paths.weight_lora import WeightLoRA, WeightLoRAOptions
from gatedadapters.supernet.attach import candidates
from gatedadapters.testing import tiny
from gatedadapters.testing.helpers import awaken

EXPERTS = WeightLoRAOptions(rank=3, at=Where(include="experts"))
SPACE = SearchSpace(gates=GateConfig(levels=("rank",), stochastic=False), paths=(WeightLoRAOptions(rank=3),))
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def attached(
    model: nn.Module, batch: dict[str, Tensor], *, tasks: tuple[str, ...] = ("default",), space: SearchSpace = SPACE
) -> ga.Adapters:
    """Paths that do something, gates in the middle of their range, some of them closed."""
    adapters = ga.attach(model, space, batch, tasks=tasks)
    awaken(adapters)
    assert adapters.bank is not None
    with torch.no_grad():
        adapters.bank.log_alpha.uniform_(-3.5, 1.0, generator=torch.Generator().manual_seed(1))
    return adapters


def weighted(output: Tensor) -> Tensor:
    return (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)).sum()


def typed(adapters: ga.Adapters) -> Iterator[tuple[str, WeightLoRA]]:
    for key, path in adapters.paths.items():
        assert isinstance(path, WeightLoRA)
        yield key, path


def nothing_in_the_way(model: nn.Module) -> bool:
    return not any(name in module._parameters for module in model.modules() for name in vars(module))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "jamba"])
def test_values_and_gradients_are_those_of_weights_that_were_changed(family: str, implementation: str) -> None:
    """Gates included: the oracle hands the model whole weights, W + up diag(z) down of each expert. In float64, where
    the implementation can.
    """
    model, batch = tiny(family)
    double = implementation != "grouped_mm"
    dtype = torch.float64 if double else torch.float32
    plain = copy.deepcopy(model).to(dtype)
    model.to(dtype).config._experts_implementation = plain.config._experts_implementation = implementation
    adapters = attached(model, batch)
    adapters.paths.to(dtype)
    bank = adapters.bank
    assert bank is not None
    ours = model(**batch)[0]

    weights, gates = {}, {}
    for key, path in typed(adapters):
        where, units = bank.slices[key], torch.arange(path.units).view(-1, 3)
        gate = gates[key] = bank.deterministic()[0, where].to(dtype).requires_grad_()
        name = str(path.site.write)
        delta = torch.stack([(path.up[:, own] * gate[own]) @ path.down[own] for own in units])
        delta = delta if path.site.experts else delta[0]
        weights[name] = plain.get_parameter(name).detach() + (delta.mT if path.site.transposed else delta)
    theirs = functional_call(plain, weights, (), batch)[0]

    tight = {"rtol": 1e-6, "atol": 1e-9} if double else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(ours, theirs, **tight)
    parameters = list(adapters.paths.parameters())
    expected = torch.autograd.grad(weighted(theirs), [*parameters, *gates.values()])
    weighted(ours).backward()
    for parameter, want in zip(parameters, expected, strict=False):
        torch.testing.assert_close(parameter.grad, want, **tight)
    slope = torch.autograd.functional.jvp(  # of a gate in its log alpha
        lambda a: (torch.sigmoid(a) * 1.2 - 0.1).clamp(0, 1), bank.log_alpha.detach(), torch.ones_like(bank.log_alpha)
    )[1]
    assert bank.log_alpha.grad is not None
    for key, want in zip(gates, expected[len(parameters) :], strict=True):
        where = bank.slices[key]
        got = bank.log_alpha.grad[0, where]
        torch.testing.assert_close(got, (want * slope[0, where]).float(), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft reads a former name
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_it_equals_pefts_target_parameters(family: str) -> None:
    """Values and gradients of its LoRA at the same parameters, translated from its layout."""
    model, batch = tiny(family)
    space = SearchSpace(gates=GateConfig(levels=("path",), init=4.6, init_spread=0, stochastic=False), paths=(EXPERTS,))
    adapters = ga.attach(model, space, batch)
    awaken(adapters)
    twin, _ = tiny(family)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=[], target_parameters=names)
    theirs = peft.get_peft_model(twin, config).eval()
    layers = {
        f"{name.removeprefix('base_model.model.').replace('.base_layer', '')}.{module.parameter_name}": module
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.layer.ParamWrapper)
    }
    assert layers.keys() == {str(path.site.write) for _, path in typed(adapters)}

    def as_peft(path: WeightLoRA, value: Tensor) -> Tensor:
        """up (out, experts x rank) -> lora_B (out, rank x experts); lora_A is down as it is."""
        return value.unflatten(1, (path.site.experts, 3)).transpose(1, 2).flatten(1)

    with torch.no_grad():
        for _, path in typed(adapters):
            layers[str(path.site.write)].lora_A["default"].weight.copy_(path.down)
            layers[str(path.site.write)].lora_B["default"].weight.copy_(as_peft(path, path.up))
    ours, expected = model(**batch)[0], theirs(**batch)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    weighted(ours).backward()
    weighted(expected).backward()
    for _, path in typed(adapters):
        layer = layers[str(path.site.write)]
        assert path.down.grad is not None
        assert path.up.grad is not None
        torch.testing.assert_close(path.down.grad, layer.lora_A["default"].weight.grad, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            as_peft(path, path.up.grad), layer.lora_B["default"].weight.grad, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4", "jetmoe", "recurrent_gemma"])
def test_no_weight_is_ever_copied(family: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny(family)
    model.config._experts_implementation = implementation
    stacks = SearchSpace(gates=SPACE.gates, paths=(WeightLoRAOptions(rank=3, at=Where(exclude="router|gate$")),))
    attached(model, batch, space=stacks)
    monkeypatch.setattr(LowRankSum, "dense", lambda self: pytest.fail("the sum was formed"))
    weighted(model(**batch)[0]).backward()


def test_an_implementation_that_hides_its_products_gets_whole_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny("mixtral")
    attached(model, batch)
    expected = model(**batch)[0]
    seen = []

    def opaque(self: Any, *args: Tensor) -> Tensor:
        seen.extend([type(self.gate_up_proj), type(self.down_proj)])
        return type(self).forward.__wrapped__(self, *args)  # the eager loop

    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "opaque", opaque)
    model.config._experts_implementation = "opaque"
    torch.testing.assert_close(model(**batch)[0], expected)
    assert set(seen) == {Tensor}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_that_fails_leaves_the_weights_alone(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny("mixtral")
    before, keys = model(**batch)[0], model.state_dict().keys()
    adapters = attached(model, batch)
    adapted = model(**batch)[0]
    experts = model.get_submodule("layers.1.mlp.experts")
    with monkeypatch.context() as broken:

        def fail(x: Tensor) -> Tensor:
            assert model.state_dict().keys() >= keys
            raise error

        broken.setattr(experts.act_fn, "forward", fail)
        with pytest.raises(error):
            model(**batch)
    assert issubclass(error, KeyboardInterrupt) or nothing_in_the_way(model)
    with adapters.disabled():
        assert torch.equal(model(**batch)[0], before)
    assert torch.equal(model(**batch)[0], adapted)
    assert nothing_in_the_way(model)
    with monkeypatch.context() as broken:
        broken.setattr(experts.act_fn, "forward", fail)
        with pytest.raises(error):
            model(**batch)
    ga.detach(model)
    assert nothing_in_the_way(model)
    assert torch.equal(model(**batch)[0], before)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["qwen2_moe", "llama4", "jamba"])
def test_a_batch_of_several_tasks_equals_one_batch_for_each(family: str, implementation: str) -> None:
    """Values and gradients; the module runs on each token once."""
    model, batch = tiny(family)
    model.config._experts_implementation = implementation
    model.config.use_cache = False
    batch = {name: value.repeat(2, 1) for name, value in batch.items()}
    batch["input_ids"] = (batch["input_ids"] + torch.arange(4)[:, None]) % 99
    adapters = attached(model, batch, tasks=("a", "b", "c"))
    ids = torch.tensor([2, 0, 0, 2])
    results = []
    for together in (True, False):
        model.zero_grad()
        if together:
            output = model(**batch, task_ids=ids)[0]
        else:
            parts = [model(**{k: v[i : i + 1] for k, v in batch.items()}, task_ids=ids[i : i + 1])[0] for i in range(4)]
            output = torch.cat(parts)
        weighted(output).backward()
        results.append([output.detach(), *(p.grad for p in adapters.parameters() if p.grad is not None)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("preset", ["lora-all-linear", "decoder-mixed"])
@pytest.mark.parametrize(
    "family", ["mamba", "falcon_mamba", "jamba", "deepseek_v3", "nemotron_h", "lfm2_moe", "recurrent_gemma"]
)
def test_a_batch_of_several_tasks_may_have_paths_inside_and_around_what_is_cut_up(family: str, preset: str) -> None:
    """Mixers that hold maps with paths of their own, routers that flatten tokens or take the model's own vectors."""
    model, batch = tiny(family)
    model.config.use_cache = False
    batch = {name: value.repeat(2, 1) for name, value in batch.items()}
    batch["input_ids"] = (batch["input_ids"] + torch.arange(4)[:, None]) % 99
    adapters = ga.attach(model, preset, batch, tasks=("a", "b"))
    awaken(adapters.paths)
    assert adapters.bank is not None
    ids = torch.tensor([0, 1, 1, 0])
    with torch.no_grad():
        adapters.bank.log_alpha.uniform_(-4, 4, generator=torch.Generator().manual_seed(0))
        together = model(**batch, task_ids=ids)[0]
        parts = [model(**{k: v[i : i + 1] for k, v in batch.items()}, task_ids=ids[i : i + 1])[0] for i in range(4)]
    torch.testing.assert_close(together, torch.cat(parts), rtol=1e-4, atol=1e-5)
    assert nothing_in_the_way(model)


def test_tasks_that_cannot_be_told_apart_inside_the_experts_are_refused() -> None:
    """JetMoE's experts get tokens sorted by expert, Mamba's mixer holds the past of the whole batch."""
    mamba, batch = tiny("mamba")
    attached(mamba, batch, tasks=("a", "b"))
    with pytest.raises(TaskError, match=r"cannot be told apart(.|\n)*Cache(.|\n)*use_cache=False"):
        mamba(**batch, task_ids=torch.tensor([0, 1]))
    mamba(**batch, task_ids=torch.tensor([0, 1]), use_cache=False)
    model, batch = tiny("jetmoe")
    adapters = attached(model, batch, tasks=("a", "b"))
    with pytest.raises(TaskError, match=r"cannot be told apart(.|\n)*input_linear(.|\n)*fix:"):
        model(**batch, task_ids=torch.tensor([0, 1]))
    model(**batch, task_ids=torch.tensor([1, 1]))
    adapters.set_task("b")
    model(**batch)
    assert nothing_in_the_way(model)


def test_a_structure_chooses_among_experts_and_comes_back_from_a_file(tmp_path: FilePath) -> None:
    model, batch = tiny("qwen3_moe")
    adapters = attached(model, batch, space=SearchSpace(gates=SPACE.gates, paths=(EXPERTS,)))
    bank = adapters.bank
    assert bank is not None
    with torch.no_grad():  # one expert keeps all of its ranks, one keeps the last, the others nothing
        for where in bank.slices.values():
            bank.log_alpha[0, where] = torch.tensor([-4.0] * 3 + [4.0] * 3 + [-4.0] * 5 + [1.0])
        gated = model(**batch)[0]
    structure = adapters.compact()
    torch.testing.assert_close(model(**batch)[0], gated, rtol=0, atol=1e-5)
    for _, path in typed(adapters):
        assert path.experts == (1, 1, 1, 3)
        assert path.down.shape == (4, path.site.width_in)
    assert [record.options.experts for record in structure.paths] == [(1, 1, 1, 3)] * 4
    assert structure.params == sum(p.numel() for p in adapters.parameters())
    assert structure.params == sum(4 * (path.site.width_in + path.site.width_out) for _, path in typed(adapters))
    with torch.no_grad():
        expected = model(**batch)[0]
    adapters.save(tmp_path / "out")
    fresh, _ = tiny("qwen3_moe")
    loaded = ga.load_adapters(fresh, tmp_path / "out")
    assert torch.equal(fresh(**batch)[0], expected)
    assert loaded.structure == structure
    ga.detach(fresh)
    scratch = ga.attach(fresh, structure)
    assert [path.experts for _, path in typed(scratch)] == [(1, 1, 1, 3)] * 4
    weighted(fresh(**batch)[0]).backward()
    assert all(path.up.grad is not None for _, path in typed(scratch))
    other, _ = tiny("llama")
    with pytest.raises(PathError, match="does not fit the model"):
        ga.attach(other, structure)
    with pytest.raises(ArtifactError):
        ga.load_adapters(other, tmp_path / "out")


def test_condensing_is_the_best_approximation_of_each_expert() -> None:
    model, batch = tiny("mixtral")
    path = next(path for _, path in typed(ga.attach(model, SPACE, batch)) if path.site.experts)
    awaken(path)
    gate = torch.rand(path.units)
    full = path.delta(gate).detach()
    kept = (0, 1, 3, 4, 5, 8)  # of the experts' ranks 0-2, 3-5, 6-8, 9-11
    path.condense(torch.tensor(kept), gate)
    for expert, rank in enumerate((2, 3, 1, 0)):
        u, s, vh = torch.linalg.svd(full[expert], full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        torch.testing.assert_close(path.delta()[expert].detach(), best, rtol=1e-4, atol=1e-5)
    before = path.delta().detach()
    path.select_units(torch.tensor(kept))
    torch.testing.assert_close(path.delta().detach(), before)


def test_a_path_that_keeps_no_rank_condenses_to_nothing() -> None:
    model, batch = tiny("mixtral")
    path = next(path for _, path in typed(ga.attach(model, SPACE, batch)) if path.site.experts)
    awaken(path)
    path.condense(torch.tensor([], dtype=torch.long), torch.zeros(path.units))
    assert not path.delta().detach().any()


def test_what_is_saved_for_backward_does_not_grow_with_the_experts() -> None:
    """Nothing of a weight's size but the backbone's own parameters."""
    model, batch = tiny("mixtral")
    attached(model, batch)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    experts = model.get_parameter("layers.0.mlp.experts.down_proj")
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(**batch)
    assert max(sizes) < experts.numel()


def test_all_linear_reaches_experts_and_lora_alone_says_what_it_leaves() -> None:
    model, batch = tiny("mixtral")
    layout = discover(model, batch)
    _, left = candidates(SearchSpace.load("lora-all-linear"), layout)
    assert not left
    alone = SearchSpace.parse({"paths": [{"kind": "lora"}]}, where="test")
    found, left = candidates(alone, layout)
    assert all("experts" not in key for key in found)
    inside = ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    assert {skipped.module for skipped in left} == {f"layers.{i}.mlp.{name}" for i in range(2) for name in inside}
    assert all("weight_lora can go there" in skipped.reason for skipped in left)
    half = SearchSpace(paths=(*alone.paths, WeightLoRAOptions(at=Where(roles=("down",)))))
    _, left = candidates(half, layout)
    assert {skipped.module for skipped in left} == {f"layers.{i}.mlp.{name}" for i in range(2) for name in inside[:2]}


@pytest.mark.parametrize("experts", [(), (0, 4), (-1,)])
def test_options_of_another_model_are_refused(experts: tuple[int, ...]) -> None:
    model, batch = tiny("mixtral")
    path = next(path for _, path in typed(ga.attach(model, SPACE, batch)) if path.site.experts)
    with pytest.raises(PathError, match=r"experts 0\.\.3"):
        WeightLoRA(path.site, WeightLoRAOptions(experts=experts))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler does that itself
@pytest.mark.filterwarnings("ignore:.*grad attribute of a Tensor that is not a leaf:UserWarning")  # and looks at it
def test_compiled_experts_give_what_eager_ones_do() -> None:
    model, batch = tiny("mixtral")
    adapters = attached(model, batch)
    results = []
    for compiled in (False, True):
        model.zero_grad()
        if compiled:
            model.get_submodule("layers.1.mlp").compile(backend="eager")
        output = model(**batch)[0]
        weighted(output).backward()
        results.append([output.detach(), *(p.grad for p in adapters.parameters() if p.grad is not None)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()
