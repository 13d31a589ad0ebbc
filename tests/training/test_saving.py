"""Every folder that a Trainer or an attached model writes, and every upload, loads back with the library's readers."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import SOON, arguments, assert_same, continued, gated_causal, gated_classifier, labelled, trained
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer

import gatedadapters as ga
from gatedadapters.testing import tiny

BUDGET = ga.Budget(fraction=0.3)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    _, batch = tiny("llama", head="lm")
    found: Tensor = model.eval()(**batch).logits
    return found


def causal_trainer(folder: Path, **changes: Any) -> Any:
    model = gated_causal()
    options = {"budget": BUDGET, "schedule": SOON}
    return ga.GatedTrainer(model, arguments(folder, **changes), train_dataset=continued(40), **options)


def loaded(folder: Path, onto: Any = None) -> Any:
    """A fresh model with the adapters of a folder."""
    model = tiny("llama", head="lm")[0] if onto is None else onto
    ga.load_adapters(model, folder)
    return model


class Uploads:
    """Stands in for the hub: it keeps a copy of the files of every upload."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.names = folder, list[str]()

    def upload_folder(self, *, folder_path: str, ignore_patterns: Any = None, **kwargs: Any) -> Any:
        self.keep(Path(folder_path))
        done = Future[None]()
        done.set_result(None)
        return done

    def keep(self, source: Path) -> None:
        self.folder.mkdir(exist_ok=True)
        for file in source.iterdir():
            if file.is_file():
                (self.folder / file.name).write_bytes(file.read_bytes())


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Uploads:
    found = Uploads(tmp_path / "uploaded")
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: found)

    def init_hf_repo(self: Any, **options: Any) -> None:
        self.hub_model_id, self.push_in_progress = "me/mine", None

    monkeypatch.setattr(Trainer, "init_hf_repo", init_hf_repo)
    monkeypatch.setattr(Trainer, "create_model_card", lambda self, **options: None)
    monkeypatch.setattr("gatedadapters.training.trainer.card_of", lambda *args, **options: None)
    return found


@pytest.mark.parametrize("steps", [0, 3, 10], ids=["untrained", "with gates", "pruned"])
def test_a_saved_model_of_a_gated_trainer_computes_what_compact_adapters_would(steps: int, tmp_path: Path) -> None:
    trainer = causal_trainer(tmp_path / "run")
    if steps:
        trainer.add_callback(stop_after(steps))
        trainer.train()
    before = trained(trainer.model)
    trainer.save_model(str(tmp_path / "saved"))
    assert_same(trained(trainer.model), before)
    again = loaded(tmp_path / "saved")
    ga.get_adapters(trainer.model).compact()
    assert ga.get_adapters(again).structure == ga.get_adapters(trainer.model).structure
    assert torch.equal(logits(again), logits(trainer.model))


def stop_after(steps: int) -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= state.global_step >= steps

    return Stop()


