"""Adapters on the hub: pushed with a card, loaded by name, and refused in plain words."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from local_hub import OWNER, STRANGER, LocalHub
from torch import Tensor, nn

import gatedadapters as ga
from gatedadapters.errors import ArtifactError
from gatedadapters.testing import tiny
from gatedadapters.testing.helpers import stir

NAME = "anna/mood"
FILES = {"structure.json", "adapters.safetensors", "README.md", "structure.png"}


def model_of(base: str | None = "org/base") -> Any:
    model, _ = tiny("llama", head="lm")
    model.config.name_or_path = base or ""
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(**tiny("llama", head="lm")[1]).logits
    return found


@pytest.fixture
def adapters() -> Any:
    """Compact adapters that do something, on a base that is called org/base."""
    model = model_of()
    found = ga.attach(model, "decoder-mixed")
    stir(found, by=0.1, seed=1)
    found.compact()
    return found


def test_a_push_loads_elsewhere_by_name_alone_and_computes_the_same(adapters: Any, hub: LocalHub) -> None:
    address = adapters.push_to_hub(NAME, license="mit")
    assert address.startswith(f"{hub.url}/{NAME}/commit/")
    assert set(hub.files(NAME)) == FILES | {".gitattributes"}
    assert len(hub.repositories[NAME].commits) == 2  # the one that made it, and one for all files
    model = model_of()
    loaded = ga.load_adapters(model, NAME)
    assert torch.equal(logits(model), logits(adapters.model))
    assert loaded.origin.base_model_name_or_path == "org/base"


def test_without_a_network_the_cache_answers(adapters: Any, hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters.push_to_hub(NAME)
    ga.load_adapters(model_of(), NAME)
    hub.log.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = model_of()
    ga.load_adapters(model, NAME)
    assert torch.equal(logits(model), logits(adapters.model))
    with pytest.raises(ArtifactError, match="the hub cannot be reached, and the cache does not hold it"):
        ga.load_adapters(model_of(), "anna/other")
    with pytest.raises(ArtifactError, match="the hub cannot be reached"):
        adapters.push_to_hub(NAME)
    assert not hub.log


def test_a_branch_and_a_commit_are_loaded_by_revision(adapters: Any, hub: LocalHub) -> None:
    adapters.push_to_hub(NAME)
    first = hub.repositories[NAME].branches["main"]
    before = logits(adapters.model)
    with torch.no_grad():
        for parameter in adapters.weight_parameters():
            parameter.add_(0.1)
    adapters.push_to_hub(NAME, revision="newer")
    for revision, expected in ((None, before), (first, before), ("newer", logits(adapters.model))):
        model = model_of()
        ga.load_adapters(model, NAME, revision=revision)
        assert torch.equal(logits(model), expected)
    with pytest.raises(ArtifactError, match="no such revision"):
        ga.load_adapters(model_of(), NAME, revision="gone")


def test_both_files_are_of_one_commit_where_the_branch_moves_meanwhile(
    adapters: Any, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gatedadapters.structure import hub as module

    adapters.push_to_hub(NAME)
    expected = logits(adapters.model)
    download = module.hf_hub_download

    def moved(repository: str, name: str, **options: Any) -> str:
        found = download(repository, name, **options)
        if name == "structure.json":
            hub.add(NAME, {"structure.json": "{}", "adapters.safetensors": b"another"})
        return found

    monkeypatch.setattr(module, "hf_hub_download", moved)
    model = model_of()
    ga.load_adapters(model, NAME)
    assert torch.equal(logits(model), expected)


def test_a_shelf_takes_adapters_from_the_hub(adapters: Any, hub: LocalHub, tmp_path: Path) -> None:
    adapters.push_to_hub(NAME)
    adapters.save(tmp_path / "local")
    model = model_of()
    shelf = ga.Shelf.load(model, {"hub": NAME, "local": tmp_path / "local"})
    assert torch.equal(logits(model), logits(adapters.model))
    shelf.activate("local")
    assert torch.equal(logits(model), logits(adapters.model))


def test_nothing_but_the_two_files_is_fetched(adapters: Any, hub: LocalHub) -> None:
    adapters.push_to_hub(NAME)
    hub.add(NAME, hub.files(NAME) | {"pytorch_model.bin": b"\x80 a pickle", "evil.py": b"1 / 0"})
    hub.log.clear()
    ga.load_adapters(model_of(), NAME)
    fetched = {line.rpartition("/")[2] for line in hub.log}
    assert fetched == {"structure.json", "adapters.safetensors"}


def test_the_uploaded_folder_of_a_run_is_found_inside_its_repository(
    adapters: Any, hub: LocalHub, tmp_path: Path
) -> None:
    adapters.save(tmp_path / "adapter")
    hub.add(NAME, {f"adapter/{file.name}": file.read_bytes() for file in (tmp_path / "adapter").iterdir()})
    model = model_of()
    ga.load_adapters(model, NAME)
    assert torch.equal(logits(model), logits(adapters.model))


# -- the card ----------------------------------------------------------------------------------------------------------


def test_the_card_of_a_push_says_what_the_hub_and_a_reader_need(adapters: Any, hub: LocalHub) -> None:
    adapters.push_to_hub(NAME, license="apache-2.0")
    card = ModelCard(hub.files(NAME)["README.md"].decode())
    data = card.data.to_dict()
    assert data["base_model"] == "org/base"
    assert data["base_model_relation"] == "adapter"
    assert data["library_name"] == "gatedadapters"
    assert data["license"] == "apache-2.0"
    assert data["pipeline_tag"] == "text-generation"
    assert {path.kind for path in adapters.structure.paths} < set(data["tags"])
    assert str(adapters.structure) in card.text
    assert "![" in card.text
    assert hub.files(NAME)["structure.png"].startswith(b"\x89PNG")
    assert f'ga.load("{NAME}")' in card.text


def test_scores_stand_in_the_card_as_the_hub_reads_them(adapters: Any, hub: LocalHub) -> None:
    origin = ga.structure.origin.Origin.of(adapters.model, adapters.tasks)
    scored = origin.tasks[0].model_copy(update={"metrics": {"loss": 1.25, "accuracy": 0.5}})
    adapters.origin = origin.model_copy(update={"tasks": (scored,)})
    adapters.push_to_hub(NAME)
    (found, other) = ModelCard(hub.files(NAME)["README.md"].decode()).data.eval_results
    assert {found.metric_type: found.metric_value, other.metric_type: other.metric_value} == scored.metrics


@pytest.mark.parametrize(("space", "in_peft"), [("lora-all-linear", True), ("decoder-mixed", False)])
def test_the_card_shows_the_way_to_peft_where_peft_can_hold_the_kinds(
    space: str, in_peft: bool, tmp_path: Path
) -> None:
    adapters = ga.attach(model_of(), space)
    kinds = tuple(path for path in adapters.space.paths if path.kind != "weight_lora")
    adapters.detach()
    adapters = ga.attach(model_of(), adapters.space.model_copy(update={"paths": kinds}))
    stir(adapters, by=0.1, seed=1)
    adapters.compact()
    adapters.save(tmp_path / "out")
    assert ("export_peft" in (tmp_path / "out" / "README.md").read_text()) == in_peft
    if in_peft:
        ga.export_peft(adapters, tmp_path / "peft")
    else:
        with pytest.raises(ArtifactError):
            ga.export_peft(adapters, tmp_path / "peft")


def test_the_python_of_a_card_runs(adapters: Any, hub: LocalHub) -> None:
    adapters.push_to_hub(NAME)
    blocks = re.findall(r"```python\n(.*?)```", hub.files(NAME)["README.md"].decode(), re.DOTALL)
    names: dict[str, Any] = {"model": model_of(), "ga": ga}
    exec(blocks[1], names)  # the first loads the base by its name, which this machine does not have
    assert torch.equal(logits(names["model"]), logits(adapters.model))


def test_a_card_that_somebody_edited_is_refused_kept_or_replaced(adapters: Any, hub: LocalHub) -> None:
    adapters.push_to_hub(NAME)
    edited = hub.files(NAME)["README.md"].decode().replace("# anna/mood", "# My model of moods")
    before = hub.add(NAME, hub.files(NAME) | {"README.md": edited.encode()})
    with pytest.raises(ArtifactError, match="a card that somebody wrote or edited"):
        adapters.push_to_hub(NAME)
    assert hub.repositories[NAME].branches["main"] == before
    adapters.push_to_hub(NAME, card="keep", dtype=torch.bfloat16)
    assert hub.files(NAME)["README.md"].decode() == edited
    adapters.push_to_hub(NAME, card="replace")
    assert "# anna/mood" in hub.files(NAME)["README.md"].decode()


def test_a_card_that_holds_a_licence_alone_is_replaced_and_the_licence_stays(adapters: Any, hub: LocalHub) -> None:
    hub.add(NAME, {"README.md": "---\nlicense: mit\n---\n"})
    adapters.push_to_hub(NAME)
    adapters.push_to_hub(NAME)
    assert ModelCard(hub.files(NAME)["README.md"].decode()).data.license == "mit"


def test_a_save_leaves_a_card_that_somebody_wrote(adapters: Any, tmp_path: Path) -> None:
    adapters.save(tmp_path / "out")
    card = tmp_path / "out" / "README.md"
    card.write_text("mine")
    adapters.save(tmp_path / "out", overwrite=True)
    assert card.read_text() == "mine"
    adapters.save(tmp_path / "out", beside=True)
    assert card.read_text() == "mine"
    card.unlink()
    adapters.save(tmp_path / "out", overwrite=True)
    assert ModelCard.load(card).data.license == "unknown"


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_is_not_there_or_private_is_refused_and_no_token_is_shown(
    adapters: Any, hub: LocalHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    adapters.push_to_hub(NAME, private=True)
    ga.load_adapters(model_of(), NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", f"{hub}-empty")
    told = []
    for token in (None, STRANGER, "hf_wrong000000000000"):
        monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
        for name in (NAME, "anna/nothing"):
            with pytest.raises(ArtifactError, match="no such repository, or you may not read it") as error:
                ga.load_adapters(model_of(), name)
            told.append("".join(traceback.format_exception(error.value)))
        with pytest.raises(ArtifactError, match="you may not write it") as error:
            adapters.push_to_hub("anna/mine")
        told.append(str(error.value))
    assert not any(token in text for token in (OWNER, STRANGER, "hf_wrong") for text in [*told, caplog.text])
    assert set(hub.repositories) == {NAME}


def test_a_token_that_no_header_can_hold_is_not_shown(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "geheim-ключ")
    with pytest.raises(ArtifactError) as error:
        ga.load_adapters(model_of(), NAME)
    assert "geheim" not in "".join(traceback.format_exception(error.value))


def test_a_name_that_is_none_and_a_repository_without_adapters_are_refused(hub: LocalHub) -> None:
    hub.add("anna/peft", {"adapter_config.json": "{}"})
    with pytest.raises(ArtifactError, match="holds no saved adapter"):
        ga.load_adapters(model_of(), "anna/peft")
    with pytest.raises(ArtifactError, match="no id of a repository"):
        ga.load_adapters(model_of(), "anna/-mood.", revision="main")


def test_a_path_with_a_mistake_is_not_looked_for_on_the_hub(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match='revision="main"'):
        ga.load_adapters(model_of(), "out/moood")
    with pytest.raises(ArtifactError, match="only repositories on the hub have revisions"):
        ga.load_adapters(model_of(), "out", revision="main")
    assert not hub.log


def test_adapters_that_cannot_be_shared_are_refused_before_anything_is_made(hub: LocalHub, tmp_path: Path) -> None:
    gated = ga.attach(model_of(), "decoder-mixed")
    with pytest.raises(ArtifactError, match="only compact adapters are saved"):
        gated.push_to_hub(NAME)
    model = model_of(str(tmp_path))
    adapters = ga.attach(model, "decoder-mixed")
    adapters.compact()
    with pytest.raises(ArtifactError, match="by a folder of this machine") as error:
        adapters.push_to_hub(NAME)
    assert 'base_model="user/base"' in str(error.value)
    assert not hub.repositories
    adapters.push_to_hub(NAME, base_model="org/base")
    assert str(tmp_path).encode() not in b"".join(hub.files(NAME).values())


def test_a_base_that_differs_from_the_named_one_is_refused_by_its_name(adapters: Any, hub: LocalHub) -> None:
    adapters.push_to_hub(NAME)
    other = model_of()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(ArtifactError, match="load the backbone they were trained on, org/base"):
        ga.load_adapters(other, NAME)


def test_a_commit_that_the_hub_refuses_leaves_the_repository_as_it_was(adapters: Any, hub: LocalHub) -> None:
    adapters.push_to_hub(NAME)
    before = dict(hub.repositories[NAME].branches)
    hub.refuse_commits = True
    with pytest.raises(ArtifactError, match="does not let this repository be written"):
        adapters.push_to_hub(NAME, dtype=torch.bfloat16)
    assert hub.repositories[NAME].branches == before


def test_the_folder_of_a_search_that_is_unfinished_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out" / "tensorboard").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="has not saved an adapter yet"):
        ga.load(tmp_path / "out")
