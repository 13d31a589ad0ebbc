"""k micro-batches and several processes give the gradients of one batch, whatever a model does with the item count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import SPACE, Watch, arguments, assert_same, continued, labelled, with_dropout
from scales import MODELS, examples, search
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer
from transformers.modeling_outputs import CausalLMOutput

import gatedadapters as ga
from gatedadapters.testing import tiny
from gatedadapters.testing.backbones import VOCABULARY
from gatedadapters.training.loss_scale import divides_by_count


class Mean(nn.Module):
    """A model that takes every argument and returns the mean over its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body, _ = tiny("llama")
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, VOCABULARY)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Any = None, **kwargs: Any) -> CausalLMOutput:
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.head(self.dropout(self.norm(hidden.transpose(1, 2)).transpose(1, 2)))
        return CausalLMOutput(loss=self.loss(logits.flatten(0, 1), labels.flatten(), **kwargs), logits=logits)

    def loss(self, logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        return F.cross_entropy(logits, labels)


class Share(Mean):
    """The same, dividing by the number of items."""

    def loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
        if num_items_in_batch is None:
            return super().loss(logits, labels)
        return F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


def batch() -> dict[str, Tensor]:
    rows = continued(4)
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize(("model", "divides"), [(Mean(), False), (Share(), True)], ids=["mean", "share"])
def test_a_model_is_known_by_what_it_does_with_the_count(model: nn.Module, divides: bool) -> None:
    assert divides_by_count(model.train(), batch(), torch.tensor(7)) is divides


def test_the_question_changes_neither_modes_nor_statistics_nor_random_numbers() -> None:
    model = Mean().train()
    model.body.eval()
    state, modes = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]
    random = torch.get_rng_state()
    divides_by_count(model, batch(), 7)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_batch_without_labels_that_count_does_not_tell() -> None:
    model, _ = tiny("llama", head="lm")
    empty = batch() | {"labels": torch.full((4, 8), -100)}
    assert divides_by_count(model, empty, 7) is None
    assert divides_by_count(model, batch(), 7) is True


@pytest.mark.parametrize("name", MODELS)
def test_micro_batches_give_the_gradients_of_one_batch(name: str, tmp_path: Path) -> None:
    whole = search(name, tmp_path, batch=8, pieces=1)
    assert len(whole["gradients"]) == 4
    for pieces in (2, 4):
        found = search(name, tmp_path, batch=8 // pieces, pieces=pieces)
        for here, there in zip(found["gradients"], whole["gradients"], strict=True):
            assert_same(here, there, rtol=1e-5, atol=1e-5)
        assert found["structure"] == whole["structure"]


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_called_twice_more_in_the_first_step_and_never_again(name: str, tmp_path: Path) -> None:
    family, head = MODELS[name]
    model, _ = tiny(family, head=head, pad_token_id=0)
    ga.attach(model, SPACE)
    calls: list[bool] = []
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    trainer = ga.GatedTrainer(model, arguments(tmp_path, max_steps=3), train_dataset=examples(head))
    trainer.train()
    assert calls == [False, False, True, True, True]
    assert trainer.model_accepts_loss_kwargs is (name == "LlamaForCausalLM")


def test_a_loss_of_the_users_own_is_not_asked_about(tmp_path: Path) -> None:
    model, _ = tiny("bert", head="classification")
    ga.attach(model, SPACE)
    counts = []

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        counts.append(int(num_items_in_batch))
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    args = arguments(tmp_path, max_steps=1, gradient_accumulation_steps=2)
    ga.GatedTrainer(model, args, train_dataset=labelled([8]), compute_loss_func=loss).train()
    assert counts == [8, 8]


def test_a_plain_trainer_shows_what_was_wrong(tmp_path: Path) -> None:
    """The scale that transformers' own Trainer gives such a model: k times the gradient at k micro-batches."""
    sizes = []
    for pieces in (1, 4):
        model, _ = tiny("bert", head="classification")
        ga.attach(with_dropout(model, 0.0), SPACE)
        watch = Watch(lambda model, optimizer: float(model.classifier.weight.grad.norm()))
        changes = {"per_device_train_batch_size": 8 // pieces, "gradient_accumulation_steps": pieces, "max_steps": 1}
        args = arguments(tmp_path, **changes, max_grad_norm=0.0)
        Trainer(model, args, train_dataset=labelled([8]), callbacks=[watch]).train()
        sizes += watch.seen
    assert sizes[1] == pytest.approx(4 * sizes[0], rel=1e-2)