def test_every_checkpoint_loads_back_and_still_resumes(tmp_path: Path) -> None:
    causal_trainer(tmp_path, save_strategy="steps", save_steps=4).train()
    for step in (4, 8):
        assert ga.get_adapters(loaded(tmp_path / f"checkpoint-{step}")).structure is not None
    resumed = causal_trainer(tmp_path, save_strategy="steps", save_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 10


def test_a_classifier_of_several_tasks_loads_back_with_its_heads(tmp_path: Path) -> None:
    model = gated_classifier({"a": 3, "b": 2})
    data = labelled([20, 20], [3, 2])
    trainer = ga.GatedTrainer(model, arguments(tmp_path / "run"), train_dataset=data, budget=BUDGET, schedule=SOON)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    ga.get_adapters(model).compact()
    again = gated_classifier({"a": 3, "b": 2})
    ga.detach(again)
    loaded(tmp_path / "saved", again)
    assert_same(trained(again), trained(model))


def test_saving_twice_replaces_the_adapters_and_leaves_other_files(tmp_path: Path) -> None:
    trainer = causal_trainer(tmp_path)
    trainer.save_model()
    (tmp_path / "notes.txt").write_text("mine")
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert ga.get_adapters(loaded(tmp_path)).structure == ga.get_adapters(trainer.model).compacted().structure


def test_an_interrupted_save_leaves_no_artefact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = causal_trainer(tmp_path)
    trainer.save_model()
    moved = []

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == "structure.json":
            raise KeyboardInterrupt
        moved.append(Path(target).name)
        Path(source).rename(target)

    monkeypatch.setattr("gatedadapters.safe_files.os.replace", replace)
    with pytest.raises(KeyboardInterrupt):
        ga.get_adapters(trainer.model).compacted().save(tmp_path, beside=True)
    assert sorted(moved) == ["README.md", "adapters.safetensors"]
    with pytest.raises(ga.errors.ArtifactError, match="not a saved adapter"):
        loaded(tmp_path)


def test_a_push_to_the_hub_uploads_what_loads_back(tmp_path: Path, uploads: Uploads) -> None:
    trainer = causal_trainer(tmp_path / "run")
    trainer.train()
    trainer.push_to_hub()
    model = loaded(uploads.folder)
    ga.get_adapters(trainer.model).compact()
    assert torch.equal(logits(model), logits(trainer.model))


def test_a_selective_trainer_saves_and_uploads_its_delta(tmp_path: Path, uploads: Uploads) -> None:
    trainer = ga.SelectiveTrainer(tuned(), arguments(tmp_path / "run", max_steps=3), train_dataset=continued(12))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    trainer.push_to_hub()
    for folder in (tmp_path / "saved", uploads.folder):
        model, _ = tiny("llama", head="lm")
        ga.load_delta(model, folder)
        assert torch.equal(logits(model), logits(trainer.model))


def test_a_push_at_every_checkpoint_uploads_the_adapters_too(tmp_path: Path, uploads: Uploads) -> None:
    settings = {"save_strategy": "steps", "save_steps": 8, "push_to_hub": True, "hub_model_id": "me/mine"}
    trainer = causal_trainer(tmp_path / "run", **settings, hub_strategy="every_save", hub_always_push=True)
    trainer.train()
    assert ga.get_adapters(loaded(uploads.folder)).structure == ga.get_adapters(trainer.model).structure


def tuned() -> Any:
    """A tiny Llama of which a sparse delta tunes some elements."""
    model, _ = tiny("llama", head="lm")
    names = [name for name, _ in model.named_parameters() if "mlp" in name]
    ga.apply_mask(model, ga.Mask.build(model, {name: torch.arange(0, 100, 7) for name in names}))
    return model


def test_save_pretrained_writes_a_backbone_and_adapters_that_load_onto_it(tmp_path: Path) -> None:
    trainer = causal_trainer(tmp_path / "run")
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "saved")
    again = loaded(tmp_path / "saved", AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    ga.get_adapters(trainer.model).compact()
    assert torch.equal(logits(again), logits(trainer.model))


def test_a_plain_trainer_writes_adapters_that_load_back_and_resumes_its_own(tmp_path: Path) -> None:
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    model = gated_causal()
    Trainer(model, args, train_dataset=continued(16)).train()
    ga.get_adapters(model).compact()
    assert torch.equal(logits(loaded(tmp_path / "checkpoint-4")), logits(model))
    resumed = gated_causal()
    Trainer(resumed, args, train_dataset=continued(16)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    ga.get_adapters(resumed).compact()
    torch.testing.assert_close(logits(resumed), logits(model), rtol=1e-4, atol=1e-5)


def test_pushing_a_model_uploads_its_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = gated_causal(), Uploads(tmp_path / "uploaded")

    def push(self: Any, repo_id: str, **options: Any) -> None:
        self.save_pretrained(tmp_path / "scratch")
        found.names.append(repo_id)
        found.keep(tmp_path / "scratch")

    monkeypatch.setattr(PreTrainedModel, "push_to_hub", push)
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, private=True)
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/other")
    assert found.names == ["mine", "me/other"]
    loaded(found.folder)


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    gated_causal().save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved" / "structure.json").exists()


def test_merged_adapters_warn_of_where_they_are(tmp_path: Path) -> None:
    model = gated_causal()
    adapters = ga.get_adapters(model)
    adapters.compact()
    adapters.merge()
    with pytest.warns(UserWarning, match=r"adapters.unmerge\(\) before saving"):
        model.save_pretrained(tmp_path / "merged")
    adapters.unmerge()
    model.save_pretrained(tmp_path / "unmerged")
    loaded(tmp_path / "unmerged")


def test_adapters_beside_a_delta_warn_of_how_both_are_saved(tmp_path: Path) -> None:
    model = tuned()
    adapters = ga.attach(model, "decoder-mixed")
    adapters.compact()
    with pytest.warns(UserWarning, match="ga.save_joint"):
        model.save_pretrained(tmp_path / "model")
    ga.save_joint(model, tmp_path / "both")
    ga.load_joint(tiny("llama", head="lm")[0], tmp_path / "both")


def test_a_gated_trainer_with_a_delta_writes_both(tmp_path: Path) -> None:
    model = tuned()
    ga.attach(model, "decoder-mixed")
    options = {"penalty": BUDGET, "schedule": SOON}
    trainer = ga.GatedTrainer(model, arguments(tmp_path), train_dataset=continued(40), **options)
    trainer.train()
    trainer.save_model()
    again, _ = tiny("llama", head="lm")
    ga.load_joint(again, tmp_path)
    ga.get_adapters(model).compact()
    torch.testing.assert_close(logits(again), logits(model))


def test_copies_and_detached_models_save_what_is_theirs(tmp_path: Path) -> None:
    model = gated_causal()
    for number, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            for parameter in ga.get_adapters(twin).weight_parameters():
                parameter.add_(0.1 + number)
        twin.save_pretrained(tmp_path / str(number))
        again = loaded(tmp_path / str(number))
        ga.get_adapters(twin).compact()
        assert torch.equal(logits(again), logits(twin))
    ga.detach(model)
    model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "structure.json").exists()
    assert "save_pretrained" not in vars(model)
