"""Results of benchmarks: loose files while processes compute, one packed file afterwards, and nothing is lost."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store("study", root=tmp_path)


def test_results_are_loose_until_they_are_packed(store: Store) -> None:
    store.write("b", {"score": 0.5})
    store.write("a", {"score": 0.25})
    assert sorted(file.name for file in store.loose.iterdir()) == ["a.json", "b.json"]
    assert not store.packed.exists()
    assert store.pack() == "study.jsonl: 2 results, 2 of them packed now"
    assert store.packed.read_text().splitlines() == ['{"name":"a","score":0.25}', '{"name":"b","score":0.5}']
    assert not list(store.loose.glob("*.json"))
    assert store.results() == {"a": {"score": 0.25}, "b": {"score": 0.5}}


def test_a_study_that_goes_on_after_packing_repeats_nothing(store: Store) -> None:
    computed: list[str] = []

    def run(name: str) -> dict[str, Any]:
        return store.computed(name, lambda: computed.append(name) or {"score": len(computed)})

    assert run("a") == run("a") == {"score": 1}
    store.pack()
    assert run("a") == Store("study", root=store.root).read("a") == {"score": 1}
    assert run("b") == {"score": 2}
    assert computed == ["a", "b"]
    store.pack()
    assert list(store.results()) == ["a", "b"]
    assert store.pack() == "study.jsonl: 2 results, 0 of them packed now"


def test_a_process_sees_what_another_has_packed(store: Store) -> None:
    other = Store("study", root=store.root)
    other.write("a", {"score": 1})
    assert store.read("b") is None
    other.pack()
    assert store.read("a") == {"score": 1}
    other.write("b", {"score": 2})
    other.pack()
    assert store.read("b") == {"score": 2}


def test_a_result_that_is_measured_anew_replaces_the_packed_one(store: Store) -> None:
    store.write("a", {"score": 1})
    store.pack()
    store.write("a", {"score": 2})
    assert store.read("a") == store.results()["a"] == {"score": 2}
    store.pack()
    assert store.read("a") == {"score": 2}
    assert len(store.packed.read_text().splitlines()) == 1


def test_what_a_summary_leaves_out_is_not_packed(tmp_path: Path) -> None:
    store = Store("study", summary=lambda result: {"score": result["score"]}, root=tmp_path)
    store.write("a", {"score": 1, "report": "long"})
    assert store.read("a") == {"score": 1, "report": "long"}
    store.pack()
    assert store.read("a") == {"score": 1}


def test_changing_what_was_read_changes_nothing_that_is_stored(store: Store) -> None:
    store.write("a", {"score": 1})
    store.pack()
    found = store.read("a")
    assert found is not None
    found["score"] = 2
    assert store.read("a") == {"score": 1}


def _work(root: Path, first: int) -> None:
    store = Store("study", root=root)
    for number in range(first, first + 20):
        store.write(str(number), {"score": number})
        store.pack()


def test_processes_that_pack_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_work, args=(tmp_path, 100 * index)) for index in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = Store("study", root=tmp_path).results()
    assert {name: result["score"] for name, result in found.items()} == {
        str(number): number for index in range(3) for number in range(100 * index, 100 * index + 20)
    }


def test_every_packed_file_of_the_repository_is_sorted_and_small() -> None:
    files = sorted(Store("any").packed.parent.iterdir())
    if not files:
        pytest.skip("a source distribution has no results")
    assert {file.suffix for file in files} == {".jsonl"}
    assert sum(file.stat().st_size for file in files) < 2.5e6
    for file in files:
        names = [json.loads(line)["name"] for line in file.read_text(encoding="utf-8").splitlines()]
        assert names == sorted(set(names)), file.name
