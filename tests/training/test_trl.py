"""TRL's own trainers, gated and selective: they train what they should, and keep no second model."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import KNOWN, backbone, completions, conversations, gated_model, preferences, tokenizer
from recipes import SOON, SPACE, Watch, assert_same, trained
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import gatedadapters as ga
from gatedadapters.errors import TrainingError

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

BUDGET = ga.Budget(fraction=0.3)
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL calls what transformers has renamed
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),  # TRL's reference, re-entrant
]


@pytest.fixture(autouse=True)
def _no_progress_bars() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def settings(kind: Any, folder: Path, **changes: Any) -> Any:
    """Ten quick, quiet steps on the CPU, in fp32."""
    plain: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    return kind(**(plain | changes))


def rows(examples: list[dict[str, Any]]) -> Any:
    return datasets.Dataset.from_list(examples)


def sft(
    folder: Path, data: Any = None, *, model: Any = None, kind: Any = None, options: Any = None, **changes: Any
) -> Any:
    """A gated SFTTrainer on the questions."""
    own = {"budget": BUDGET, "schedule": SOON} if options is None else options
    return (kind or ga.gated(trl.SFTTrainer))(
        gated_model() if model is None else model,
        settings(trl.SFTConfig, folder, **changes),
        train_dataset=rows(completions() if data is None else data),
        processing_class=tokenizer(),
        **own,
    )


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def check_searched(trainer: Any, before: dict[str, torch.Tensor]) -> None:
    """A structure within the budget was found, its paths have learned, and the backbone has not moved."""
    adapters = ga.get_adapters(trainer.model)
    assert adapters.structure is not None
    assert 0 < adapters.structure.params <= BUDGET.resolve(adapters.bank.dense_cost())
    assert any(bool(path.up.any()) for _, path in adapters.typed_paths())
    for name, value in before.items():
        assert torch.equal(trainer.model.state_dict()[name], value), name


MODES: dict[str, dict[str, Any]] = {
    "completions": {},
    "whole texts": {"completion_only_loss": False},
    "packed": {"packing": True, "max_length": 32},
    "packed and wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 32},
    "chats": {"data": conversations()},
    "answers of chats": {"data": conversations(), "assistant_only_loss": True},
    "bf16": {"bf16": True},
    "checkpointed": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "checkpointed, re-entrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
}


@pytest.mark.parametrize("mode", MODES)
def test_supervised_fine_tuning_searches_in_every_mode(mode: str, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in backbone().state_dict().items()}
    trainer = sft(tmp_path, **MODES[mode])
    assert type(trainer).__name__ == "GatedSFTTrainer"
    trainer.train()
    check_searched(trainer, before)
    found = losses(trainer)
    assert sum(found[-3:]) < sum(found[:3])
    assert "gates/open_paths" in trainer.state.log_history[0]


@pytest.mark.parametrize("mode", ["completions", "packed", "checkpointed"])
def test_a_probe_leaves_no_trace_in_what_the_trainer_counts(mode: str, tmp_path: Path) -> None:
    trainer = sft(tmp_path, max_steps=32, **MODES[mode])
    learn = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if name not in learn}
    trainer._start_gates()
    assert trainer.placement is not None
    assert trainer._metrics == {"train": {}, "eval": {}}
    assert trainer._total_train_tokens == 0
    assert before
    assert all(torch.equal(value, trainer.model.get_parameter(name)) for name, value in before.items())


def test_checkpointing_changes_nothing_in_either_mode(tmp_path: Path) -> None:
    states = []
    for mode in ("completions", "checkpointed", "checkpointed, re-entrant"):
        trainer = sft(tmp_path, **MODES[mode])
        trainer.train()
        states.append((losses(trainer), trained(trainer.model)))
    for found, state in states[1:]:
        assert found == pytest.approx(states[0][0], rel=1e-5)
        assert_same(state, states[0][1], rtol=1e-4, atol=1e-5)


def test_micro_batches_of_unequal_length_give_one_batchs_gradients(tmp_path: Path) -> None:
    def gradients(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    seen = []
    for batch, pieces in ((8, 1), (4, 2), (2, 4)):
        changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": pieces, "optim": "sgd"}
        trainer = sft(tmp_path, conversations(), **changes, max_steps=4, max_grad_norm=0.0)
        watch = Watch(gradients)
        trainer.add_callback(watch)
        trainer.train()
        seen.append((watch.seen, ga.get_adapters(trainer.model).structure))
    for steps, structure in seen[1:]:
        assert structure == seen[0][1]
        for here, there in zip(steps, seen[0][0], strict=True):
            assert_same(here, there, rtol=1e-5, atol=1e-5)


def test_the_loss_is_that_of_the_answers_alone(tmp_path: Path) -> None:
    trainer = sft(tmp_path, completions(4), max_steps=1, options={})
    with torch.no_grad():
        texts = [tokenizer()(row["prompt"] + row["completion"] + "[EOS]")["input_ids"] for row in completions(4)]
        ids = torch.tensor(texts)
        logits = backbone()(input_ids=ids).logits
        answers = slice(len(tokenizer()(completions(1)[0]["prompt"])["input_ids"]), None)
        expected = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")[:, answers.start - 1 :]
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(float(expected.mean()), rel=1e-4)


def test_what_was_searched_loads_back_answers_alike_and_resumes(tmp_path: Path) -> None:
    changes = {"max_steps": 20, "learning_rate": 3e-2}
    trainer = sft(tmp_path / "run", **changes, save_strategy="steps", save_steps=10)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    resumed = sft(tmp_path / "run", **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))
    assert_same(trained(resumed.model), trained(trainer.model), rtol=1e-4, atol=1e-5)
    model = backbone()
    ga.load_adapters(model, tmp_path / "saved")
    ga.get_adapters(trainer.model).compact()
    prompt = torch.tensor([tokenizer()(completions(1)[0]["prompt"])["input_ids"]])
    answers = [m.eval().generate(input_ids=prompt, max_new_tokens=6, do_sample=False) for m in (model, trainer.model)]
    assert torch.equal(*answers)
    assert not torch.equal(answers[0], backbone().generate(input_ids=prompt, max_new_tokens=6, do_sample=False))


def test_the_fused_head_stays_connected_where_every_gate_was_drawn_0(tmp_path: Path) -> None:
    trainer = sft(tmp_path, options={"penalty": ga.L0(weight=0.1), "schedule": ga.Schedule(prune=None)}, max_steps=3)
    adapters = ga.get_adapters(trainer.model)
    with torch.no_grad():
        adapters.bank.log_alpha.fill_(adapters.bank.config.bounds[0])
    closed = Watch(lambda model, optimizer: not any(adapters.bank.open_paths.values()))
    trainer.add_callback(closed)
    trainer.train()
    assert any(closed.seen)


# -- what must not go wrong silently -----------------------------------------------------------------------------------


def test_a_plain_trainer_with_a_budget_stops(tmp_path: Path) -> None:
    model = gated_model()
    ga.get_adapters(model).set_penalty(BUDGET, schedule=SOON, total_steps=10)
    with pytest.raises(TrainingError, match=r"in no loss(.|\n)*ga.gated"):
        sft(tmp_path, model=model, kind=trl.SFTTrainer, options={}).train()


def test_peft_is_refused_by_the_gated_trainer_and_by_the_plain_one(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(TrainingError, match=r"trained alone(.|\n)*GatedSFTTrainer\(peft_config=\)"):
        sft(tmp_path, options={"peft_config": config})
    trainer = sft(tmp_path, kind=trl.SFTTrainer, options={"peft_config": config})
    with pytest.raises(TrainingError, match=r"trained alone(.|\n)*leave peft_config out"):
        trainer.train()


def test_loss_scaling_is_refused(tmp_path: Path) -> None:
    args = settings(trl.SFTConfig, tmp_path)
    args.fp16 = True
    with pytest.raises(TrainingError, match=r"loss scaling(.|\n)*bf16=True"):
        ga.gated(trl.SFTTrainer)(gated_model(), args, train_dataset=rows(completions()), processing_class=tokenizer())


def test_candidates_at_an_output_layer_that_is_not_called_are_refused(tmp_path: Path) -> None:
    space = ga.SearchSpace.parse(
        {"paths": [{"kind": "lora", "rank": 2, "at": {"sublayers": ["outside"]}}]}, where="a test"
    )
    model = gated_model(space=space)
    with pytest.raises(TrainingError, match=r"output layer's weight(.|\n)*lm_head"):
        sft(tmp_path, model=model, options={"penalty": ga.L0(weight=0.1)})


def test_adapters_beside_a_quantised_backbone_stay_as_precise_as_they_were(tmp_path: Path) -> None:
    model = gated_model()
    model.is_loaded_in_4bit = True  # TRL rounds what is trained to bf16 then
    before = {name: value.clone() for name, value in ga.get_adapters(model).named_parameters()}
    sft(tmp_path, model=model)
    assert_same(dict(ga.get_adapters(model).named_parameters()), before)
    assert {parameter.dtype for parameter in ga.get_adapters(model).parameters()} == {torch.float32}


@pytest.mark.parametrize("bits", [4, 8])
def test_supervised_fine_tuning_searches_over_few_bits(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    backbone().save_pretrained(tmp_path / "base")
    few = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=few)
    ga.attach(model, SPACE)
    before = {name: value.clone() for name, value in model.state_dict().items() if "gated_adapters" not in name}
    trainer = ga.gated(trl.SFTTrainer)(
        model,
        settings(trl.SFTConfig, tmp_path / "out", eval_strategy="steps", eval_steps=4),  # bitsandbytes repacks weights
        train_dataset=rows(completions()),
        eval_dataset=rows(completions(2)),
        processing_class=tokenizer(),
        budget=BUDGET,
        schedule=SOON,
    )
    trainer.train()
    check_searched(trainer, before)
    trainer.save_model(str(tmp_path / "found"))
    original = backbone()
    ga.load_adapters(original, tmp_path / "found")
    assert sum(losses(trainer)[-3:]) < sum(losses(trainer)[:3])


# -- reference models --------------------------------------------------------------------------------------------------


def models_alive() -> int:
    gc.collect()
    return sum(isinstance(found, PreTrainedModel) for found in gc.get_objects())


def dpo(folder: Path, *, given: Any = None, **changes: Any) -> Any:
    return ga.gated(trl.DPOTrainer)(
        gated_model(),
        given,
        settings(trl.DPOConfig, folder, learning_rate=3e-2, **changes),
        train_dataset=rows(preferences()),
        processing_class=tokenizer(),
        budget=BUDGET,
        schedule=SOON,
    )


@pytest.fixture
def no_second_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a second model is loaded")

    for module in ("dpo_trainer", "kto_trainer", "grpo_trainer", "rloo_trainer"):
        monkeypatch.setattr(f"trl.trainer.{module}.create_model_from_path", refuse)


@pytest.mark.usefixtures("no_second_model")
@pytest.mark.parametrize("precomputed", [False, True])
def test_preferences_are_compared_with_the_same_model_without_adapters(precomputed: bool, tmp_path: Path) -> None:
    before = models_alive()
    trainer = dpo(tmp_path, precompute_ref_log_probs=precomputed)
    held = models_alive() - before
    trainer.train()
    check_searched(trainer, {name: value.clone() for name, value in backbone().state_dict().items()})
    with_copy = dpo(tmp_path, given=backbone())
    assert held < models_alive() - before - held
    assert sum(parameter.numel() for parameter in trainer.ref_model.parameters()) == 0
    with_copy.train()
    assert losses(trainer) == pytest.approx(losses(with_copy), rel=1e-5)
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.005


def test_scores_that_are_kept_on_disk_are_those_of_the_backbone(tmp_path: Path) -> None:
    """TRL keeps precomputed scores under a digest of the reference's weights."""
    from trl.trainer.dpo_trainer import hash_module

    first, second = dpo(tmp_path), dpo(tmp_path)
    with torch.no_grad():
        for parameter in ga.get_adapters(second.model).weight_parameters():
            parameter.add_(1.0)
    assert hash_module(first.ref_model) == hash_module(second.ref_model) == hash_module(backbone())
    with torch.no_grad():
        second.model.lm_head.weight.add_(1.0)
    assert hash_module(second.ref_model) != hash_module(first.ref_model)


