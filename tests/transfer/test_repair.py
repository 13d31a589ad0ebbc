"""Repair of carried adapters: what it learns, what it leaves alone, and what it refuses."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence
from torch.utils.data import DataLoader
from updates import updated

import gatedadapters as ga
from gatedadapters.errors import ArtifactError, AttachError, DataError, TrainingError
from gatedadapters.testing.backbones import VOCABULARY, tiny
from gatedadapters.transfer import teacher_outputs
from gatedadapters.transfer.distance import distance

LORA = ga.SearchSpace.parse({"paths": [{"kind": "lora", "rank": 2}]}, where="test")
Batch = dict[str, Tensor]


def pair(folder: Path, family: str, head: str | None = "classification") -> tuple[nn.Module, nn.Module, Batch]:
    """An old base with trained adapters, its update with the same ones carried over, and a batch without labels."""
    old, batch = tiny(family, head=head) if head else tiny(family)
    new = updated(old)
    adapters = ga.attach(old, LORA, batch)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (*adapters.weight_parameters(), *adapters.head_parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapters.compact()
    adapters.save(folder / "adapter")
    ga.load_adapters(new, folder / "adapter", base="updated")
    return old, new, batch


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def learned(model: nn.Module) -> list[Tensor]:
    adapters = ga.get_adapters(model)
    return [p.detach().clone() for p in (*adapters.weight_parameters(), *adapters.head_parameters())]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- what it learns ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "head"), [("llama", "classification"), ("bert", "classification"), ("llama", "lm")])
def test_labels_lower_the_loss_and_move_adapters_and_heads_alone(tmp_path: Path, family: str, head: str) -> None:
    _, new, batch = pair(tmp_path, family, head)
    batch["labels"] = batch["input_ids"] if head == "lm" else torch.arange(len(batch["input_ids"])) % 2
    adapters, before = ga.get_adapters(new), state(new)
    structure, mode = adapters.structure, new.training
    with torch.no_grad():
        first = float(new.eval()(**batch).loss)
    report = ga.repair(new, [batch], steps=12, learning_rate=1e-2, progress=False)
    with torch.no_grad():
        assert float(new.eval()(**batch).loss) < 0.9 * first
    own = {f"gated_adapters.{name}" for name, _ in adapters.named_parameters()} | set(adapters.head_names)
    moved = {name for name, value in new.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert moved <= own
    assert adapters.structure is structure
    assert new.training == mode
    assert (report.steps, report.labelled, report.distilled) == (12, 12, 0)
    assert all(parameter.grad is None for parameter in new.parameters())


@pytest.mark.parametrize(("family", "head"), [("bert", "classification"), ("llama", "lm"), ("bert", None)])
def test_a_teacher_repairs_without_labels_and_is_left_as_it_is(tmp_path: Path, family: str, head: str | None) -> None:
    old, new, batch = pair(tmp_path, family, head)
    before, mode = state(old), old.train().training

    def gap() -> float:
        with torch.no_grad():
            return float((old.eval()(**batch)[0] - new.eval()(**batch)[0]).square().mean())

    first = gap()
    old.train()
    report = ga.repair(new, [batch], steps=30, teacher=old, learning_rate=1e-2, progress=False)
    assert old.training == mode
    assert gap() < 0.5 * first
    assert (report.labelled, report.distilled) == (0, 30)
    assert report.losses[-1] < report.losses[0]
    assert all(torch.equal(value, before[name]) for name, value in old.state_dict().items())


def test_a_teacher_answers_as_in_an_evaluation(tmp_path: Path) -> None:
    old, batch = tiny("bert", head="classification", hidden_dropout_prob=0.5)
    ga.attach(old, LORA, batch).compact()
    with torch.no_grad():
        expected = old.eval()(**batch).logits
    assert torch.equal(teacher_outputs(old.train(), [batch])[0], expected)
    assert old.training


def test_outputs_computed_beforehand_teach_the_same_as_the_model(tmp_path: Path) -> None:
    old, new, batch = pair(tmp_path, "llama", "lm")
    other = {**batch, "input_ids": batch["input_ids"].flip(0)}
    twin, batches = copy.deepcopy(new), [batch, other]
    outputs = teacher_outputs(old, batches)
    assert all(out.shape == (*batch["input_ids"].shape, VOCABULARY) for out in outputs)
    ga.repair(new, batches, steps=3, teacher=old, progress=False)
    ga.repair(twin, batches, steps=3, teacher=outputs, progress=False)
    assert same(learned(new), learned(twin))


def test_labels_and_a_teacher_add_up(tmp_path: Path) -> None:
    old, new, batch = pair(tmp_path, "bert")
    labels = torch.arange(len(batch["input_ids"])) % 2
    parts = [
        ga.repair(copy.deepcopy(new), [given], steps=1, teacher=teacher, progress=False).losses[0]
        for given, teacher in (({**batch, "labels": labels}, None), (batch, old), ({**batch, "labels": labels}, old))
    ]
    assert parts[0] + parts[1] == pytest.approx(parts[2], rel=1e-5)


def test_several_tasks_are_repaired_together(tmp_path: Path) -> None:
    backbone, batch = tiny("bert")
    old = ga.MultiTaskClassifier(backbone, {"a": 2, "b": 4})
    new = updated(old)
    batch["task_ids"] = torch.arange(len(batch["input_ids"])) % 2
    ga.attach(old, LORA, batch, tasks=("a", "b")).compact()
    ga.get_adapters(old).save(tmp_path / "both")
    ga.load_adapters(new, tmp_path / "both", base="updated")
    report = ga.repair(new, [batch], steps=10, teacher=old, progress=False)  # task a lacks two of the four classes
    assert 0 <= report.losses[-1] < report.losses[0]


def test_gated_adapters_keep_their_gates_their_penalty_and_so_their_structure() -> None:
    model, batch = tiny("llama", head="classification")
    batch["labels"] = torch.arange(len(batch["input_ids"])) % 2
    budget = ga.Budget(fraction=0.5)
    adapters = ga.attach(model, LORA, batch, penalty=budget, total_steps=4)
    assert adapters.bank is not None
    with torch.no_grad():
        adapters.bank.log_alpha.copy_(3 * torch.randn(adapters.bank.log_alpha.shape))
        for parameter in adapters.weight_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
        first = float(model.eval()(**batch).loss)  # with the gates of an evaluation
    adapters.bank.step += 4  # the prune is due
    structure, pressure = adapters.discretize(), adapters.pressure
    gates = [value.clone() for value in (*adapters.bank.parameters(), *adapters.bank.buffers())]
    before = learned(model)
    report = ga.repair(model, [batch], steps=6, progress=False)
    assert report.losses[0] == pytest.approx(first, rel=1e-5)
    assert not same(learned(model), before)
    assert adapters.structure is None
    assert same(gates, [*adapters.bank.parameters(), *adapters.bank.buffers()])
    assert adapters.pressure is pressure
    assert adapters.discretize() == structure
    assert all(p.requires_grad for p in adapters.bank.parameters())


# -- how it learns -----------------------------------------------------------------------------------------


def test_every_kind_learns_at_its_own_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, new, batch = pair(tmp_path, "bert")
    batch["labels"] = torch.arange(len(batch["input_ids"])) % 2
    expected = [(group["lr"], group["params"]) for group in ga.get_adapters(new).parameter_groups(1e-3)]
    seen: list[Any] = []
    adamw = torch.optim.AdamW

    def watched(groups: Any, **options: Any) -> Any:
        seen.extend((group["lr"], group["params"]) for group in groups)
        assert options == {"weight_decay": 0.0}
        return adamw(groups, **options)

    monkeypatch.setattr(torch.optim, "AdamW", watched)
    ga.repair(new, [batch], steps=1, progress=False)
    assert [rate for rate, _ in seen] == [rate for rate, _ in expected]
    assert all(a is b for (_, x), (_, y) in zip(seen, expected, strict=True) for a, b in zip(x, y, strict=True))


def test_the_rate_rises_in_a_tenth_of_the_steps_and_falls_to_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, new, batch = pair(tmp_path, "bert")
    batch["labels"] = torch.arange(len(batch["input_ids"])) % 2
    highest = ga.get_adapters(new).parameter_groups(1e-3)[0]["lr"]
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def watched(optimizer: Any, *args: Any) -> Any:
        rates.append(optimizer.param_groups[0]["lr"] / highest)
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    ga.repair(new, [batch], steps=20, progress=False)
    assert rates == pytest.approx([0.5, 1.0, *((20 - done) / 18 for done in range(2, 20))])


def test_batches_are_read_again_where_they_are_fewer_than_the_steps(tmp_path: Path) -> None:
    _, new, batch = pair(tmp_path, "bert")
    ids = batch["input_ids"]
    rows = [{"input_ids": row, "labels": torch.tensor(i % 2)} for i, row in enumerate(ids)]
    assert ga.repair(copy.deepcopy(new), DataLoader(rows, batch_size=1), steps=5, progress=False).steps == 5
    batches = [{"input_ids": ids[i : i + 1], "labels": torch.tensor([i % 2])} for i in range(len(ids))]
    twin = copy.deepcopy(new)
    ga.repair(new, batches, steps=5, progress=False)
    ga.repair(twin, (batch for batch in batches), steps=5, progress=False)  # kept for the second reading
    assert same(learned(new), learned(twin))


def test_a_repair_leaves_the_random_state_of_others(tmp_path: Path) -> None:
    _, new, batch = pair(tmp_path, "bert")
    batch["labels"] = torch.arange(len(batch["input_ids"])) % 2
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    ga.repair(new, [batch], steps=2, progress=False)
    assert torch.equal(torch.rand(3), expected)


# -- the distance to a teacher -----------------------------------------------------------------------------


def test_distance_of_classes_is_the_divergence_over_what_is_no_padding() -> None:
    torch.manual_seed(0)
    output, target = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    each = kl_divergence(Categorical(logits=target), Categorical(logits=output))
    torch.testing.assert_close(distance(output, target, mask), each[mask.bool()].mean())
    torch.testing.assert_close(distance(output, target), each.mean())
    lacking = torch.finfo(torch.float32).min  # the logit of a class that a task does not have
    output[..., 4], target[..., 4] = lacking, lacking
    torch.testing.assert_close(distance(output, target), distance(output[..., :4], target[..., :4]))
    assert distance(target, target) == 0


def test_distance_of_numbers_and_hidden_states_is_relative() -> None:
    output, target = torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [4.0]])
    assert float(distance(output, target)) == pytest.approx(5 / 20)
    states = torch.ones(1, 2, 4)
    mask = torch.tensor([[1, 0]])
    states_of_teacher = torch.tensor([2.0, 100.0])[None, :, None].expand(1, 2, 4)
    assert float(distance(states, states_of_teacher, mask, hidden=True)) == pytest.approx(1 / 4)


# -- what it refuses ---------------------------------------------------------------------------------------


def outside(batch: Batch) -> Batch:
    ids = batch["input_ids"].clone()
    ids[0, 0] = VOCABULARY
    return {**batch, "input_ids": ids, "labels": torch.zeros(len(ids), dtype=torch.long)}


CASES: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "no steps": (lambda old, new, batch: ga.repair(new, [batch], steps=0, teacher=old), TrainingError, "at least 1"),
    "no whole steps": (
        lambda old, new, batch: ga.repair(new, [batch], steps=1.5, teacher=old),  # type: ignore[arg-type]
        TrainingError,
        "1.5",
    ),
    "neither labels nor teacher": (
        lambda old, new, batch: ga.repair(new, [batch], steps=1),
        DataError,
        "neither labels nor a teacher",
    ),
    "no batches": (lambda old, new, batch: ga.repair(new, [], steps=1, teacher=old), DataError, "nothing to repair"),
    "another tokenizer's text": (
        lambda old, new, batch: ga.repair(new, [outside(batch)], steps=1),
        TrainingError,
        "outside the model's vocabulary",
    ),
    "another tokenizer's text for the teacher": (
        lambda old, new, batch: teacher_outputs(old, [outside(batch)]),
        TrainingError,
        "outside the model's vocabulary",
    ),
    "its own teacher": (
        lambda old, new, batch: ga.repair(new, [batch], steps=1, teacher=new),
        DataError,
        "not its own teacher",
    ),
    "too few outputs": (
        lambda old, new, batch: ga.repair(new, [batch, batch], steps=1, teacher=teacher_outputs(old, [batch])),
        DataError,
        "one output of the teacher for each batch",
    ),
    "outputs for a stream": (
        lambda old, new, batch: ga.repair(new, iter([batch]), steps=1, teacher=teacher_outputs(old, [batch])),
        DataError,
        "list_iterator",
    ),
    "another head's outputs": (
        lambda old, new, batch: ga.repair(new, [batch], steps=1, teacher=[torch.zeros(2, 7)]),
        DataError,
        "(2, 7)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_repaired_is_refused_and_nothing_changed(tmp_path: Path, case: str) -> None:
    act, error, says = CASES[case]
    old, new, batch = pair(tmp_path, "bert")
    before = state(new), state(old)
    with pytest.raises(error) as refused:
        act(old, new, batch)
    assert says in str(refused.value)
    assert all(part in str(refused.value) for part in ("expected:", "got:", "where:", "fix:"))
    for model, held in zip((new, old), before, strict=True):
        assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())


def test_a_repair_that_fails_on_the_way_leaves_everything_as_it_was(tmp_path: Path) -> None:
    _, new, batch = pair(tmp_path, "bert")
    batch["labels"] = torch.arange(len(batch["input_ids"])) % 2
    new.eval()
    parameter = ga.get_adapters(new).weight_parameters()[0]
    parameter.grad = torch.ones_like(parameter)
    before, given = state(new), parameter.grad

    def stream() -> Iterator[Batch]:
        yield batch
        yield batch
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ga.repair(new, stream(), steps=3, progress=False)
    embedded = {name: value for name, value in batch.items() if name != "input_ids"}
    broken = {**embedded, "inputs_embeds": torch.full((*batch["input_ids"].shape, 32), torch.nan)}
    with pytest.raises(TrainingError, match="the loss is not finite"):
        ga.repair(new, [batch, batch, broken], steps=5, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in new.state_dict().items())
    assert parameter.grad is given
    assert not any(module.training for module in new.modules())
    ga.repair(new, [batch], steps=1, progress=False)


def test_a_model_without_adapters_is_told_how_to_carry_them(tmp_path: Path) -> None:
    _, new, batch = pair(tmp_path, "bert")
    batch["labels"] = torch.zeros(len(batch["input_ids"]), dtype=torch.long)
    ga.detach(new)
    with pytest.raises(AttachError, match=r"load_adapters\(model, folder, base=\"updated\"\)"):
        ga.repair(new, [batch], steps=1)
    ga.load_adapters(new, tmp_path / "adapter", base="updated")
    ga.repair(new, [batch], steps=1, progress=False)


def test_running_text_is_its_own_label_if_the_user_says_so(tmp_path: Path) -> None:
    old, new, batch = pair(tmp_path, "llama", "lm")
    with pytest.raises(DataError, match="labels = input_ids"):
        ga.repair(new, [batch], steps=1, progress=False)
    ga.repair(new, [{**batch, "labels": batch["input_ids"]}], steps=1, progress=False)
    ga.repair(new, [batch], steps=1, teacher=old, progress=False)


def test_a_backbone_without_a_head_has_no_loss_but_can_follow_a_teacher(tmp_path: Path) -> None:
    old, new, batch = pair(tmp_path, "bert", None)
    twin = copy.deepcopy(new)
    labels = torch.zeros(len(batch["input_ids"]), dtype=torch.long)
    new.register_forward_pre_hook(lambda m, a, k: (a, {n: v for n, v in k.items() if n != "labels"}), with_kwargs=True)
    with pytest.raises(TrainingError, match="returns no loss"):
        ga.repair(new, [{**batch, "labels": labels}], steps=1, progress=False)
    ga.repair(twin, [batch], steps=1, teacher=old, progress=False)


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    old, new, batch = pair(tmp_path, "bert")
    other, _ = tiny("bert", head="classification")
    other.resize_token_embeddings(VOCABULARY + 3)
    with pytest.raises(DataError, match="another tokenizer"):
        ga.repair(new, [batch], steps=1, teacher=other, progress=False)
    ga.repair(new, [batch], steps=1, teacher=old, progress=False)


def test_a_teacher_without_adapters_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new, batch = pair(tmp_path, "bert")
    ga.detach(old)
    with caplog.at_level(logging.WARNING):
        ga.repair(new, [batch], steps=1, teacher=old, progress=False)
    assert "the teacher has no adapters" in caplog.text


def test_merged_and_disabled_adapters_do_not_learn(tmp_path: Path) -> None:
    _, new, batch = pair(tmp_path, "llama", "lm")
    batch["labels"] = batch["input_ids"]
    adapters = ga.get_adapters(new)
    adapters.merge()
    with pytest.raises(TrainingError, match="unmerge"):
        ga.repair(new, [batch], steps=1, progress=False)
    adapters.unmerge()
    with adapters.disabled(), pytest.raises(TrainingError, match="depends on no adapter"):
        ga.repair(new, [batch], steps=1, progress=False)
    ga.repair(new, [batch], steps=1, progress=False)


# -- updates that adapters cannot follow -------------------------------------------------------------------


def test_a_joint_artefact_is_not_carried_but_its_adapters_are(tmp_path: Path) -> None:
    old, batch = tiny("llama", head="lm")
    new = updated(old)
    mask = ga.select(ga.score(old, kind="random"), protect=0.9)
    ga.attach(old, LORA, batch).compact()
    ga.apply_mask(old, mask)
    ga.save_joint(old, tmp_path / "joint")
    with pytest.raises(ArtifactError, match="A delta cannot be carried to an update"):
        ga.load_adapters(new, tmp_path / "joint", base="updated")
    ga.load_adapters(new, f"{tmp_path / 'joint'}/adapters", base="updated")
    labelled = {**batch, "labels": batch["input_ids"]}
    ga.repair(new, [labelled], steps=1, progress=False)
    with pytest.raises(AttachError, match="cannot be carried over an update"):
        ga.repair(old, [labelled], steps=1, progress=False)
    ga.get_delta(old).remove()
    ga.repair(old, [labelled], steps=1, progress=False)


def test_an_update_that_changed_shapes_takes_the_structure_alone(tmp_path: Path) -> None:
    _, _, batch = pair(tmp_path, "bert")
    wider, _ = tiny("bert", head="classification")
    wider.resize_token_embeddings(VOCABULARY + 3)
    with pytest.raises(ArtifactError, match="takes the structure over"):
        ga.load_adapters(wider, tmp_path / "adapter", base="updated")
    ga.attach(wider, ga.Structure.load(tmp_path / "adapter"))
    batch["labels"] = torch.zeros(len(batch["input_ids"]), dtype=torch.long)
    ga.repair(wider, [batch], steps=1, progress=False)
