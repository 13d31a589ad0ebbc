"""In and out of a model, and from gates to a compact adapter, on whole (tiny) models."""

from __future__ import annotations

import copy
import gc
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import pipeline

import gatedadapters as ga
from gatedadapters.errors import AttachError, BudgetError, ConfigError, LayoutError, PathError, TaskError
from gatedadapters.supernet import hooks as hooks_module
from gatedadapters.testing.backbones import FAMILIES, tiny

PRESETS = ("encoder-mixed", "decoder-mixed", "lora-all-linear")


def hidden(output: Any) -> Tensor:
    return output.logits if "logits" in output else output.last_hidden_state


def stirred(adapters: ga.Adapters, seed: int = 0) -> ga.Adapters:
    """Paths that contribute and gates that differ."""
    generator = torch.Generator().manual_seed(seed)
    assert adapters.bank is not None
    with torch.no_grad():
        for parameter in adapters.weight_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        values = 1 + 2 * torch.randn(adapters.bank.log_alpha.shape, generator=generator)
        coarse = torch.tensor([name[0] == "block" for name in adapters.bank.gate_names])
        adapters.bank.log_alpha.copy_(torch.where(coarse, values.clamp(min=2.0), values))  # not all of a shared block
    return adapters


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that attaching could disturb."""
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "modules": {name: (type(m), m.training) for name, m in model.named_modules()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "signature": str(inspect.signature(model.forward)),
    }


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["state"].keys() == b["state"].keys()
    assert all(torch.equal(value, b["state"][key]) for key, value in a["state"].items())
    assert {k: v for k, v in a.items() if k != "state"} == {k: v for k, v in b.items() if k != "state"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same_at_the_start_learns_and_comes_back_bit_for_bit(family: str) -> None:
    model, batch = tiny(family)
    before = snapshot(model)
    with torch.no_grad():  # frozen: torch multiplies a weight that needs a gradient in another order
        expected = hidden(copy.deepcopy(model).requires_grad_(False)(**batch))
    for preset in PRESETS:
        adapters = ga.attach(model, preset, sample=batch)
        with torch.no_grad():
            torch.testing.assert_close(hidden(model(**batch)), expected, rtol=0, atol=0)
        stirred(adapters)
        model.train()
        hidden(model(**batch)).float()[..., ::3].exp().mean().backward()  # of all, a norm would fix the mean
        assert adapters.bank is not None
        for key, path in adapters.paths.items():
            learns = any(p.grad is not None and p.grad.any() for p in path.parameters())
            idle = not adapters.bank.open_paths[key] or (family == "phimoe" and path.site.role == "router")
            assert learns or idle, f"{preset}: {key} reaches nothing"  # Phi's router estimates its gradient by chance
        assert adapters.bank.log_alpha.grad is not None
        assert adapters.bank.log_alpha.grad.any()
        model.eval()
        ga.detach(model)
        assert_same(before, snapshot(model))


def test_attached_model_keeps_its_type_signature_and_keys() -> None:
    model, batch = tiny("bert", head="classification")
    before = snapshot(model)
    ga.attach(model, "encoder-mixed", sample=batch)
    assert str(inspect.signature(model.forward)) == before["signature"]
    assert {k for k in model.state_dict() if not k.startswith("gated_adapters.")} == before["state"].keys()
    now = {n: type(m) for n, m in model.named_modules() if not n.startswith("gated_adapters")}
    assert now == {n: kind for n, (kind, _) in before["modules"].items()}


def test_only_adapters_and_the_head_learn() -> None:
    model, batch = tiny("bert", head="classification")
    adapters = ga.attach(model, "lora-all-linear", sample=batch)
    learning = {n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("gated_adapters.")}
    assert learning == set(adapters.head_names) == {"classifier.weight", "classifier.bias"}


def test_attaching_twice_is_refused() -> None:
    model, batch = tiny("bert")
    ga.attach(model, "lora-all-linear", sample=batch)
    with pytest.raises(AttachError, match=r"already has adapters(.|\n)*fix:"):
        ga.attach(model, "lora-all-linear", sample=batch)


@pytest.mark.parametrize("moment", range(1, 8))
def test_an_attach_that_fails_leaves_the_model_untouched(moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny("llama")
    before, calls = snapshot(model), iter(range(1, 100))
    real = hooks_module.OutputHook

    def failing(*args: Any, **options: Any) -> Any:
        if next(calls) == moment:
            raise RuntimeError("out of luck")
        return real(*args, **options)

    monkeypatch.setattr(hooks_module, "OutputHook", failing)
    with pytest.raises(RuntimeError, match="out of luck"):
        ga.attach(model, "decoder-mixed", sample=batch)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("collects", [True, False])
def test_attaching_leaves_the_garbage_collector_as_it_was(collects: bool) -> None:
    model, batch = tiny("bert")
    try:
        if not collects:
            gc.disable()
        ga.attach(model, "lora-all-linear", sample=batch)
        assert gc.isenabled() is collects
        with pytest.raises(AttachError):
            ga.attach(model, "lora-all-linear", sample=batch)
        assert gc.isenabled() is collects
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["lora", "serial", "parallel", "scale"])
def test_paths_that_share_a_tap_run_as_one(kind: str) -> None:
    """Three of a kind at one point take as many products as one."""
    counts = []
    for number in (1, 3):
        model, batch = tiny("bert")
        ga.attach(model, ga.SearchSpace.parse({"paths": [{"kind": kind}] * number}, where="test"), sample=batch)
        with Products() as products:
            model(**batch)
        counts.append(products.count)
    assert counts[0] == counts[1] > 0


class Products(TorchDispatchMode):
    """Counts matrix products, and the multiplications of whole hidden states."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.count += "mm" in name or (name == "mul" and out.dim() > 1)
        return out


