"""A gated trainer pushes what loads back by name alone, with a card of its own and without its token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from local_hub import OWNER, STRANGER, LocalHub
from recipes import SOON, arguments, continued, gated_causal

import gatedadapters as ga
from gatedadapters.errors import ArtifactError
from gatedadapters.testing import tiny

NAME = "anna/run"


def trainer(folder: Path, **settings: Any) -> Any:
    model = gated_causal()
    model.config.name_or_path = "org/base"
    args = arguments(folder, push_to_hub=True, hub_model_id=NAME, hub_token=OWNER, **settings)
    data = {"train_dataset": continued(40), "eval_dataset": continued(8)}
    return ga.GatedTrainer(model, args, **data, budget=ga.Budget(fraction=0.3), schedule=SOON)


def test_a_training_that_pushes_loads_by_name_with_its_scores_in_the_card_and_no_token_anywhere(
    tmp_path: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")  # the arguments alone have it
    saving = {"save_strategy": "steps", "save_steps": 5, "hub_strategy": "every_save", "hub_always_push": True}
    found = trainer(tmp_path / "run", eval_strategy="steps", eval_steps=5, **saving)
    found.train()
    found.push_to_hub(license="mit")
    card = ModelCard(hub.files(NAME)["README.md"].decode())
    assert card.data.license == "mit"
    assert card.data.base_model == "org/base"
    losses = [logs["eval_loss"] for logs in found.state.log_history if "eval_loss" in logs]
    assert [result.metric_value for result in card.data.eval_results] == [pytest.approx(losses[-1], abs=1e-4)]
    everything = [content for tree in hub.repositories[NAME].commits.values() for content in tree.values()]
    assert len(everything) > 10
    assert not any(OWNER.encode() in content for content in everything)
    model, batch = tiny("llama", head="lm")
    model.eval()
    ga.load_adapters(model, NAME)
    ga.get_adapters(found.model).compact()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, found.model.eval()(**batch).logits)


def test_a_card_that_somebody_wrote_stays(tmp_path: Path, hub: LocalHub) -> None:
    mine = "---\nlicense: mit\n---\n# Mine\n"
    hub.add(NAME, {"README.md": mine})
    found = trainer(tmp_path / "run")
    found.push_to_hub()
    assert hub.files(NAME)["README.md"] == mine.encode()
    assert "structure.json" in hub.files(NAME)


def test_what_cannot_be_pushed_is_refused_before_the_training(
    tmp_path: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("bert/run", {})
    args = arguments(tmp_path, push_to_hub=True, hub_model_id="bert/run", hub_token=OWNER)
    hub.repositories["bert/run"].private = True
    with pytest.raises(ArtifactError, match="you may not write it") as error:
        ga.GatedTrainer(gated_causal(), args, train_dataset=continued(8))
    assert OWNER not in str(error.value)
    assert STRANGER not in str(error.value)
    model = gated_causal()
    model.config.name_or_path = str(tmp_path)
    with pytest.raises(ArtifactError, match="by a folder of this machine") as error:
        ga.GatedTrainer(model, args, train_dataset=continued(8))
    assert "model.config.name_or_path" in str(error.value)
