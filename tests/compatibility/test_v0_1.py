"""What release 0.1 wrote is read by this one, gives what it gave there, and can be gone on with.

`write.py` made the folder `v0.1`; `cases.py` builds the models again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    CLASSES,
    EXPERTS,
    RUNS,
    STREAMS,
    STUDIES,
    TASK_IDS,
    chosen,
    classifier,
    decoder,
    encoder,
    logits,
    outcome,
    shallow,
    stream,
    study,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

import gatedadapters as ga
from gatedadapters.config import ContinualConfig, SearchConfig, SelectConfig, StudyConfig, TransferConfig

STORED = Path(__file__).parent / "v0.1"
EXPECTED = load_file(STORED / "expected.safetensors")


def assert_as_expected(name: str, found: Tensor, *, atol: float = 1e-5) -> None:
    """Up to what another processor or release of torch may round otherwise."""
    torch.testing.assert_close(found, EXPECTED[name], rtol=10 * atol, atol=atol)


def assert_same_bits(model: nn.Module, fresh: nn.Module) -> None:
    found, wanted = model.state_dict(), fresh.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def kept(structure: ga.Structure) -> dict[str, Any]:
    """Units by task, of each path."""
    return {path.key: path.units for path in structure.paths}


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a stored folder or file, to go on in."""

    def copy(name: str) -> Path:
        source, target = STORED / name, tmp_path / "stored" / Path(name).name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        return target

    return copy


def test_the_artefacts_are_those_of_the_release_and_stay_small() -> None:
    on = json.loads((STORED / "release.json").read_text(encoding="utf-8"))
    assert on["gatedadapters"].startswith("0.1.")
    assert sum(path.stat().st_size for path in STORED.rglob("*")) < 1_000_000


# -- adapters ----------------------------------------------------------------------------------------------------------

MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "one-task": (encoder, {}),
    "bfloat16": (encoder, {}),
    "updated-base": (lambda: encoder(seed=1), {}),
    "several-tasks": (classifier, {"task_ids": TASK_IDS}),
    "one-of-several": (classifier, {"task_ids": torch.full_like(TASK_IDS, list(CLASSES).index("topic"))}),
    **{family: (lambda family=family: shallow(family, "lm"), {}) for family in EXPERTS},
}


@pytest.mark.parametrize("name", MODELS)
def test_adapters_compute_what_they_did_and_come_off(name: str) -> None:
    build, more = MODELS[name]
    model = build()
    adapters = ga.load_adapters(model, STORED / "adapters" / name)
    assert_as_expected(f"adapters/{name}", logits(model, **more))
    assert sum(p.numel() for p in adapters.weight_parameters()) > 0
    adapters.detach()
    heads = [name for name, _ in model.named_parameters() if name.startswith(("classifier", "heads"))]
    fresh = build()
    fresh.load_state_dict({name: model.get_parameter(name) for name in heads}, strict=False)  # what they learned stays
    assert_same_bits(model, fresh)


def test_adapters_train_on(tmp_path: Path) -> None:
    model = encoder()
    adapters = ga.load_adapters(model, STORED / "adapters" / "one-task")
    before = [p.detach().clone() for p in adapters.weight_parameters()]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        learning_rate=1e-2,
    )
    rows = [{"input_ids": list(range(3 + i, 9 + i)), "attention_mask": [1] * 6, "labels": i % 2} for i in range(8)]
    ga.GatedTrainer(model, args, train_dataset=rows).train()
    assert any(not torch.equal(p, old) for p, old in zip(adapters.weight_parameters(), before, strict=True))
    assert all(bool(p.isfinite().all()) for p in adapters.weight_parameters())


def test_adapters_that_were_carried_to_an_updated_base_know_where_they_come_from() -> None:
    folder = STORED / "adapters"
    first, carried = (ga.Structure.load(folder / name) for name in ("one-task", "updated-base"))
    assert carried.lineage == (first.fingerprint,)
    assert kept(carried) == kept(first)
    model = encoder(seed=1)
    ga.load_adapters(model, folder / "one-task", base="updated")
    assert_as_expected("adapters/updated-base", logits(model))


def test_a_structure_alone_is_read_written_and_attached_untrained() -> None:
    structure = ga.Structure.load(STORED / "adapters" / "structure.json")
    assert ga.Structure.from_json(structure.to_json()) == structure
    assert structure.tasks == tuple(CLASSES)
    assert structure.budget == ga.Budget(fraction=0.4)
    model = classifier()
    adapters = ga.attach(model, structure)
    routing = sum(len(path.kept) * len(structure.tasks) for path in structure.paths)
    assert sum(p.numel() for p in adapters.weight_parameters()) + routing == structure.params
    assert torch.equal(logits(model, task_ids=TASK_IDS), logits(classifier(), task_ids=TASK_IDS))


def test_a_shelf_serves_each_alone_and_mixed() -> None:
    model = decoder()
    shelf = ga.Shelf.load(model, {name: STORED / "shelf" / name for name in CLASSES})
    for name in CLASSES:
        with shelf.using(name):
            assert_as_expected(f"shelf/{name}", logits(model))
    assert_as_expected("shelf/mixed", logits(model, adapter_names=["topic", None, "mood", "topic"]))


def test_an_export_to_peft_is_imported() -> None:
    model = decoder()
    ga.import_peft(model, STORED / "peft")
    assert_as_expected("peft", logits(model), atol=1e-4)  # gates turn B A into its singular directions


# -- masks -------------------------------------------------------------------------------------------------------------


def test_a_mask_is_the_set_that_was_saved() -> None:
    model = decoder()
    assert ga.Mask.load(STORED / "masks" / "own") == ga.Mask.build(model, chosen(model))