def test_bad_requests_say_what_was_expected_and_leave_the_model_untouched() -> None:
    model, batch = tiny("bert")
    before = snapshot(model)
    nothing = ga.SearchSpace.parse({"paths": [{"kind": "lora", "at": {"roles": ["nonesuch"]}}]}, where="test")
    cases: list[tuple[type[Exception], dict[str, Any]]] = [
        (ConfigError, {"space": "no-such-preset"}),
        (PathError, {"space": nothing}),
        (TaskError, {"space": "lora-all-linear", "tasks": ("a", "a")}),
        (AttachError, {"space": "lora-all-linear", "heads": ("no.such.part",)}),
        (BudgetError, {"space": "lora-all-linear", "penalty": ga.Budget(params=1), "total_steps": 10}),
        (BudgetError, {"space": "lora-all-linear", "penalty": ga.Budget(fraction=0.5)}),
        (LayoutError, {"space": "lora-all-linear", "sample": {"input_ids": torch.ones(1, 4)}}),
    ]
    for error, arguments in cases:
        with pytest.raises(error, match=r"expected:(.|\n)*got:"):
            ga.attach(model, **{"sample": batch, **arguments})
        assert_same(before, snapshot(model))


def test_a_model_without_repeated_blocks_is_refused() -> None:
    with pytest.raises(LayoutError):
        ga.attach(nn.Sequential(nn.Linear(4, 4)), "lora-all-linear", sample={"input": torch.ones(1, 4)})


def test_detached_model_can_be_attached_again_and_has_no_adapters() -> None:
    model, batch = tiny("gpt2")
    ga.attach(model, "lora-all-linear", sample=batch)
    ga.detach(model)
    with pytest.raises(AttachError):
        ga.get_adapters(model)
    again = ga.attach(model, "attention-only", sample=batch)
    assert ga.get_adapters(model) is again


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart"])
def test_generation_works_and_starts_as_the_backbones(family: str) -> None:
    model, batch = tiny(family, head="lm")
    inputs = {"input_ids": batch["input_ids"]}
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    adapters = ga.attach(model, "decoder-mixed", sample=batch)
    assert torch.equal(model.generate(**inputs, **options), expected)
    stirred(adapters)
    gated = model.generate(**inputs, **options)
    adapters.compact(adapters.discretize())
    assert torch.equal(model.generate(**inputs, **options), gated)
    with adapters.disabled():
        assert torch.equal(model.generate(**inputs, **options), expected)


def test_pipelines_run_on_an_attached_model(minilm: Any) -> None:
    model, tokenizer = minilm
    model = copy.deepcopy(model)
    run = pipeline("feature-extraction", model=model, tokenizer=tokenizer, device="cpu")
    expected = run("a small test", return_tensors=True)
    adapters = ga.attach(model, "encoder-mixed")
    torch.testing.assert_close(run("a small test", return_tensors=True), expected, rtol=0, atol=0)
    stirred(adapters)
    assert not torch.allclose(run("a small test", return_tensors=True), expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler does that itself
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_compiled_model_gives_what_the_eager_one_does(family: str) -> None:
    model, batch = tiny(family, num_hidden_layers=1)  # which has every path; tracing takes its time
    adapters = stirred(ga.attach(model, "decoder-mixed", sample=batch))
    assert adapters.bank is not None
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD(adapters.gate_parameters(), lr=0.1)
    for _ in range(2):  # the second time round, gates have moved
        results = []
        for run in (model, compiled):
            model.zero_grad()
            output = hidden(run(**batch))
            output[..., ::3].exp().mean().backward()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in adapters.parameters()]
            results.append(
                [output.detach(), *grads]
            )  # a closed path is skipped by the one, multiplied by 0 by the other
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
        optimizer.step()
    torch._dynamo.reset()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "albert"])
