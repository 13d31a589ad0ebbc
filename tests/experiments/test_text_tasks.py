"""Texts, conversations and choices in every run: what is learned, how it is scored, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_runs import CHATML, chat_tokenizer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import gatedadapters as ga
from gatedadapters import experiments
from gatedadapters.cli.main import main
from gatedadapters.config import (
    CompressConfig,
    ContinualConfig,
    CorruptionConfig,
    SearchConfig,
    SelectConfig,
    TaskConfig,
    TransferConfig,
)
from gatedadapters.continual.measures import token_scores
from gatedadapters.data import LanguageCollator, LanguageDataset, load_task, register_measure
from gatedadapters.data import measures as measures_by_name
from gatedadapters.errors import ConfigError, DataError, GatedAdaptersError
from gatedadapters.experiments.evaluation import TaskScore, score_tasks
from gatedadapters.experiments.task_models import build_model, check_packing, load_tasks
from gatedadapters.studies.objective import measure
from gatedadapters.testing import tiny

TRAINING = {"steps": 8, "batch_size": 4, "max_length": 64, "learning_rate": 0.01, "precision": "fp32", "device": "cpu"}
CHAT = {"train": "chat.jsonl", "kind": "chat", "packing": True, "measures": ["exact_match"]}
QUESTIONS = {"train": "questions.csv", "text": "question", "answer": "answer"}
CHOICES = {"train": "choices.jsonl", "choices": "options"}
STORY = {"train": "story.txt"}
LABELS = {"name": "labels", "train": "questions.csv", "kind": "choice", "text": "question", "label": "answer"}


@pytest.fixture
def search(texts: Path, chat_decoder: Path) -> Callable[..., Path]:
    """Writes search.yaml beside the texts; takes what is to differ."""

    def write(*tasks: dict[str, Any], **changes: Any) -> Path:
        data = {
            "model": str(chat_decoder),
            "tasks": list(tasks or (CHAT, QUESTIONS)),
            "space": "lora-all-linear",
            "budget": {"fraction": 0.25},
            "training": TRAINING,
        }
        file = texts / "search.yaml"
        file.write_text(yaml.safe_dump(data | changes))
        return file

    return write


@pytest.fixture
def nothing_stays_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures_by_name, "_MEASURES", {})


def test_one_search_from_the_command_line_learns_tasks_of_different_kinds(
    search: Callable[..., Path], texts: Path, chat_decoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = search(CHAT, QUESTIONS, CHOICES, STORY, LABELS, compare=["uniform"])
    assert main(["search", str(file), "--out", str(texts / "out")]) == 0
    printed = capsys.readouterr().out
    assert "Loss per token on test data" in printed
    for part in ("chat loss", "mean loss", "chat exact match", "choices accuracy", "the base model", "used by story"):
        assert part in printed
    data = json.loads((texts / "out" / "metrics.json").read_text())
    searched, uniform = data["arms"]
    names = ["chat", "questions", "choices", "story", "labels"]
    assert [list(scores) for scores in (searched["scores"], data["base"])] == [names, names]
    for name in names:
        assert searched["scores"][name]["loss"] < data["base"][name]["loss"]
    assert uniform["params"] <= searched["params"]
    assert ga.Structure.load(texts / "out" / "adapter").tasks == tuple(names)

    model = AutoModelForCausalLM.from_pretrained(chat_decoder, dtype=torch.float32)
    tasks = [load_task(task, 0) for task in SearchConfig.load(file).tasks]
    ga.load_adapters(model, texts / "out" / "adapter")
    again = score_tasks(model, tasks, AutoTokenizer.from_pretrained(chat_decoder), 64)
    assert {name: score.loss for name, score in again.items()} == pytest.approx(
        {name: score["loss"] for name, score in searched["scores"].items()}, rel=1e-4
    )


def test_the_loss_is_that_of_a_token_and_an_exact_match_is_what_generation_gives() -> None:
    """Against transformers' `generate` and a loss that is summed by hand."""
    model, _ = tiny("llama", head="lm")
    model.eval()
    prompts = torch.randint(4, 40, (4, 6), generator=torch.Generator().manual_seed(0))
    given = model.generate(input_ids=prompts, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    items = []
    for row, ids in enumerate(given.tolist()):
        if row % 2:
            ids[-1] = (ids[-1] + 1) % 40  # the last token is another than the likeliest
        cut = ids[: len(ids) - row // 2]  # of two lengths, so that some are padded
        items.append({"input_ids": cut, "attention_mask": [1] * len(cut), "labels": [-100] * 6 + cut[6:]})
    loss, exact = token_scores(model, items, LanguageCollator(chat_tokenizer()))
    matches = [
        item["input_ids"][6:] == given[row, 6 : len(item["input_ids"])].tolist() for row, item in enumerate(items)
    ]
    assert exact == sum(matches) / 4
    total, count = 0.0, 0
    with torch.no_grad():
        for item in items:
            ids = torch.tensor([item["input_ids"]])
            total += float(F.cross_entropy(model(ids).logits[0, 5:-1], ids[0, 6:], reduction="sum"))
            count += ids.shape[1] - 6
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_the_loss_of_choices_is_that_of_the_right_ones_as_answers(texts: Path, chat_decoder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(chat_decoder), AutoTokenizer.from_pretrained(chat_decoder)
    texts.joinpath("long.jsonl").write_text(  # answers of different lengths
        "\n".join(
            json.dumps({"text": f"the cat {n}", "options": ["runs", "sleeps and runs", "today"], "label": n % 3})
            for n in range(12)
        )
    )
    task = load_task(TaskConfig(train=str(texts / "long.jsonl"), choices="options"))
    answers = LanguageDataset(task.split("test") + task.split("train"), tokenizer, 64)
    whole = replace(task, test=task.split("test") + task.split("train"))
    loss, _ = token_scores(model.eval(), [answers[i] for i in range(len(answers))], LanguageCollator(tokenizer))
    assert score_tasks(model, [whole], tokenizer, 64)["long"].loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.usefixtures("nothing_stays_registered")
def test_a_measure_of_ones_own_sees_the_gates_of_its_task(search: Callable[..., Path], texts: Path) -> None:
    seen: list[tuple[str | None, int]] = []

    @register_measure("words")
    def words(model: Any, tokenizer: Any, examples: Any) -> float:
        adapters = getattr(model, "gated_adapters", None)
        seen.append((None if adapters is None else adapters.tasks[adapters._task], len(examples)))
        prompt = tokenizer("what does the dog", return_tensors="pt")
        made = model.generate(**prompt, max_new_tokens=2, do_sample=False, pad_token_id=0)
        return float(made.shape[1] - prompt["input_ids"].shape[1])

    asked = [{**task, "measures": ["words"]} for task in (CHAT, QUESTIONS)]
    result = experiments.search(search(*asked), out=texts / "out")
    assert result.arms[0].scores["chat"].measures == {"words": pytest.approx(2, abs=1)}
    assert {task for task, _ in seen} == {None, "chat", "questions"}
    assert "questions words" in result.table()
    with pytest.raises(ConfigError, match="library's own"):
        register_measure("loss")


@pytest.mark.parametrize(
    ("tasks", "named"),
    [
        (
            [STORY, {"name": "mood", "train": "questions.csv", "text": "question", "label": "answer"}],
            "kind: choice for",
        ),
        ([{**CHOICES, "measures": ["exact_match"]}], "no answers to match"),
        ([{**STORY, "measures": ["exact_match"]}], "no answers to match"),
        ([{**CHAT, "measures": ["bleu"]}], r"(?s)no such measure.*exact_match.*register_measure"),
        ([{"bundled": "tweets", "measures": ["exact_match"]}], "classification has its own measure"),
        ([CHAT, CHAT], "distinct names"),
    ],
)
def test_tasks_that_cannot_be_learned_together_or_measured_are_refused(
    tasks: list[dict[str, Any]], named: str, search: Callable[..., Path], texts: Path
) -> None:
    with pytest.raises(GatedAdaptersError, match=named):
        experiments.search(search(*tasks), out=texts / "out")
    assert not (texts / "out").exists()


def test_models_and_tokenizers_that_do_not_fit_are_refused(
    search: Callable[..., Path], texts: Path, chat_decoder: Path, encoder: Path
) -> None:
    def run(model: Path, *tasks: dict[str, Any]) -> None:
        config = SearchConfig.load(search(*tasks, model=str(model)))
        build_model(config, load_tasks(config))

    with pytest.raises(ConfigError, match=r"(?s)for causal language models.*BertModel.*kind: classification"):
        run(encoder, STORY)
    folder = texts / "model"
    LlamaForCausalLM.from_pretrained(chat_decoder).save_pretrained(folder)
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["meow"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match=rf"(?s)tokens that the model does not know.*{len(tokenizer) - 1} for 'meow'"):
        run(folder, STORY)
    tokenizer = chat_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"(?s)cannot pad.*neither.*tokenizer\.pad_token"):
        run(folder, STORY)
    tokenizer.eos_token = "</s>"
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    run(folder, STORY)  # pads with what ends a text
    config = SearchConfig.load(search(CHAT, model=str(folder)))
    with pytest.raises(DataError, match="no chat template"):
        experiments.search(config, out=texts / "out")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    short = config.training.model_copy(update={"max_length": 9})
    with pytest.raises(DataError, match=r"(?s)cuts every answer off.*max_length"):
        experiments.search(config.model_copy(update={"training": short}), out=texts / "out")


def test_a_model_that_lets_packed_conversations_see_each_other_is_refused() -> None:
    for family in ("llama", "qwen3", "gpt_neox"):
        check_packing(tiny(family, head="lm")[0], family)
    with pytest.raises(ConfigError, match=r"(?s)see each other.*packing: false"):
        check_packing(tiny("mamba", head="lm")[0], "mamba")


def test_a_study_scores_the_loss_also_of_a_whole_model_and_under_perturbation(search: Callable[..., Path]) -> None:
    config = SearchConfig.load(search(CHAT | {"packing": False}, CHOICES, noise={"kind": "label", "ratio": 0.5}))
    reported: list[float] = []
    typos = CorruptionConfig(kind="typos", ratio=0.5)
    found = {
        side: measure(config, side, [typos], split="validation", report=lambda _, value: reported.append(value))
        for side in ("gated", "full")
    }
    for measured in found.values():
        assert measured.scores.keys() == measured.perturbed[0].keys() == {"chat", "choices"}
        assert all(value > 1 for value in measured.scores.values())  # losses, not shares
        assert measured.scores != measured.perturbed[0]
    assert found["full"].params > found["gated"].params
    assert reported
    assert all(value > 1 for value in reported)


def test_a_transfer_recovers_losses(texts: Path, chat_decoder: Path) -> None:
    config = TransferConfig.parse(
        {
            "model": str(chat_decoder),
            "update": str(chat_decoder),
            "tasks": [CHAT | {"train": str(texts / "chat.jsonl")}, QUESTIONS | {"train": str(texts / "questions.csv")}],
            "seeds": [0],
            "training": TRAINING | {"steps": 2},
        },
        where="test",
    )
    result = experiments.transfer(config, out=texts / "out")
    (scores,) = result.report.scores
    assert result.report.lower_is_better
    assert "Loss per token" in str(result)
    assert scores.direct == scores.old == scores.retuned > 1
    better = [replace(scores, direct=3.0 + s, trained_direct=2.5 + s, retuned=2.0 + s) for s in (0.0, 0.01, 0.02)]
    recovery = ga.transfer.TransferReport(tuple(better), lower_is_better=True).recovery
    assert recovery.value == pytest.approx(0.5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks by the old name
def test_a_lora_of_a_language_model_is_compressed_on_conversations(texts: Path, chat_decoder: Path) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(chat_decoder, dtype=torch.float32)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    wrapped.save_pretrained(texts / "lora")
    data = {
        "lora": str(texts / "lora"),
        "budget": {"fraction": 0.5},
        "task": CHAT | {"train": str(texts / "chat.jsonl")},
        "training": TRAINING,
    }
    result = experiments.compress(CompressConfig.parse(data, where="test"), out=texts / "out")
    assert isinstance(result.base, TaskScore)
    assert result.compressed.structure.params <= result.given.structure.params / 2
    assert result.compressed.loss < result.given.loss
    assert "the base model" in result.table()
    base = AutoModelForCausalLM.from_pretrained(chat_decoder, dtype=torch.float32)
    smaller = peft.PeftModel.from_pretrained(base, texts / "out" / "peft")
    (task,) = load_tasks(SearchConfig.parse({"model": "m", "tasks": [data["task"]]}, where="test"))
    scores = score_tasks(smaller, [task], AutoTokenizer.from_pretrained(chat_decoder), 64)
    assert scores["chat"].loss == pytest.approx(result.compressed.loss, rel=1e-4)
    table = {"train": str(texts / "questions.csv"), "text": "question", "label": "answer"}
    for changes, named in (({"task": table}, "another kind of task"), ({"classes": ["a", "b"]}, "only a classifier")):
        with pytest.raises(ConfigError, match=named):
            experiments.compress(CompressConfig.parse(data | changes, where="test"), out=texts / "other")


def test_a_selection_and_a_stream_read_the_same_tasks(texts: Path, chat_decoder: Path) -> None:
    def at(task: dict[str, Any]) -> dict[str, Any]:
        return task | {"train": str(texts / task["train"])}

    training = {"steps": 2, "batch_size": 4, "max_length": 64, "learning_rate": 0.01, "device": "cpu"}
    data: dict[str, Any] = {"model": str(chat_decoder), "training": training}
    selection = SelectConfig.parse(
        data | {"general": at(CHOICES), "domain": at(CHAT), "selection": {"batches": 1}}, where="test"
    )
    assert experiments.select(selection, out=texts / "tuned").report.after.keys() == {"domain", "general"}
    table = TaskConfig(train=str(texts / "questions.csv"), text="question", label="answer")
    with pytest.raises(ConfigError, match=r"(?s)not learned in tokens.*kind: choice"):
        experiments.select(selection.model_copy(update={"domain": table}), out=texts / "other")

    tasks = [at(CHAT) | {"measures": []}, at(QUESTIONS), at(CHOICES), at(STORY)]
    stream = ContinualConfig.parse(
        data | {"tasks": tasks, "strategy": "sequential", "general": at(LABELS)}, where="test"
    )
    (found,) = experiments.continual(stream, out=texts / "stream").streams["sequential"]
    scores = [*found.baseline.scores, *found.matrix[-1]]
    assert all(0 <= score <= 1 for score in scores)
    assert found.matrix[-1][0] > found.baseline.scores[0] > 0  # the probability of a token, which training raises
    mixed = ContinualConfig.parse(data | {"tasks": [at(CHAT), table], "strategy": "sequential"}, where="test")
    with pytest.raises(ConfigError, match=r"(?s)do not mix with labelled tables.*questions.*kind: choice"):
        experiments.continual(mixed, out=texts / "other")
