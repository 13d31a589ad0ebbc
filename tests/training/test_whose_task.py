"""Task ids reach the examples they are of, or are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recipes import arguments, labelled
from torch import nn
from transformers import DebertaV2Config, DebertaV2Model, XLNetConfig, XLNetModel

import gatedadapters as ga
from gatedadapters.errors import AttachError, GatedAdaptersError, PathError, TaskError, TrainingError
from gatedadapters.testing import tiny
from gatedadapters.testing.helpers import awaken
from gatedadapters.training import MultiTaskClassifier

IDS = torch.randint(3, 50, (1, 8), generator=torch.Generator().manual_seed(0))


class PositionsFirst(nn.Module):
    """An encoder as torch's own layers are by default: (length, batch, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, 48) for _ in range(2))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.table(input_ids).transpose(0, 1)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden.transpose(0, 1)


@pytest.mark.parametrize("kind", ["xlnet", "torch"])
def test_a_hidden_state_with_positions_first_takes_one_task_at_a_time(kind: str) -> None:
    config = XLNetConfig(vocab_size=50, d_model=32, n_layer=2, n_head=4, d_inner=48)
    model: Any = XLNetModel(config).eval() if kind == "xlnet" else PositionsFirst().eval()
    sample = {"input_ids": IDS.repeat(3, 1)}
    for batch in (None, sample) if kind == "xlnet" else (sample,):
        with pytest.raises(TaskError, match="positions first"):
            ga.attach(model, "lora-all-linear", batch, tasks=("a", "b"))
    ga.attach(model, "lora-all-linear", sample)  # one task needs no telling apart


@pytest.mark.parametrize("batch", [2, 3, 8])
def test_points_that_carry_no_examples_are_refused_whatever_the_batch(batch: int) -> None:
    config = DebertaV2Config(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        relative_attention=True,
        position_buckets=256,
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        max_position_embeddings=512,
    )
    model = DebertaV2Model(config).eval()
    awaken(ga.attach(model, "encoder-mixed", tasks=("a", "b")).paths)
    with pytest.raises(PathError, match="relative positions"):
        model(input_ids=IDS.repeat(batch, 1), task_ids=torch.arange(batch) % 2)


def test_ids_are_those_of_the_models_own_tasks_in_whatever_order_they_were_attached() -> None:
    torch.manual_seed(0)
    model = MultiTaskClassifier(tiny("bert")[0], {"a": 2, "b": 2, "c": 2}).eval()
    adapters = ga.attach(model, "lora-all-linear", tasks=("c", "a"))
    awaken(adapters.paths)
    assert adapters.bank is not None
    with torch.no_grad():
        adapters.bank.log_alpha[1] = -5.0  # a's are closed
        found = model(IDS.repeat(2, 1), task_ids=torch.tensor([0, 2])).logits
        with adapters.disabled():
            plain = model(IDS.repeat(2, 1), task_ids=torch.tensor([0, 2])).logits
    assert torch.equal(found[0], plain[0])
    assert not torch.allclose(found[1], plain[1])
    with pytest.raises(TaskError, match=r"2, 0 \(c, a\)"):
        model(IDS, task_ids=torch.tensor([1]))


def test_an_encoder_called_by_itself_goes_by_the_task_that_is_set_not_by_the_last_call() -> None:
    model, batch = tiny("bart", head="lm")
    adapters = ga.attach(model, "lora-all-linear", batch, tasks=("a", "b"))
    awaken(adapters.paths)
    assert adapters.bank is not None
    adapters.set_task("b")
    ids = batch["input_ids"][:2]
    with torch.no_grad():
        adapters.bank.log_alpha[0] = -5.0  # a's are closed
        wanted = model.get_encoder()(ids).last_hidden_state
        model(ids, decoder_input_ids=ids, task_ids=torch.tensor([0, 0]))
        assert torch.equal(model.get_encoder()(ids).last_hidden_state, wanted)
        assert model.get_encoder()(ids[:1]).last_hidden_state.shape[0] == 1
        with adapters.disabled():
            assert not torch.equal(model.get_encoder()(ids).last_hidden_state, wanted)


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def test_what_would_lose_adapters_or_mislead_gates_is_refused(tmp_path: Any) -> None:
    model, batch = tiny("bert", head="classification")
    ga.attach(model, "lora-all-linear", batch)
    with pytest.raises(TrainingError, match="a part of this model"):
        ga.GatedTrainer(Outer(model), arguments(tmp_path), train_dataset=labelled([4], [2]))
    args = arguments(tmp_path)
    args.fp16 = True
    with pytest.raises(GatedAdaptersError, match="loss scaling"):
        ga.GatedTrainer(model, args, train_dataset=labelled([4], [2]))
    args = arguments(tmp_path)
    args.mixed_precision = "fp16"  # as `accelerate launch --mixed_precision fp16` sets it
    with pytest.raises(GatedAdaptersError, match="loss scaling"):
        ga.GatedTrainer(model, args, train_dataset=labelled([4], [2]))


def test_a_structure_of_other_tasks_and_detached_adapters_are_refused_and_nothing_changes() -> None:
    model, batch = tiny("bert")
    adapters = ga.attach(model, "lora-all-linear", batch)
    other = ga.attach(tiny("bert")[0], "lora-all-linear", batch, tasks=("a", "b")).discretize()
    with pytest.raises(AttachError, match=r"other tasks[\s\S]*a, b"):
        adapters.compact(other)
    sizes = {name: path.units for name, path in adapters.typed_paths()}
    wanted = adapters.discretize(ga.Budget(fraction=0.2))
    ga.detach(model)
    with pytest.raises(AttachError, match="detached"):
        adapters.compact(wanted)
    assert {name: path.units for name, path in adapters.typed_paths()} == sizes
    assert adapters.structure is None


def test_a_structure_fixed_by_hand_is_the_same_after_loading() -> None:
    def pressed() -> tuple[nn.Module, ga.Adapters]:
        model, batch = tiny("bert")
        return model, ga.attach(model, "lora-all-linear", batch, penalty=ga.Budget(fraction=0.1), total_steps=10)

    (model, adapters), (other, again) = pressed(), pressed()
    adapters.prune(adapters.discretize(ga.Budget(fraction=0.5)))  # larger than what is trained under
    other.load_state_dict(model.state_dict())
    assert adapters.structure is not None
    assert again.structure is not None
    assert again.structure.paths == adapters.structure.paths
    assert again.compact().params == adapters.structure.params