def test_compact_output_is_that_of_the_gated_evaluation(family: str, preset: str) -> None:
    model, batch = tiny(family)
    adapters = stirred(ga.attach(model, preset, sample=batch))
    with torch.no_grad():
        gated = hidden(model(**batch))
        structure = adapters.compact(adapters.discretize())
        compact = hidden(model(**batch))
    torch.testing.assert_close(compact, gated, rtol=0, atol=1e-5)
    assert sum(p.numel() for p in adapters.paths.parameters()) == structure.params
    assert ga.Structure.from_json(structure.to_json()) == structure


@pytest.mark.parametrize("fraction", [0.02, 0.125, 0.5])
@pytest.mark.parametrize("unit", ["params", "flops"])
def test_a_pruned_structure_is_never_over_budget_and_nearly_spends_it(fraction: float, unit: str) -> None:
    model, batch = tiny("albert")  # its shared block makes flops and parameters differ
    adapters = stirred(ga.attach(model, "encoder-mixed", sample=batch))
    assert adapters.bank is not None
    dense = adapters.bank.dense_cost(unit)
    budget = ga.Budget(flops=fraction * dense) if unit == "flops" else ga.Budget(params=int(fraction * dense))
    structure = adapters.discretize(budget)
    spent = structure.flops if unit == "flops" else structure.params
    smallest = float(adapters.bank.cost(unit).min())
    assert spent <= budget.resolve(dense)
    assert spent >= min(0.98 * budget.resolve(dense), budget.resolve(dense) - smallest)


@pytest.fixture
def two_tasks() -> tuple[nn.Module, dict[str, Tensor], ga.Adapters]:
    model, batch = tiny("bert")
    batch = {key: value.repeat(4, 1)[:4] for key, value in batch.items()}
    return model, batch, stirred(ga.attach(model, "encoder-mixed", sample=batch, tasks=("one", "two")))


def test_each_example_sees_its_own_tasks_gates(two_tasks: tuple[nn.Module, dict[str, Tensor], ga.Adapters]) -> None:
    model, batch, adapters = two_tasks
    ids = torch.tensor([0, 1, 1, 0])
    with torch.no_grad():
        mixed = hidden(model(**batch, task_ids=ids))
        for row, task in enumerate(ids.tolist()):
            adapters.set_task(task)
            alone = hidden(model(**{key: value[row : row + 1] for key, value in batch.items()}))
            torch.testing.assert_close(mixed[row : row + 1], alone, rtol=0, atol=1e-5)
        structure = adapters.compact(adapters.discretize())
        torch.testing.assert_close(hidden(model(**batch, task_ids=ids)), mixed, rtol=0, atol=1e-5)
    held = (*adapters.paths.parameters(), *adapters.paths.buffers())
    assert sum(t.numel() for t in held if t.is_floating_point()) == structure.params  # positions are not counted


@pytest.mark.parametrize(
    "ids", [None, torch.tensor([0, 1, 2, 0]), torch.tensor([-1, 0, 0, 0]), torch.zeros(4), torch.zeros(4, 1).long()]
)
def test_task_ids_that_cannot_be_right_are_refused(
    ids: Tensor | None, two_tasks: tuple[nn.Module, dict[str, Tensor], ga.Adapters]
) -> None:
    model, batch, _ = two_tasks
    with pytest.raises(TaskError, match=r"expected:(.|\n)*got:"):
        model(**batch, **({} if ids is None else {"task_ids": ids}))


def test_a_structure_trains_from_scratch_without_gates() -> None:
    model, batch = tiny("llama")
    structure = stirred(ga.attach(model, "decoder-mixed", sample=batch)).discretize(ga.Budget(fraction=0.2))
    ga.detach(model)
    adapters = ga.attach(model, structure)
    assert adapters.bank is None
    assert sum(p.numel() for p in adapters.parameters()) == structure.params
    other, _ = tiny("gpt2")
    with pytest.raises(PathError, match="does not fit"):
        ga.attach(other, structure)


def test_a_wrappers_own_head_does_not_stay_frozen_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.out = tiny("bert")[0], nn.Linear(32, 2)

        def forward(self, **inputs: Any) -> Any:
            return self.out(self.encoder(**inputs)[0])

    sample = tiny("bert")[1]
    ga.attach(Wrapper(), "lora-all-linear", sample)
    assert [record.message for record in caplog.records if "out.weight, out.bias stays frozen" in record.message]
    caplog.clear()
    assert ga.attach(Wrapper(), "lora-all-linear", sample, heads=["out"]).head_names == ("out.weight", "out.bias")
    ga.attach(tiny("bert", head="classification")[0], "lora-all-linear", sample)
    assert not [record for record in caplog.records if "frozen" in record.message]


def test_places_where_a_candidate_cannot_go_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = tiny("mixtral")
    adapters = ga.attach(model, ga.SearchSpace.parse({"paths": [{"kind": "lora"}]}, where="test"), sample=batch)
    assert {skipped.kind for skipped in adapters.skipped_sites} == {"lora"}
    assert any("experts" in record.message for record in caplog.records)
