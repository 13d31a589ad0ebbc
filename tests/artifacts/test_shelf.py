"""Several saved adapters on one model: switched, mixed, added and removed, each as it is alone."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatedadapters as ga
from gatedadapters.errors import ArtifactError, AttachError, PathError, TaskError
from gatedadapters.runtime.call import Call
from gatedadapters.testing.backbones import tiny
from gatedadapters.testing.helpers import checkpoint_activations, output_of, stir

FAMILIES = ("bert", "albert", "modernbert", "gpt2", "llama", "gemma2", "mixtral", "jamba", "t5")
SPACES = {"a": "encoder-mixed", "b": "lora-all-linear", "c": "decoder-mixed"}


def saved(
    folder: Path, make: Callable[[], nn.Module], space: str, *, seed: int, tasks: tuple[str, ...] = ("default",)
) -> Path:
    """A folder with adapters, and heads if the model has some, that do something."""
    model, everything = make(), ga.SearchSpace.load(space)
    paths = tuple(options for options in everything.paths if options.kind != "weight_lora")
    adapters = ga.attach(model, everything.model_copy(update={"paths": paths}), tasks=tasks, seed=seed)
    stir(adapters, by=0.1, seed=seed)
    adapters.compact()
    adapters.save(folder)
    return folder


class Case:
    """One family, its saved adapters, and what each of them computes alone."""

    def __init__(self, root: Path, family: str, head: str = "base") -> None:
        self.make = lambda: tiny(family, head=head)[0]
        self.batch = {k: torch.cat([v, v.flip(0), v])[:5] for k, v in tiny(family, head=head)[1].items()}
        self.folders = {
            name: saved(root / name, self.make, space, seed=i) for i, (name, space) in enumerate(SPACES.items())
        }
        self.alone: dict[str | None, Tensor] = {None: output_of(self.make(), self.batch)}
        for name, folder in self.folders.items():
            model = self.make()
            ga.load_adapters(model, folder)
            self.alone[name] = output_of(model, self.batch)

    def shelf(self) -> tuple[nn.Module, ga.Shelf]:
        model = self.make()
        return model, ga.Shelf.load(model, self.folders)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("classifier"), "bert", "classification")


# -- what is computed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_each_example_of_a_mixture_and_each_batch_gets_what_its_own_adapters_compute_alone(
    family: str, tmp_path: Path
) -> None:
    case = Case(tmp_path, family)
    model, shelf = case.shelf()
    backbone = {n: p.clone() for n, p in model.named_parameters() if not n.startswith("gated_adapters.")}
    for names in (["b", "a", None, "b", "c"], ["a", "a", "a", "b", "b"], [None, None, "c", "c", "c"]):
        mixed = output_of(model, case.batch, adapter_names=names)
        expected = torch.stack([case.alone[name][row] for row, name in enumerate(names)])
        torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)
    for name in (*SPACES, None, "a"):
        shelf.activate(name)
        assert shelf.active == name
        assert torch.equal(output_of(model, case.batch), case.alone[name])
        assert torch.equal(output_of(model, case.batch, adapter_names=["b"] * 5), case.alone["b"])
    assert all(torch.equal(p, backbone[n]) for n, p in model.named_parameters() if n in backbone)
    distinct = list(case.alone.values())
    assert all(not torch.allclose(x, y, atol=1e-3) for i, x in enumerate(distinct) for y in distinct[:i])


def test_paths_at_weights_are_refused_a_place_beside_others(tmp_path: Path) -> None:
    model, batch = tiny("mixtral")
    adapters = ga.attach(model, "lora-all-linear", batch)
    adapters.compact()
    adapters.save(tmp_path / "experts")
    ga.detach(model)
    before = output_of(model, batch)
    with pytest.raises(ArtifactError, match=r"for a whole batch(.|\n)*weight_lora"):
        ga.Shelf.load(model, {"experts": tmp_path / "experts"})
    assert torch.equal(output_of(model, batch), before)


def test_adapters_that_no_example_uses_do_not_run(bert: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from gatedadapters.supernet import hooks

    model, shelf = bert.shelf()
    ran: dict[str, set[int]] = {}
    real = hooks.run_paths

    def counting(adapters: ga.Adapters, keys: list[str], hidden: Tensor, target: Tensor, call: Call) -> Tensor:
        name = next(name for name, member in shelf.members.items() if member is adapters)
        ran.setdefault(name, set()).add(target.shape[0])
        return real(adapters, keys, hidden, target, call)

    monkeypatch.setattr(hooks, "run_paths", counting)
    output_of(model, bert.batch, adapter_names=["b", None, "b", "c", None])
    assert ran == {"b": {2}, "c": {1}}  # each on its own examples alone
    ran.clear()
    shelf.activate(None)
    output_of(model, bert.batch)
    assert ran == {}


def test_gradients_of_a_mixture_are_those_of_each_example_alone_also_when_checkpointed(bert: Case) -> None:
    model, shelf = bert.shelf()
    names = ["b", "a", "b", None, "a"]
    weight = torch.randn(bert.alone[None].shape)
    shelf.activate(None)
    results = []
    for checkpointed in (False, True):
        model.zero_grad()
        for module in model.modules():  # blocks checkpoint in training mode alone, in which all else drops at random
            module.training = hasattr(module, "gradient_checkpointing")
        if checkpointed:
            checkpoint_activations(model, use_reentrant=False)
        (model(**bert.batch, adapter_names=names)[0] * weight).sum().backward()
        results.append({n: p.grad.clone() for n, p in shelf.named_parameters() if p.grad is not None})
    expected: dict[str, Tensor] = {}
    for name in ("a", "b"):
        alone = bert.make()
        adapters = ga.load_adapters(alone, bert.folders[name])
        rows = [row for row, other in enumerate(names) if other == name]
        (alone(**{k: v[rows] for k, v in bert.batch.items()})[0] * weight[rows]).sum().backward()
        expected |= {f"members.{name}.{n}": p.grad for n, p in adapters.named_parameters() if p.grad is not None}
    for result in results:
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(result[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_generation_follows_the_active_adapters_and_mixtures_also_with_beams(family: str, tmp_path: Path) -> None:
    case = Case(tmp_path, family, "lm")
    model, shelf = case.shelf()
    inputs = {"input_ids": case.batch["input_ids"][:3], "attention_mask": case.batch["attention_mask"][:3]}
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    each = {}
    for beams in (1, 2):
        for name in (*SPACES, None):
            with shelf.using(name):
                each[name] = model.generate(**inputs, num_beams=beams, **options)
        names = ["b", None, "a"]
        with shelf.using(names):
            assert shelf.active is None
            mixed = model.generate(**inputs, num_beams=beams, **options)
        assert shelf.active == "a"
        assert torch.equal(mixed, torch.stack([each[name][row] for row, name in enumerate(names)]))
    assert len({tuple(value.flatten().tolist()) for value in each.values()}) > 1


def test_an_encoder_called_by_itself_goes_by_what_is_active_not_by_the_last_call(tmp_path: Path) -> None:
    case = Case(tmp_path, "bart", "lm")
    model, shelf = case.shelf()
    inputs = {"input_ids": case.batch["input_ids"][:2], "attention_mask": case.batch["attention_mask"][:2]}
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    shelf.activate("b")
    wanted = model.generate(**inputs, **options)
    encoded = model.get_encoder()(**inputs).last_hidden_state
    with torch.no_grad():
        model(**inputs, decoder_input_ids=inputs["input_ids"], adapter_names=["a", "a"])
        assert torch.equal(model.get_encoder()(**inputs).last_hidden_state, encoded)
    assert torch.equal(model.generate(**inputs, **options), wanted)


def test_disabled_is_the_backbone_with_its_own_heads(classifier: Case) -> None:
    model, shelf = classifier.shelf()
    for name in ("b", None):
        shelf.activate(name)
        with shelf.disabled():
            assert torch.equal(output_of(model, classifier.batch), classifier.alone[None])
            shelf.activate("c")  # takes effect afterwards
            assert torch.equal(output_of(model, classifier.batch), classifier.alone[None])
        assert torch.equal(output_of(model, classifier.batch), classifier.alone["c"])


def test_routing_over_tasks_works_within_a_mixture(tmp_path: Path) -> None:
    make = lambda: tiny("bert")[0]  # noqa: E731
    batch = {k: torch.cat([v, v.flip(0)]) for k, v in tiny("bert")[1].items()}
    both = saved(tmp_path / "both", make, "encoder-mixed", seed=1, tasks=("one", "two"))
    single = saved(tmp_path / "single", make, "lora-all-linear", seed=2)
    alone = {}
    for name, folder in (("both", both), ("single", single)):
        model = make()
        ga.load_adapters(model, folder)
        ids = torch.tensor([1, 0, 0, 1]) if name == "both" else torch.zeros(4).long()
        alone[name] = output_of(model, batch, task_ids=ids)
    model = make()
    ga.Shelf.load(model, {"both": both, "single": single})
    mixed = output_of(
        model, batch, task_ids=torch.tensor([1, 0, 0, 1]), adapter_names=["both", "single", "single", "both"]
    )
    expected = torch.stack([alone["both"][0], alone["single"][1], alone["single"][2], alone["both"][3]])
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(TaskError, match="does not say which"):
        output_of(model, batch)


# -- heads ---------------------------------------------------------------------------------------------------


def test_heads_follow_the_switch_and_come_back(classifier: Case) -> None:
    model, shelf = classifier.shelf()
    for name in ("b", None, "a", "c"):
        shelf.activate(name)
        assert torch.equal(output_of(model, classifier.batch), classifier.alone[name])
    with shelf.using("b"):
        assert torch.equal(output_of(model, classifier.batch), classifier.alone["b"])
    assert torch.equal(output_of(model, classifier.batch, adapter_names=["c"] * 5), classifier.alone["c"])
    shelf.detach()
    assert torch.equal(output_of(model, classifier.batch), classifier.alone[None])


def test_mixtures_with_heads_are_refused_with_the_way_out(classifier: Case) -> None:
    model, shelf = classifier.shelf()
    for names in (["a", "b", "a", "a", None], [None, "b", "b", "b", "b"]):
        with pytest.raises(TaskError, match=r"heads(.|\n)*fix:.*using"):
            model(**classifier.batch, adapter_names=names)
    with pytest.raises(TaskError, match="heads"), shelf.using(["a", "b", "a", "a", None]):
        pass
    assert torch.equal(output_of(model, classifier.batch), classifier.alone["a"])


def test_a_call_that_names_one_for_all_runs_with_its_heads_and_leaves_the_models_own_alone(classifier: Case) -> None:
    model, _ = classifier.shelf()
    own = {name: value.clone() for name, value in classifier.make().named_parameters() if "classifier" in name}
    for name in ("b", None, "c", "a"):
        assert torch.equal(output_of(model, classifier.batch, adapter_names=[name] * 5), classifier.alone[name])
    assert all(torch.equal(model.get_parameter(name), value) for name, value in own.items())


def test_generate_takes_adapter_names_and_detaching_gives_it_back(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama", "lm")
    model, shelf = case.shelf()
    inputs = {"input_ids": case.batch["input_ids"][:3], "attention_mask": case.batch["attention_mask"][:3]}
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    each = {}
    for name in (*SPACES, None):
        with shelf.using(name):
            each[name] = model.generate(**inputs, **options)
    for beams, names in ((1, ["b", None, "a"]), (2, ["c", "c", "a"])):
        with shelf.using(names):
            wanted = model.generate(**inputs, num_beams=beams, **options)
        assert torch.equal(model.generate(**inputs, num_beams=beams, adapter_names=names, **options), wanted)
    assert torch.equal(model.generate(**inputs, adapter_names="b", **options), each["b"])
    with pytest.raises(TaskError, match="3 names"):
        model.generate(**inputs, adapter_names=["a", "b"], **options)
    with pytest.raises(ArtifactError, match="one of a, b, c"):
        model.generate(**inputs, adapter_names=["a", "b", "x"], **options)
    twin = copy.deepcopy(model)
    shelf.detach()
    assert "generate" not in vars(model)
    assert torch.equal(model.generate(**inputs, **options), each[None])
    assert torch.equal(twin.generate(**inputs, adapter_names="b", **options), each["b"])


def test_what_a_head_learns_stays_with_its_adapters(classifier: Case, tmp_path: Path) -> None:
    model, shelf = classifier.shelf()
    with torch.no_grad():
        for parameter in shelf.members["a"].head_parameters():
            parameter.add_(1.0)
    learned = output_of(model, classifier.batch)
    assert not torch.equal(learned, classifier.alone["a"])
    for name in ("b", "a"):
        shelf.activate(name)
    assert torch.equal(output_of(model, classifier.batch), learned)
    shelf.activate("b")
    shelf.members["a"].save(tmp_path / "again")  # from aside
    other = classifier.make()
    ga.load_adapters(other, tmp_path / "again")
    assert torch.equal(output_of(other, classifier.batch), learned)


# -- on and off the shelf ------------------------------------------------------------------------------------


def test_adapters_are_added_and_removed_one_by_one(bert: Case) -> None:
    model = bert.make()
    shelf = ga.Shelf.load(model, {"a": bert.folders["a"]})
    shelf.add("late", bert.folders["b"])
    assert shelf.active == "a"
    assert torch.equal(output_of(model, bert.batch), bert.alone["a"])
    with shelf.using("late"):
        assert torch.equal(output_of(model, bert.batch), bert.alone["b"])
    shelf.remove("a")
    assert shelf.active is None
    assert torch.equal(output_of(model, bert.batch), bert.alone[None])
    shelf.activate("late")
    assert torch.equal(output_of(model, bert.batch), bert.alone["b"])
    shelf.remove("late")
    assert list(shelf.parameters()) == []
    hooked = [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooked == ["", "embeddings.word_embeddings"]


def test_a_call_ends_with_the_adapters_it_began_with_though_they_are_removed_and_others_added_meanwhile(
    bert: Case,
) -> None:
    model = bert.make()
    shelf = ga.Shelf.load(model, {"a": bert.folders["a"], "b": bert.folders["b"]})

    def change(*_: Any) -> None:
        shelf.remove("a")
        shelf.add("a", bert.folders["c"])

    handle = model.encoder.layer[0].register_forward_hook(change)
    assert torch.equal(output_of(model, bert.batch), bert.alone["a"])
    handle.remove()
    with shelf.using("a"):
        assert torch.equal(output_of(model, bert.batch), bert.alone["c"])
    handle = model.encoder.layer[0].register_forward_hook(lambda *_: shelf.remove("a"))
    names = ["a", "b", "a", None, "b"]
    mixed = output_of(model, {**bert.batch, "adapter_names": names})
    expected = torch.stack(
        [{"a": bert.alone["c"], "b": bert.alone["b"], None: bert.alone[None]}[n][i] for i, n in enumerate(names)]
    )
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)
    handle.remove()
    shelf.remove("b")
    hooked = [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooked == ["", "embeddings.word_embeddings"]


def test_adapters_come_and_go_while_other_threads_serve(bert: Case) -> None:
    model = bert.make()
    shelf = ga.Shelf.load(model, {"a": bert.folders["a"], "b": bert.folders["b"]})
    done, served, wrong = threading.Event(), [0, 0], list[str]()

    def serve(index: int, name: str) -> None:
        try:
            while not done.is_set():
                with shelf.using(name), torch.no_grad():
                    if not torch.equal(output_of(model, bert.batch), bert.alone[name]):
                        wrong.append(name)
                served[index] += 1
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=serve, args=item) for item in enumerate("ab")]
    for thread in threads:
        thread.start()
    for _ in range(5):
        shelf.add("late", bert.folders["c"])
        with shelf.using("late"):
            assert torch.equal(output_of(model, bert.batch), bert.alone["c"])
        shelf.remove("late")
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert min(served) > 0


def test_the_memory_of_each_is_that_of_its_values(bert: Case) -> None:
    _, shelf = bert.shelf()
    assert shelf.bytes["b"] == 4 * shelf.members["b"].structure.params  # of LoRA alone
    assert shelf.bytes["a"] > 4 * shelf.members["a"].structure.params  # elements remember where they are, too


# -- combined ------------------------------------------------------------------------------------------------


def combined(case: Case, weights: dict[str, float], **options: Any) -> tuple[Tensor, ga.Adapters]:
    model, shelf = case.shelf()
    found = shelf.combine("sum", weights, **options)
    with shelf.using("sum"):
        return output_of(model, case.batch), found


def test_one_adapter_with_weight_one_is_itself_and_with_weight_nought_the_backbone(bert: Case) -> None:
    for name in SPACES:
        torch.testing.assert_close(combined(bert, {name: 1.0})[0], bert.alone[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(combined(bert, {name: 0.0})[0], bert.alone[None], rtol=1e-4, atol=1e-5)
    halves, _ = combined(bert, {"c": 0.5, "b": 0.0})
    assert not torch.allclose(halves, bert.alone["c"], rtol=1e-3, atol=1e-4)


def test_a_sum_of_all_kinds_is_the_sum_in_another_order_saved_and_loaded(bert: Case, tmp_path: Path) -> None:
    one, found = combined(bert, {"a": 0.7, "b": -0.2, "c": 0.4})
    other, _ = combined(bert, {"c": 0.4, "a": 0.7, "b": -0.2})
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert found.structure.params == sum(p.numel() for p in found.weight_parameters())
    found.save(tmp_path / "sum")
    model = bert.make()
    ga.load_adapters(model, tmp_path / "sum")
    assert torch.equal(output_of(model, bert.batch), one)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks by the old name
@pytest.mark.parametrize("rank", [None, 4])
def test_a_combined_lora_is_what_peft_makes_of_the_same(rank: int | None, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    make = lambda: tiny("llama", head="lm")[0]  # noqa: E731
    batch = tiny("llama", head="lm")[1]
    weights = {"one": 0.7, "two": -0.4}
    for seed, name in enumerate(weights):
        saved(tmp_path / name, make, "lora-all-linear", seed=seed)
        model = make()
        ga.export_peft(ga.load_adapters(model, tmp_path / name), tmp_path / f"{name}-peft")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "one-peft", adapter_name="one")
    theirs.load_adapter(tmp_path / "two-peft", adapter_name="two")
    options = {"combination_type": "cat"} if rank is None else {"combination_type": "svd", "svd_rank": rank}
    theirs.add_weighted_adapter(list(weights), list(weights.values()), "sum", **options)
    theirs.set_adapter("sum")
    ours = make()
    shelf = ga.Shelf.load(ours, {name: tmp_path / name for name in weights})
    found = shelf.combine("sum", weights, rank=rank)
    shelf.activate("sum")
    torch.testing.assert_close(output_of(ours, batch), output_of(theirs, batch), rtol=1e-3, atol=1e-4)
    kept = [p for name in weights for p in shelf.members[name].structure.paths]
    most = {own.key: sum(len(p.kept) for p in kept if p.key == own.key) for own in kept}
    assert all(path.units == (rank or most[key]) for key, path in found.typed_paths())


def test_what_cannot_be_combined_is_refused_and_the_shelf_is_as_it_was(bert: Case, classifier: Case) -> None:
    _, shelf = bert.shelf()
    for weights, says in (({}, "a finite weight"), ({"a": float("nan")}, "finite"), ({"x": 1.0}, "one of a, b, c")):
        with pytest.raises(ArtifactError, match=says):
            shelf.combine("sum", weights)
    with pytest.raises(ArtifactError, match="the name is taken"):
        shelf.combine("a", {"b": 1.0})
    _, headed = classifier.shelf()
    with pytest.raises(ArtifactError, match="without heads of their own"):
        headed.combine("sum", {"a": 0.5, "b": 0.5})
    assert list(shelf.members) == list(headed.members) == ["a", "b", "c"]


def test_a_model_comes_off_the_shelf_bit_for_bit(classifier: Case) -> None:
    model, untouched = classifier.make(), classifier.make()
    model.classifier.bias.requires_grad_(False)
    shelf = ga.Shelf.load(model, classifier.folders)
    learning = {n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("gated_adapters.")}
    assert learning == {"classifier.weight", "classifier.bias"}
    assert shelf.detach() is model
    assert not model.classifier.bias.requires_grad
    assert model.classifier.weight.requires_grad
    state = model.state_dict()
    assert state.keys() == untouched.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in untouched.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(AttachError, match="detached"):
        shelf.activate("a")
    ga.Shelf.load(model, classifier.folders)


@pytest.mark.parametrize("way", ["deepcopy", "torch.save"])
def test_a_copy_has_a_shelf_of_its_own(way: str, classifier: Case) -> None:
    model, shelf = classifier.shelf()
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    twin.gated_adapters.activate("b")
    assert torch.equal(output_of(twin, classifier.batch), classifier.alone["b"])
    assert torch.equal(output_of(model, classifier.batch), classifier.alone["a"])
    shelf.detach()
    assert torch.equal(output_of(twin, classifier.batch), classifier.alone["b"])
    twin.gated_adapters.detach()
    assert torch.equal(output_of(twin, classifier.batch), classifier.alone[None])


def test_get_adapters_finds_the_active_ones_and_they_are_neither_merged_nor_detached_alone(bert: Case) -> None:
    model, shelf = bert.shelf()
    shelf.activate("b")
    active = ga.get_adapters(model)
    assert active is shelf.members["b"] is shelf.current
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for call in (active.merge, active.merge_and_detach, active.detach, lambda: ga.detach(model)):
        with pytest.raises(AttachError, match=r"on a shelf(.|\n)*load_adapters"):
            call()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(output_of(model, bert.batch), bert.alone["b"])


# -- what is refused -----------------------------------------------------------------------------------------


def test_unknown_taken_and_impossible_names_are_refused_and_nothing_changes(bert: Case) -> None:
    model, shelf = bert.shelf()
    requests: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (ArtifactError, "one of a, b, c", lambda: shelf.activate("nonesuch")),
        (ArtifactError, "one of a, b, c", lambda: shelf.remove("nonesuch")),
        (ArtifactError, "one of a, b, c", lambda: model(**bert.batch, adapter_names=["a", "b", "a", "b", "x"])),
        (ArtifactError, "taken", lambda: shelf.add("b", bert.folders["c"])),
        (ArtifactError, "without dots", lambda: shelf.add("b.c", bert.folders["c"])),
        (ArtifactError, "without dots", lambda: shelf.add("keys", bert.folders["c"])),
        (ArtifactError, "no such folder", lambda: shelf.add("d", bert.folders["c"].parent / "gone")),
        (TaskError, "5 names", lambda: model(**bert.batch, adapter_names=["a", "b"])),
        (TaskError, "5 names", lambda: model(**bert.batch, adapter_names=[])),
        (AttachError, "already has adapters", lambda: ga.load_adapters(model, bert.folders["a"])),
        (AttachError, "already has adapters", lambda: ga.Shelf.load(model, bert.folders)),
    ]
    for error, words, call in requests:
        with pytest.raises(error, match=words) as caught:
            call()
        assert "fix:" in str(caught.value)
        assert (tuple(shelf.members), shelf.active) == (("a", "b", "c"), "a")
        assert torch.equal(output_of(model, bert.batch), bert.alone["a"])


def test_adapters_of_another_backbone_are_refused_and_the_model_left_as_it_was(bert: Case, classifier: Case) -> None:
    model, _ = tiny("bert", seed=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for folders in (bert.folders, classifier.folders, {}):
        with pytest.raises(ArtifactError):
            ga.Shelf.load(model, folders)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    shelf = ga.Shelf.load(model, bert.folders, base="updated")
    assert tuple(shelf.members) == ("a", "b", "c")


def test_a_mixture_is_refused_where_a_point_carries_no_examples(tmp_path: Path) -> None:
    case = Case(tmp_path, "deberta_v2")  # adapters on its projections of relative positions, which all examples share
    model, shelf = case.shelf()
    with pytest.raises(PathError, match=r"one run each(.|\n)*relative positions"):
        output_of(model, case.batch, adapter_names=["a", "b", "a", "b", "c"])
    with pytest.raises(PathError, match="examples first"):  # also where their number could be shared out
        output_of(model, {name: value[:2] for name, value in case.batch.items()}, adapter_names=["a", "b"])
    shelf.activate("b")
    assert torch.equal(output_of(model, case.batch), case.alone["b"])