def test_scores_are_read_and_select_what_they_did() -> None:
    general, domain = (ga.Scores.load(STORED / "masks" / name) for name in ("general", "domain"))
    assert_as_expected("scores/taylor", torch.cat([general[name].flatten() for name in general.names]), atol=0)
    selected = ga.Mask.load(STORED / "masks" / "selected")
    assert ga.select(general, domain, density=0.1) == selected
    assert ga.apply_mask(decoder(), selected).params == selected.count()


@pytest.mark.parametrize("name", ["float32", "bfloat16", "with-head"])
def test_a_delta_computes_what_it_did_and_comes_off(name: str) -> None:
    build = encoder if name == "with-head" else decoder
    model = build()
    delta = ga.load_delta(model, STORED / "deltas" / name)
    assert_as_expected(f"delta/{name}", logits(model))
    delta.remove()
    fresh = build()
    if name == "with-head":  # what it learned stays
        fresh.classifier.load_state_dict(model.classifier.state_dict())
    assert_same_bits(model, fresh)


def test_adapters_and_delta_of_one_artefact_compute_what_they_did() -> None:
    model = decoder()
    adapters, delta = ga.load_joint(model, STORED / "deltas" / "joint")
    assert_as_expected("delta/joint", logits(model))
    delta.remove()
    adapters.detach()
    assert_same_bits(model, decoder())


# -- what can be gone on with ------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Counts the steps that are taken, and keeps what training starts from."""

    steps = 0

    def on_train_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.start = {name: value.clone() for name, value in model.state_dict().items()}

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps += 1


@pytest.mark.parametrize(
    "place", sorted(str(path.relative_to(STORED / "checkpoints")) for path in STORED.glob("checkpoints/*/checkpoint-*"))
)
def test_a_training_goes_on_and_ends_where_the_whole_one_did(place: str, tmp_path: Path) -> None:
    name, at = Path(place).parent.name, int(place.rpartition("-")[2])
    torch.manual_seed(1)  # what a new process starts from
    trainer, watch = RUNS[name](tmp_path), Watch()
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=str(STORED / "checkpoints" / place))
    assert watch.steps == 10 - at
    assert_as_expected(f"checkpoints/{name}", outcome(name, trainer.model), atol=1e-3)
    if name != "selective":
        stored = load_file(STORED / "checkpoints" / place / "model.safetensors")
        old, new = "gated_adapters.bank.evidence", "gated_adapters.bank.saliency"
        assert stored[old].count_nonzero() > 0
        assert torch.equal(watch.start[new].cpu(), stored[old])
        assert kept(trainer.adapters.compact()) == kept(ga.Structure.load(STORED / "checkpoints" / name))


def expect_states(result: Any, model: nn.Module, kind: str) -> None:
    """Of every state of a stream the logits that it had."""
    if kind == "per_task":
        shelf = result.shelf(model)
        for index, task in enumerate(CLASSES):
            with shelf.using(task):
                found = logits(model, task_ids=torch.full_like(TASK_IDS, index))
                assert_as_expected(
                    f"streams/{kind}/{task}", found, atol=5e-3
                )  # gates now start from a probe, ranks learn at 1 / sqrt(r)
        return
    for state in (1, 0, len(CLASSES)):
        result.restore(model, state)
        assert_as_expected(f"streams/{kind}/{state}", logits(model, task_ids=TASK_IDS), atol=1e-3)


@pytest.mark.parametrize("kind", STREAMS)
def test_a_finished_stream_is_read_and_every_state_of_it_restored(
    kind: str, copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = copied(f"streams/{kind}"), classifier()
    monkeypatch.setattr("transformers.Trainer.train", None)  # nothing is trained again
    result = stream(model, kind, folder)
    assert result.matrix == ga.StreamResult.load(folder).matrix
    assert_as_expected(f"streams/{kind}/scores", torch.tensor(result.matrix), atol=1e-6)
    expect_states(result, model, kind)


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_that_was_stopped_goes_on(kind: str, copied: Callable[[str], Path]) -> None:
    folder, model = copied(f"streams/{kind}"), classifier()
    first = (folder / "stages" / "000" / "stage.json").read_bytes()
    shutil.rmtree(folder / "stages" / "001")
    result = stream(model, kind, folder)
    assert (folder / "stages" / "000" / "stage.json").read_bytes() == first
    expect_states(result, model, kind)


@pytest.mark.parametrize("kind", STUDIES)
def test_a_study_goes_on_with_what_is_missing(kind: str, copied: Callable[[str], Path], tmp_path: Path) -> None:
    found = study(kind, copied(f"studies/{kind}.journal"))
    before = torch.tensor([trial.values for trial in found.trials], dtype=torch.float64)
    assert_as_expected(f"studies/{kind}", before, atol=0)
    found.run()
    values = torch.tensor([trial.values for trial in found.trials], dtype=torch.float64)
    assert torch.equal(values[: len(before)], before)
    config = found.config
    assert len(values) == (config.trials if kind == "optimise" else 12)  # 3 values, 2 sides, 2 seeds
    assert found.report(tmp_path / "report").exists()


# -- configurations ----------------------------------------------------------------------------------------------------

KINDS: dict[str, Any] = {
    "search": SearchConfig,
    "select": SelectConfig,
    "continual": ContinualConfig,
    "transfer": TransferConfig,
    "study": StudyConfig,
}


@pytest.mark.filterwarnings("ignore:SelectionConfig:FutureWarning")
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore:TaskConfig. file will not be read any more:FutureWarning")
def test_every_field_of_a_configuration_is_still_known(name: str) -> None:
    found = KINDS[name].load(STORED / "configurations" / f"{name}.yaml")
    assert (found.search if name == "study" else found).model == "nowhere"