def test_a_reference_of_the_users_own_is_used(tmp_path: Path) -> None:
    own = backbone(seed=1)
    assert dpo(tmp_path, given=own).ref_model is own


def test_a_reference_that_would_have_to_move_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"sync_ref_model"):
        dpo(tmp_path, sync_ref_model=True)


@pytest.mark.usefixtures("no_second_model")
def test_unpaired_preferences_are_compared_the_same_way(tmp_path: Path) -> None:
    data = [
        {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
        for row in preferences(12)
        for kind in ("chosen", "rejected")
    ]
    trainer = ga.gated(trl.KTOTrainer)(
        gated_model(),
        args=settings(trl.KTOConfig, tmp_path),
        train_dataset=rows(data),
        processing_class=tokenizer(),
        budget=BUDGET,
        schedule=SOON,
    )
    trainer.train()
    check_searched(trainer, {})


@pytest.mark.usefixtures("no_second_model")
@pytest.mark.parametrize(
    ("kind", "beta"), [("GRPO", 0.0), ("GRPO", 0.1), ("RLOO", 0.1)], ids=["grpo", "grpo with a reference", "rloo"]
)
def test_rewards_are_earned_by_the_gates_that_are_then_trained(kind: str, beta: float, tmp_path: Path) -> None:
    model = gated_model()
    bank = ga.get_adapters(model).bank
    drawn: list[tuple[int, torch.Tensor]] = []

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        drawn.append((int(bank.step), bank.noise.clone()))
        return [float(text.split().count("blue")) for text in completions]

    config = settings(
        getattr(trl, f"{kind}Config"), tmp_path, beta=beta, num_generations=4, max_completion_length=6, max_steps=8
    )
    trainer = ga.gated(getattr(trl, f"{kind}Trainer"))(
        model, reward, config, train_dataset=rows(completions()), processing_class=tokenizer(), budget=BUDGET,
        schedule=SOON,
    )  # fmt: skip
    watch = Watch(lambda model, optimizer: (int(bank.step), bank.noise.clone()))
    trainer.add_callback(watch)
    assert (trainer.beta, trainer.args.beta) == (beta, beta)
    assert (trainer.ref_model is not None) == (beta > 0)
    ids = torch.tensor([[4, 5, 6]])
    path = next(iter(ga.get_adapters(model).typed_paths()))[1]
    with torch.no_grad():
        path.up.add_(0.1)
        if beta:  # the reference does not see what the adapters do
            torch.testing.assert_close(trainer.ref_model(input_ids=ids).logits, backbone()(input_ids=ids).logits)
            assert not torch.equal(model(input_ids=ids).logits, trainer.ref_model(input_ids=ids).logits)
    trainer.train()
    check_searched(trainer, {})
    assert len(drawn) == len(watch.seen) == 8
    for (step, noise), (trained_step, trained_noise) in zip(drawn, watch.seen, strict=True):
        assert step == trained_step
        assert torch.equal(noise, trained_noise)
    kls = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert any(kls) == (beta > 0)


# -- rewards and sparse deltas -----------------------------------------------------------------------------------------


def test_a_reward_model_learns_with_its_head_and_loads_back(tmp_path: Path) -> None:
    trainer = ga.gated(trl.RewardTrainer)(
        gated_model("classification", num_labels=1),
        settings(trl.RewardConfig, tmp_path, gradient_accumulation_steps=2),
        train_dataset=rows(preferences()),
        processing_class=tokenizer(),
        budget=BUDGET,
        schedule=SOON,
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    check_searched(trainer, {})
    trainer.save_model()
    model = backbone("classification", num_labels=1)
    ga.load_adapters(model, tmp_path)
    ids = torch.arange(4, 10)[None]
    ga.get_adapters(trainer.model).compact()
    assert torch.equal(model.eval()(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


def test_supervised_fine_tuning_of_selected_elements(tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in backbone().state_dict().items()}
    general = [{"prompt": "red is", "completion": f" {word} ."} for word in list(KNOWN)[4:16]]
    trainer = ga.selective(trl.SFTTrainer)(
        backbone(),
        settings(trl.SFTConfig, tmp_path, learning_rate=3e-2),
        train_dataset=rows(completions()),
        eval_dataset=rows(completions(3)),
        general_dataset=rows(general),
        general_eval_dataset=rows(general[:4]),
        processing_class=tokenizer(),
        selection=ga.SelectionConfig(protect=0.9, batches=2, batch_size=4),
    )
    trainer.train()
    report = trainer.report()
    assert report.after["domain"] < report.before["domain"]
    assert set(report.before) == {"domain", "general"}
    mask = trainer.delta.mask
    for name, value in before.items():
        if name in mask.names:
            moved = (trainer.model.state_dict()[name] != value).sum()
            assert moved <= mask.count(name), name
    trainer.save_model()
    model = backbone()
    ga.load_delta(model, tmp_path)
    assert_same(
        {name: value for name, value in model.state_dict().items() if name in before},
        {name: value for name, value in trainer.model.state_dict().items() if name in before},
    )
