"""`gated` and `selective` of any Trainer class: what they return, and what they refuse."""

from __future__ import annotations

import pickle
import subprocess
import sys
from abc import ABC
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import SOON, SPACE, arguments, assert_same, gated_classifier, labelled, trained, with_dropout
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

import gatedadapters as ga
from gatedadapters.errors import AttachError, TrainingError
from gatedadapters.testing import tiny
from gatedadapters.testing.backbones import VOCABULARY

BUDGET = ga.Budget(fraction=0.3)


class Counting(Trainer):
    """A Trainer as users write them: with an argument of its own in front."""

    def __init__(self, name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.name, self.losses = name, 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.losses += 1
        return super().compute_loss(*args, **kwargs)


class Abstract(Trainer, ABC):
    """A Trainer with a metaclass."""


@pytest.mark.parametrize("combine", [ga.gated, ga.selective])
@pytest.mark.parametrize("kind", [Trainer, Seq2SeqTrainer, Counting, Abstract])
def test_equal_classes_give_one_class_that_pickles_by_reference(combine: Any, kind: type[Trainer]) -> None:
    made = combine(kind)
    assert combine(kind) is made
    assert made.__name__ == f"{combine.__name__.capitalize()}{kind.__name__}"
    assert issubclass(made, kind)
    assert pickle.loads(pickle.dumps(made)) is made


def test_the_plain_ones_are_gated_and_selective_versions_of_trainer() -> None:
    assert ga.gated(Trainer) is ga.GatedTrainer
    assert ga.selective(Trainer) is ga.SelectiveTrainer


def test_a_pickled_class_is_made_again_in_another_process(tmp_path: Path) -> None:
    (tmp_path / "class.pkl").write_bytes(pickle.dumps(ga.gated(Seq2SeqTrainer)))
    code = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).__mro__[:2])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "class.pkl")], capture_output=True, text=True)
    assert "GatedSeq2SeqTrainer" in done.stdout, done.stderr


@pytest.mark.parametrize("wrong", [int, torch.nn.Linear, "SFTTrainer", TrainingArguments])
def test_what_is_no_trainer_class_is_refused(wrong: Any) -> None:
    with pytest.raises(TrainingError, match=r"no Trainer class(.|\n)*ga.gated\(SFTTrainer\)"):
        ga.gated(wrong)


@pytest.mark.parametrize("kind", [ga.GatedTrainer, ga.SelectiveTrainer])
@pytest.mark.parametrize("combine", [ga.gated, ga.selective])
def test_a_class_is_gated_once(combine: Any, kind: Any) -> None:
    with pytest.raises(TrainingError, match=kind.__name__):
        combine(kind)


def test_a_trainers_own_arguments_and_methods_are_kept(tmp_path: Path) -> None:
    model = gated_classifier()
    trainer = ga.gated(Counting)(
        "mine", model, arguments(tmp_path), train_dataset=labelled([40]), budget=BUDGET, schedule=SOON
    )
    trainer.train()
    assert (trainer.name, trainer.losses) == ("mine", 10)
    structure = ga.get_adapters(model).structure
    assert structure is not None
    assert structure.params <= BUDGET.resolve(ga.get_adapters(model).bank.dense_cost())


def test_any_trainer_trains_what_the_gated_trainer_does(tmp_path: Path) -> None:
    models = []
    for kind, first in ((ga.GatedTrainer, ()), (ga.gated(Counting), ("mine",))):
        models.append(gated_classifier())
        settings = {"train_dataset": labelled([40]), "budget": BUDGET, "schedule": SOON}
        kind(*first, models[-1], arguments(tmp_path), **settings).train()
    assert_same(trained(models[1]), trained(models[0]))


def test_too_many_arguments_and_doubled_ones_are_named(tmp_path: Path) -> None:
    model = gated_classifier()
    with pytest.raises(TypeError, match="multiple values for argument 'model'"):
        ga.GatedTrainer(model, model=model)
    with pytest.raises(TypeError, match="positional arguments too many"):
        ga.GatedTrainer(model, arguments(tmp_path), *range(20))


@pytest.mark.parametrize("model", [None, "HuggingFaceTB/SmolLM2-135M"])
def test_a_model_that_is_not_there_yet_is_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"needs a model with adapters(.|\n)*ga.attach\(model"):
        ga.gated(Counting)("mine", model, arguments(tmp_path))


def test_a_model_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AttachError, match="no adapters"):
        ga.gated(Counting)("mine", tiny("llama", head="lm")[0], arguments(tmp_path))


def test_loss_scaling_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.fp16 = True  # with a GPU the constructor takes it
    with pytest.raises(TrainingError, match=r"loss scaling(.|\n)*GatedCounting|loss scaling(.|\n)*bf16=True"):
        ga.gated(Counting)("mine", gated_classifier(), args)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_reentrant_checkpointing_on_several_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    for option in ("activation_checkpointing", "gradient_checkpointing"):
        settings = {option: True, f"{option}_kwargs": {"use_reentrant": True}}
        with pytest.raises(TrainingError, match=r"re-entrant checkpointing(.|\n)*\"use_reentrant\": False"):
            ga.GatedTrainer(gated_classifier(), arguments(tmp_path, **settings))


def test_a_trainer_whose_penalty_another_one_replaced_does_not_train(tmp_path: Path) -> None:
    model, data = gated_classifier(), labelled([40])
    first = ga.GatedTrainer(model, arguments(tmp_path), train_dataset=data, budget=BUDGET)
    second = ga.gated(Counting)("mine", model, arguments(tmp_path), train_dataset=data, penalty=ga.L0(weight=0.1))
    with pytest.raises(TrainingError, match=r"another gated trainer(.|\n)*GatedCounting that was made after"):
        first.train()
    second.train()
    ga.GatedTrainer(model, arguments(tmp_path), train_dataset=data, budget=BUDGET).train()  # the remedy


def test_one_trainer_after_another_goes_on_with_the_same_gates(tmp_path: Path) -> None:
    model, data = gated_classifier(), labelled([40])
    first = ga.GatedTrainer(model, arguments(tmp_path), train_dataset=data, budget=BUDGET, schedule=SOON)
    first.train()
    structure = ga.get_adapters(model).structure
    ga.gated(Counting)("mine", model, arguments(tmp_path), train_dataset=data).train()
    assert ga.get_adapters(model).structure is structure


def test_a_sequence_to_sequence_trainer_generates_through_the_adapters(tmp_path: Path) -> None:
    model, _ = tiny("t5", head="lm", decoder_start_token_id=0, num_decoder_layers=2)
    ga.attach(with_dropout(model, 0.0), SPACE)
    rows = [
        {"input_ids": row["input_ids"], "attention_mask": row["attention_mask"], "labels": row["input_ids"][:5]}
        for row in labelled([24])
    ]
    args = Seq2SeqTrainingArguments(
        **{name: getattr(arguments(tmp_path), name) for name in ("output_dir", "use_cpu", "report_to")},
        max_steps=10,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        predict_with_generate=True,
        generation_max_length=6,
    )
    trainer = ga.gated(Seq2SeqTrainer)(
        model, args, train_dataset=rows, eval_dataset=rows[:4], budget=BUDGET, schedule=SOON
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    predictions = trainer.predict(rows[:4]).predictions
    assert predictions.shape[0] == 4
    assert (predictions < VOCABULARY).all()
